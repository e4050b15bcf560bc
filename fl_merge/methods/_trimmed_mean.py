import math
from typing import Annotated

from torch import Tensor

from fl_merge.hyperparameters import Range
from fl_merge.method import Clients, merge_method
from fl_merge.ops.order import trimmed_mean as mean_without_ends
from fl_merge.shapes import Coordinate, Elements, Slice


def _enough(beta: float) -> Clients:
    if beta == 0:
        return Clients()
    fewest = max(1, math.floor(1 / beta) - 1)
    while int(beta * fewest) == 0:
        fewest += 1
    return Clients(fewest, why=f"of fewer, int({beta:g} * N) are left out at either end: nobody")


@merge_method(paper="Yin et al., 2018, arXiv:1803.01498", identity={"beta": 0.0}, base=False, clients=_enough)
def trimmed_mean(*, beta: Annotated[float, Range(0.0, math.nextafter(0.5, 0.0))] = 0.2) -> Coordinate:
    """Average without the smallest and the largest values, element by element.

    theta = theta_0 + mean of tau_i without the int(beta * N) smallest and as many largest

    It stands up to int(beta * N) bad clients. The shares of examples play no part: a client says itself how many it
    has. With beta 0 it is the plain mean. One client cannot be trimmed: it is refused unless beta is 0.

    Args:
        beta: fraction that is left out at either end, in [0, 0.5).

    Raises:
        MergeError: if beta is above 0 and the cohort so small that nobody would be left out.

    Flower's FedTrimmedAvg is the same, but takes cohorts of which it leaves out nobody.
    """

    def left(clients: int) -> int:
        return clients - 2 * int(beta * clients)

    def combine(deltas_NS: Tensor, weights_N: Tensor, at: Slice) -> Tensor:
        return mean_without_ends(deltas_NS, int(beta * len(deltas_NS)))

    return Coordinate(combine, stages=Elements("trimmed_mean", count=left))
