"""Arcs between models, computed on coefficients: a point is a combination of the clients' vectors x_1 .. x_N, and its
lengths and angles follow from their Gram matrix. Suffixes: N clients, V vectors that are merged each for itself."""

from __future__ import annotations

import math
import sys

import torch
from torch import Tensor

ALMOST_PARALLEL = 0.9995
"""Above this |cosine| an arc is replaced by the straight line, as is customary."""

PARALLEL = 1.0 - 5e-13
"""Above this |cosine|, an angle of 1e-6, an arc and its chord are the same in float32, and sin W says little."""


def arc_weights(cosine_V: Tensor, t: float, straight_above: float) -> tuple[Tensor, Tensor]:
    """The factors of a and b at fraction t of the arc from a to b (Shoemake, 1985), for several pairs.

    sin((1 - t) W) / sin W  and  sin(t W) / sin W,  with cos W = cosine;  1 - t and t where the two are parallel.

    Args:
        cosine_V: (V,), float64; NaN counts as parallel.
        straight_above: the |cosine| above which a pair is parallel.
    """
    bent_V = cosine_V.abs() <= straight_above
    angle_V = torch.where(bent_V, cosine_V, 0.0).acos()
    keep_V, add_V = ((1.0 - t) * angle_V).sin() / angle_V.sin(), (t * angle_V).sin() / angle_V.sin()
    return torch.where(bent_V, keep_V, 1.0 - t), torch.where(bent_V, add_V, t)


def slerp_weights(cosine: float, t: float) -> tuple[float, float]:
    """The same for one pair, with a straight line where |cosine| > 0.9995."""
    keep_V, add_V = arc_weights(torch.tensor([cosine], dtype=torch.float64), t, ALMOST_PARALLEL)
    return float(keep_V), float(add_V)


def slerp_fold(
    gram_VNN: Tensor, weights_N: Tensor, straight_above: float = ALMOST_PARALLEL, *, linear_lengths: bool = False
) -> Tensor:
    """The coefficients of slerp(... slerp(x_1, x_2) ..., x_N), the k-th step at t = w_k / (w_1 + ... + w_k).

    Args:
        gram_VNN: (V, N, N) or (N, N), float64: the inner products of x_1 .. x_N, for each of V merges.
        weights_N: (N,), float64, > 0.
        straight_above: the |cosine| above which an arc is replaced by the straight line.
        linear_lengths: take the arc between directions, and the length (1 - t) |a| + t |b|. If false, the factors of
            the arc are those of a and b themselves.

    Returns:
        (V, N) or (N,), float64. A vector of length 0 has no direction: it is joined by a straight line.
    """
    if gram_VNN.ndim == 2:
        return slerp_fold(gram_VNN[None], weights_N, straight_above, linear_lengths=linear_lengths)[0]
    coefficients_VN = torch.zeros(gram_VNN.shape[:2], dtype=torch.float64)
    coefficients_VN[:, 0] = 1.0
    for k in range(1, len(weights_N)):
        t = float(weights_N[k] / weights_N[: k + 1].sum())
        row_VN = gram_VNN[:, k]
        far_V = _lengths(gram_VNN, coefficients_VN)
        near_V = row_VN[:, k].clamp(min=0.0).sqrt()
        cosine_V = (row_VN * coefficients_VN).sum(dim=1) / (far_V * near_V)
        keep_V, add_V = arc_weights(cosine_V, t, straight_above)
        if linear_lengths:
            bent_V = cosine_V.abs() <= straight_above
            length_V = (1.0 - t) * far_V + t * near_V
            keep_V = torch.where(bent_V, keep_V * length_V / far_V, keep_V)
            add_V = torch.where(bent_V, add_V * length_V / near_V, add_V)
        coefficients_VN = coefficients_VN * keep_V[:, None]
        coefficients_VN[:, k] = add_V
    return coefficients_VN


def _lengths(gram_VNN: Tensor, coefficients_VN: Tensor) -> Tensor:
    """(V,): the lengths of the combinations; 0 where they cancel, but for rounding."""
    squared_V = (coefficients_VN[:, :, None] * gram_VNN * coefficients_VN[:, None, :]).sum(dim=(1, 2))
    lengths_VN = coefficients_VN.abs() * gram_VNN.diagonal(dim1=1, dim2=2).clamp(min=0.0).sqrt()
    rounding_V = 4 * sys.float_info.epsilon * lengths_VN.sum(dim=1).square()
    return torch.where(squared_V > rounding_V, squared_V, 0.0).sqrt()


