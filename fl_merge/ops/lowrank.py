"""Products of thin matrices, B A, without ever making the product: sums, inner products, the best approximation.

Everything is float64. Suffixes: P parts (the clients that are merged), O outputs (rows of a product), I inputs (its
columns), R rank, K singular values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Factors(NamedTuple):
    """A product B A by its factors: (O, R) and (R, I), float64. R may be 0, for a product of zeros."""

    b_OR: Tensor
    a_RI: Tensor

    @property
    def rank(self) -> int:
        """R: the product's rank is at most that."""
        return self.a_RI.shape[0]


class Compressed(NamedTuple):
    """A product of bounded rank in place of another.

    Args:
        factors: of what is kept.
        error: the Frobenius norm of what was cut off.
        norm: that of the whole.
    """

    factors: Factors
    error: float
    norm: float


def none(outputs: int, inputs: int) -> Factors:
    """The product of rank 0: zeros."""
    return Factors(torch.zeros(outputs, 0, dtype=torch.float64), torch.zeros(0, inputs, dtype=torch.float64))


def stack(parts_P: Sequence[Factors], weights_P: Sequence[float]) -> Factors:
    """The weighted sum of products, exactly, by concatenation: ranks r_1 and r_2 become r_1 + r_2.

    sum w_i B_i A_i = [B_1 ... B_P] [w_1 A_1; ...; w_P A_P]
    """
    b_OR = torch.cat([part.b_OR for part in parts_P], dim=1)
    a_RI = torch.cat([part.a_RI * weight for part, weight in zip(parts_P, weights_P, strict=True)])
    return Factors(b_OR, a_RI)


class Decomposed:
    """The thin singular value decomposition of a product, U diag(s) V^T, s descending: s now, vectors when asked for.

    QR of either factor, then the decomposition of an R x R core; the orthogonal matrices stay products of reflections,
    so that only those vectors are made that are asked for.

    Attributes:
        s_K: (K,) float64.
    """

    def __init__(self, product: Factors) -> None:
        self._left, left_KR = _triangular(product.b_OR)
        self._right, right_KR = _triangular(product.a_RI.T)
        self._u_KK, self.s_K, self._vt_KK = torch.linalg.svd(left_KR @ right_KR.T, full_matrices=False)

    def leading(self, count: int) -> Factors:
        """The first vectors: (O, count) and (count, I).

        The sign of each pair is fixed: the left one's first element of largest magnitude is positive.
        """
        u_OK = _rotated(self._left, self._u_KK[:, :count])
        vt_KI = _rotated(self._right, self._vt_KK[:count].T).T
        if not u_OK.numel():
            return Factors(u_OK, vt_KI)
        largest_K = u_OK.abs().argmax(dim=0)
        sign_K = torch.where(u_OK[largest_K, torch.arange(u_OK.shape[1])] < 0, -1.0, 1.0).to(torch.float64)
        return Factors(u_OK * sign_K, vt_KI * sign_K[:, None])


