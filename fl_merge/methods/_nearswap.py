from typing import Annotated

from torch import Tensor

from fl_merge.hyperparameters import Range
from fl_merge.method import merge_method
from fl_merge.ops.combine import weighted_sum
from fl_merge.shapes import Coordinate, Slice


@merge_method(
    paper="alchemonaut, 2024, QuartetAnemoi-70B-t0.0001; mergekit: Goddard et al., 2024, arXiv:2403.13257",
    identity={"t": 1e30},
    additive=True,
)
def nearswap(*, t: Annotated[float, Range(0.0, open_low=True)] = 1e-3) -> Coordinate:
    """Take over what a client changed a little, and of large changes no more than a threshold.

    theta = theta_0 + sum w_i clip(tau_i, -t, t), element by element

    It is written as an interpolation, (1 - m) theta_0 + m theta_i with m = min(1, t / |tau_i|), which is the same.

    Args:
        t: the largest change of an element, > 0, in units of the weights.

    mergekit takes one model beside the base; more clients are averaged here, each clipped for itself. Below t = 1e-6
    mergekit takes less of elements that moved by less than 1e-6.
    """
    return Coordinate(lambda deltas_NS, weights_N, at: _clipped_sum(deltas_NS, weights_N, at, t))


def _clipped_sum(deltas_NS: Tensor, weights_N: Tensor, at: Slice, t: float) -> Tensor:
    return weighted_sum(deltas_NS.clamp(-t, t), weights_N)
