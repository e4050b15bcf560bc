from torch import Tensor

from fl_merge.method import merge_method
from fl_merge.ops.order import median as median_of
from fl_merge.shapes import Coordinate, Elements, Slice


@merge_method(paper="Yin et al., 2018, arXiv:1803.01498", base=False)
def median() -> Coordinate:
    """Take the median over the clients, element by element; of an even number the mean of the two in the middle.

    theta = median_i theta_i = theta_0 + median_i tau_i

    Fewer than half of the clients cannot take an element beyond what the others have. The shares of examples play no
    part: a client says itself how many it has. Flower's FedMedian is the same.
    """

    def combine(deltas_NS: Tensor, weights_N: Tensor, at: Slice) -> Tensor:
        return median_of(deltas_NS)

    return Coordinate(combine, stages=Elements("median"))
