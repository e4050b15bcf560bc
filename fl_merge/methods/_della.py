from collections.abc import Mapping

from fl_merge.hyperparameters import Density, Scale
from fl_merge.method import merge_method
from fl_merge.methods._della_linear import Epsilon, check_spread
from fl_merge.ops.consensus import Election
from fl_merge.shapes import Coordinate
from fl_merge.stages import KeepRanked, Rescale, Stages


@merge_method(paper="Deep et al., 2024, arXiv:2406.11617", identity={"density": 1.0}, additive=True, passes="1")
def della(
    *,
    density: Density | Mapping[str, Density] = 0.5,
    epsilon: Epsilon = 0.2,
    scale: Scale = 1.0,
    rescale: Rescale = True,
    normalize: bool = True,
    election: Election = "total",
) -> Coordinate:
    """Keep each element by chance, larger ones more likely, then elect signs and average as TIES does.

    The dropping of `della_linear`, then steps 2 and 3 of `ties`.

    Args:
        density: mean probability that an element is kept, in (0, 1]; for all clients or by client id.
        epsilon: how far the probabilities are apart, in [0, 1], so that all of them are in (0, 1].
        scale: multiplies the merged delta.
        rescale: whether kept elements are divided by their probabilities; "l1": rescaled to the L1 norm instead.
        normalize: if false, the last step is the sum without the division.
        election: "total": by weighted sum; "frequency": by the number of clients.

    mergekit's `epsilon` is half of this one; it cannot merge rows of one element (0 / 0).
    """
    check_spread("della", density, epsilon)
    return Stages(KeepRanked(density, epsilon, rescale), election, normalize, scale).coordinate()
