"""Scores of elements over all clients, and passes that go by them: `ops.scores` bit for bit, operation by operation.

Suffixes: N clients, B the elements of a block, R rows of scores, L lanes, X blocks of a partial sum, K rows of scratch.
"""

from __future__ import annotations

import numpy as np

from fl_merge.kernels import across, balances, varying
from fl_merge.kernels.blocks import (
    BLOCK,
    MAGNITUDE,
    bits_of,
    bits_of_double,
    by_dtype,
    compiled_part,
    compiled_pass,
    from_bits,
    from_double_bits,
    load_base,
    load_delta,
    load_deltas,
    one_dtype,
    store,
    sum_by_halves,
    sum_of_lanes,
)
from fl_merge.kernels.pairs import PAIR
from fl_merge.kernels.series import EXP2, LEAST, LOG2_E, LOWEST, MANY, ROUNDING, TANH

DELTAS, VARIANCE, BALANCE, DIVIDED = 0, 1, 2, 3
"""What the rows of scores are: the clients' deltas themselves, one row of variances, a balance for each client; the
last again where its numbers divide."""

SCRATCH = 3
"""Rows of scratch beside one for each client."""

LANES, GROUP, SUM_BLOCK = 16, 1024, 16384
"""As `ops.gram` has them."""

_ZERO, _ONE = np.float32(0), np.float32(1)
_ROUNDING, _LOWEST, _LEAST = np.float32(ROUNDING), np.float32(LOWEST), np.float32(LEAST)
_P0, _P1, _P2, _P3, _P4, _P5 = (np.float32(term) for term in EXP2)
_T0, _T1, _T2, _T3, _T4, _T5 = (np.float32(term) for term in TANH)

_find_balances, _add_balanced = by_dtype(balances.finds_balances), by_dtype(balances.adds_balanced)
_find_largest = by_dtype(balances.finds_largest)
in_order = by_dtype(varying.puts_in_order)
_find_variances, _add_squares = by_dtype(varying.finds_variances), by_dtype(varying.adds_varying_squares)


@compiled_part
def natively(codes_N):
    """Whether variances are found as the models are read."""
    return one_dtype(codes_N) and codes_N.size <= MANY


@compiled_part
def _variance_of_rows(rows, stride, count, size, out):
    """Of rows of deltas, with room for a whole last group; so has `out`."""
    if count > MANY:
        across.variance_of_many(rows, stride, count, size, out)
    else:
        across.variance(rows, stride, count, size, out)


@compiled_part
def _load_variances(clients_N, codes_N, start, base_B, work_NB, out_B):
    """`ops.scores.variance` of the elements from `start` on.

    Args:
        work_NB: scratch, contiguous, with room for a whole last group; so has `out_B`.
    """
    size, count, done = base_B.size, clients_N.size, 0
    out = out_B.ctypes.data
    if natively(codes_N):
        done = size - size % PAIR
        _find_variances(codes_N[0], base_B.ctypes.data, clients_N.ctypes.data, start, count, done, out)
    if done < size:
        left = size - done
        for n in range(count):
            load_delta(clients_N[n], codes_N[n], start + done, base_B[done:], work_NB[n, :left])
        # A whole group may be written, the places of which may end behind `out_B`.
        rows, variance_G = work_NB.ctypes.data, np.empty(across.GROUP, np.float32)
        for begin in range(0, left, across.GROUP):
            here = min(across.GROUP, left - begin)
            _variance_of_rows(rows + 4 * begin, 4 * work_NB.shape[1], count, here, variance_G.ctypes.data)
            out_B[done + begin : done + begin + here] = variance_G[:here]


@compiled_part
def load_varying(clients_N, codes_N, start, base_B, cut, delta_NB, variance_B):
    """Deltas of which those of an element are kept whose variance over the clients is above the cut, or just on it if
    it is not behind the place `last`; the others are 0.

    Args:
        cut: threshold, above, last: above is the float32 that follows the threshold.
        delta_NB: contiguous, with room for a whole last group; so has `variance_B`, which is scratch.
    """
    threshold, above, last = cut
    size, count = base_B.size, clients_N.size
    rows, stride, masks = delta_NB.ctypes.data, 4 * delta_NB.shape[1], variance_B.ctypes.data
    load_deltas(clients_N, codes_N, start, base_B, delta_NB)
    _variance_of_rows(rows, stride, count, size, masks)
    for s in range(size):
        variance_B[s] = _ONE if variance_B[s] >= (threshold if start + s <= last else above) else _ZERO
    across.keep_where(rows, stride, count, masks, size)


