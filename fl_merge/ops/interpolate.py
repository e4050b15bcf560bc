"""Arcs between models, computed on coefficients: a point is a combination of the clients' vectors x_1 .. x_N, and its
lengths and angles follow from their Gram matrix. Suffixes: N clients, V vectors that are merged each for itself."""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray[Any, Any]
"""On as many numbers as there are clients, numpy takes a fifth of torch's time."""

ALMOST_PARALLEL = 0.9995
"""Above this |cosine| an arc is replaced by the straight line, as is customary."""

PARALLEL = 1.0 - 5e-13
"""Above this |cosine|, an angle of 1e-6, an arc and its chord are the same in float32, and sin W says little."""


_quiet = np.errstate(divide="ignore", invalid="ignore")
"""What is divided by 0 here is not used."""


@_quiet
def arc_weights(cosine_V: Array, t: float, straight_above: float) -> tuple[Array, Array]:
    """The factors of a and b at fraction t of the arc from a to b (Shoemake, 1985), for several pairs.

    sin((1 - t) W) / sin W  and  sin(t W) / sin W,  with cos W = cosine;  1 - t and t where the two are parallel.

    Args:
        cosine_V: (V,), float64; NaN counts as parallel.
        straight_above: the |cosine| above which a pair is parallel.
    """
    bent_V = np.abs(cosine_V) <= straight_above
    angle_V = np.arccos(np.where(bent_V, cosine_V, 0.0))
    whole_V = np.sin(angle_V)
    keep_V, add_V = np.sin((1.0 - t) * angle_V) / whole_V, np.sin(t * angle_V) / whole_V
    return np.where(bent_V, keep_V, 1.0 - t), np.where(bent_V, add_V, t)


def slerp_weights(cosine: float, t: float) -> tuple[float, float]:
    """The same for one pair, with a straight line where |cosine| > 0.9995."""
    keep_V, add_V = arc_weights(np.array([cosine]), t, ALMOST_PARALLEL)
    return float(keep_V[0]), float(add_V[0])


@_quiet
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
    products_VNN, shares_N = gram_VNN.numpy(), weights_N.numpy()
    coefficients_VN = np.zeros(products_VNN.shape[:2])
    coefficients_VN[:, 0] = 1.0
    for k in range(1, len(shares_N)):
        t = float(shares_N[k] / shares_N[: k + 1].sum())
        row_VN = products_VNN[:, k]
        far_V, near_V = _lengths(products_VNN, coefficients_VN), np.sqrt(np.maximum(row_VN[:, k], 0.0))
        cosine_V = (row_VN * coefficients_VN).sum(axis=1) / (far_V * near_V)
        keep_V, add_V = arc_weights(cosine_V, t, straight_above)
        if linear_lengths:
            bent_V = np.abs(cosine_V) <= straight_above
            length_V = (1.0 - t) * far_V + t * near_V
            keep_V = np.where(bent_V, keep_V * length_V / far_V, keep_V)
            add_V = np.where(bent_V, add_V * length_V / near_V, add_V)
        coefficients_VN *= keep_V[:, None]
        coefficients_VN[:, k] = add_V
    return torch.from_numpy(coefficients_VN)


def _own_lengths(products_VNN: Array) -> Array:
    """(V, N): the lengths of x_1 .. x_N."""
    return np.sqrt(np.maximum(products_VNN.diagonal(axis1=-2, axis2=-1), 0.0))


def _lengths(products_VNN: Array, coefficients_VN: Array) -> Array:
    """(V,): the lengths of the combinations; 0 where they cancel, but for rounding."""
    squared_V = ((products_VNN @ coefficients_VN[:, :, None])[:, :, 0] * coefficients_VN).sum(axis=1)
    rounding_V = 4 * sys.float_info.epsilon * (np.abs(coefficients_VN) * _own_lengths(products_VNN)).sum(axis=1) ** 2
    return np.sqrt(np.where(squared_V > rounding_V, squared_V, 0.0))


@_quiet
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
    products_NN, shares_N = gram_NN.numpy(), weights_N.numpy()
    lengths_N = _own_lengths(products_NN)
    towards_N = np.where(lengths_N > 0, shares_N / lengths_N, 0.0)
    length = _length(products_NN, towards_N)
    if length < _CANCELS or _one_direction(products_NN, lengths_N):
        return weights_N
    return torch.from_numpy(towards_N * (float(shares_N @ lengths_N) / length))


@_quiet
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
    products_NN, given_N = gram_NN.numpy(), weights_N.numpy()
    lengths_N = _own_lengths(products_NN)
    there_N = lengths_N > 0
    towards_N = np.where(there_N, given_N / lengths_N, 0.0)
    length = _length(products_NN, towards_N)
    if length < _CANCELS * float(given_N[there_N].sum()) or _one_direction(products_NN, lengths_N):
        return weights_N
    shares_N = np.where(there_N, given_N, 0.0) / given_N[there_N].sum()
    point_N = towards_N / length
    for _ in range(max_iterations):
        cosine_N = np.clip(np.where(there_N, products_NN @ point_N / lengths_N, 1.0), -1.0, 1.0)
        angle_N = np.arccos(cosine_N)
        if float(angle_N.max()) > math.pi - _CANCELS:
            return weights_N
        stretch_N = shares_N * np.where(angle_N > 0, angle_N / np.sin(angle_N), 1.0)
        tangent_N = np.where(there_N, stretch_N / lengths_N, 0.0) - float(stretch_N @ cosine_N) * point_N
        step = _length(products_NN, tangent_N)
        if step <= tolerance:  # a step of 0 has no direction
            break
        point_N = math.cos(step) * point_N + math.sin(step) / step * tangent_N
        point_N = point_N / _length(products_NN, point_N)
    return torch.from_numpy(point_N * float(given_N @ lengths_N))


_CANCELS = 1e-7
"""A mean of directions that is shorter than this is 0 but for rounding."""


def _one_direction(products_NN: Array, lengths_N: Array) -> bool:
    """Whether all vectors that have a direction have the same one, but for rounding."""
    there_N = lengths_N > 0
    cosine_NN = products_NN[there_N][:, there_N] / (lengths_N[there_N, None] * lengths_N[there_N])
    return bool((cosine_NN > PARALLEL).all())


def _length(products_NN: Array, coefficients_N: Array) -> float:
    return float(_lengths(products_NN[None], coefficients_N[None])[0])


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
