"""Sums over clients. Suffixes: N clients, S elements."""

from __future__ import annotations

import torch
from torch import Tensor


def weighted_sum(deltas_NS: Tensor, weights_N: Tensor) -> Tensor:
    """Sum over clients of weights_N[i] * deltas_NS[i], added in the clients' order.

    Each product is rounded before it is added, so that an element's result does not depend on where a slice of the
    tensor begins or ends (a fused multiply-add in the vectorised part of a loop only would make it so).

    Args:
        deltas_NS: (N, S), a floating dtype.
        weights_N: (N,), float64.

    Returns:
        (S,), in the dtype of the deltas.
    """
    total_S = deltas_NS[0] * float(weights_N[0])
    for delta_S, weight in zip(deltas_NS[1:], weights_N[1:].tolist(), strict=True):
        total_S += delta_S * weight
    return total_S


def by_share(deltas_NRC: Tensor, weights_N: Tensor) -> Tensor:
    """Each delta times N times the client's share: equal shares change nothing. Args and Returns: as `weighted_sum`."""
    factors_N = (len(weights_N) * weights_N).to(deltas_NRC.device, deltas_NRC.dtype)
    return deltas_NRC * factors_N.reshape(-1, *[1] * (deltas_NRC.dim() - 1))


def disjoint_mean(deltas_NS: Tensor, weights_N: Tensor, sign_S: Tensor) -> Tensor:
    """Weighted mean, element by element, over the clients that have the elected sign; 0 where there are none.

    sum_i [sign(w_i delta_i) = sign] w_i delta_i / sum_i [sign(w_i delta_i) = sign] w_i      (Yadav et al., 2023)

    Args:
        deltas_NS: (N, S), a floating dtype.
        weights_N: (N,), float64. With negative ones among them, what they are divided by may cancel: where less than
            1e-6 of it is left the sum is not divided at all.
        sign_S: (S,), -1, 0 or 1.

    Returns:
        (S,), in the dtype of the deltas.
    """
    agrees_NS = _agreement(deltas_NS, weights_N, sign_S)
    total_S = _agreed_sum(agrees_NS, deltas_NS, weights_N)
    share_S = weighted_sum(agrees_NS.to(deltas_NS.dtype), weights_N)
    if (weights_N < 0).any():
        whole_S = weighted_sum(agrees_NS.to(deltas_NS.dtype), weights_N.abs())
        return torch.where(share_S.abs() > 1e-6 * whole_S, total_S / share_S, total_S)
    return torch.where(share_S > 0, total_S / share_S, 0.0)


def disjoint_sum(deltas_NS: Tensor, weights_N: Tensor, sign_S: Tensor) -> Tensor:
    """Weighted sum, element by element, over the clients that have the elected sign.

    Args and Returns: as `disjoint_mean`.
    """
    return _agreed_sum(_agreement(deltas_NS, weights_N, sign_S), deltas_NS, weights_N)


def _agreed_sum(agrees_NS: Tensor, deltas_NS: Tensor, weights_N: Tensor) -> Tensor:
    """The weighted sum of those that agree; of products that are all too small for the dtype it is 0, and not -0."""
    return weighted_sum(torch.where(agrees_NS, deltas_NS, 0.0), weights_N) + 0.0


def directed(deltas_NS: Tensor, weights_N: Tensor) -> Tensor:
    """The deltas turned the way in which their weights take them: those of negative weights with the other sign."""
    negative_N = (weights_N < 0).to(deltas_NS.device)
    return torch.where(negative_N[:, None], -deltas_NS, deltas_NS) if negative_N.any() else deltas_NS


def _agreement(deltas_NS: Tensor, weights_N: Tensor, sign_S: Tensor) -> Tensor:
    return (directed(deltas_NS, weights_N).sign() == sign_S) & (sign_S != 0)


def add_scaled_delta(total_S: Tensor, base_S: Tensor, client_S: Tensor, coefficient: float | Tensor) -> None:
    """total_S += (client_S - base_S) * coefficient, in place: a sum over clients is run one client at a time.

    Args:
        total_S, base_S: (S,), float64.
        client_S: (S,), a floating dtype.
        coefficient: of this client; (S,) float64 where each element has its own.
    """
    delta_S = client_S.to(total_S.device, torch.float64) - base_S
    total_S += delta_S.mul_(coefficient)