@compiled_part
def _sum(delta_NB, total_B):
    size = total_B.size
    total_B[:] = delta_NB[0, :size]
    for n in range(1, delta_NB.shape[0]):
        delta_B = delta_NB[n, :size]
        for s in range(size):
            total_B[s] += delta_B[s]


@compiled_part
def _balance(delta_B, total_B, of_size, of_total, divide, decay, out_B):
    """`ops.scores.balance` of one client."""
    for s in range(out_B.size):
        size = delta_B[s] / of_size if divide else delta_B[s] * of_size
        agreement = size * (total_B[s] / of_total if divide else total_B[s] * of_total)
        agreement = agreement if agreement > _ZERO else _ZERO
        exponent = size * size - decay
        exponent = _LOWEST if exponent < _LOWEST else exponent
        moved = exponent + _ROUNDING
        rest = exponent - (moved - _ROUNDING)
        power = rest * _P5 + _P4
        power = power * rest + _P3
        power = power * rest + _P2
        power = power * rest + _P1
        power = power * rest + _P0
        # The last bits of what was moved are the whole part, and the lift.
        power = from_bits(np.uint32(bits_of(power) + np.uint32(bits_of(moved) << np.uint32(23))))
        square = agreement * agreement
        curve = square * _T5 + _T4
        curve = curve * square + _T3
        curve = curve * square + _T2
        curve = curve * square + _T1
        curve = curve * square + _T0
        out_B[s] = power * (agreement * curve)


@compiled_part
def in_registers(codes_N, size, kind, decay):
    """How many of a block's elements `balances` can go through."""
    return size - size % across.GROUP if kind == BALANCE and decay <= -_LOWEST and one_dtype(codes_N) else 0


@compiled_part
def _load_balances(clients_N, codes_N, start, base_B, kind, numbers_2N, first, work_KB, score_NB):
    """The balances of the elements of a block from the one at `first` on; `start` is where the block is."""
    size, count = base_B.size, clients_N.size
    if first == size:
        return
    delta_NB, total_B = work_KB[SCRATCH : SCRATCH + count], work_KB[1, :size]
    for n in range(count):
        load_delta(clients_N[n], codes_N[n], start + first, base_B[first:], delta_NB[n, first:size])
    _sum(delta_NB[:, first:], total_B[first:])
    decay = np.float32(count * LOG2_E)
    for n in range(count):
        numbers = numbers_2N[0, n], numbers_2N[1, n], kind == DIVIDED, decay
        _balance(delta_NB[n, first:size], total_B[first:], *numbers, score_NB[n, first:size])


@compiled_part
def load_scores(base, base_code, clients_N, codes_N, kind, numbers_2N, begin, size, work_KB, score_RB):
    """The scores of `size` elements from `begin` on.

    Args:
        numbers_2N: for BALANCE and DIVIDED: of each client, as `ops.scores.scales`.
        work_KB: SCRATCH rows of scratch, and then one for each client, which takes its deltas (but with DELTAS).
    """
    base_B = work_KB[0, :size]
    load_base(base, base_code, begin, base_B)
    count = clients_N.size
    delta_NB = score_RB[:count] if kind == DELTAS else work_KB[SCRATCH : SCRATCH + count]
    if kind == DELTAS:
        load_deltas(clients_N, codes_N, begin, base_B, delta_NB)
    elif kind == VARIANCE:
        _load_variances(clients_N, codes_N, begin, base_B, delta_NB, score_RB[0])
    else:
        decay = np.float32(count * LOG2_E)
        done = in_registers(codes_N, size, kind, decay)
        bases, models, numbers = base_B.ctypes.data, clients_N.ctypes.data, numbers_2N.ctypes.data
        scratch, scores, stride = delta_NB.ctypes.data, score_RB.ctypes.data, 4 * score_RB.shape[1]
        _find_balances(codes_N[0], bases, models, begin, count, numbers, decay, done, scratch, scores, stride)
        _load_balances(clients_N, codes_N, begin, base_B, kind, numbers_2N, done, work_KB, score_RB)


