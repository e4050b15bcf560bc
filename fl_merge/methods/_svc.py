from typing import Annotated

from torch import Tensor

from fl_merge.hyperparameters import Range, Scale
from fl_merge.method import merge_method
from fl_merge.ops.combine import by_share
from fl_merge.ops.spectral import calibrated
from fl_merge.shapes import Matrix


@merge_method(paper="Li et al., 2026, arXiv:2602.05536", identity=None)
def svc(
    *,
    floor: Annotated[float, Range(0.0, 1e6, open_low=True)] = 1.0,
    scale: Scale = 1.0,
    weighted: bool = False,
) -> Matrix:
    """Sum the deltas and lower the singular values that several clients' deltas have added up in.

    sum tau_i = U S V^T;  s_i = <u^T sum tau, u^T tau_i> / ||u^T tau_i||^2 for each direction u
    S <- S * N / sum_i max(floor, s_i);  theta = theta_0 + scale * U S V^T

    A direction that one client alone has keeps its value, one that all have alike is averaged. Tensors with fewer than
    two dimensions are averaged; convolution kernels are taken as (out, rest).

    Args:
        floor: the least that a client counts with, > 0 (the paper's alpha); larger lowers more.
        scale: multiplies the merged delta.
        weighted: multiply each delta by N times the client's share first; if false, shares count in averages only.

    One client, or several identical ones, give that client at a floor of at most 1, to rounding: the product with the
    singular vectors is not exact. The paper calibrates what any linear merge gives; here it is the sum.
    """

    def merged(deltas_NRC: Tensor, weights_N: Tensor) -> Tensor:
        deltas_NRC = by_share(deltas_NRC, weights_N) if weighted else deltas_NRC
        return scale * calibrated(deltas_NRC, floor)

    return Matrix(merged)
