"""A compiled pass that keeps elements by chance, the more likely the larger they are within their row: it equals
`ops.sparsify.rank_chances` and `keep_by_chance` bit for bit.

Ranks come from a radix sort of the magnitudes' bits, whole rows at a time. Suffixes: S elements of a piece, R of a row.
"""

from __future__ import annotations

import numpy as np

from fl_merge.kernels.blocks import MAGNITUDE, bits_of, compiled_part, compiled_pass, load, load_delta, uniform_words

_DIGIT = 11
_BINS = 1 << _DIGIT
_FEW = 48
"""Rows up to this length are sorted by insertion."""

_ZERO = np.float32(0)


@compiled_part
def _by_insertion(keys_R):
    for r in range(1, keys_R.size):
        key = keys_R[r]
        at = r
        while at > 0 and keys_R[at - 1] > key:
            keys_R[at] = keys_R[at - 1]
            at -= 1
        keys_R[at] = key


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
    keys_R, other_R = np.empty(row, np.uint64), np.empty(row, np.uint64)
    draws_H = np.empty(row // 2 + 2, np.uint64)
    counts_3K = np.empty((3, _BINS), np.int64)
    for begin in range(start, stop, row):
        load(base, base_code, begin, base_R)
        load_delta(client, code, begin, base_R, delta_R)
        kept_R = out_S[begin - start : begin - start + row]
        if spread < 0 or row == 1:
            for r in range(row):
                kept_R[r] = delta_R[r] if own_chance else delta_R[r] / divisor
            continue
        for r in range(row):
            rank = np.uint64(np.uint32(MAGNITUDE - np.uint32(bits_of(delta_R[r]) & MAGNITUDE)))
            keys_R[r] = (rank << np.uint64(32)) | np.uint64(r)
        sorted_R = keys_R
        if row <= _FEW:
            _by_insertion(keys_R)
        else:
            sorted_R = _by_digits(keys_R, other_R, counts_3K)
        uniform_words(key, begin // 2, draws_H)
        words = draws_H.view(np.uint32)[begin % 2 :]
        for place in range(row):
            r = np.uint64(sorted_R[place] & np.uint64(0xFFFFFFFF))
            chance = highest - np.float64(place) / np.float64(row - 1) * spread
            kept = delta_R[r] if np.float64(words[r]) * 2.0**-32 < chance else _ZERO
            kept_R[r] = kept / (np.float32(chance) if own_chance else divisor)
