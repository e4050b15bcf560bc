"""A compiled pass that keeps elements by chance, the more likely the larger they are within their row, and merges what
is kept: it equals `ops.sparsify.rank_chances` and `keep_by_chance`, and what `prune_combine` equals, bit for bit.

Places come from counts of classes of magnitude, or, in short rows, from comparing all with all.
Suffixes: N clients, S elements of a group of rows, R of a row, K classes, W elements and room for a vector.
"""

from __future__ import annotations

import numpy as np

from fl_merge.kernels.blocks import (
    GROUP,
    MAGNITUDE,
    bits_of,
    compiled_part,
    compiled_pass,
    load,
    load_all,
    load_delta,
    uniform_words,
)
from fl_merge.kernels.merging import in_use, merge_rows, merging_scratch, places_of
from fl_merge.kernels.places import (
    CLASSES,
    DROPPED_BITS,
    LANES,
    LEAST_CHANCE,
    STRIDE,
    chances_of_classes,
    count_and_draw,
    look_up_and_keep,
)
from fl_merge.kernels.vectors import WIDE

FEW = 64
"""In rows up to this length all are compared with all."""

RANKED = 1024
"""How many elements of all clients are kept and merged together, or one row, if that is longer: they stay in the cache
that is next to the fastest."""

_ZERO, _ONE = np.float32(0), np.float32(1)
_LEAST, _DRAWS, _MOST = np.float32(LEAST_CHANCE), np.float32(2.0**32), np.float32(2.0**32 - 256)


@compiled_part
def _chance(twice, highest, step):
    """At twice a place."""
    return max(np.float32(highest - np.float32(np.float32(twice) * step)), _LEAST)


@compiled_part
def _classify(delta_R, class_R):
    """The class of each element; gives the last class but the very last that one is in."""
    largest = np.uint32(0)
    for r in range(delta_R.size):
        largest = max(largest, np.uint32(bits_of(delta_R[r]) & MAGNITUDE))
    first = np.uint32(largest >> np.uint32(DROPPED_BITS))
    last = np.uint32(0)
    for r in range(delta_R.size):
        below = np.uint32(first - ((bits_of(delta_R[r]) & MAGNITUDE) >> np.uint32(DROPPED_BITS)))
        class_R[r] = np.uint16(min(below, np.uint32(CLASSES - 1)))
        last = max(last, below if below < np.uint32(CLASSES - 1) else np.uint32(0))
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
def _keep(delta_S, chance_S, word_S, own_chance, divisor, kept_S):
    """What is kept, over its own chance or the divisor."""
    for s in range(delta_S.size):
        chance = chance_S[s]
        limit = np.uint32(np.ceil(min(np.float32(chance * _DRAWS), _MOST)))
        kept = delta_S[s] if (word_S[s] < limit) | (chance >= _ONE) else _ZERO
        kept_S[s] = kept / (chance if own_chance else divisor)


