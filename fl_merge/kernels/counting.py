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
    GROUP,
    MAGNITUDE,
    WIDTHS,
    bits_of,
    compare_models,
    compiled_part,
    compiled_pass,
    load,
    load_delta,
    one_dtype,
    pair_up,
    pointer,
)
from fl_merge.kernels.scoring import DELTAS, SCRATCH, load_scores
from fl_merge.kernels.sifting import bounds_of, room_to_sift, sift
from fl_merge.kernels.vectors import WIDE

MARKED = 4096
"""For every so many elements it is noted how many before them are between two limits."""

_BINS = 1 << 11
"""How many bins `_select` tells apart in a turn: their counts stay in the fastest cache."""


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


@compiled_part
def _compare(score_B, low, high, listed, found_M):
    """Of a few scores, how many magnitudes are above `high`, and how many from `low` to `high`: these are written down
    if they are to be listed."""
    above, between = np.int64(0), np.int64(0)
    for s in range(score_B.size):
        bits = np.uint32(bits_of(score_B[s]) & MAGNITUDE)
        above += np.int64(bits > high)
        if low <= bits <= high:
            if listed:
                found_M[between] = bits
            between += 1
    return above, between


@compiled_pass
def magnitudes_between(
    base,
    base_code,
    clients_N,
    codes_N,
    kind,
    numbers_2N,
    rows_R,
    first,
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
        first: where the piece begins; a call that goes on starts a multiple of MARKED further.
        marks_RM: takes `between_R` as it is at the beginning of each MARKED elements from `first` on.
        found_RM, used_R: take what is between and written down, in order, and count it.

    Returns:
        Where it stopped, because a row of `found_RM` has no room for another block; else `stop`.
    """
    work_KB, score_NB = _room(clients_N, rows_R.size)
    # Scores are compared as models whose base is 0.
    native = kind == DELTAS and one_dtype(codes_N)
    base_B, rest_B = np.zeros(MARKED, np.float32), np.empty(GROUP, np.float32)
    width = WIDTHS[codes_N[0]] if native else 4
    bases, founds = np.int64(base_B.ctypes.data), np.int64(found_RM.ctypes.data)
    bound_2R, sift_R = np.empty((2, rows_R.size), np.float32), np.zeros(rows_R.size, np.int64)
    sifted = bounds_of(codes_N, kind, numbers_2N, rows_R, low_R, high_R, bound_2R)
    scratch = room_to_sift(clients_N.size, rows_R.size, MARKED if sifted else 0)
    begin = start
    while begin < stop:
        sifts = sifted and stop - begin >= MARKED
        size = min(MARKED if native or sifts else BLOCK, stop - begin)
        if (begin - start) % MARKED == 0:
            if used_R.max() + MARKED + WIDE > found_RM.shape[1]:
                return begin
            marks_RM[:, np.uint64((begin - first) // MARKED)] = between_R
        whole = size - size % GROUP
        if sifts:
            known = base, base_code, clients_N, codes_N, numbers_2N
            sift(*known, begin, rows_R, bound_2R, scratch, sift_R, above_R)
        elif native:
            load(base, base_code, begin, base_B[:size])
            pair_up(codes_N[0], bases, whole)
        else:
            load_scores(base, base_code, clients_N, codes_N, kind, numbers_2N, begin, size, work_KB, score_NB)
        for r in range(rows_R.size):
            row = rows_R[r]
            beyond, listed = np.uint32(high_R[r] + np.uint32(1)), np.int64(low_R[r] != high_R[r])
            if native:
                code, address = codes_N[row], clients_N[row] + width * begin
            elif sifts:
                code, address, whole = FLOAT32, np.int64(scratch[3][r].ctypes.data), sift_R[r]
            else:
                code, address = FLOAT32, score_NB[row].ctypes.data
            found = founds + 4 * (r * found_RM.shape[1] + used_R[r])
            above, between = compare_models(code, bases, address, low_R[r], beyond, whole, found, listed)
            used_R[r] += between * listed
            if whole < size and not sifts:
                left_B = rest_B[: size - whole]
                if native:
                    load_delta(clients_N[row], codes_N[row], begin + whole, base_B[whole:size], left_B)
                else:
                    left_B[:] = score_NB[row, whole:size]
                more, few = _compare(left_B, low_R[r], high_R[r], listed, found_RM[r, used_R[r] :])
                used_R[r] += few * listed
                above, between = above + more, between + few
            above_R[r] += above
            between_R[r] += between
        begin += size
    return stop


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


@compiled_part
def _count_in_bins(value_M, low, high, counts_K):
    """Count values from `low` to `high` in bins of equal width. Gives the width, as a shift."""
    shift = np.uint32(0)
    while (np.uint32(high - low) >> shift) >= _BINS:
        shift += np.uint32(1)
    counts_K[:] = 0
    for m in range(value_M.size):
        counts_K[np.uint64(np.uint32(value_M[m] - low) >> shift)] += 1
    return shift


@compiled_part
def _keep_bin(value_M, rank, low, high, shift, counts_K, kept_M):
    """Write down the values of the bin in which that of a rank is; `kept_M` may be where they are.

    Returns:
        These; the limits of the bin; and how many values are larger.
    """
    chosen, larger = np.uint32(np.uint32(high - low) >> shift), np.int64(0)
    while larger + counts_K[chosen] < rank:
        larger += counts_K[chosen]
        chosen -= np.uint32(1)
    if shift != 0:
        used = np.uint64(0)
        for m in range(value_M.size):
            value = value_M[m]
            kept_M[used] = value
            used += np.uint64((np.uint32(value - low) >> shift) == chosen)
        value_M = kept_M[: np.int64(used)]
    first = np.uint32(low + np.uint32(chosen << shift))
    last = min(high, np.uint32(first + np.uint32((np.uint32(1) << shift) - np.uint32(1))))
    return value_M, first, last, larger


@compiled_part
def _select(value_M, rank, low, high, counts_K, scratch_M):
    """The value at a rank, 1 for the largest, of values from `low` to `high`; and how many are larger.

    Each turn counts the values in bins of equal width and goes on with those of one bin.
    """
    larger = np.int64(0)
    while low != high:
        shift = _count_in_bins(value_M, low, high, counts_K)
        value_M, low, high, more = _keep_bin(value_M, rank - larger, low, high, shift, counts_K, scratch_M)
        larger += more
    return low, larger


@compiled_pass
def select_two(bits_RM, rows_N, ranks_2N, values_2N):
    """For each of some rows the values at two ranks, 1 for the largest; where a rank is 0, what was there stays."""
    scratch_M, counts_K, left_K = (
        np.empty(bits_RM.shape[1] + 1, np.uint32),
        np.empty(_BINS, np.int64),
        np.empty(_BINS, np.int64),
    )
    for n in range(rows_N.size):
        bits_M = bits_RM[rows_N[n]]
        low, high = bits_M[0], bits_M[0]
        for m in range(bits_M.size):
            low, high = min(low, bits_M[m]), max(high, bits_M[m])
        shift = _count_in_bins(bits_M, low, high, counts_K)
        for which in range(2):
            rank = ranks_2N[which, n]
            if rank:
                value_M, first, last, larger = _keep_bin(bits_M, rank, low, high, shift, counts_K, scratch_M)
                values_2N[which, n] = _select(value_M, rank - larger, first, last, left_K, scratch_M)[0]


@compiled_part
def _find_cut(value_M, rank, low, high, mark_X, counts_K, scratch_M):
    """The value at a rank of what is between the limits, in which block the last of the equal ones is that stay, and
    which one of those in the block it is, from 1."""
    value, larger = _select(value_M, rank, low, high, counts_K, scratch_M)
    wanted, start = rank - larger, 0
    while True:
        equal = np.int64(0)
        for m in range(start, min(start + BLOCK, value_M.size)):
            equal += np.int64(value_M[m] == value)
        if equal >= wanted:
            break
        wanted -= equal
        start += BLOCK
    place = start - 1
    while wanted:
        place += 1
        wanted -= np.int64(value_M[place] == value)
    block = np.searchsorted(mark_X, place, side="right") - 1
    nth = np.int64(0)
    for m in range(mark_X[block], place + 1):
        nth += np.int64(value_M[m] == value)
    return value, block, nth


@compiled_pass
def find_cuts(counts_R, low_R, high_R, found_RM, above_R, between_R, marks_RX, bits_R, block_R, nth_R):
    """The cuts of rows of which `magnitudes_between` has gone through all elements.

    Args:
        counts_R: how many of each row stay.
        low_R, high_R: the limits; where they are equal, what is between has not been written down.
        bits_R, block_R, nth_R: take the bits of the smallest magnitude that stays; in which block the last element is
            that has it and stays; and which one of those in the block it is, from 1. Where a cut is not between the
            limits the block is -1.
    """
    scratch_M, counts_K = np.empty(found_RM.shape[1] + 1, np.uint32), np.empty(_BINS, np.int64)
    for r in range(counts_R.size):
        rank, block_R[r] = counts_R[r] - above_R[r], -1
        if not 0 < rank <= between_R[r]:
            continue
        if low_R[r] != high_R[r]:
            found_M, mark_X = found_RM[r, : between_R[r]], marks_RX[r]
            found = _find_cut(found_M, rank, low_R[r], high_R[r], mark_X, counts_K, scratch_M)
            bits_R[r], block_R[r], nth_R[r] = found
        else:
            block_R[r] = np.searchsorted(marks_RX[r], rank - 1, side="right") - 1
            bits_R[r], nth_R[r] = low_R[r], rank - marks_RX[r, block_R[r]]


@compiled_part
def _nth_equal(scored, row, start, stop, wanted, nth, scratch):
    """The index of the nth element (from 1) of a row whose magnitude has the wanted bits; -1 if there are fewer."""
    base, base_code, clients_N, codes_N, kind, numbers_2N = scored
    work_KB, score_NB = scratch
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


@compiled_pass
def nth_equals(
    base, base_code, clients_N, codes_N, kind, numbers_2N, rows_R, starts_R, stops_R, bits_R, nth_R, places_R
):
    """Where the nth element (from 1) of each row is whose magnitude has the wanted bits, from a start to a stop; -1 if
    there are fewer."""
    scored, scratch = (base, base_code, clients_N, codes_N, kind, numbers_2N), _room(clients_N, rows_R.size)
    for r in range(rows_R.size):
        places_R[r] = _nth_equal(scored, rows_R[r], starts_R[r], stops_R[r], bits_R[r], nth_R[r], scratch)