def _triangular(matrix_SR: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """QR: the reflections that make up Q, and the triangle."""
    if not matrix_SR.shape[1]:
        return (matrix_SR, matrix_SR.new_zeros(0)), matrix_SR.new_zeros(0, 0)
    packed_SR, scales_K = torch.geqrf(matrix_SR)
    size = len(scales_K)
    return (packed_SR[:, :size], scales_K), packed_SR[:size].triu()


def _rotated(reflections: tuple[Tensor, Tensor], columns_KC: Tensor) -> Tensor:
    """Q times some columns, (S, C), without making Q."""
    packed_SK, scales_K = reflections
    padded_SC = columns_KC.new_zeros(packed_SK.shape[0], columns_KC.shape[1])
    padded_SC[: columns_KC.shape[0]] = columns_KC
    return torch.ormqr(packed_SK, scales_K, padded_SC) if padded_SC.numel() else padded_SC


def kept_rank(s_K: Tensor, rank: int | None = None, energy: float | None = None, tolerance: float | None = None) -> int:
    """How many singular values are kept: the fewest that satisfy energy and tolerance, at most `rank`, at least one.

    Args:
        s_K: (K,) float64, descending.
        rank: the most.
        energy: the share of sum s^2 that what is kept must have, in (0, 1].
        tolerance: the largest relative Frobenius error, in [0, 1).
    """
    tails_K = tail_norms(s_K)
    total = float(tails_K[0])
    needed = len(s_K) if energy is None and tolerance is None else 0
    if energy is not None:
        allowed = total * math.sqrt(max(0.0, 1.0 - energy))
        needed = max(needed, int((tails_K > max(allowed, total * 1e-15)).sum()))
    if tolerance is not None:
        needed = max(needed, int((tails_K > max(tolerance * total, total * 1e-15)).sum()))
    return max(1, min(needed, len(s_K) if rank is None else rank))


def tail_norms(s_K: Tensor) -> Tensor:
    """(K + 1,): entry k is the Frobenius norm of what is cut off when k singular values are kept."""
    squares_K = (s_K * s_K).flip(0).cumsum(0).flip(0)
    return torch.cat([squares_K, squares_K.new_zeros(1)]).sqrt()


def compress(
    product: Factors, rank: int | None = None, energy: float | None = None, tolerance: float | None = None
) -> Compressed:
    """The best approximation of bounded rank (Eckart and Young), its singular values shared out evenly to B and A.

    B = U sqrt(s), A = sqrt(s) V^T: both factors have the same scale, whatever it was in the parts.

    Args:
        product: never multiplied out.
        rank, energy, tolerance: as for `kept_rank`; with none of them all of it is kept.
    """
    found = Decomposed(product)
    tails_K = tail_norms(found.s_K)
    kept = min(kept_rank(found.s_K, rank, energy, tolerance), len(found.s_K))
    factors = _shared_out(found, kept)
    return Compressed(factors, float(tails_K[kept]), float(tails_K[0]))


def norm(product: Factors) -> float:
    """The Frobenius norm of a product."""
    return math.sqrt(max(0.0, float(inner(product, product))))


def inner(one: Factors, other: Factors) -> Tensor:
    """The sum over all elements of one product times another: tr((B_1^T B_2) (A_2 A_1^T))."""
    return ((one.b_OR.T @ other.b_OR) * (one.a_RI @ other.a_RI.T)).sum()


def gram(parts_P: Sequence[Factors]) -> Tensor:
    """(P, P): the inner products of every pair of products."""
    gram_PP = torch.zeros(len(parts_P), len(parts_P), dtype=torch.float64)
    for i, one in enumerate(parts_P):
        for j in range(i, len(parts_P)):
            gram_PP[i, j] = gram_PP[j, i] = inner(one, parts_P[j])
    return gram_PP


def mean_factors(parts_P: Sequence[Factors], weights_P: Sequence[float]) -> Factors:
    """The weighted means of the B and of the A, which is not the mean of the products. All of one rank."""
    b_OR = torch.stack([part.b_OR * weight for part, weight in zip(parts_P, weights_P, strict=True)]).sum(0)
    a_RI = torch.stack([part.a_RI * weight for part, weight in zip(parts_P, weights_P, strict=True)]).sum(0)
    return Factors(b_OR, a_RI)


def residual(parts_P: Sequence[Factors], weights_P: Sequence[float], mean: Factors) -> Factors:
    """What the product of the mean factors lacks of the weighted sum of products; the weights sum to 1.

    sum w_i B_i A_i - B A = sum w_i (B_i - B) (A_i - A), whose rank is at most (P - 1) R: the differences of the B sum
    to zero.
    """
    centred = [Factors(part.b_OR - mean.b_OR, part.a_RI - mean.a_RI) for part in parts_P]
    return stack(centred, weights_P)


def canonical(product: Factors) -> Factors:
    """Factors that depend on the product alone: U sqrt(s) and sqrt(s) V^T, without what is zero but for rounding."""
    found = Decomposed(product)
    return _shared_out(found, _significant(found.s_K))


def _shared_out(found: Decomposed, count: int) -> Factors:
    u_OK, vt_KI = found.leading(count)
    root_K = found.s_K[:count].sqrt()
    return Factors(u_OK * root_K, vt_KI * root_K[:, None])


def knots_basis(parts_P: Sequence[Factors]) -> tuple[Tensor, Tensor]:
    """The products in a basis that all share (KnOTS): B_i A_i = left @ right[i].

    The singular value decomposition of the products side by side, [B_1 A_1 ... B_P A_P] = U diag(s) [V_1 ... V_P]^T,
    from the factors: QR of [B_1 ... B_P], QR of each A_i^T, and that of a small core.

    Returns:
        left (O, K) = U diag(s), and right (P, K, I), the V_i^T.
    """
    left, rest_KR = _triangular(torch.cat([part.b_OR for part in parts_P], dim=1))
    rights, cores, at = [], [], 0
    for part in parts_P:
        right, right_KR = _triangular(part.a_RI.T)
        cores.append(rest_KR[:, at : at + part.rank] @ right_KR.T)
        rights.append(right)
        at += part.rank
    u_KK, s_K, vt_KR = torch.linalg.svd(torch.cat(cores, dim=1), full_matrices=False)
    count = _significant(s_K)
    blocks = torch.split(vt_KR[:count], [core.shape[1] for core in cores], dim=1)
    right_PKI = torch.stack([_rotated(right, block.T).T for block, right in zip(blocks, rights, strict=True)])
    return _rotated(left, u_KK[:, :count]) * s_K[:count], right_PKI


def core_basis(parts_P: Sequence[Factors]) -> tuple[Tensor, Tensor, Tensor]:
    """The products in the space that all factors span (Core Space): B_i A_i = left @ cores[i] @ right.

    The bases are the left singular vectors of all canonical B side by side, and the right ones of all A stacked; from
    factors as the clients split them, the bases would depend on that split.

    Returns:
        left (O, K), cores (P, K, L), right (L, I).
    """
    parts_P = [canonical(part) for part in parts_P]
    left_OK = _basis(torch.cat([part.b_OR for part in parts_P], dim=1))
    right_IL = _basis(torch.cat([part.a_RI for part in parts_P]).T)
    cores = torch.stack([(left_OK.T @ part.b_OR) @ (part.a_RI @ right_IL) for part in parts_P])
    return left_OK, cores, right_IL.T


def _basis(vectors_SR: Tensor) -> Tensor:
    reflections, rest_KR = _triangular(vectors_SR)
    u_KK, s_K, _ = torch.linalg.svd(rest_KR, full_matrices=False)
    return _rotated(reflections, u_KK[:, : _significant(s_K)])


def _significant(s_K: Tensor) -> int:
    """How many singular values are more than rounding: the vectors of the others would be arbitrary."""
    return int((s_K > s_K[0] * 1e-12).sum()) if len(s_K) else 0
