from typing import Annotated

import torch
from torch import Tensor

from fl_merge.hyperparameters import Range, Scale
from fl_merge.method import merge_method
from fl_merge.ops.spectral import least_interference
from fl_merge.shapes import Matrix


@merge_method(paper="Cheng et al., 2025, arXiv:2503.08099", additive=True)
def wudi(*, ridge: Annotated[float, Range(0.0, 1e6)] = 0.01, scale: Scale = 1.0, weighted: bool = False) -> Matrix:
    """Take the delta that interferes least with each client's, on the inputs that its own delta responds to.

    min over M of  sum ||(M - tau_i) tau_i^T||_F^2 / ||tau_i||_F^2.  Its gradient is zero at
    M = (sum tau_i S_i) (sum S_i)^-1,  S_i = tau_i^T tau_i / ||tau_i||_F^2;  theta = theta_0 + scale * M

    There is no scale to tune. Both sums are sums over clients. Tensors with fewer than two dimensions are averaged;
    convolution kernels are taken as (out, rest).

    Args:
        ridge: >= 0, pulls M toward the average with this fraction of the mean of the diagonal of sum S_i. It decides
            in directions in which no delta says much; 0 still adds what float64 needs to solve.
        scale: multiplies the merged delta.
        weighted: give each client its share of the sum to be minimised; if false, equal parts.

    The authors run a few hundred steps of Adam from the sum of the deltas; this is where those steps lead to, but for
    directions that no client has. The ridge is toward the average and not toward 0, so that one client, or several
    identical ones, give that client.
    """

    def merged(deltas_NRC: Tensor, weights_N: Tensor) -> Tensor:
        parts_N = weights_N if weighted else torch.full_like(weights_N, 1.0 / len(weights_N))
        return scale * least_interference(deltas_NRC, parts_N, ridge)

    return Matrix(merged)
