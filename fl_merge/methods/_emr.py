from torch import Tensor

from fl_merge.hyperparameters import Scale
from fl_merge.method import merge_method
from fl_merge.ops.masks import unified_delta
from fl_merge.shapes import Coordinate, Elements, Slice


@merge_method(paper="Huang et al., 2024, arXiv:2405.17461")
def emr(*, scale: Scale = 1.0) -> Coordinate:
    """Take the largest magnitude among the deltas that have the sign of the sum: EMR-Merging's unified delta.

    s = sign(sum tau_i);  theta = theta_0 + scale * s * max over i of max(s tau_i, 0)

    The paper gives each client this delta under a mask and times a factor of its own: `fl_merge.personal.emr` makes
    these. The unified delta by itself is one model for all. The clients' shares of examples play no part.

    Args:
        scale: multiplies the merged delta.
    """

    def combine(deltas_NS: Tensor, weights_N: Tensor, at: Slice) -> Tensor:
        return scale * unified_delta(deltas_NS)

    return Coordinate(combine, stages=Elements("unified", scale=scale))
