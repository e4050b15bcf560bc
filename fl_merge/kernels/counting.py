"""Compiled passes that find out which elements are the largest, by counting. Magnitudes are compared as the bits of
float32, which have their order. What is compared are rows of scores (`scoring.load_scores`): the clients' deltas, or
numbers made of them. Suffixes: N clients, S elements of a piece, B of a block, M of a sample, R rows, P runs, K bins.
"""

from __future__ import annotations

import numpy as np
from numba import carray

from fl_merge.kernels.blocks import (
    BLOCK,
    FLOAT32,
    FLOAT64,
    MAGNITUDE,
    at_least,
    bits_of,
    bits_set,
    compiled_part,
    compiled_pass,
    lowest_bit,
    pointer,
)
from fl_merge.kernels.scoring import SCRATCH, load_scores

_ROW = 64
"""Elements that are compared together."""

_BINS = 1 << 11
"""How many bins `select` tells apart in a turn: their counts stay in the fastest cache."""


@compiled_pass
def largest_magnitude(address, code, start, stop):
    """The bits of the largest magnitude in a piece, in the tensor's own dtype; those of a NaN are larger than any."""
    size = stop - start
    if code == FLOAT32:
        largest = np.uint32(0)
        word_S = carray(pointer(address + 4 * start), (size,), np.uint32)
        for s in range(size):
            largest = max(largest, np.uint32(word_S[s] & MAGNITUDE))
        return np.int64(largest)
    if code == FLOAT64:
        widest = np.uint64(0)
        long_S = carray(pointer(address + 8 * start), (size,), np.uint64)
        for s in range(size):
            widest = max(widest, long_S[s] & np.uint64(0x7FFFFFFFFFFFFFFF))
        return np.int64(widest)
    narrowest = np.uint16(0)
    half_S = carray(pointer(address + 2 * start), (size,), np.uint16)
    for s in range(size):
        narrowest = max(narrowest, np.uint16(half_S[s] & np.uint16(0x7FFF)))
    return np.int64(narrowest)


@compiled_part
def _room(clients_N, rows):
    """Scratch for `load_scores`, and where the scores go."""
    work_KB = np.empty((SCRATCH + clients_N.size, BLOCK), np.float32)
    return work_KB, np.empty((max(clients_N.size, rows), BLOCK), np.float32)


@compiled_pass
def sample_magnitudes(base, base_code, clients_N, codes_N, kind, numbers_2N, rows_R, starts_P, bits_RM):
    """The bits of the magnitudes of each row in runs that begin at `starts_P`, of BLOCK elements at most."""
    runs = starts_P.size
    length = bits_RM.shape[1] // runs
    work_KB, score_NB = _room(clients_N, rows_R.size)
    for run in range(runs):
        load_scores(base, base_code, clients_N, codes_N, kind, numbers_2N, starts_P[run], length, work_KB, score_NB)
        for r in range(rows_R.size):
            score_B, bits_B = score_NB[rows_R[r]], bits_RM[r, run * length : (run + 1) * length]
            for s in range(length):
                bits_B[s] = bits_of(score_B[s]) & MAGNITUDE


