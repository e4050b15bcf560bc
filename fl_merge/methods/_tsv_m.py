from torch import Tensor

from fl_merge.hyperparameters import Scale
from fl_merge.method import merge_method
from fl_merge.ops.combine import by_share
from fl_merge.ops.spectral import merge_triplets, top_triplets, triplets_each
from fl_merge.shapes import Matrix


@merge_method(paper="Gargiulo et al., 2024, arXiv:2412.00081", identity=None)
def tsv_m(*, scale: Scale = 1.0, weighted: bool = False) -> Matrix:
    """Sum the clients' strongest singular directions, made orthogonal to each other first.

    1. of each tau_i = U_i S_i V_i^T keep the top k = max(1, floor(min(rows, columns) / N)) triplets
    2. U = polar([U_1 .. U_N]), V = polar([V_1 .. V_N]), S the values of all
    3. theta = theta_0 + scale * U S V^T

    Tensors with fewer than two dimensions are averaged; convolution kernels are taken as (out, rest).

    Args:
        scale: multiplies the merged delta.
        weighted: multiply each delta by N times the client's share first; if false, shares count in averages only.

    With one client nothing is left out and the result is that client, to rounding. N identical clients give their
    delta truncated to rank k, and not the delta, since each keeps only k directions. Where k is 1 because there are
    more clients than rows or columns (the authors' code then keeps none), or clients share directions exactly, the
    polar factor is taken on what the vectors span. A client may send its top k triplets in place of the delta:
    `fl_merge.ops.spectral.top_triplets` and `merge_triplets` give the same matrix.
    """

    def merged(deltas_NRC: Tensor, weights_N: Tensor) -> Tensor:
        clients, rows, columns = deltas_NRC.shape
        count = triplets_each(rows, columns, clients)
        deltas_NRC = by_share(deltas_NRC, weights_N) if weighted else deltas_NRC
        return scale * merge_triplets([top_triplets(delta_RC, count) for delta_RC in deltas_NRC])

    return Matrix(merged)
