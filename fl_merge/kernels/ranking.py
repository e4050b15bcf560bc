"""A compiled pass that keeps elements by chance, the more likely the larger they are within their row, and merges what
is kept: it equals `ops.sparsify.rank_chances` and `keep_by_chance`, and what `prune_combine` equals, bit for bit.

Places come from counts of classes of magnitude, or, in short rows, from comparing all with all.
Suffixes: N clients, S elements of a group of rows, R of a row, K classes, W elements and room for a vector.
"""

from __future__ import annotations

import numpy as np
from numba import carray

from fl_merge.kernels import vectors
from fl_merge.kernels.blocks import (
    GROUP,
    MAGNITUDE,
    bits_of,
    by_dtype,
    compiled_part,
    compiled_pass,
    from_bits,
    load_base,
    load_delta,
    pointer,
    uniform_words,
)
from fl_merge.kernels.merging import OF_ROWS, in_use, merge_rows, merging_scratch, places_of
from fl_merge.kernels.places import (
    CLASSES,
    DROPPED_BITS,
    LANES,
    LEAST_CHANCE,
    STRIDE,
    chances_of_classes,
    classify_steps,
    count_and_draw,
    look_up_and_keep,
    write_steps,
)
from fl_merge.kernels.vectors import WIDE

FEW = 64
"""In rows up to this length all are compared with all."""

RANKED = 1024
"""How many elements of all clients are kept and merged together, or one row, if that is longer: they stay in the cache
that is next to the fastest."""

_load_row = by_dtype(vectors.loads_models, ahead=RANKED)
_ZERO, _ONE = np.float32(0), np.float32(1)
_LEAST, _DRAWS, _MOST = np.float32(LEAST_CHANCE), np.float32(2.0**32), np.float32(2.0**32 - 256)


@compiled_part
def _chance(twice, highest, step):
    """At twice a place."""
    return max(np.float32(highest - np.float32(np.float32(twice) * step)), _LEAST)


@compiled_part
def _classify(deltas, classes, size):
    """The class of each element; gives the last class but the very last that one is in."""
    delta_R, class_R = carray(pointer(deltas), (size,), np.uint32), carray(pointer(classes), (size,), np.uint16)
    whole = size // WIDE
    first = write_steps(deltas, whole, classes)
    for r in range(whole * WIDE, size):
        step = (delta_R[r] & MAGNITUDE) >> np.uint32(DROPPED_BITS)
        class_R[r] = np.uint16(step)
        first = max(first, np.int64(step))
    last = classify_steps(classes, whole, first)
    for r in range(whole * WIDE, size):
        below = first - np.int64(class_R[r])
        class_R[r] = np.uint16(min(below, CLASSES - 1))
        last = max(last, below if below < CLASSES - 1 else 0)
    return last


@compiled_part
def _compare(class_R, highest, step, chance_R):
    """The chances in a short row."""
    for r in range(class_R.size):
        twice = -1
        for other in range(class_R.size):
            twice += (class_R[other] <= class_R[r]) + (class_R[other] < class_R[r])
        chance_R[r] = _chance(twice, highest, step)


@compiled_part
def _limit_and_factor(chance, own_chance):
    """The largest draw of what is kept with this chance, and what that is multiplied by."""
    limit = np.uint32(np.ceil(min(np.float32(chance * _DRAWS), _MOST))) - np.uint32(1)
    return np.uint32(limit if chance < _ONE else 0xFFFFFFFF), np.float32(_ONE / chance) if own_chance else _ONE


@compiled_part
def _keep(deltas, limit, factor, words, divisor, kept, s):
    """One element, if its draw is low enough, times a factor and over the divisor."""
    delta_S, kept_S = carray(pointer(deltas), (s + 1,), np.float32), carray(pointer(kept), (s + 1,), np.float32)
    word_S = carray(pointer(words), (s + 1,), np.uint32)
    kept_S[s] = np.float32((delta_S[s] if word_S[s] <= limit else _ZERO) * factor) / divisor


@compiled_part
def _draw(key, pair, draws, words):
    """Write so many words of draws, of 64 bits."""
    if words > 0:
        uniform_words(key, pair, carray(pointer(draws), (words,), np.uint64))


