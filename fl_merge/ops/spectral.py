"""Merging matrices by their singular vectors and values. Suffixes: N clients, R rows, C columns, K directions.

All arithmetic is in float64. The executor calls these in threads in which torch has one thread, so that the results do
not depend on how many there are. Signs of singular vectors, and bases of directions whose values are equal, are
arbitrary; what is formed from them here does not depend on the choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fl_merge.ops.solve import weighted_solution

PARALLEL = 1e-9
"""A direction whose share of a Gram matrix's largest eigenvalue is below this is no direction of its own."""


class Triplets(NamedTuple):
    """Singular triplets of a matrix, values falling: left_RK @ diag(values_K) @ right_CK.T, all float64."""

    left_RK: Tensor
    values_K: Tensor
    right_CK: Tensor

    def matrix(self) -> Tensor:
        """(R, C), float64: their product."""
        return (self.left_RK * self.values_K) @ self.right_CK.T


def triplets(matrix_RC: Tensor) -> Triplets:
    """The singular triplets above rounding: values over max(R, C) * eps * the largest, eps that of the matrix's dtype.

    What is below says nothing of the matrix: its vectors are whatever rounding makes them.

    A float32 matrix is decomposed by the eigenvectors of its smaller Gram matrix in float64, which costs a fraction of
    a singular value decomposition. What squaring loses is then below what is left out. A float64 one is decomposed as
    it is.
    """
    wide_RC = matrix_RC.double()
    if matrix_RC.dtype == torch.float64:
        left_RK, values_K, right_KC = torch.linalg.svd(wide_RC, full_matrices=False)
        right_CK = right_KC.T
        kept_K = _above_rounding(values_K, matrix_RC)
        return Triplets(left_RK[:, kept_K], values_K[kept_K], right_CK[:, kept_K])
    turned = wide_RC.shape[0] > wide_RC.shape[1]
    if turned:
        wide_RC = wide_RC.T
    squares_R, left_RR = torch.linalg.eigh(wide_RC @ wide_RC.T)
    values_R = squares_R.clamp(min=0.0).sqrt().flip(0)
    kept_R = _above_rounding(values_R, matrix_RC)
    left_RK, values_K = left_RR.flip(1)[:, kept_R], values_R[kept_R]
    right_CK = (wide_RC.T @ left_RK) / values_K
    return Triplets(right_CK, values_K, left_RK) if turned else Triplets(left_RK, values_K, right_CK)


def _above_rounding(values_K: Tensor, matrix_RC: Tensor) -> Tensor:
    return values_K > max(matrix_RC.shape) * torch.finfo(matrix_RC.dtype).eps * values_K[0]


def top_triplets(delta_RC: Tensor, count: int) -> Triplets:
    """The `count` triplets of largest value, or fewer if the matrix has fewer: what a client may send in place of it.

    Args:
        delta_RC: of one client and one tensor.
        count: `triplets_each` of its shape and the number of clients, for `merge_triplets` to give what `tsv_m` gives.
    """
    found = triplets(delta_RC)
    return Triplets(found.left_RK[:, :count], found.values_K[:count], found.right_CK[:, :count])


