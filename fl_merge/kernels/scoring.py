"""Scores of elements over all clients, and passes that go by them: `ops.scores` bit for bit, operation by operation.

Suffixes: N clients, B the elements of a block, R rows of scores, L lanes, X blocks of a partial sum, K rows of scratch.
"""

from __future__ import annotations

import numpy as np

from fl_merge.kernels import across
from fl_merge.kernels.blocks import (
    BLOCK,
    MAGNITUDE,
    bits_of,
    bits_of_double,
    by_dtype,
    compiled_part,
    compiled_pass,
    from_bits,
    load,
    load_delta,
    load_deltas,
    one_dtype,
    store,
)

DELTAS, VARIANCE, BALANCE = 0, 1, 2
"""What the rows of scores are: the clients' deltas themselves, one row of variances, a balance for each client."""

STEP = 256
"""Elements of all clients that passes by variance work on at a time."""

SCRATCH = 3
"""Rows of scratch beside one for each client."""

LANES, GROUP, SUM_BLOCK = 16, 1024, 16384
"""As `ops.gram` has them."""

_ZERO, _ONE = np.float32(0), np.float32(1)

_LOG2_E, _LN2_HIGH, _LN2_LOW = np.float32(1.44269504), np.float32(0.693359375), np.float32(-2.12194440e-4)
_ROUNDING, _LOWEST = np.float32(12582912.0), np.float32(-120.0)
_BIASED = np.uint32(0x4B400000 - 2 * 127)
"""The bits of `_ROUNDING`, less the exponents of two numbers between 1 and 2."""

_E1, _E2, _E3 = np.float32(1 / 5040), np.float32(1 / 720), np.float32(1 / 120)
_E4, _E5, _E6 = np.float32(1 / 24), np.float32(1 / 6), np.float32(1 / 2)
_T0, _T1, _T2 = np.float32(135135), np.float32(17325), np.float32(378)
_U1, _U2, _U3 = np.float32(62370), np.float32(3150), np.float32(28)


_variances, _load_kept = (by_dtype(across.loads_varying, kept=kept) for kept in (False, True))


@compiled_part
def _load_variances(clients_N, codes_N, start, base_B, work_NB, out_B):
    """`ops.scores.variance` of the elements from `start` on.

    Args:
        work_NB: scratch, contiguous, with room for a whole last group; so has `out_B`.
    """
    size, count, done = base_B.size, clients_N.size, 0
    rows, out = work_NB.ctypes.data, out_B.ctypes.data
    if one_dtype(codes_N):
        done = size - size % across.GROUP
        bases, models = base_B.ctypes.data, clients_N.ctypes.data
        _variances(codes_N[0], bases, models, start, count, _ZERO, done, rows, 4 * across.GROUP, out)
    if done < size:
        for n in range(count):
            load_delta(clients_N[n], codes_N[n], start + done, base_B[done:], work_NB[n, done:size])
        across.variance(rows + 4 * done, 4 * work_NB.shape[1], count, size - done, out + 4 * done)


@compiled_part
def load_varying(clients_N, codes_N, start, base_B, cut, delta_NB, variance_B):
    """Deltas of which those of an element are kept whose variance over the clients is above the cut, or just on it if
    it is not behind the place `last`; the others are 0.

    Args:
        cut: threshold, above, last: above is the float32 that follows the threshold.
        delta_NB: contiguous, with room for a whole last group; so has `variance_B`, which is scratch.
    """
    threshold, above, last = cut
    size, count, done = base_B.size, clients_N.size, 0
    rows, stride = delta_NB.ctypes.data, 4 * delta_NB.shape[1]
    before = min(max(last + 1 - start, 0), size)
    if one_dtype(codes_N) and before in (0, size):
        done = size - size % across.GROUP
        bases, models = base_B.ctypes.data, clients_N.ctypes.data
        limit = threshold if before else above
        _load_kept(codes_N[0], bases, models, start, count, limit, done, rows, stride, rows)
    if done < size:
        for n in range(count):
            load_delta(clients_N[n], codes_N[n], start + done, base_B[done:], delta_NB[n, done:size])
        masks = variance_B.ctypes.data + 4 * done
        across.variance(rows + 4 * done, stride, count, size - done, masks)
        for s in range(done, size):
            variance_B[s] = _ONE if variance_B[s] >= (threshold if s < before else above) else _ZERO
        across.keep_where(rows + 4 * done, stride, count, masks, size - done)


