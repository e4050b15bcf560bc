"""A compiled pass that keeps elements by chance, the more likely the larger they are within their row: it equals
`ops.sparsify.rank_chances` and `keep_by_chance` bit for bit.

Ranks come from bins of the magnitudes, whole rows at a time, or from a radix sort where most are in few bins.
Suffixes: S elements of a piece, R of a row, K bins.
"""

from __future__ import annotations

import math

import numpy as np

from fl_merge.kernels.blocks import (
    MAGNITUDE,
    bits_of,
    compiled_part,
    compiled_pass,
    from_bits,
    load,
    load_delta,
    uniform_words,
)

_DIGIT = 11
_BINS = 1 << _DIGIT
_FEW = 16
"""Rows up to this length are sorted by insertion alone."""

_MOST_BINS = 1 << 16

_ZERO = np.float32(0)


@compiled_part
def _by_insertion(bits_R, order_R, limit):
    """Sort by the bits, the largest first and equal ones in the order in which they were; false if more than `limit`
    moves are needed."""
    moves = 0
    for r in range(1, order_R.size):
        element = order_R[r]
        bits = bits_R[element]
        at = r
        while at > 0 and bits_R[order_R[np.uint32(at - 1)]] < bits:
            order_R[np.uint32(at)] = order_R[np.uint32(at - 1)]
            at -= 1
        order_R[np.uint32(at)] = element
        moves += r - at
        if moves > limit:
            return False
    return True


@compiled_part
def _by_size(bits_R, bins_R, starts_K, order_R):
    """The same, given that magnitudes are spread over their range: there are more bins of equal width than elements.

    Returns:
        False if they are not.
    """
    largest = np.uint32(0)
    for r in range(bits_R.size):
        largest = max(largest, bits_R[r])
    last = np.float32(starts_K.size - 1)
    scale = last / from_bits(largest)
    if not scale < np.float32(1e30):
        return False
    for r in range(bits_R.size):
        bins_R[r] = np.uint32(np.int32(last - np.float32(np.int32(from_bits(bits_R[r]) * scale))))
    starts_K[:] = 0
    for r in range(bits_R.size):
        starts_K[bins_R[r]] += np.uint32(1)
    before = np.uint32(0)
    for k in range(starts_K.size):
        here = starts_K[k]
        starts_K[k] = before
        before = np.uint32(before + here)
    for r in range(bits_R.size):
        start = starts_K[bins_R[r]]
        order_R[start] = np.uint32(r)
        starts_K[bins_R[r]] = np.uint32(start + np.uint32(1))
    return _by_insertion(bits_R, order_R, 4 * bits_R.size)


@compiled_part
def _by_digits(keys_R, other_R, counts_3K):
    """Sorted by the upper 32 bits, equal ones in the order in which they were; gives the array they end in."""
    counts_3K[:] = 0
    for r in range(keys_R.size):
        key = keys_R[r] >> np.uint64(32)
        counts_3K[0, key & np.uint64(_BINS - 1)] += 1
        counts_3K[1, (key >> np.uint64(_DIGIT)) & np.uint64(_BINS - 1)] += 1
        counts_3K[2, key >> np.uint64(2 * _DIGIT)] += 1
    source_R, target_R = keys_R, other_R
    for digit in range(3):
        counts_K = counts_3K[digit]
        shift = np.uint64(32 + digit * _DIGIT)
        if counts_K[(source_R[0] >> shift) & np.uint64(_BINS - 1)] == keys_R.size:
            continue  # all have the same digit
        before = 0
        for k in range(_BINS):
            here = counts_K[k]
            counts_K[k] = before
            before += here
        for r in range(keys_R.size):
            key = source_R[r]
            bin_of = (key >> shift) & np.uint64(_BINS - 1)
            target_R[np.uint64(counts_K[bin_of])] = key
            counts_K[bin_of] += 1
        source_R, target_R = target_R, source_R
    return source_R


@compiled_part
def _sort(bits_R, bins_R, starts_K, order_R, keys_R, other_R, counts_3K):
    if bits_R.size <= _FEW:
        for r in range(bits_R.size):
            order_R[r] = np.uint32(r)
        _by_insertion(bits_R, order_R, bits_R.size * bits_R.size)
    elif not _by_size(bits_R, bins_R, starts_K, order_R):
        for r in range(bits_R.size):
            keys_R[r] = (np.uint64(MAGNITUDE - bits_R[r]) << np.uint64(32)) | np.uint64(r)
        sorted_R = _by_digits(keys_R, other_R, counts_3K)
        for r in range(bits_R.size):
            order_R[r] = np.uint32(sorted_R[r])


@compiled_pass
def keep_ranked(base, base_code, client, code, start, stop, row, key, highest, spread, own_chance, divisor, out_S):
    """What is kept of one client's delta in whole rows from start to stop.

    Args:
        key: of the client's draws for this tensor.
        highest, spread: the chances are highest - place / (row - 1) * spread; all is kept if spread is negative.
        own_chance: whether what is kept is divided by its own chance; else it is divided by `divisor`.
        out_S: takes it, float32.
    """
    base_R, delta_R = np.empty(row, np.float32), np.empty(row, np.float32)
    bits_R, bins_R, order_R = np.empty(row, np.uint32), np.empty(row, np.uint32), np.empty(row, np.uint32)
    bins = 2
    while bins < 2 * row and bins < _MOST_BINS:
        bins *= 2
    starts_K = np.empty(bins, np.uint32)
    keys_R, other_R = np.empty(row, np.uint64), np.empty(row, np.uint64)
    counts_3K = np.empty((3, _BINS), np.int64)
    draws_H = np.empty(row // 2 + 2, np.uint64)
    # By place: below which number of 32 bits a draw keeps, and what is divided by.
    limit_R, divisor_R = np.empty(row, np.uint64), np.empty(row, np.float32)
    for place in range(row if spread >= 0 and row > 1 else 0):
        chance = highest - np.float64(place) / np.float64(row - 1) * spread
        limit_R[place] = np.uint64(max(math.ceil(chance * 2.0**32), 0))
        divisor_R[place] = np.float32(chance) if own_chance else divisor
    for begin in range(start, stop, row):
        load(base, base_code, begin, base_R)
        load_delta(client, code, begin, base_R, delta_R)
        kept_R = out_S[begin - start : begin - start + row]
        if spread < 0 or row == 1:
            for r in range(row):
                kept_R[r] = delta_R[r] if own_chance else delta_R[r] / divisor
            continue
        for r in range(row):
            bits_R[r] = np.uint32(bits_of(delta_R[r]) & MAGNITUDE)
        _sort(bits_R, bins_R, starts_K, order_R, keys_R, other_R, counts_3K)
        for place in range(row):
            bins_R[order_R[place]] = np.uint32(place)
        uniform_words(key, begin // 2, draws_H)
        words = draws_H.view(np.uint32)[begin % 2 :]
        for r in range(row):
            place = bins_R[r]
            kept = delta_R[r] if np.uint64(words[r]) < limit_R[place] else _ZERO
            kept_R[r] = kept / divisor_R[place]