@compiled_part
def _largest_of_block(delta_B, total_B):
    """The bits of the largest magnitude, and of the largest product."""
    largest, product = np.uint32(0), np.uint64(0)
    for s in range(delta_B.size):
        largest = max(largest, np.uint32(bits_of(delta_B[s]) & MAGNITUDE))
        bits = bits_of_double(np.float64(delta_B[s]) * np.float64(total_B[s]))
        product = max(product, bits & np.uint64(0x7FFFFFFFFFFFFFFF))
    return largest, product


@compiled_pass
def largest_of_products(base, base_code, clients_N, codes_N, start, stop, largest_N, product_N):
    """The bits of the largest magnitudes of each client's deltas, in float32, and of their products with the sum of all
    deltas, in float64.

    A product is worked out in float64 only where it may be a new largest one: in blocks in which its float32 is not
    below that of the largest one so far.
    """
    count = clients_N.size
    base_store, total_store = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    delta_NB, found_2NL = np.empty((count, BLOCK), np.float32), np.zeros((2, count, LANES), np.uint32)
    scratch, found = delta_NB.ctypes.data, found_2NL.ctypes.data
    known_N = np.zeros(count, np.uint32)
    alike = one_dtype(codes_N)
    for begin in range(start, stop, BLOCK):
        size = min(BLOCK, stop - begin)
        base_B, total_B = base_store[:size], total_store[:size]
        load_base(base, base_code, begin, base_B)
        done = size - size % across.GROUP if alike else 0
        _find_largest(codes_N[0], base_B.ctypes.data, clients_N.ctypes.data, begin, count, done, scratch, found)
        loaded = False
        for n in range(count):
            moved = found_2NL[0, n].max()
            if done == size and (moved == 0 or found_2NL[1, n].max() < known_N[n]):
                continue
            if not loaded:
                load_deltas(clients_N, codes_N, begin, base_B, delta_NB)
                _sum(delta_NB, total_B)
                loaded = True
            largest, product = _largest_of_block(delta_NB[n, :size], total_B)
            largest_N[n], product_N[n] = max(largest_N[n], largest, moved), max(product_N[n], product)
            known_N[n] = bits_of(np.float32(from_double_bits(product_N[n])))
            found_2NL[1, n] = 0
    for n in range(count):
        largest_N[n] = max(largest_N[n], found_2NL[0, n].max())


