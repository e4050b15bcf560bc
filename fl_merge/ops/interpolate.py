"""Arcs between models, computed on coefficients: a point is a combination of the clients' vectors x_1 .. x_N, and its
lengths and angles follow from their Gram matrix. Suffix: N clients."""

from __future__ import annotations

import math

import torch
from torch import Tensor

ALMOST_PARALLEL = 0.9995
"""Above this |cosine| an arc is replaced by the straight line, as is customary."""


def slerp_weights(cosine: float, t: float) -> tuple[float, float]:
    """The factors of a and b at fraction t of the arc from a to b (Shoemake, 1985).

    sin((1 - t) W) / sin W  and  sin(t W) / sin W,  with cos W = cosine;  1 - t and t where |cosine| > 0.9995.
    """
    if not abs(cosine) <= ALMOST_PARALLEL:
        return 1.0 - t, t
    angle = math.acos(cosine)
    return math.sin((1.0 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def slerp_fold(gram_NN: Tensor, weights_N: Tensor) -> Tensor:
    """The coefficients of slerp(... slerp(x_1, x_2) ..., x_N), the k-th step at t = w_k / (w_1 + ... + w_k).

    Args:
        gram_NN: (N, N), float64: the inner products of x_1 .. x_N.
        weights_N: (N,), float64, > 0.

    Returns:
        (N,), float64. A vector of length 0 has no direction: it is joined by a straight line.
    """
    coefficients_N = torch.zeros_like(weights_N)
    coefficients_N[0] = 1.0
    for k in range(1, len(weights_N)):
        t = float(weights_N[k] / weights_N[: k + 1].sum())
        so_far_squared = float(coefficients_N @ gram_NN @ coefficients_N)
        product_of_norms = math.sqrt(max(so_far_squared, 0.0) * max(float(gram_NN[k, k]), 0.0))
        cosine = float(gram_NN[k] @ coefficients_N) / product_of_norms if product_of_norms > 0 else 1.0
        keep, add = slerp_weights(cosine, t)
        coefficients_N = coefficients_N * keep
        coefficients_N[k] = add
    return coefficients_N