@compiled_part
def _sum(delta_NB, total_B):
    size = total_B.size
    total_B[:] = delta_NB[0, :size]
    for n in range(1, delta_NB.shape[0]):
        delta_B = delta_NB[n, :size]
        for s in range(size):
            total_B[s] += delta_B[s]


@compiled_part
def _balance(delta_B, total_B, largest, typical, count, out_B):
    """`ops.scores.balance` of one client."""
    for s in range(out_B.size):
        size = delta_B[s] / largest
        agreement = size * (total_B[s] / typical)
        agreement = _ZERO if agreement <= _ZERO else agreement
        inner = (size * size - _ONE) * count
        inner = _LOWEST if inner < _LOWEST else inner
        moved = inner * _LOG2_E + _ROUNDING
        whole = moved - _ROUNDING
        rest = (inner - whole * _LN2_HIGH) - whole * _LN2_LOW
        power = rest * _E1 + _E2
        power = power * rest + _E3
        power = power * rest + _E4
        power = power * rest + _E5
        power = power * rest + _E6
        power = power * rest + _ONE
        power = power * rest + _ONE
        # The exponents of two powers of 2, which need not be normal numbers together: that of `whole` is in its bits.
        exponents = np.uint32(bits_of(moved) - _BIASED)
        half = np.uint32(exponents >> np.uint32(1))
        power = power * from_bits(np.uint32(half << np.uint32(23)))
        power = power * from_bits(np.uint32(np.uint32(exponents - half) << np.uint32(23)))
        square = agreement * agreement
        above = ((square + _T2) * square + _T1) * square + _T0
        below = ((square * _U3 + _U2) * square + _U1) * square + _T0
        out_B[s] = power * (agreement * above / below)


@compiled_part
def load_scores(base, base_code, clients_N, codes_N, kind, numbers_2N, begin, size, work_KB, score_RB):
    """The scores of `size` elements from `begin` on.

    Args:
        numbers_2N: for BALANCE: of each client, as `ops.scores.scales`.
        work_KB: SCRATCH rows of scratch, and then one for each client, which takes its deltas (but with DELTAS).
    """
    base_B = work_KB[0, :size]
    load(base, base_code, begin, base_B)
    count = clients_N.size
    delta_NB = score_RB[:count] if kind == DELTAS else work_KB[SCRATCH : SCRATCH + count]
    if kind == VARIANCE:
        _load_variances(clients_N, codes_N, begin, base_B, delta_NB, score_RB[0])
        return
    load_deltas(clients_N, codes_N, begin, base_B, delta_NB)
    if kind == BALANCE:
        total_B, number = work_KB[1, :size], np.float32(count)
        _sum(delta_NB, total_B)
        for n in range(count):
            _balance(delta_NB[n, :size], total_B, numbers_2N[0, n], numbers_2N[1, n], number, score_RB[n, :size])


@compiled_pass
def largest_of_products(base, base_code, clients_N, codes_N, start, stop, largest_N, product_N):
    """The bits of the largest magnitudes of each client's deltas, in float32, and of their products with the sum of all
    deltas, in float64."""
    count = clients_N.size
    base_store, total_store = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    delta_NB = np.empty((count, BLOCK), np.float32)
    for begin in range(start, stop, BLOCK):
        size = min(BLOCK, stop - begin)
        base_B, total_B = base_store[:size], total_store[:size]
        load(base, base_code, begin, base_B)
        load_deltas(clients_N, codes_N, begin, base_B, delta_NB)
        _sum(delta_NB, total_B)
        for n in range(count):
            delta_B = delta_NB[n, :size]
            largest, product = largest_N[n], product_N[n]
            for s in range(size):
                largest = max(largest, np.uint32(bits_of(delta_B[s]) & MAGNITUDE))
                bits = bits_of_double(np.float64(delta_B[s]) * np.float64(total_B[s]))
                product = max(product, bits & np.uint64(0x7FFFFFFFFFFFFFFF))
            largest_N[n], product_N[n] = largest, product