@compiled_pass
def kept_squares(base, base_code, clients_N, codes_N, threshold, above, last, start, stop, out_XN):
    """Sums of squares of each client's deltas where the variance is above the cut, as `ops.gram.sums_of_squares`.

    Args:
        threshold, above, last: the cut, the float32 that follows it, and the last element just on it that is kept.
        start, stop: from a multiple of 16384 on.
    """
    count, native = clients_N.size, natively(codes_N)
    base_store, variance_store = np.empty(GROUP, np.float32), np.empty(GROUP, np.float32)
    delta_NB, sum_NL = np.zeros((count, GROUP), np.float32), np.empty((count, LANES), np.float64)
    bases, models = base_store.ctypes.data, clients_N.ctypes.data
    rows, sums = delta_NB.ctypes.data, sum_NL.ctypes.data
    cut = threshold, above, last
    group_NG = np.zeros((count, SUM_BLOCK // GROUP), np.float64)
    for x in range(out_XN.shape[0]):
        first = start + x * SUM_BLOCK
        end = min(first + SUM_BLOCK, stop)
        groups = (end - first + GROUP - 1) // GROUP
        for g in range(groups):
            sum_NL[:] = 0.0
            begin = first + g * GROUP
            size, done = min(GROUP, end - begin), 0
            base_B = base_store[:size]
            load_base(base, base_code, begin, base_B)
            if native and not begin <= last < begin + size - 1:
                done, limit = size - size % across.GROUP, threshold if begin <= last else above
                _add_squares(codes_N[0], bases, models, begin, count, limit, done, rows, sums)
                in_order(codes_N[0], sums, count)
            if done < size:
                left = size - done
                load_varying(clients_N, codes_N, begin + done, base_B[done:], cut, delta_NB, variance_store)
                delta_NB[:, left : left + LANES] = 0.0
                for n in range(count):
                    across.add_squares(rows + 4 * GROUP * n, left, sums + 8 * LANES * n)
            for n in range(count):
                group_NG[n, g] = sum_of_lanes(sum_NL[n])
        for n in range(count):
            out_XN[x, n] = sum_by_halves(group_NG[n], groups)


@compiled_part
def _add_kept(clients_N, numbers, cuts, start, first, base_B, work_KB, score_NB):
    """The sum of the deltas, each times its share in the balances above their cuts, of the elements of a block from the
    one at `first` on: goes to the third row of scratch."""
    codes_N, kind, numbers_2N = numbers
    thresholds_N, above_N, last_N = cuts
    size = base_B.size
    _load_balances(clients_N, codes_N, start, base_B, kind, numbers_2N, first, work_KB, score_NB)
    total_B, value_B = work_KB[1, first:size], work_KB[2, first:size]
    total_B[:] = _ZERO
    for n in range(clients_N.size):
        score_B = score_NB[n, first:size]
        for s in range(score_B.size):
            limit = thresholds_N[n] if start + first + s <= last_N[n] else above_N[n]
            score_B[s] = score_B[s] if score_B[s] >= limit else _ZERO
            total_B[s] += score_B[s]
    value_B[:] = -_ZERO
    for s in range(total_B.size):
        some, total = total_B[s] >= _LEAST, total_B[s]
        factor = _ONE / total if some else _ZERO
        for n in range(clients_N.size):
            score = score_NB[n, first + s]
            share = _ONE if some and score == total else score * factor
            value_B[s] += share * work_KB[SCRATCH + n, first + s]


@compiled_pass
def combine_balanced(
    base,
    base_code,
    clients_N,
    codes_N,
    kind,
    numbers_2N,
    thresholds_N,
    above_N,
    last_N,
    scale,
    start,
    stop,
    out,
    out_code,
):
    """base + scale * the mean of the deltas, each weighed by its balance where that is above its client's cut.

    Args:
        kind, numbers_2N: as for `load_scores`.

    Returns:
        The bits of the largest float32 magnitude in it.
    """
    count = clients_N.size
    work_KB, score_NB = np.empty((SCRATCH + count, BLOCK), np.float32), np.empty((count, BLOCK), np.float32)
    limit_N, decay = np.empty(count, np.float32), np.float32(count * LOG2_E)
    models, numbers, limits = clients_N.ctypes.data, numbers_2N.ctypes.data, limit_N.ctypes.data
    bases = work_KB.ctypes.data
    values, scratch = bases + 4 * BLOCK * 2, bases + 4 * BLOCK * SCRATCH
    largest = np.uint32(0)
    for begin in range(start, stop, BLOCK):
        size = min(BLOCK, stop - begin)
        base_B, value_B = work_KB[0, :size], work_KB[2, :size]
        load_base(base, base_code, begin, base_B)
        done = in_registers(codes_N, size, kind, decay)
        for n in range(count):
            limit_N[n] = thresholds_N[n] if begin <= last_N[n] else above_N[n]
            if begin <= last_N[n] < begin + size - 1:
                done = 0
        _add_balanced(codes_N[0], bases, models, begin, count, numbers, decay, limits, done, scratch, values)
        if done < size:
            of_balances, cuts = (codes_N, kind, numbers_2N), (thresholds_N, above_N, last_N)
            _add_kept(clients_N, of_balances, cuts, begin, done, base_B, work_KB, score_NB)
        for s in range(size):
            value_B[s] = base_B[s] + value_B[s] * scale
        largest = max(largest, store(value_B, out, out_code, begin))
    return largest
