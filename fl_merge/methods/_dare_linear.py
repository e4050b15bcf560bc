from fl_merge.hyperparameters import Density, Scale
from fl_merge.method import merge_method
from fl_merge.shapes import Coordinate
from fl_merge.stages import KeepRandom, Stages


@merge_method(paper="Yu et al., 2023, arXiv:2311.03099", identity={"density": 1.0})
def dare_linear(*, density: Density = 0.5, scale: Scale = 1.0, rescale: bool = True) -> Coordinate:
    """Keep each element of each delta by chance, divide by the chance, and take the weighted sum.

    theta = theta_0 + scale * sum w_i m_i tau_i / density,  m_i = 1 with probability density, else 0

    The expected result is the one without dropping. The draws are a function of (seed, round, client id, tensor name,
    element), so a result can be had again and does not depend on who else took part.

    Args:
        density: probability that an element is kept, in (0, 1].
        scale: multiplies the merged delta.
        rescale: if false, kept elements are not divided by `density`.

    mergekit rescales the kept elements to the delta's L1 norm instead, which is not unbiased.
    """

    return Stages(KeepRandom(density, rescale), scale=scale).coordinate()
