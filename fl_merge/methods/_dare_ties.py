from collections.abc import Mapping

from fl_merge.hyperparameters import Density, Scale
from fl_merge.method import merge_method
from fl_merge.ops.consensus import Election
from fl_merge.shapes import Coordinate
from fl_merge.stages import KeepRandom, Rescale, Stages


@merge_method(paper="Yu et al., 2023, arXiv:2311.03099", identity={"density": 1.0}, additive=True, passes="1")
def dare_ties(
    *,
    density: Density | Mapping[str, Density] = 0.5,
    scale: Scale = 1.0,
    rescale: Rescale = True,
    normalize: bool = True,
    election: Election = "total",
) -> Coordinate:
    """Keep each element of each delta by chance, then elect signs and average as TIES does.

    The dropping of `dare_linear`, then steps 2 and 3 of `ties`.

    Args:
        density: probability that an element is kept, in (0, 1]; for all clients or by client id.
        scale: multiplies the merged delta.
        rescale: whether kept elements are divided by `density`; "l1": rescaled to the L1 norm, see `dare_linear`.
        normalize: if false, the last step is the sum without the division.
        election: "total": by weighted sum; "frequency": by the number of clients.

    The mean over the clients that kept an element, and not over all, is already larger by about 1 / density where few
    kept it: with `rescale` the merged delta comes out larger than without dropping, as in the paper's own combination.
    """

    return Stages(KeepRandom(density, rescale), election, normalize, scale).coordinate()
