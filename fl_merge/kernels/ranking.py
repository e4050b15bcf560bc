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
"""Rows up to this length are sorted by exchanges alone."""

_TURNS = 32
"""How often neighbours are exchanged at most before most of a row is taken to be in few bins."""

_MOST_BINS = 1 << 16

_ZERO = np.float32(0)


@compiled_part
def _by_exchange(keys_R, most):
    """Sort what is nearly sorted, by exchanging neighbours in turns; false if `most` turns are not enough."""
    for _ in range(most):
        exchanged = np.uint64(0)
        for first in range(2):
            pairs = (keys_R.size - first) // 2
            pair_P = keys_R[first : first + 2 * pairs]
            for p in range(pairs):
                one, two = pair_P[2 * p], pair_P[2 * p + 1]
                smaller, larger = min(one, two), max(one, two)
                pair_P[2 * p], pair_P[2 * p + 1] = smaller, larger
                exchanged |= one ^ smaller
        if exchanged == 0:
            return True
    return False


@compiled_part
def _by_size(bits_R, bins_R, starts_K, keys_R):
    """Write the keys in order, given that magnitudes are spread over their range: there are more bins of equal width
    than elements.

    Returns:
        False if they are not.
    """
    largest = np.uint32(0)
    for r in range(bits_R.size):
        largest = max(largest, bits_R[r])
    last = np.float32(starts_K.size - 1)
    scale = last / from_bits(largest)
    # Infinite where all are 0, and 0 where a difference of two finite numbers is infinite: there are no bins then.
    if not _ZERO < scale < np.float32(1e30):
        return False
    for r in range(bits_R.size):
        bins_R[r] = np.uint32(np.int32(last - np.float32(np.int32(from_bits(bits_R[r]) * scale))))
    starts_K[:] = 0
    for r in range(bits_R.size):
        starts_K[bins_R[r]] += np.uint32(1)
    before = np.uint32(0)
    for k in range(0, starts_K.size, 4):  # bins are a multiple of 4
        one, two = starts_K[k], np.uint32(starts_K[k] + starts_K[k + 1])
        three = np.uint32(two + starts_K[k + 2])
        after = np.uint32(before + np.uint32(three + starts_K[k + 3]))
        starts_K[k], starts_K[k + 1] = before, np.uint32(before + one)
        starts_K[k + 2], starts_K[k + 3] = np.uint32(before + two), np.uint32(before + three)
        before = after
    for r in range(bits_R.size):
        start = starts_K[bins_R[r]]
        keys_R[start] = _key(bits_R[r], r)
        starts_K[bins_R[r]] = np.uint32(start + np.uint32(1))
    return _by_exchange(keys_R, _TURNS)


@compiled_part
def _key(bits, place):
    """What is sorted: the largest magnitude first, equal ones in the order in which they were."""
    return (np.uint64(MAGNITUDE - bits) << np.uint64(32)) | np.uint64(place)


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
def _sort(bits_R, bins_R, starts_K, keys_R, other_R, counts_3K):
    """The keys in order; gives the array in which they are."""
    if bits_R.size > _FEW and _by_size(bits_R, bins_R, starts_K, keys_R):
        return keys_R
    for r in range(bits_R.size):
        keys_R[r] = _key(bits_R[r], r)
    if bits_R.size <= _FEW:
        _by_exchange(keys_R, _FEW)
        return keys_R
    return _by_digits(keys_R, other_R, counts_3K)


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
    bits_R, bins_R = np.empty(row, np.uint32), np.empty(row, np.uint32)
    bins = 4
    while bins < 2 * row and bins < _MOST_BINS:
        bins *= 2
    starts_K = np.empty(bins, np.uint32)
    keys_R, other_R = np.empty(row, np.uint64), np.empty(row, np.uint64)
    counts_3K = np.empty((3, _BINS), np.int64)
    draws_H = np.empty(row // 2 + 2, np.uint64)
    # By place: below which number of 32 bits a draw keeps, and what is divided by.
    limits_R, divisors_R = np.empty(row, np.uint64), np.empty(row, np.float32)
    limit_R, divisor_R = np.empty(row, np.uint64), np.empty(row, np.float32)
    for place in range(row if spread >= 0 and row > 1 else 0):
        chance = highest - np.float64(place) / np.float64(row - 1) * spread
        limits_R[place] = np.uint64(max(math.ceil(chance * 2.0**32), 0))
        divisors_R[place] = np.float32(chance) if own_chance else divisor
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
        sorted_R = _sort(bits_R, bins_R, starts_K, keys_R, other_R, counts_3K)
        for place in range(row):
            r = np.uint32(sorted_R[place])
            limit_R[r], divisor_R[r] = limits_R[place], divisors_R[place]
        uniform_words(key, begin // 2, draws_H)
        words = draws_H.view(np.uint32)[begin % 2 :]
        for r in range(row):
            kept = delta_R[r] if np.uint64(words[r]) < limit_R[r] else _ZERO
            kept_R[r] = kept / divisor_R[r]
