"""Scores by which elements are chosen over all clients at once. Suffixes: N clients, S elements."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fl_merge.ops.combine import weighted_sum

_LOWEST = -120.0
_LOG2_E, _LN2_HIGH, _LN2_LOW = 1.44269504, 0.693359375, -2.12194440e-4
"""Of log(2) the first has so few bits that its products with whole numbers are exact."""

_ROUNDING = {torch.float32: 1.5 * 2.0**23, torch.float64: 1.5 * 2.0**52}
"""Added and subtracted again, this rounds to whole numbers."""

_TERMS = {torch.float32: 7, torch.float64: 14}
"""Of the series of exp."""


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


def balance(deltas_NS: Tensor, largest_N: Tensor, largest_product_N: Tensor) -> Tensor:
    """How much each client's element counts: its size within the client, times its agreement with all clients.

    exp(N (a_i^2 - 1)) * tanh(b_i), not below 0, with a_i = |tau_i| / max |tau_i| and b_i = tau_i sum_j tau_j as a part
    of its largest magnitude (Du et al., 2024, arXiv:2410.02396).

    Args:
        deltas_NS: (N, S), a floating dtype.
        largest_N, largest_product_N: (N,), float64: over the whole tensor, of |tau_i| and of |tau_i sum_j tau_j|.
    """
    largest_N, typical_N = scales(largest_N, largest_product_N, deltas_NS.dtype)
    size_NS = deltas_NS / largest_N.to(deltas_NS.device)[:, None]
    agreement_NS = size_NS * (_total(deltas_NS) / typical_N.to(deltas_NS.device)[:, None])
    agreement_NS = torch.where(agreement_NS <= 0, 0.0, agreement_NS)
    return _exp((size_NS * size_NS - 1.0) * len(deltas_NS)) * _tanh(agreement_NS)


def scales(largest_N: Tensor, largest_product_N: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What deltas and their sum are divided by, so that the product's largest magnitude is 1; 1 in place of 0.

    Args:
        largest_N, largest_product_N: as for `balance`.
        dtype: of the two that come out, (N,).
    """
    largest_N = torch.where(largest_N.to(dtype) > 0, largest_N, 1.0)
    typical_N = (largest_product_N / largest_N).to(dtype)
    return largest_N.to(dtype), torch.where(typical_N > 0, typical_N, 1.0)


def products(deltas_NS: Tensor) -> Tensor:
    """tau_i sum_j tau_j, (N, S), float64: those of float32 fit it, however large or small."""
    return deltas_NS.double() * _total(deltas_NS)


def _total(deltas_NS: Tensor) -> Tensor:
    return weighted_sum(deltas_NS, torch.ones(len(deltas_NS), dtype=torch.float64))


# The same operations in the same order everywhere: how the library's functions round depends on where a slice begins,
# and on the machine.


def _exp(values: Tensor) -> Tensor:
    """exp of numbers up to 0, and exp(-120) of those below -120 (0 in float32): 2^k exp(r), |r| <= log(2) / 2."""
    values = torch.where(values < _LOWEST, _LOWEST, values)
    whole = (values * _LOG2_E + _ROUNDING[values.dtype]) - _ROUNDING[values.dtype]
    rest = (values - whole * _LN2_HIGH) - whole * _LN2_LOW
    terms = _TERMS[values.dtype]
    power = rest * (1 / math.factorial(terms)) + 1 / math.factorial(terms - 1)
    for term in range(terms - 2, -1, -1):
        power = power * rest + 1 / math.factorial(term)
    steps = whole.to(torch.int32)
    half = steps >> 1
    return power * _power_of_2(half, values.dtype) * _power_of_2(steps - half, values.dtype)


def _power_of_2(exponents: Tensor, dtype: torch.dtype) -> Tensor:
    """2^k as the bits of the dtype; k is within its normal range."""
    if dtype == torch.float64:
        return (exponents.long() + 1023 << 52).view(dtype)
    return (exponents + 127 << 23).view(dtype)


def _tanh(values: Tensor) -> Tensor:
    """tanh of numbers from 0 to 1, by Lambert's continued fraction: correct to 1e-10."""
    square = values * values
    above = ((square + 378.0) * square + 17325.0) * square + 135135.0
    below = ((square * 28.0 + 3150.0) * square + 62370.0) * square + 135135.0
    return values * above / below
