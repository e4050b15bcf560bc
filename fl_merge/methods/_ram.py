from typing import Annotated

from torch import Tensor

from fl_merge.hyperparameters import Range, Scale
from fl_merge.method import merge_method
from fl_merge.ops.combine import weighted_sum
from fl_merge.shapes import Coordinate, Slice


@merge_method(paper="Yuan et al., 2026, arXiv:2601.13572", identity={"epsilon": 0.0}, additive=True)
def ram(*, epsilon: Annotated[float, Range(0.0)] = 1e-5, scale: Scale = 1.0) -> Coordinate:
    """Average each element over the clients that changed it: what one client alone changed is kept whole.

    theta = theta_0 + scale * sum w_i tau_i / sum w_i, both over the clients with |tau_i| > epsilon; 0 without any

    Meant for sparse deltas, such as those of reinforcement learning, which an average over all clients dilutes.

    Args:
        epsilon: a change of at most this is none, >= 0, in units of the weights.
        scale: multiplies the merged delta.

    mergekit's `ram` is the case of equal weights. The paper's RAM+, which enlarges what one client alone changed
    (mergekit's `ramplus_tl`), is not done here.
    """

    def combine(deltas_NS: Tensor, weights_N: Tensor, at: Slice) -> Tensor:
        changed_NS = (deltas_NS.abs() > epsilon).to(deltas_NS.dtype)
        share_S = weighted_sum(changed_NS, weights_N)
        total_S = weighted_sum(deltas_NS * changed_NS, weights_N)
        return scale * (total_S / share_S.masked_fill(share_S == 0, 1.0))

    return Coordinate(combine)
