from collections.abc import Mapping

from fl_merge.hyperparameters import Density, Scale
from fl_merge.method import merge_method
from fl_merge.shapes import Coordinate
from fl_merge.stages import KeepRandom, Rescale, Stages


@merge_method(paper="Yu et al., 2023, arXiv:2311.03099", identity={"density": 1.0}, additive=True, passes="1")
def dare_linear(
    *, density: Density | Mapping[str, Density] = 0.5, scale: Scale = 1.0, rescale: Rescale = True
) -> Coordinate:
    """Keep each element of each delta by chance, divide by the chance, and take the weighted sum.

    theta = theta_0 + scale * sum w_i m_i tau_i / density,  m_i = 1 with probability density, else 0

    The expected result is the one without dropping. The draws are a function of (seed, round, client id, tensor name,
    element), so a result can be had again and does not depend on who else took part.

    Args:
        density: probability that an element is kept, in (0, 1]; for all clients or by client id.
        scale: multiplies the merged delta.
        rescale: if false, kept elements are not divided by `density`; "l1": what is kept of a delta is rescaled to the
            whole one's L1 norm instead, as mergekit does (not unbiased).
    """

    return Stages(KeepRandom(density, rescale), scale=scale).coordinate()
