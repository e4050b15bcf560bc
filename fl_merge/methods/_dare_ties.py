from torch import Tensor

from fl_merge.hyperparameters import Density, Scale
from fl_merge.method import merge_method
from fl_merge.ops.combine import disjoint_mean, disjoint_sum
from fl_merge.ops.consensus import Election, elect_sign, settle_draws
from fl_merge.ops.sparsify import keep_random
from fl_merge.shapes import Coordinate, Slice


@merge_method(paper="Yu et al., 2023, arXiv:2311.03099", identity={"density": 1.0})
def dare_ties(
    *,
    density: Density = 0.5,
    scale: Scale = 1.0,
    rescale: bool = True,
    normalize: bool = True,
    election: Election = "total",
) -> Coordinate:
    """Keep each element of each delta by chance, then elect signs and average as TIES does.

    The dropping of `dare_linear`, then steps 2 and 3 of `ties`.

    Args:
        density: probability that an element is kept, in (0, 1].
        scale: multiplies the merged delta.
        rescale: whether kept elements are divided by `density`.
        normalize: if false, the last step is the sum without the division.
        election: "total": by weighted sum; "frequency": by the number of clients.

    The mean over the clients that kept an element, and not over all, is already larger by about 1 / density where few
    kept it: with `rescale` the merged delta comes out larger than without dropping, as in the paper's own combination.
    """

    def kept(deltas_NS: Tensor, at: Slice) -> Tensor:
        return keep_random(deltas_NS, at.uniform_NS(), density, rescale=rescale)

    def elected(deltas_NS: Tensor, weights_N: Tensor, at: Slice) -> Tensor:
        return elect_sign(kept(deltas_NS, at), weights_N, election)

    def combine(deltas_NS: Tensor, weights_N: Tensor, at: Slice) -> Tensor:
        kept_NS = kept(deltas_NS, at)
        sign_S = settle_draws(elect_sign(kept_NS, weights_N, election), at.tally)
        return scale * (disjoint_mean if normalize else disjoint_sum)(kept_NS, weights_N, sign_S)

    return Coordinate(combine, tally=elected)
