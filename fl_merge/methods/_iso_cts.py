from typing import Annotated

from torch import Tensor

from fl_merge.hyperparameters import Range, Scale
from fl_merge.method import merge_method
from fl_merge.ops.combine import by_share
from fl_merge.ops.spectral import isotropic_common_and_specific
from fl_merge.shapes import Matrix


@merge_method(paper="Marczak et al., 2025, arXiv:2502.04959", identity=None)
def iso_cts(*, common: Annotated[float, Range(0.0, 1.0)] = 0.8, scale: Scale = 1.0, weighted: bool = False) -> Matrix:
    """Give equal strength to the summed delta's main directions and to some of each client's own.

    1. U_k, V_k: the top k of the r = min(rows, columns) singular directions of sum tau_i, k about common * r
    2. U_i, V_i: the top (r - k) / N directions of tau_i - U_k U_k^T tau_i
    3. U = polar([U_k U_1 .. U_N]), V likewise, s the mean of all their values
    4. theta = theta_0 + scale * s U V^T

    Tensors with fewer than two dimensions are averaged; convolution kernels are taken as (out, rest).

    Args:
        common: fraction of the directions that is taken from the sum, in [0, 1]; at 1 this is `iso_c`.
        scale: multiplies the merged delta.
        weighted: multiply each delta by N times the client's share first; if false, shares count in averages only.

    It does not give back one client, as `iso_c` does not. Directions below rounding are left out. Where
    (1 - common) * r is less than N, no client gets a direction of its own.
    """

    def merged(deltas_NRC: Tensor, weights_N: Tensor) -> Tensor:
        deltas_NRC = by_share(deltas_NRC, weights_N) if weighted else deltas_NRC
        return scale * isotropic_common_and_specific(deltas_NRC, common)

    return Matrix(merged)
