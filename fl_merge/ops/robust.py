"""Means that a few bad clients cannot move far, computed on coefficients from the Gram matrix of the deltas.
Suffix: N clients."""

from __future__ import annotations

import torch
from torch import Tensor


def squared_distances(gram_NN: Tensor) -> Tensor:
    """|x_i - x_j|^2 of every pair; the Gram matrix must be that of deltas, or nearby models lose their digits here.

    Args:
        gram_NN: (N, N), float64, symmetric: the inner products of x_1 .. x_N.

    Returns:
        (N, N), float64, >= 0, with zeros on the diagonal.
    """
    squared_N = gram_NN.diagonal()
    return (squared_N[:, None] + squared_N - 2.0 * gram_NN).clamp(min=0.0).fill_diagonal_(0.0)


def krum_scores(gram_NN: Tensor, bad: int) -> Tensor:
    """Each client's sum of squared distances to its N - f - 2 nearest others (Blanchard et al., 2017).

    Args:
        gram_NN: (N, N), float64.
        bad: f; N >= f + 3.

    Returns:
        (N,), float64; the smaller, the better.
    """
    distances_NN = squared_distances(gram_NN)
    count = len(distances_NN)
    others_NM = distances_NN[~torch.eye(count, dtype=torch.bool)].view(count, count - 1)
    return others_NM.sort(dim=1).values[:, : count - bad - 2].sum(dim=1)


def mean_of_best(scores_N: Tensor, weights_N: Tensor, best: int) -> Tensor:
    """The coefficients of the weighted mean of the clients with the smallest scores.

    Args:
        scores_N: (N,), float64; of equal ones the first wins.
        weights_N: (N,), float64, > 0.
        best: of how many clients.
    """
    chosen_M = torch.argsort(scores_N, stable=True)[:best]
    coefficients_N = torch.zeros_like(weights_N)
    coefficients_N[chosen_M] = weights_N[chosen_M] / weights_N[chosen_M].sum()
    return coefficients_N


def geometric_median(gram_NN: Tensor, weights_N: Tensor, iterations: int, smoothing: float) -> Tensor:
    """The coefficients of Weiszfeld's iteration for argmin_z sum w_i |z - x_i|, smoothed (Pillutla et al., 2019).

    z <- sum b_i x_i / sum b_i,  b_i = w_i / max(smoothing, |z - x_i|),  from the weighted mean on

    Args:
        gram_NN: (N, N), float64.
        weights_N: (N,), float64, > 0, summing to 1.
        iterations: how many.
        smoothing: a length, > 0.

    Returns:
        (N,), float64, summing to 1.
    """
    point_N = weights_N
    for _ in range(iterations):
        share_N = weights_N / _distances(gram_NN, point_N).clamp(min=smoothing)
        point_N = share_N / share_N.sum()
    return point_N


def centered_clip(gram_NN: Tensor, weights_N: Tensor, radius: float, iterations: int) -> Tensor:
    """The coefficients of a mean of differences that are clipped to a length (Karimireddy et al., 2021).

    z <- z + sum w_i (x_i - z) min(1, radius / |x_i - z|),  from z = 0 on

    Args:
        gram_NN: (N, N), float64.
        weights_N: (N,), float64, > 0, summing to 1.
        radius: a length, > 0.
        iterations: how many.

    Returns:
        (N,), float64.
    """
    point_N = torch.zeros_like(weights_N)
    for _ in range(iterations):
        share_N = weights_N * (radius / _distances(gram_NN, point_N)).clamp(max=1.0)
        # share_N and the sum of the shares that is taken off z: with all unclipped z becomes the mean itself.
        point_N = point_N * (1.0 - min(1.0, float(share_N.sum()))) + share_N
    return point_N


def _distances(gram_NN: Tensor, point_N: Tensor) -> Tensor:
    """(N,): |z - x_i| for z = sum a_i x_i."""
    difference_NN = torch.eye(len(point_N), dtype=torch.float64) - point_N
    return ((difference_NN @ gram_NN) * difference_NN).sum(dim=1).clamp(min=0.0).sqrt()