def normalized_mean(gram_NN: Tensor, weights_N: Tensor) -> Tensor:
    """The coefficients of the mean of the directions, brought back to the sphere, times the mean length.

    sum w_j |x_j| * m / |m|,  m = sum w_i x_i / |x_i|

    Args:
        gram_NN: (N, N), float64: the inner products of x_1 .. x_N.
        weights_N: (N,), float64, > 0, summing to 1.

    Returns:
        (N,), float64: the weights themselves where the directions cancel, so that there is no mean direction, and
        where all vectors have one direction. Vectors of length 0 count for the length only.
    """
    lengths_N = gram_NN.diagonal().clamp(min=0.0).sqrt()
    towards_N = torch.where(lengths_N > 0, weights_N / lengths_N, 0.0)
    length = _length(gram_NN, towards_N)
    if length < _CANCELS or _one_direction(gram_NN, lengths_N):
        return weights_N
    return towards_N * (float(weights_N @ lengths_N) / length)


def karcher_mean(gram_NN: Tensor, weights_N: Tensor, max_iterations: int, tolerance: float) -> Tensor:
    """The coefficients of the Frechet mean of the directions on the sphere, times the mean length.

    u <- exp_u(sum w_i log_u(u_i)) from the normalised mean on, until the step is not longer than `tolerance`; u_i are
    the directions x_i / |x_i|, log_u(u_i) = (W / sin W) (u_i - cos W u), cos W = u . u_i.

    Args:
        gram_NN: (N, N), float64: the inner products of x_1 .. x_N.
        weights_N: (N,), float64, > 0, summing to 1.
        max_iterations: at most so many steps.
        tolerance: radians.

    Returns:
        (N,), float64: the weights themselves where there is no mean direction (the directions cancel, or one is
        opposite to the mean, where log is not defined) and where all vectors have one direction. Vectors of length 0
        count for the length only.
    """
    lengths_N = gram_NN.diagonal().clamp(min=0.0).sqrt()
    there_N = lengths_N > 0
    towards_N = torch.where(there_N, weights_N / lengths_N, 0.0)
    length = _length(gram_NN, towards_N)
    if length < _CANCELS * float(weights_N[there_N].sum()) or _one_direction(gram_NN, lengths_N):
        return weights_N
    shares_N = torch.where(there_N, weights_N, 0.0) / weights_N[there_N].sum()
    point_N = towards_N / length
    for _ in range(max_iterations):
        cosine_N = torch.where(there_N, gram_NN @ point_N / lengths_N, 1.0).clamp(-1.0, 1.0)
        angle_N = cosine_N.acos()
        if float(angle_N.max()) > math.pi - _CANCELS:
            return weights_N
        stretch_N = shares_N * torch.where(angle_N > 0, angle_N / angle_N.sin(), 1.0)
        tangent_N = torch.where(there_N, stretch_N / lengths_N, 0.0) - float(stretch_N @ cosine_N) * point_N
        step = _length(gram_NN, tangent_N)
        if step <= tolerance:  # a step of 0 has no direction
            break
        point_N = math.cos(step) * point_N + math.sin(step) / step * tangent_N
        point_N = point_N / _length(gram_NN, point_N)
    return point_N * float(weights_N @ lengths_N)


_CANCELS = 1e-7
"""A mean of directions that is shorter than this is 0 but for rounding."""


def _one_direction(gram_NN: Tensor, lengths_N: Tensor) -> bool:
    """Whether all vectors that have a direction have the same one, but for rounding."""
    there_N = lengths_N > 0
    cosine_NN = gram_NN[there_N][:, there_N] / (lengths_N[there_N, None] * lengths_N[there_N])
    return bool((cosine_NN > PARALLEL).all())


def _length(gram_NN: Tensor, coefficients_N: Tensor) -> float:
    return float(_lengths(gram_NN[None], coefficients_N[None]))


def stock_ratio(gram_VNN: Tensor) -> Tensor:
    """How far to go from the base to the clients' mean (Jang et al., 2024), from the angles between their deltas.

    t = N c / (1 + (N - 1) c),  c = the mean cosine over pairs of clients, clamped to [0, 1]

    Args:
        gram_VNN: (V, N, N), float64: the inner products of the deltas, for each of V merges.

    Returns:
        (V,), float64, in [0, 1]; 1 for one client. A delta of length 0 has cosine 0 with every other.
    """
    count = gram_VNN.shape[1]
    if count == 1:
        return torch.ones(len(gram_VNN), dtype=torch.float64)
    lengths_VN = gram_VNN.diagonal(dim1=1, dim2=2).clamp(min=0.0).sqrt()
    cosine_VNN = gram_VNN / lengths_VN[:, :, None] / lengths_VN[:, None, :]
    cosine_VNN = torch.where(cosine_VNN > PARALLEL, 1.0, cosine_VNN)  # identical clients are parallel, not nearly so
    pair_NN = torch.ones(count, count, dtype=torch.bool).triu(1)
    cosine_V = cosine_VNN.nan_to_num(nan=0.0)[:, pair_NN].mean(dim=1).clamp(0.0, 1.0)
    return count * cosine_V / (1.0 + (count - 1) * cosine_V)