@compiled_part
def _keep_row(delta_R, at, key, line, scratch, kept_R):
    """What is kept of a row that is not short.

    Args:
        at: the row's first element.
        line: highest, step, own_chance, divisor: as `rank_combine` has them for this client.
        scratch: class_R, count_LK (zeros; again so afterwards), chance_K, chance_R, draws_H.
    """
    highest, step, own_chance, divisor = line
    class_R, count_LK, chance_K, chance_R, draws_H = scratch
    size = delta_R.size
    last = np.int64(_classify(delta_R, class_R))
    counts, chances = count_LK.ctypes.data, chance_K.ctypes.data
    classes, draws = class_R.ctypes.data, draws_H.ctypes.data
    whole = size // WIDE
    pairs = whole * (WIDE // 2)
    count_and_draw(classes, whole, counts, key, at // 2, draws)
    uniform_words(key, at // 2 + pairs, draws_H[pairs : size // 2 + 1])
    for r in range(whole * WIDE, size):
        count_LK[0, np.uint64(class_R[r])] += np.uint32(1)
    smallest = np.int64(0)
    for lane in range(LANES):
        smallest += np.int64(count_LK[lane, CLASSES - 1])
        count_LK[lane, CLASSES - 1] = np.uint32(0)
    chances_of_classes(counts, last + 1, highest, step, chances)
    chance_K[CLASSES - 1] = _chance(2 * size - smallest - 1, highest, step)
    words, deltas, kept = draws + 4 * (at % 2), delta_R.ctypes.data, kept_R.ctypes.data
    look_up_and_keep(classes, chances, whole, words, deltas, own_chance, divisor, kept)
    done = whole * WIDE
    for r in range(done, size):
        chance_R[r] = chance_K[np.uint64(class_R[r])]
    word_R = draws_H.view(np.uint32)[at % 2 :]
    _keep(delta_R[done:], chance_R[done:], word_R[done:], own_chance, divisor, kept_R[done:])


@compiled_part
def _keep_short(delta_S, at, row, key, line, scratch, kept_S):
    """What is kept of short rows, or of any where all elements have one chance; as `_keep_row`."""
    highest, step, own_chance, divisor = line
    class_R, _, _, chance_S, draws_H = scratch
    chance_S[: delta_S.size] = highest
    for begin in range(0, delta_S.size if step != _ZERO else 0, row):
        _classify(delta_S[begin : begin + row], class_R)
        _compare(class_R, highest, step, chance_S[begin : begin + row])
    uniform_words(key, at // 2, draws_H[: delta_S.size // 2 + 1])
    _keep(delta_S, chance_S, draws_H.view(np.uint32)[at % 2 :], own_chance, divisor, kept_S)


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
    base_store, delta_S, scratch = (
        np.zeros(room, np.float32),
        np.empty(group, np.float32),
        merging_scratch(count, room),
    )
    kept_NS, places = scratch[0], places_of(scratch)
    count_LK, chance_K = np.zeros((LANES, STRIDE), np.uint32), np.empty(CLASSES, np.float32)
    class_R, chance_S, draws_H = (
        np.empty(row, np.uint16),
        np.empty(group, np.float32),
        np.empty(group // 2 + 1, np.uint64),
    )
    ranks = class_R, count_LK, chance_K, chance_S, draws_H
    bases, deltas = np.int64(base_store.ctypes.data), np.int64(delta_S.ctypes.data)
    models = np.int64(clients_N.ctypes.data)
    how = np.int64(weights_N.ctypes.data), elect_by, normalize, scale
    drawn, otherwise = np.int64(drawn_M.ctypes.data), np.int64(otherwise_M.ctypes.data)
    largest, largest_drawn = np.uint32(0), np.uint32(0)
    tally, draws = 0, 0
    for begin in range(start, stop, group):
        size = min(group, stop - begin)
        base_S = base_store[:size]
        load(base, base_code, begin, base_S)
        for n in range(count):
            done = size - size % GROUP
            load_all(codes_N[n], bases, models + 8 * n, begin, 1, done, deltas, 0)
            load_delta(clients_N[n], codes_N[n], begin + done, base_S[done:], delta_S[done:size])
            line = highest_N[n], steps_N[n], own_chance, divisors_N[n]
            if steps_N[n] != _ZERO and row > FEW:
                for at in range(0, size, row):
                    _keep_row(delta_S[at : at + row], begin + at, keys_N[n], line, ranks, kept_NS[n, at : at + row])
            else:
                _keep_short(delta_S[:size], begin, row, keys_N[n], line, ranks, kept_NS[n, :size])
        noted = drawn, otherwise, drawn_M.size, draws
        found = merge_rows(base_store, size, how, scratch, places, out, out_code, begin, noted)
        largest, largest_drawn = max(largest, found[0]), max(largest_drawn, found[1])
        tally += found[2]
        draws += found[3]
    in_use(*scratch)
    return largest, largest_drawn, tally, draws