@compiled_part
def _keep_row(deltas, size, at, key, line, places, kept):
    """What is kept of a row that is not short.

    Args:
        deltas, kept: addresses.
        at: the row's first element.
        line: highest, step, own_chance, divisor: as `rank_combine` has them for this client.
        places: addresses of class_R, count_LK (zeros; again so afterwards), chance_K2, chance_R, draws_H.
    """
    highest, step, own_chance, divisor = line
    classes, counts, chances, _, draws = places
    class_R, count_LK = (
        carray(pointer(classes), (size,), np.uint16),
        carray(pointer(counts), (LANES, STRIDE), np.uint32),
    )
    chance_K2 = carray(pointer(chances), (CLASSES, 2), np.uint32)
    last = _classify(deltas, classes, size)
    whole = size // WIDE
    pairs = whole * (WIDE // 2)
    count_and_draw(classes, whole, counts, key, at // 2, draws)
    _draw(key, at // 2 + pairs, draws + 8 * pairs, size // 2 + 1 - pairs)
    for r in range(whole * WIDE, size):
        count_LK[0, np.uint64(class_R[r])] += np.uint32(1)
    smallest = np.int64(0)
    for lane in range(LANES):
        smallest += np.int64(count_LK[lane, CLASSES - 1])
        count_LK[lane, CLASSES - 1] = np.uint32(0)
    chances_of_classes(counts, last + 1, highest, step, own_chance, chances)
    limit, factor = _limit_and_factor(_chance(2 * size - smallest - 1, highest, step), own_chance)
    chance_K2[CLASSES - 1, 0], chance_K2[CLASSES - 1, 1] = limit, bits_of(factor)
    words = draws + 4 * (at % 2)
    look_up_and_keep(classes, chances, whole, words, deltas, divisor, kept)
    for r in range(whole * WIDE, size):
        place = np.uint64(class_R[r])
        _keep(deltas, chance_K2[place, 0], from_bits(chance_K2[place, 1]), words, divisor, kept, r)


@compiled_part
def _keep_short(deltas, size, at, row, key, line, places, kept):
    """What is kept of short rows, or of any where all elements have one chance; as `_keep_row`."""
    highest, step, own_chance, divisor = line
    classes, _, _, chances, draws = places
    chance_S = carray(pointer(chances), (size,), np.float32)
    chance_S[:] = highest
    for begin in range(0, size if step != _ZERO else 0, row):
        _classify(deltas + 4 * begin, classes, row)
        class_R = carray(pointer(classes), (row,), np.uint16)
        _compare(class_R, highest, step, carray(pointer(chances + 4 * begin), (row,), np.float32))
    _draw(key, at // 2, draws, size // 2 + 1)
    for s in range(size):
        limit, factor = _limit_and_factor(chance_S[s], own_chance)
        _keep(deltas, limit, factor, draws + 4 * (at % 2), divisor, kept, s)


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
        highest_N, steps_N: the chances are highest - twice the place * step.
        own_chance: whether what is kept is divided by its own chance; else it is divided by the client's divisor.

    The other arguments and what comes back are those of `prune_combine`.
    """
    count = clients_N.size
    group = row * max(1, RANKED // row)
    room = (group + GROUP - 1) // GROUP * GROUP
    base_store, delta_S = np.zeros(room, np.float32), np.empty(group, np.float32)
    scratch = merging_scratch(count, room)
    places = places_of(scratch)
    class_R, count_LK = np.empty(row, np.uint16), np.zeros((LANES, STRIDE), np.uint32)
    chance_K2, chance_S = np.empty((CLASSES, 2), np.uint32), np.empty(group, np.float32)
    draws_H = np.empty(group // 2 + 1, np.uint64)
    ranks = (
        np.int64(class_R.ctypes.data),
        np.int64(count_LK.ctypes.data),
        np.int64(chance_K2.ctypes.data),
        np.int64(chance_S.ctypes.data),
        np.int64(draws_H.ctypes.data),
    )
    bases, deltas = np.int64(base_store.ctypes.data), np.int64(delta_S.ctypes.data)
    models, kept = np.int64(clients_N.ctypes.data), np.int64(scratch[0].ctypes.data)
    how = np.int64(weights_N.ctypes.data), elect_by, normalize, scale, OF_ROWS
    drawn, otherwise = np.int64(drawn_M.ctypes.data), np.int64(otherwise_M.ctypes.data)
    largest, largest_drawn = np.uint32(0), np.uint32(0)
    tally, draws = 0, 0
    for begin in range(start, stop, group):
        size = min(group, stop - begin)
        base_S = base_store[:size]
        load_base(base, base_code, begin, base_S)
        for n in range(count):
            done = size - size % GROUP
            _load_row(codes_N[n], bases, models + 8 * n, begin, 1, done, deltas, 0)
            load_delta(clients_N[n], codes_N[n], begin + done, base_S[done:], delta_S[done:size])
            line = highest_N[n], steps_N[n], own_chance, divisors_N[n]
            to = kept + 4 * room * n
            if steps_N[n] != _ZERO and row > FEW:
                for at in range(0, size, row):
                    _keep_row(deltas + 4 * at, row, begin + at, keys_N[n], line, ranks, to + 4 * at)
            else:
                _keep_short(deltas, size, begin, row, keys_N[n], line, ranks, to)
        noted = drawn, otherwise, drawn_M.size, draws
        found = merge_rows(base_store, size, how, scratch, places, out, out_code, begin, noted)
        largest, largest_drawn = max(largest, found[0]), max(largest_drawn, found[1])
        tally += found[2]
        draws += found[3]
    in_use(*scratch, class_R, count_LK, chance_K2, chance_S, draws_H)
    return largest, largest_drawn, tally, draws