@compiled_pass
def magnitudes_between(
    base,
    base_code,
    clients_N,
    codes_N,
    kind,
    numbers_2N,
    rows_R,
    start,
    stop,
    low_R,
    high_R,
    above_R,
    between_R,
    marks_RM,
    found_RM,
    used_R,
):
    """Count, for each row, the elements of a piece whose magnitude's bits are above `high`, and those from `low` to
    `high`, which are written down too unless the two are equal.

    Args:
        rows_R: which rows; the same one may be there twice.
        above_R, between_R: are added to.
        marks_RM: takes `between_R` as it is at the beginning of each block, counted from that in which `start` is.
        found_RM, used_R: take what is between and written down, in order, and count it.

    Returns:
        Where it stopped, because a row of `found_RM` has no room for another block; else `stop`.
    """
    work_KB, score_NB = _room(clients_N, rows_R.size)
    address = score_NB.ctypes.data
    for begin in range(start, stop, BLOCK):
        size = min(BLOCK, stop - begin)
        if used_R.max() + size > found_RM.shape[1]:
            return begin
        load_scores(base, base_code, clients_N, codes_N, kind, numbers_2N, begin, size, work_KB, score_NB)
        for r in range(rows_R.size):
            marks_RM[r, np.uint64((begin - start) // BLOCK)] = between_R[r]
            score_B = score_NB[rows_R[r], :size]
            row = address + 4 * BLOCK * rows_R[r]
            above, between, used_R[r] = _between(score_B, row, low_R[r], high_R[r], found_RM[r], used_R[r])
            above_R[r] += above
            between_R[r] += between
    return stop


@compiled_part
def _between(score_B, address, low, high, found_M, used):
    """What one block adds to the counts, and how much is written down: 64 elements at a time are compared, and the few
    that lie between the limits are looked up."""
    above, between, used = 0, 0, np.uint64(used)
    beyond = np.uint32(high + np.uint32(1))
    whole = score_B.size - score_B.size % _ROW
    for first in range(0, whole, _ROW):
        larger = at_least(address + 4 * first, beyond)
        hits = at_least(address + 4 * first, low) & ~larger
        above += bits_set(larger)
        between += bits_set(hits)
        while hits and low != high:
            found_M[used] = bits_of(score_B[np.uint64(first + lowest_bit(hits))]) & MAGNITUDE
            used += np.uint64(1)
            hits &= hits - np.uint64(1)
    for s in range(whole, score_B.size):
        bits = np.uint32(bits_of(score_B[s]) & MAGNITUDE)
        above += np.int64(bits > high)
        between += np.int64(low <= bits <= high)
        if low <= bits <= high and low != high:
            found_M[used] = bits
            used += np.uint64(1)
    return above, between, np.int64(used)


@compiled_pass
def count_magnitudes(
    base, base_code, clients_N, codes_N, kind, numbers_2N, row, start, stop, low, high, shift, counts_K
):
    """Add to bin (bits - low) >> shift, for each element of a row whose magnitude's bits are from low to high."""
    work_KB, score_NB = _room(clients_N, 1)
    for begin in range(start, stop, BLOCK):
        size = min(BLOCK, stop - begin)
        load_scores(base, base_code, clients_N, codes_N, kind, numbers_2N, begin, size, work_KB, score_NB)
        score_B = score_NB[row, :size]
        for s in range(size):
            bits = np.uint32(bits_of(score_B[s]) & MAGNITUDE)
            if low <= bits <= high:
                counts_K[np.uint32(bits - low) >> shift] += 1


@compiled_pass
def select(value_M, rank):
    """The value at a rank, 1 for the largest, and how many are larger. What is not needed of `value_M` is overwritten.

    Each turn counts the values in bins of equal width and goes on with those of one bin.
    """
    counts_K = np.empty(_BINS, np.int64)
    left, larger = value_M.size, 0
    while True:
        low, high = value_M[0], value_M[0]
        for m in range(left):
            low, high = min(low, value_M[m]), max(high, value_M[m])
        if low == high:
            return low, larger
        shift = np.uint32(0)
        while (np.uint32(high - low) >> shift) >= _BINS:
            shift += np.uint32(1)
        counts_K[:] = 0
        for m in range(left):
            counts_K[np.uint32(value_M[m] - low) >> shift] += 1
        chosen = np.uint32(np.uint32(high - low) >> shift)
        while counts_K[chosen] < rank:
            rank -= counts_K[chosen]
            larger += counts_K[chosen]
            chosen -= np.uint32(1)
        if shift == 0:
            return np.uint32(low + chosen), larger
        used = np.uint64(0)
        for m in range(left):
            value = value_M[m]
            value_M[used] = value
            used += np.uint64((np.uint32(value - low) >> shift) == chosen)
        left = np.int64(used)


@compiled_pass
def nth_equal(base, base_code, clients_N, codes_N, kind, numbers_2N, row, start, stop, wanted, nth):
    """The index of the nth element (from 1) of a row whose magnitude has the wanted bits; -1 if there are fewer."""
    work_KB, score_NB = _room(clients_N, 1)
    for begin in range(start, stop, BLOCK):
        size = min(BLOCK, stop - begin)
        load_scores(base, base_code, clients_N, codes_N, kind, numbers_2N, begin, size, work_KB, score_NB)
        score_B = score_NB[row, :size]
        here = 0
        for s in range(size):
            here += np.uint32(bits_of(score_B[s]) & MAGNITUDE) == wanted
        if here < nth:
            nth -= here
            continue
        for s in range(size):
            if np.uint32(bits_of(score_B[s]) & MAGNITUDE) == wanted:
                nth -= 1
                if nth == 0:
                    return begin + s
    return -1
