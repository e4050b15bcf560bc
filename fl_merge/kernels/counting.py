"""Compiled passes that find out which elements are the largest, by counting. Magnitudes are compared as the bits of
float32, which have their order. Suffixes: N clients, S elements of a piece, B of a block, M of a sample, K bins.
"""

from __future__ import annotations

import numpy as np
from numba import carray

from fl_merge.kernels.blocks import (
    BLOCK,
    FLOAT32,
    FLOAT64,
    MAGNITUDE,
    bits_of,
    compiled_part,
    compiled_pass,
    load,
    load_delta,
    pointer,
)

_ROW = 64
"""Elements that are passed over together if none of them is looked for."""


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


@compiled_pass
def sample_magnitudes(base, base_code, clients_N, codes_N, starts_R, bits_NM):
    """The bits of the magnitudes of each client's delta in runs that begin at `starts_R`."""
    runs = starts_R.size
    length = bits_NM.shape[1] // runs
    base_store = np.empty(length, np.float32)
    delta_store = np.empty(length, np.float32)
    for r in range(runs):
        load(base, base_code, starts_R[r], base_store)
        for n in range(clients_N.size):
            load_delta(clients_N[n], codes_N[n], starts_R[r], base_store, delta_store)
            bits_B = bits_NM[n, r * length : (r + 1) * length]
            for s in range(length):
                bits_B[s] = bits_of(delta_store[s]) & MAGNITUDE


@compiled_pass
def magnitudes_between(
    base, base_code, clients_N, codes_N, start, stop, low_N, high_N, above_N, between_N, marks_NM, found_NM, used_N
):
    """Count, for each client, the deltas of a piece whose magnitude's bits are above `high`, and those from `low` to
    `high`, which are written down too unless the two are equal.

    Args:
        above_N, between_N: are added to.
        marks_NM: takes `between_N` as it is at the beginning of each block, counted from that in which `start` is.
        found_NM, used_N: take what is between and written down, in order, and count it.

    Returns:
        Where it stopped, because a row of `found_NM` has no room for another block; else `stop`.
    """
    base_store = np.empty(BLOCK, np.float32)
    delta_store = np.empty(BLOCK, np.float32)
    bits_store = np.empty(BLOCK, np.uint32)
    for begin in range(start, stop, BLOCK):
        size = min(BLOCK, stop - begin)
        if used_N.max() + size + _ROW > found_NM.shape[1]:
            return begin
        base_B, delta_B, bits_B = base_store[:size], delta_store[:size], bits_store[:size]
        load(base, base_code, begin, base_B)
        for n in range(clients_N.size):
            low, high = low_N[n], high_N[n]
            marks_NM[n, np.uint64((begin - start) // BLOCK)] = between_N[n]
            load_delta(clients_N[n], codes_N[n], begin, base_B, delta_B)
            above, equal = 0, 0
            for s in range(size):
                bits_B[s] = np.uint32(bits_of(delta_B[s]) & MAGNITUDE)
                above += bits_B[s] > high
            above_N[n] += above
            if low == high:
                for s in range(size):
                    equal += bits_B[s] == low
                between_N[n] += equal
            else:
                used = _between(bits_B, low, np.uint32(high - low), found_NM[n], used_N[n])
                between_N[n] += used - used_N[n]
                used_N[n] = used
    return stop


@compiled_part
def _between(bits_B, low, width, found_M, used):
    """Few elements lie between the limits: a row without one is passed over."""
    whole = bits_B.size - bits_B.size % _ROW
    for first in range(0, whole, _ROW):
        row_B = bits_B[first : first + _ROW]
        hits = np.uint32(0)
        for s in range(_ROW):
            hits = np.uint32(hits | (np.uint32(1) if np.uint32(row_B[s] - low) <= width else np.uint32(0)))
        if hits:
            for s in range(_ROW):
                found_M[np.uint64(used)] = row_B[s]
                used += np.int64(np.uint32(row_B[s] - low) <= width)
    for s in range(whole, bits_B.size):
        found_M[np.uint64(used)] = bits_B[s]
        used += np.int64(np.uint32(bits_B[s] - low) <= width)
    return used


@compiled_pass
def count_magnitudes(base, base_code, client, code, start, stop, low, high, shift, counts_K):
    """Add to bin (bits - low) >> shift, for each delta of a piece whose magnitude's bits are from low to high."""
    base_store = np.empty(BLOCK, np.float32)
    delta_store = np.empty(BLOCK, np.float32)
    for begin in range(start, stop, BLOCK):
        size = min(BLOCK, stop - begin)
        base_B, delta_B = base_store[:size], delta_store[:size]
        load(base, base_code, begin, base_B)
        load_delta(client, code, begin, base_B, delta_B)
        for s in range(size):
            bits = np.uint32(bits_of(delta_B[s]) & MAGNITUDE)
            if low <= bits <= high:
                counts_K[np.uint32(bits - low) >> shift] += 1


@compiled_pass
def nth_equal(base, base_code, client, code, start, stop, wanted, nth):
    """The index of the nth delta (from 1) in a piece whose magnitude has the wanted bits; -1 if there are fewer."""
    base_store = np.empty(BLOCK, np.float32)
    delta_store = np.empty(BLOCK, np.float32)
    for begin in range(start, stop, BLOCK):
        size = min(BLOCK, stop - begin)
        base_B, delta_B = base_store[:size], delta_store[:size]
        load(base, base_code, begin, base_B)
        load_delta(client, code, begin, base_B, delta_B)
        here = 0
        for s in range(size):
            here += np.uint32(bits_of(delta_B[s]) & MAGNITUDE) == wanted
        if here < nth:
            nth -= here
            continue
        for s in range(size):
            if np.uint32(bits_of(delta_B[s]) & MAGNITUDE) == wanted:
                nth -= 1
                if nth == 0:
                    return begin + s
    return -1
