from torch import Tensor

from fl_merge.hyperparameters import Scale
from fl_merge.method import merge_method
from fl_merge.ops.combine import by_share
from fl_merge.ops.spectral import isotropic
from fl_merge.shapes import Matrix


@merge_method(paper="Marczak et al., 2025, arXiv:2502.04959", identity=None, additive=True)
def iso_c(*, scale: Scale = 1.0, weighted: bool = False) -> Matrix:
    """Sum the deltas and give every singular direction of the sum the same strength.

    sum tau_i = U S V^T;  theta = theta_0 + scale * mean(S) U V^T

    Tensors with fewer than two dimensions are averaged; convolution kernels are taken as (out, rest).

    Args:
        scale: multiplies the merged delta.
        weighted: multiply each delta by N times the client's share first; if false, shares count in averages only.

    It does not give back one client: also a single delta gets all its singular values replaced by their mean.
    The authors' code takes the mean over min(rows, columns) values and raises also those that are zero but for
    rounding, whose directions are then random. Here directions below rounding stay 0, and the mean runs over the
    others: the sum of the singular values does not change. For matrices of full rank both are the same.
    """

    def merged(deltas_NRC: Tensor, weights_N: Tensor) -> Tensor:
        deltas_NRC = by_share(deltas_NRC, weights_N) if weighted else deltas_NRC
        return scale * isotropic(deltas_NRC.sum(dim=0))

    return Matrix(merged)
