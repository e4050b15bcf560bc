"""A compiled pass that keeps elements by chance, the more likely the larger they are within their row, and merges what
is kept: it equals `ops.sparsify.rank_chances` and `keep_by_chance`, and what `prune_combine` equals, bit for bit.

Ranks come from bins of the magnitudes, or from a radix sort where most are in few bins; in short rows all are compared
with all. Suffixes: N clients, S elements of a group of rows, R of a row, K bins.
"""

from __future__ import annotations

import numpy as np

from fl_merge.kernels.blocks import (
    GROUP,
    MAGNITUDE,
    bits_of,
    compiled_part,
    compiled_pass,
    from_bits,
    load,
    load_delta,
    uniform_words,
)
from fl_merge.kernels.merging import merge_rows

FEW = 32
"""In rows up to this length all are compared with all."""

RANKED = 1024
"""How many elements of all clients are kept and merged together, or one row, if that is longer: they stay in the cache
that is next to the fastest."""

_DIGIT = 11
_BINS = 1 << _DIGIT
_TURNS = 32
"""How often neighbours are exchanged at most before most of a row is taken to be in few bins."""

_MOST_BINS = 1 << 16

_ZERO, _ONE = np.float32(0), np.float32(1)
_LEAST, _DRAWS, _MOST = np.float32(2.0**-32), np.float32(2.0**32), np.float32(2.0**32 - 256)


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
    if _by_size(bits_R, bins_R, starts_K, keys_R):
        return keys_R
    for r in range(bits_R.size):
        keys_R[r] = _key(bits_R[r], r)
    return _by_digits(keys_R, other_R, counts_3K)


@compiled_part
def _compare(bits_R, by_place_R, chance_R):
    """The chances in a short row."""
    for r in range(bits_R.size):
        place = 0
        for other in range(bits_R.size):
            place += (bits_R[other] > bits_R[r]) | ((bits_R[other] == bits_R[r]) & (other < r))
        chance_R[r] = by_place_R[place]


@compiled_part
def _rank(delta_R, by_place_R, scratch, chance_R):
    """The chances in a row, from those by place."""
    bits_R, bins_R, starts_K, keys_R, other_R, counts_3K = scratch
    for r in range(delta_R.size):
        bits_R[r] = np.uint32(bits_of(delta_R[r]) & MAGNITUDE)
    if delta_R.size <= FEW:
        _compare(bits_R, by_place_R, chance_R)
        return
    sorted_R = _sort(bits_R, bins_R, starts_K, keys_R, other_R, counts_3K)
    for place in range(delta_R.size):
        chance_R[np.uint32(sorted_R[place])] = by_place_R[place]


@compiled_part
def _keep(delta_S, chance_S, word_S, own_chance, divisor, kept_S):
    """What is kept, over its own chance or the divisor."""
    for s in range(delta_S.size):
        chance = chance_S[s]
        limit = np.uint32(np.ceil(min(np.float32(chance * _DRAWS), _MOST)))
        kept = delta_S[s] if (word_S[s] < limit) | (chance >= _ONE) else _ZERO
        kept_S[s] = kept / (chance if own_chance else divisor)


@compiled_pass
def rank_combine(
    base,
    base_code,
    clients_N,
    codes_N,
    row,
    keys_N,
    highest_N,
    steps_N,
    own_chance,
    divisors_N,
    weights_N,
    elect_by,
    normalize,
    scale,
    start,
    stop,
    out,
    out_code,
    drawn_M,
    otherwise_M,
):
    """base + scale * combine(what is kept of the deltas), of whole rows from start to stop.

    Args:
        row: how many elements a row has.
        keys_N: of the draws of each client for this tensor.
        highest_N, steps_N: the chances are highest - place * step.
        own_chance: whether what is kept is divided by its own chance; else it is divided by the client's divisor.

    The other arguments and what comes back are those of `prune_combine`.
    """
    count = clients_N.size
    group = row * max(1, RANKED // row)
    room = (group + GROUP - 1) // GROUP * GROUP
    base_store, delta_S, value_store = (
        np.zeros(room, np.float32),
        np.empty(group, np.float32),
        np.empty(room, np.float32),
    )
    kept_NS, drawn_G = np.zeros((count, room), np.float32), np.empty(room // GROUP, np.uint64)
    delta_S, chance_S = np.empty(group, np.float32), np.empty(group, np.float32)
    draws_H = np.empty(group // 2 + 1, np.uint64)
    bins = 4
    while bins < 2 * row and bins < _MOST_BINS:
        bins *= 2
    bits_R, bins_R = np.empty(row, np.uint32), np.empty(row, np.uint32)
    keys_R, other_R = np.empty(row, np.uint64), np.empty(row, np.uint64)
    scratch = bits_R, bins_R, np.empty(bins, np.uint32), keys_R, other_R, np.empty((3, _BINS), np.int64)
    by_place_NR, merging = np.empty((count, row), np.float32), (value_store, drawn_G)
    for n in range(count):
        for place in range(row):
            chance = np.float32(highest_N[n] - np.float32(np.float32(place) * steps_N[n]))
            by_place_NR[n, place] = max(chance, _LEAST)
    how = weights_N, weights_N, elect_by, normalize, scale
    largest, largest_drawn = np.uint32(0), np.uint32(0)
    tally, draws = 0, 0
    for begin in range(start, stop, group):
        size = min(group, stop - begin)
        base_S = base_store[:size]
        load(base, base_code, begin, base_S)
        for n in range(count):
            load_delta(clients_N[n], codes_N[n], begin, base_S, delta_S[:size])
            if steps_N[n] == _ZERO:
                chance_S[:size] = highest_N[n]
            else:
                for at in range(0, size, row):
                    _rank(delta_S[at : at + row], by_place_NR[n], scratch, chance_S[at : at + row])
            uniform_words(keys_N[n], begin // 2, draws_H[: size // 2 + 1])
            words_S = draws_H.view(np.uint32)[begin % 2 :]
            _keep(delta_S[:size], chance_S, words_S, own_chance, divisors_N[n], kept_NS[n, :size])
        noted = drawn_M, otherwise_M, draws
        found = merge_rows(kept_NS, base_store, size, how, merging, out, out_code, begin, noted)
        largest, largest_drawn = max(largest, found[0]), max(largest_drawn, found[1])
        tally += found[2]
        draws += found[3]
    return largest, largest_drawn, tally, draws