@compiled_pass
def kept_squares(base, base_code, clients_N, codes_N, threshold, above, last, start, stop, out_XN):
    """Sums of squares of each client's deltas where the variance is above the cut, as `ops.gram.sums_of_squares`.

    Args:
        threshold, above, last: the cut, the float32 that follows it, and the last element just on it that is kept.
        start, stop: from a multiple of 16384 on.
    """
    count = clients_N.size
    base_store, variance_store = np.empty(STEP, np.float32), np.empty(STEP, np.float32)
    delta_NB, sum_NL = np.zeros((count, STEP), np.float32), np.empty((count, LANES), np.float64)
    rows, sums = delta_NB.ctypes.data, sum_NL.ctypes.data
    cut = threshold, above, last
    group_NG = np.zeros((count, SUM_BLOCK // GROUP), np.float64)
    for x in range(out_XN.shape[0]):
        first = start + x * SUM_BLOCK
        end = min(first + SUM_BLOCK, stop)
        groups = (end - first + GROUP - 1) // GROUP
        for g in range(groups):
            sum_NL[:] = 0.0
            for begin in range(first + g * GROUP, min(first + (g + 1) * GROUP, end), STEP):
                size = min(STEP, end - begin)
                base_B = base_store[:size]
                load(base, base_code, begin, base_B)
                load_varying(clients_N, codes_N, begin, base_B, cut, delta_NB, variance_store)
                end_of_lanes = (size + LANES - 1) // LANES * LANES
                if end_of_lanes > size:
                    delta_NB[:, size:end_of_lanes] = 0.0
                for n in range(count):
                    across.add_squares(rows + 4 * STEP * n, size, sums + 8 * LANES * n)
            for n in range(count):
                sum_L = sum_NL[n]
                for half in (8, 4, 2, 1):
                    for lane in range(half):
                        sum_L[lane] += sum_L[lane + half]
                group_NG[n, g] = sum_L[0]
        for n in range(count):
            left = groups
            while left > 1:
                for g in range(left // 2):
                    group_NG[n, g] = group_NG[n, 2 * g] + group_NG[n, 2 * g + 1]
                if left % 2:
                    group_NG[n, left // 2] = group_NG[n, left - 1]
                left = (left + 1) // 2
            out_XN[x, n] = group_NG[n, 0]


@compiled_pass
def combine_balanced(
    base, base_code, clients_N, codes_N, numbers_2N, thresholds_N, above_N, last_N, scale, start, stop, out, out_code
):
    """base + scale * the mean of the deltas, each weighed by its balance where that is above its client's cut.

    Returns:
        The bits of the largest float32 magnitude in it.
    """
    count = clients_N.size
    work_KB, score_NB = np.empty((SCRATCH + count, BLOCK), np.float32), np.empty((count, BLOCK), np.float32)
    largest = np.uint32(0)
    for begin in range(start, stop, BLOCK):
        size = min(BLOCK, stop - begin)
        load_scores(base, base_code, clients_N, codes_N, BALANCE, numbers_2N, begin, size, work_KB, score_NB)
        base_B, total_B, value_B = work_KB[0, :size], work_KB[1, :size], work_KB[2, :size]
        total_B[:] = _ZERO
        for n in range(count):
            score_B, threshold, above = score_NB[n, :size], thresholds_N[n], above_N[n]
            before = min(max(last_N[n] + 1 - begin, 0), size)
            head_B, tail_B = score_B[:before], score_B[before:]
            for s in range(head_B.size):
                head_B[s] = head_B[s] if head_B[s] >= threshold else _ZERO
            for s in range(tail_B.size):
                tail_B[s] = tail_B[s] if tail_B[s] >= above else _ZERO
            for s in range(size):
                total_B[s] += score_B[s]
        for s in range(size):
            total_B[s] = total_B[s] if total_B[s] > _ZERO else _ONE
        value_B[:] = -_ZERO
        for n in range(count):
            score_B, delta_B = score_NB[n, :size], work_KB[SCRATCH + n, :size]
            for s in range(size):
                value_B[s] += (score_B[s] / total_B[s]) * delta_B[s]
        for s in range(size):
            value_B[s] = base_B[s] + value_B[s] * scale
        largest = max(largest, store(value_B, out, out_code, begin))
    return largest
