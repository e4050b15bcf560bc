"""Systems with sums of Gram matrices, which are often singular: layers have inputs that are always zero, and clients
have few examples. Suffixes: C columns (a layer's inputs), R rows (its outputs)."""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST_RIDGE = 1e-12
"""Added to a diagonal in any case, as a fraction of its mean: below it float64 has no digits left to solve with."""


def solve_ridged(gram_CC: Tensor, right_CR: Tensor, ridge: float) -> Tensor:
    """X with (G + ridge * mean(diag G) * I) X = B, by Cholesky in float64.

    Where rounding (or whoever made G) has left it without a factor, the ridge is raised a hundredfold until it has one.

    Args:
        gram_CC: symmetric, float64, positive semidefinite but for rounding. Its lower triangle is read.
        right_CR: (C, R), float64.
        ridge: >= 0; below 1e-12 it is taken as that.

    Returns:
        (C, R), float64; zeros if the diagonal of G is zero.
    """
    size = gram_CC.diagonal().mean()
    if not size > 0:
        return torch.zeros_like(right_CR)
    identity_CC = torch.eye(len(gram_CC), dtype=gram_CC.dtype, device=gram_CC.device)
    ridge = max(ridge, SMALLEST_RIDGE)
    while True:
        factor_CC, failed = torch.linalg.cholesky_ex(gram_CC + ridge * size * identity_CC)
        if not failed:
            return torch.cholesky_solve(right_CR, factor_CC)
        ridge *= 100.0  # ends: a ridge above the sum of all magnitudes dominates the diagonal


def weighted_solution(deltas_NRC: Tensor, grams_NCC: list[Tensor], average_RC: Tensor, ridge: float) -> Tensor:
    """The matrix M nearest to all of the deltas, each distance measured by that client's Gram matrix.

    min over M of  sum_i tr (M - tau_i) G_i (M - tau_i)^T + r ||M - average||_F^2,  r = ridge * mean(diag(sum G_i))
    M = average + (sum_i (tau_i - average) G_i) (sum_i G_i + r)^-1

    Both sums are sums over clients. In directions that no Gram matrix has, M is the average.

    Args:
        deltas_NRC: float64.
        grams_NCC: one a client, float64, symmetric, positive semidefinite.
        average_RC: float64.
        ridge: >= 0, a fraction of the mean of the summed diagonal.

    Returns:
        (R, C), float64.
    """
    total_CC = torch.zeros_like(grams_NCC[0])
    right_RC = torch.zeros_like(average_RC)
    for delta_RC, gram_CC in zip(deltas_NRC, grams_NCC, strict=True):
        total_CC += gram_CC
        right_RC += (delta_RC - average_RC) @ gram_CC
    return average_RC + solve_ridged(total_CC, right_RC.T, ridge).T
