from torch import Tensor

from fl_merge.hyperparameters import Scale
from fl_merge.method import merge_method
from fl_merge.ops.masks import largest_delta
from fl_merge.shapes import Coordinate, Elements, Slice


@merge_method(paper="Marczak et al., 2024, arXiv:2407.06322", identity={"scale": 1.0})
def magmax(*, scale: Scale = 0.5) -> Coordinate:
    """Take, for each element, the delta of largest magnitude.

    theta = theta_0 + scale * tau_k,  k = argmax_i |tau_i|, the first client among equal ones

    The clients' shares of examples play no part.

    Args:
        scale: multiplies the merged delta; the paper takes 0.5.
    """

    def combine(deltas_NS: Tensor, weights_N: Tensor, at: Slice) -> Tensor:
        return scale * largest_delta(deltas_NS)

    return Coordinate(combine, stages=Elements("largest", scale=scale))
