"""Scores by which elements are chosen over all clients at once. Suffixes: N clients, S elements."""

from __future__ import annotations

import torch
from torch import Tensor

from fl_merge.ops.combine import weighted_sum


def variance(deltas_NS: Tensor) -> Tensor:
    """The variance of each element over the clients (population), added in the clients' order.

    It is that of their differences from the first client, so that it is 0 where all are equal.

    Args:
        deltas_NS: (N, S), a floating dtype.
    """
    count = len(deltas_NS)
    sum_S = torch.zeros_like(deltas_NS[0])
    for delta_S in deltas_NS[1:]:
        sum_S = sum_S + (delta_S - deltas_NS[0])
    mean_S = sum_S / count
    total_S = mean_S * mean_S
    for delta_S in deltas_NS[1:]:
        apart_S = (delta_S - deltas_NS[0]) - mean_S
        total_S = total_S + apart_S * apart_S
    return total_S / count


def relative(values_NS: Tensor, largest_N: Tensor) -> Tensor:
    """The values as parts of the largest one; 0 where that is 0.

    Args:
        values_NS: (N, S), a floating dtype.
        largest_N: (N,), float64, >= 0.
    """
    divisor_N = torch.where(largest_N > 0, largest_N, 1.0).to(values_NS.device, values_NS.dtype)
    return values_NS / divisor_N[:, None]


def balance(deltas_NS: Tensor, largest_N: Tensor, largest_product_N: Tensor) -> Tensor:
    """How much each client's element counts: its size within the client, times its agreement with all clients.

    exp(N (a_i^2 - 1)) * tanh(b_i), not below 0, with a_i = |tau_i| / max |tau_i| and b_i = tau_i sum_j tau_j as a part
    of its largest magnitude (Du et al., 2024, arXiv:2410.02396).

    Args:
        deltas_NS: (N, S), a floating dtype.
        largest_N, largest_product_N: (N,), float64: over the whole tensor, of |tau_i| and of |tau_i sum_j tau_j|.
    """
    count = len(deltas_NS)
    size_NS = relative(deltas_NS, largest_N)
    agreement_NS = relative(products(deltas_NS), largest_product_N)
    # In float64, and rounded: how the functions of float32 round depends on where a slice begins.
    inner_NS = ((size_NS * size_NS).double() - 1).mul_(count).exp_()
    return inner_NS.mul_(agreement_NS.double().tanh_()).clamp_(min=0.0).to(deltas_NS.dtype)


def products(deltas_NS: Tensor) -> Tensor:
    """tau_i sum_j tau_j, (N, S)."""
    return deltas_NS * weighted_sum(deltas_NS, torch.ones(len(deltas_NS), dtype=torch.float64))
