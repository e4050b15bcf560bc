"""Scores by which elements are chosen over all clients at once. Suffixes: N clients, S elements."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fl_merge.kernels.series import EXP2, LEAST, LIFT, LOG2_E, LOWEST, MANY, ROUNDING, TANH
from fl_merge.ops.combine import weighted_sum

_TERMS = tuple(math.log(2) ** power / math.factorial(power) for power in range(15))
"""Of the series of 2^x in float64."""


def variance(deltas_NS: Tensor) -> Tensor:
    """The variance of each element over the clients (population), added in the clients' order.

    It is that of their differences from the first client, so that it is 0 where all are equal. Their sum of squares is
    at most N + 1 times what is left when that of the mean is taken from it: with MANY clients that costs a few bits;
    with more, the mean is taken from each before it is squared.

    Args:
        deltas_NS: (N, S), a floating dtype.
    """
    count = len(deltas_NS)
    sum_S = torch.zeros_like(deltas_NS[0])
    for delta_S in deltas_NS[1:]:
        sum_S = sum_S + (delta_S - deltas_NS[0])
    mean_S = sum_S / count if count > MANY else torch.zeros_like(sum_S)
    square_S = mean_S * mean_S
    for delta_S in deltas_NS[1:]:
        apart_S = (delta_S - deltas_NS[0]) - mean_S
        square_S = square_S + apart_S * apart_S
    if count > MANY:
        return square_S / count
    inverse = torch.tensor(1.0, dtype=deltas_NS.dtype) / count
    common_S = sum_S * (sum_S * inverse)
    left_S = square_S - common_S
    left_S = torch.where(left_S > 0, left_S, 0.0)
    return torch.where(common_S < math.inf, left_S, math.inf) * inverse


def balance(deltas_NS: Tensor, largest_N: Tensor, largest_product_N: Tensor) -> Tensor:
    """How much each client's element counts: its size within the client, times its agreement with all clients.

    exp(N (a_i^2 - 1)) * tanh(b_i), not below 0, with a_i = |tau_i| / max |tau_i| and b_i = tau_i sum_j tau_j as a part
    of its largest magnitude (Du et al., 2024, arXiv:2410.02396); times some 2^82 (float64: 2^64), which changes neither
    their order nor their proportions, and with which float32 has those of many clients.

    Args:
        deltas_NS: (N, S), a floating dtype.
        largest_N, largest_product_N: (N,), float64: over the whole tensor, of |tau_i| and of |tau_i sum_j tau_j|.
    """
    count = len(deltas_NS)
    numbers_2N, divide = scales(largest_N, largest_product_N, deltas_NS.dtype)
    of_size_N1, of_total_N1 = numbers_2N.to(deltas_NS.device)[:, :, None].unbind()
    total_S = _total(deltas_NS)
    size_NS = deltas_NS / of_size_N1 if divide else deltas_NS * of_size_N1
    agreement_NS = size_NS * (total_S / of_total_N1 if divide else total_S * of_total_N1)
    agreement_NS = torch.where(agreement_NS > 0, agreement_NS, 0.0)
    return _lifted_power_of_2(size_NS * size_NS - count * LOG2_E) * _tanh(agreement_NS)


def scales(largest_N: Tensor, largest_product_N: Tensor, dtype: torch.dtype) -> tuple[Tensor, bool]:
    """What multiplies deltas, so that the largest is sqrt(N log2(e)), and their sum, so that the largest product of the
    two is 1; of what is 0 everywhere nothing is wanted.

    Args:
        largest_N, largest_product_N: as for `balance`.
        dtype: of the numbers.

    Returns:
        (2, N), and False; or, if these are not all normal numbers of the dtype, what divides, and True.
    """
    root = math.sqrt(len(largest_N) * LOG2_E)
    largest_N = torch.where(largest_N.to(dtype) > 0, largest_N, 1.0)
    typical_N = largest_product_N / largest_N
    typical_N = torch.where(typical_N.to(dtype) > 0, typical_N, 1.0)
    divisors_2N = torch.stack([largest_N / root, typical_N * root])
    factors_2N, normal = 1.0 / divisors_2N, torch.finfo(dtype)
    if bool(((factors_2N >= normal.tiny) & (factors_2N <= normal.max)).all()):
        return factors_2N.to(dtype), False
    return divisors_2N.to(dtype), True


def shares(balances_NS: Tensor) -> Tensor:
    """Each client's part in the sum over all, exactly 1 where it is alone; 0 where the sum is 0 (or below 2^-180 of the
    largest that a balance may be)."""
    total_S = weighted_sum(balances_NS, torch.ones(len(balances_NS), dtype=torch.float64))
    some_S = total_S >= LEAST
    factor_S = torch.where(some_S, 1.0 / total_S, 0.0)
    return torch.where(some_S & (balances_NS == total_S), 1.0, balances_NS * factor_S)


def products(deltas_NS: Tensor) -> Tensor:
    """tau_i sum_j tau_j, (N, S), float64: those of float32 fit it, however large or small."""
    return deltas_NS.double() * _total(deltas_NS)


def _total(deltas_NS: Tensor) -> Tensor:
    return weighted_sum(deltas_NS, torch.ones(len(deltas_NS), dtype=torch.float64))


# The same operations in the same order everywhere: how the library's functions round depends on where a slice begins,
# and on the machine.


def _lifted_power_of_2(values: Tensor) -> Tensor:
    """2^(x + 64) of numbers up to 0 and a little more, times a number; those below -188 count as -188."""
    values = torch.where(values < LOWEST, LOWEST, values)
    wide = values.dtype == torch.float64
    rounding = 1.5 * 2.0**52 if wide else ROUNDING - LIFT
    whole = (values + rounding) - rounding
    power = _polynomial(values - whole, _TERMS if wide else EXP2)
    if wide:
        return (power.view(torch.int64) + (whole.long() + LIFT) * (1 << 52)).view(values.dtype)
    return (power.view(torch.int32) + (whole.int() + LIFT) * (1 << 23)).view(values.dtype)


def _tanh(values: Tensor) -> Tensor:
    """tanh of numbers from 0 to 1, times a number; in float64 by Lambert's continued fraction, correct to 1e-10."""
    square = values * values
    if values.dtype == torch.float64:
        above = ((square + 378.0) * square + 17325.0) * square + 135135.0
        below = ((square * 28.0 + 3150.0) * square + 62370.0) * square + 135135.0
        return values * above / below
    return values * _polynomial(square, TANH)


def _polynomial(values: Tensor, terms: tuple[float, ...]) -> Tensor:
    """By Horner's rule, from the highest term on."""
    found = values * terms[-1] + terms[-2]
    for term in reversed(terms[:-2]):
        found = found * values + term
    return found