def triplets_each(rows: int, columns: int, clients: int) -> int:
    """How many triplets each client keeps, for all together to be a basis: floor(min(R, C) / N), but at least 1."""
    return max(1, min(rows, columns) // clients)


def merge_triplets(each_N: Sequence[Triplets]) -> Tensor:
    """The sum of the clients' truncated matrices once all their singular vectors are made orthogonal to each other.

    [U_1 .. U_N] and [V_1 .. V_N] are each replaced by the nearest matrix with orthonormal columns (the polar factor),
    and multiplied back with all values (Gargiulo et al., 2024). Where vectors of different clients coincide, so that
    there is no such matrix, the polar factor on what they span.

    Returns:
        (R, C), float64.
    """
    left_RK = polar(torch.cat([each.left_RK for each in each_N], dim=1))
    right_CK = polar(torch.cat([each.right_CK for each in each_N], dim=1))
    return Triplets(left_RK, torch.cat([each.values_K for each in each_N]), right_CK).matrix()


def polar(columns_RK: Tensor) -> Tensor:
    """X (X^T X)^(-1/2): the nearest matrix with orthonormal columns; on what X spans where that is less than K.

    Args:
        columns_RK: (R, K), float64.
    """
    if columns_RK.shape[0] < columns_RK.shape[1]:
        return polar(columns_RK.T).T
    values_K, vectors_KK = torch.linalg.eigh(columns_RK.T @ columns_RK)
    if not len(values_K):
        return columns_RK
    kept_K = values_K > PARALLEL * values_K[-1]
    basis_KK = vectors_KK[:, kept_K]
    inverse_KK: Tensor = (basis_KK / values_K[kept_K].sqrt()) @ basis_KK.T
    return columns_RK @ inverse_KK


def isotropic(matrix_RC: Tensor) -> Tensor:
    """The matrix with each of its singular values replaced by their mean (Marczak et al., 2025).

    U S V^T -> mean(S) U V^T. The mean runs over the values above rounding, and the others stay 0.

    Returns:
        (R, C), float64.
    """
    found = triplets(matrix_RC)
    return _even(found.left_RK, found.values_K, found.right_CK)


def _even(left_RK: Tensor, values_K: Tensor, right_CK: Tensor) -> Tensor:
    mean = values_K.mean() if len(values_K) else 0.0
    return mean * (left_RK @ right_CK.T)


def isotropic_common_and_specific(deltas_NRC: Tensor, common: float) -> Tensor:
    """As `isotropic` of the sum, with its weakest directions given to each client's own (Marczak et al., 2025).

    The top k = common * r directions of the sum's r = min(R, C) are kept. To them come, of each client, the top
    (r - k) / N directions of what is left of its delta outside the k left vectors. All are made orthogonal (`polar`)
    and get the mean of all their values.

    Args:
        deltas_NRC: a floating dtype.
        common: in [0, 1].

    Returns:
        (R, C), float64.
    """
    rank = min(deltas_NRC.shape[1:])
    specific = int((1.0 - common) * rank) // len(deltas_NRC)
    shared = top_triplets(deltas_NRC.sum(dim=0), rank - specific * len(deltas_NRC))
    parts = [shared]
    for delta_RC in deltas_NRC if specific else ():
        wide_RC = delta_RC.double()
        remainder_RC = wide_RC - shared.left_RK @ (shared.left_RK.T @ wide_RC)
        parts.append(_above(top_triplets(remainder_RC.to(delta_RC.dtype), specific), wide_RC, delta_RC.dtype))
    left_RK = polar(torch.cat([part.left_RK for part in parts], dim=1))
    right_CK = polar(torch.cat([part.right_CK for part in parts], dim=1))
    return _even(left_RK, torch.cat([part.values_K for part in parts]), right_CK)


def _above(part: Triplets, whole_RC: Tensor, dtype: torch.dtype) -> Triplets:
    """Those that are above the rounding of what they are a remainder of."""
    kept_K = part.values_K > max(whole_RC.shape) * torch.finfo(dtype).eps * whole_RC.norm()
    return Triplets(part.left_RK[:, kept_K], part.values_K[kept_K], part.right_CK[:, kept_K])


def least_interference(deltas_NRC: Tensor, coefficients_N: Tensor, ridge: float) -> Tensor:
    """The M for which M - tau_i does least on the inputs that client i's delta acts on (Cheng et al., 2025).

    min over M of  sum c_i ||(M - tau_i) tau_i^T||_F^2 / ||tau_i||_F^2, solved:
    M = (sum c_i tau_i S_i) (sum c_i S_i)^-1,  S_i = tau_i^T tau_i / ||tau_i||_F^2

    with a ridge toward the average, as `weighted_solution` has it.

    Args:
        deltas_NRC: a floating dtype.
        coefficients_N: c_i, float64, summing to 1.
        ridge: a fraction of the mean of the diagonal of sum c_i S_i.

    Returns:
        (R, C), float64.
    """
    wide_NRC = deltas_NRC.double()
    coefficients = coefficients_N.tolist()
    average_RC = wide_NRC[0].clone()
    grams = []
    for delta_RC, coefficient in zip(wide_NRC, coefficients, strict=True):
        average_RC += coefficient * (delta_RC - wide_NRC[0])  # of equal deltas it is that delta, with no rounding
        square = float(delta_RC.square().sum())
        grams.append((delta_RC.T @ delta_RC) * (coefficient / square if square > 0 else 0.0))
    return weighted_solution(wide_NRC, grams, average_RC, ridge)


def calibrated(deltas_NRC: Tensor, floor: float) -> Tensor:
    """The sum of the deltas, its singular values lowered where several clients contribute (Li et al., 2026).

    For the sum U S V^T and its direction u:  s_i = <u^T sum, u^T tau_i> / ||u^T tau_i||^2  is how many times client i's
    own response is in the sum's, and  S <- S * N / sum_i max(floor, s_i).

    Args:
        deltas_NRC: a floating dtype.
        floor: > 0. A client with no part in a direction, or none above its delta's rounding, counts with it.

    Returns:
        (R, C), float64.
    """
    wide_NRC = deltas_NRC.double()
    total_RC = wide_NRC.sum(dim=0)
    left_RK = triplets(total_RC.to(deltas_NRC.dtype)).left_RK
    merged_KC = left_RK.T @ total_RC
    eps = max(torch.finfo(deltas_NRC.dtype).eps, 32 * torch.finfo(torch.float64).eps)  # of the deltas; of left_RK
    counts_K = torch.zeros(left_RK.shape[1], dtype=torch.float64, device=left_RK.device)
    for delta_RC in wide_NRC:
        response_KC = left_RK.T @ delta_RC
        square_K = response_KC.square().sum(dim=1)
        rounding = eps * max(delta_RC.shape) * delta_RC.norm()
        times_K = torch.where(square_K > rounding.square(), (merged_KC * response_KC).sum(dim=1) / square_K, 0.0)
        counts_K += times_K.clamp(min=floor)
    lowered_K = len(wide_NRC) / counts_K - 1.0
    return total_RC + left_RK @ (lowered_K[:, None] * merged_KC)
