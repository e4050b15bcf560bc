"""Compiled passes that merge: they read a piece of a tensor's base and clients where they are (mapped files, messages),
each in its own dtype, and write the merged elements where they belong. Each equals its torch definition bit for bit.

Products are rounded before they are added and sums run in the clients' order, as in the definitions; numba does not
reorder or contract floating-point operations unless it is told to. Suffixes: N clients, B the elements of a block.
"""

from __future__ import annotations

import numpy as np
from numba import carray

from fl_merge.kernels import elections, varying, vectors
from fl_merge.kernels.across import add_weighted
from fl_merge.kernels.blocks import (
    BLOCK,
    FLOAT32,
    MAGNITUDE,
    add_scaled_delta,
    bits_of,
    by_dtype,
    compiled_part,
    compiled_pass,
    load_base,
    load_deltas,
    load_double,
    lowest_bit,
    one_dtype,
    pointer,
    store,
    uniform_words,
)
from fl_merge.kernels.draws import keep_drawn
from fl_merge.kernels.pairs import PAIR
from fl_merge.kernels.scoring import load_varying, natively
from fl_merge.kernels.vectors import DOUBLES

KEEP_LARGEST, KEEP_RANDOM, KEEP_MIDDLE, KEEP_VARYING = 1, 2, 3, 4
OF_ROWS, ABOVE, BETWEEN, VARYING = 0, 1, 2, 3
"""What `_elected` elects: rows, models above their limits, between two of them, or where they vary."""

ELECT_NONE, ELECT_TOTAL, ELECT_FREQUENCY, ELECT_SUM = 0, 1, 2, 3

_BLOCK = 512
"""Elements of all clients whose deltas are at hand together: beside what is read and written they leave room in the
fastest cache."""

_ZERO, _ONE = np.float32(0), np.float32(1)
_LEAST = np.nextafter(_ZERO, _ONE)

_add_models = by_dtype(vectors.adds_models)
_sum_kept = by_dtype(elections.sums_kept)
_elect_by_total, _elect_by_number = (by_dtype(elections.elects_kept, by=how) for how in ("total", "frequency"))
_elect_middle_by_total, _elect_middle_by_number = (
    by_dtype(elections.elects_kept, by=how, middle=True) for how in ("total", "frequency")
)
_elect_rows_by_total, _elect_rows_by_number, _elect_rows_by_sum = (
    elections.elects_rows(by=how) for how in ("total", "frequency", "sum")
)
_elect_varying = by_dtype(varying.elects_varying)


@compiled_pass
def weighted_sum(base, base_code, clients_N, codes_N, scaling, coefficients_N, start, stop, out, out_code):
    """scaling * base + sum of coefficients * (client - base), added in float64 and rounded once.

    Returns:
        The bits of the largest float32 magnitude in it.
    """
    base_store = np.empty(_BLOCK, np.float64)
    total_store = np.empty(_BLOCK, np.float64)
    value_store = np.empty(_BLOCK, np.float32)
    bases, values = base_store.ctypes.data, value_store.ctypes.data
    addresses, coefficients = clients_N.ctypes.data, coefficients_N.ctypes.data
    alike = one_dtype(codes_N)
    largest = np.uint32(0)
    for begin in range(start, stop, _BLOCK):
        size = min(_BLOCK, stop - begin)
        base_B, total_B, value_B = base_store[:size], total_store[:size], value_store[:size]
        load_double(base, base_code, begin, base_B)
        done = 0
        if alike:
            done = size - size % DOUBLES
            _add_models(codes_N[0], bases, addresses, begin, codes_N.size, scaling, coefficients, done, values)
        if done < size:
            for s in range(done, size):
                total_B[s] = base_B[s] * scaling
            rest_B, sum_B = base_B[done:], total_B[done:]
            for n in range(clients_N.size):
                add_scaled_delta(clients_N[n], codes_N[n], begin + done, rest_B, coefficients_N[n], sum_B)
            for s in range(done, size):
                value_B[s] = np.float32(total_B[s])
        largest = max(largest, store(value_B, out, out_code, begin))
    return largest


@compiled_part
def merging_scratch(count, room):
    """Arrays for `merge_rows`: kept deltas; merged values, those of clients with a minus, and the weights of these;
    which elections are draws; and where the rows are."""
    delta_NG, result_3G = np.zeros((count, room), np.float32), np.zeros((3, room), np.float32)
    rows_N = np.int64(delta_NG.ctypes.data) + 4 * room * np.arange(count)
    return delta_NG, result_3G, np.empty(room // PAIR, np.uint64), rows_N


@compiled_part
def places_of(scratch):
    """Addresses of what `merging_scratch` gives. The arrays must be in use where these are."""
    delta_NG, result_3G, drawn_X, rows_N = scratch
    count, room = delta_NG.shape
    result = np.int64(result_3G.ctypes.data)
    results = result, result + 4 * room, result + 8 * room, np.int64(drawn_X.ctypes.data)
    return (np.int64(delta_NG.ctypes.data), 4 * room, np.int64(rows_N.ctypes.data), count), results


@compiled_part
def in_use(*arrays):
    """For arrays whose addresses have been used: numba frees what is not named any more."""
    return len(arrays)


@compiled_part
def _elected(code, bases, models, start, count, limits, tops, added, size, how, results, out, out_code, begin, noted):
    """Merge what is kept of models by elections, and write it.

    Args:
        bases, models, start, count, limits, tops, added: as `elections.elects_kept` has them, of models of the dtype
            `code`; whole PAIRs of elements.
        results: of `places_of`.
        size, how, out, out_code, begin, noted: as `merge_rows`.

    Returns:
        What `merge_rows` does.
    """
    weights, elect_by, normalize, scale, kind = how
    values, others, shares, drawn = results
    given = models, start, count, limits, tops, weights, added, scale, normalize, size, *results
    if kind == OF_ROWS:
        if elect_by == ELECT_FREQUENCY:
            won, here, most = _elect_rows_by_number(bases, *given)
        elif elect_by == ELECT_SUM:
            won, here, most = _elect_rows_by_sum(bases, *given)
        else:
            won, here, most = _elect_rows_by_total(bases, *given)
    elif kind == VARYING:
        won, here, most = _elect_varying(code, bases, *given)
    elif elect_by == ELECT_FREQUENCY:
        if kind == BETWEEN:
            won, here, most = _elect_middle_by_number(code, bases, *given)
        else:
            won, here, most = _elect_by_number(code, bases, *given)
    elif kind == BETWEEN:
        won, here, most = _elect_middle_by_total(code, bases, *given)
    else:
        won, here, most = _elect_by_total(code, bases, *given)
    store(carray(pointer(values), (size,), np.float32), out, out_code, begin)
    largest_drawn = np.uint32(0)
    if here:
        groups = (size + PAIR - 1) // PAIR
        drawn_X = carray(pointer(drawn), (groups,), np.uint64)
        value_B, added_B, other_B, share_B = (
            carray(pointer(values), (PAIR * groups,), np.float32),
            carray(pointer(added), (PAIR * groups,), np.float32),
            carray(pointer(others), (PAIR * groups,), np.float32),
            carray(pointer(shares), (PAIR * groups,), np.float32),
        )
        places, otherwise, room, draws = noted
        place_M = carray(pointer(places), (room,), np.int64)
        otherwise_M = carray(pointer(otherwise), (room,), np.float32)
        for x in range(groups):
            left = drawn_X[x]
            while left:
                s = np.uint64(x * PAIR + lowest_bit(left))
                left &= left - np.uint64(1)
                largest_drawn = max(largest_drawn, np.uint32(bits_of(value_B[s]) & MAGNITUDE))
                if draws < room:
                    place_M[draws] = begin + s
                    other, share = other_B[s], share_B[s]
                    if normalize:
                        other = np.float32(other / share) if share > _ZERO else _ZERO
                    otherwise_M[draws] = added_B[s] + other * scale
                draws += 1
    return np.uint32(most), largest_drawn, won, here


@compiled_part
def merge_rows(base_G, size, how, scratch, places, out, out_code, begin, noted):
    """Merge what is kept of the deltas of the elements from `begin` on, and write it.

    Args:
        base_G: in whole groups; what is behind `size` becomes 0, in the rows too.
        how: the address of the weights, elect_by, normalize, scale, as in `prune_combine`, and OF_ROWS.
        scratch, places: of `merging_scratch`, with the deltas, and of `places_of`.
        noted: the addresses of drawn_M and otherwise_M, their size, and how many draws there have been.

    Returns:
        What `prune_combine` does, of these elements.
    """
    weights, elect_by, _, scale, _ = how
    (rows, stride, models, count), results = places
    bases = np.int64(base_G.ctypes.data)
    if elect_by == ELECT_NONE:
        add_weighted(rows, stride, count, weights, bases, scale, size, results[0])
        value_B = carray(pointer(results[0]), (size,), np.float32)
        return store(value_B, out, out_code, begin), np.uint32(0), 0, 0
    if size % PAIR:
        scratch[0][:, size:] = _ZERO
        base_G[size:] = _ZERO
    where = bases, models, 0, count, 0, 0, bases
    return _elected(FLOAT32, *where, size, how, results, out, out_code, begin, noted)


@compiled_part
def _limits(thresholds_N, above_N, last_N, start, limit_N):
    """What the magnitude of an element is at least that is kept, of each client, and for how many elements from `start`
    on that is so of all."""
    alike = np.int64(2**62)
    for n in range(limit_N.size):
        left = last_N[n] + 1 - start
        limit_N[n] = thresholds_N[n] if left > 0 else above_N[n]
        if left > 0:
            alike = min(alike, left)
    return alike


@compiled_part
def _trim(delta_B, start, thresholds, kept):
    """Set to 0 what is not kept of a client's deltas, or what is.

    Args:
        thresholds: kept is what has a magnitude above the threshold, or just on it and is not behind the place `last`:
            threshold, above, last; above is the float32 that follows the threshold.
    """
    threshold, above, last = thresholds
    for s in range(delta_B.size):
        limit = threshold if start + s <= last else above
        delta_B[s] = delta_B[s] if (abs(delta_B[s]) >= limit) == kept else _ZERO


@compiled_pass
def prune_combine(
    base,
    base_code,
    clients_N,
    codes_N,
    weights_N,
    prune,
    thresholds_N,
    above_N,
    last_N,
    top_thresholds_N,
    top_above_N,
    top_last_N,
    keys_N,
    limits_N,
    factors_N,
    divisors_N,
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
    """base + scale * combine(prune(deltas)): see `fl_merge.stages`.

    An election that is a draw is won by the sign that most of the tensor's elements have, which is known only when all
    are counted. Here it is plus; what comes out with minus is noted beside it.

    Args:
        weights_N: in the sum, and in an election by total. An election by sum is for KEEP_VARYING alone.
        thresholds_N, above_N, last_N: for KEEP_LARGEST and KEEP_MIDDLE; `last_N` counts within the tensor. For
            KEEP_VARYING the first ones are of the variance.
        top_thresholds_N, top_above_N, top_last_N: for KEEP_MIDDLE: what is dropped as the largest.
        keys_N, limits_N, factors_N, divisors_N: for KEEP_RANDOM: of the draws, the largest draw of what is kept, and
            what that is multiplied and divided by.
        drawn_M, otherwise_M: take the places of draws and the float32 values that these elements have with minus.

    Returns:
        The bits of the largest float32 magnitude in the result where there was no draw, and where there was one; the
        sum of the elected signs; and how many draws there were, of which as many are noted as there is room for.
    """
    count, by_limits = clients_N.size, prune in (KEEP_LARGEST, KEEP_MIDDLE)
    native = (by_limits and one_dtype(codes_N)) or (prune == KEEP_VARYING and natively(codes_N))
    block = BLOCK if native else _BLOCK
    scratch, base_store = merging_scratch(count, block), np.zeros(block, np.float32)
    delta_NB, places = scratch[0], places_of(scratch)
    (rows, stride, _, _), results = places
    value_B = scratch[1][0]
    limit_N, top_N = np.empty(count, np.float32), np.full(count, np.nan, np.float32)
    limits, tops = np.int64(limit_N.ctypes.data), np.int64(top_N.ctypes.data)
    if prune == KEEP_VARYING:
        tops = places[0][0]  # the rows are scratch there
    models, weights = np.int64(clients_N.ctypes.data), np.int64(weights_N.ctypes.data)
    bases, how = np.int64(base_store.ctypes.data), (weights, elect_by, normalize, scale, OF_ROWS)
    kind = VARYING if prune == KEEP_VARYING else BETWEEN if prune == KEEP_MIDDLE else ABOVE
    how_native = weights, elect_by, normalize, scale, kind
    drawn, otherwise = np.int64(drawn_M.ctypes.data), np.int64(otherwise_M.ctypes.data)
    least = _ZERO if elect_by == ELECT_NONE else _LEAST
    largest, largest_drawn = np.uint32(0), np.uint32(0)
    tally, draws, begin = 0, 0, start
    while begin < stop:
        size = min(block, stop - begin)
        noted = drawn, otherwise, drawn_M.size, draws
        alike = np.int64(0)
        if native:  # up to where a limit changes
            alike = _limits(thresholds_N, above_N, last_N, begin, limit_N)
            for n in range(count if by_limits else 0):
                limit_N[n] = max(limit_N[n], least) if limit_N[n] == limit_N[n] else limit_N[n]
            if prune == KEEP_MIDDLE:
                alike = min(alike, _limits(top_thresholds_N, top_above_N, top_last_N, begin, top_N))
            alike = min(alike, size) // PAIR * PAIR
            size = alike if alike else min(size, PAIR)
        base_B = base_store[:size]
        load_base(base, base_code, begin, base_B)
        if alike:
            where = bases, models, begin, count, limits, tops
            if elect_by == ELECT_NONE:
                _sum_kept(codes_N[0], *where, weights, bases, scale, size, results[0])
                found = store(value_B[:size], out, out_code, begin), np.uint32(0), 0, 0
            else:
                found = _elected(codes_N[0], *where, bases, size, how_native, results, out, out_code, begin, noted)
        else:
            if prune == KEEP_VARYING:
                cut = thresholds_N[0], above_N[0], last_N[0]
                load_varying(clients_N, codes_N, begin, base_B, cut, delta_NB, value_B)
            else:
                load_deltas(clients_N, codes_N, begin, base_B, delta_NB)
            for n in range(count if by_limits else 0):
                _trim(delta_NB[n, :size], begin, (thresholds_N[n], above_N[n], last_N[n]), True)
                if prune == KEEP_MIDDLE:
                    _trim(delta_NB[n, :size], begin, (top_thresholds_N[n], top_above_N[n], top_last_N[n]), False)
            for n in range(count if prune == KEEP_RANDOM else 0):
                keep_drawn(rows + stride * n, keys_N[n], begin // 2, limits_N[n], factors_N[n], size)
                if divisors_N[n] != _ONE:
                    for s in range(size):
                        delta_NB[n, s] /= divisors_N[n]
            found = merge_rows(base_store, size, how, scratch, places, out, out_code, begin, noted)
        largest, largest_drawn = max(largest, found[0]), max(largest_drawn, found[1])
        tally += found[2]
        draws += found[3]
        begin += size
    in_use(*scratch, base_store, limit_N, top_N)
    return largest, largest_drawn, tally, draws


@compiled_pass
def uniform(key, start, out_S):
    """The draws of `ops.draws` from an even element on, in [0, 1)."""
    draws_H = np.empty((out_S.size + 1) // 2, np.uint64)
    uniform_words(key, start // 2, draws_H)
    words_S = draws_H.view(np.uint32)
    for s in range(out_S.size):
        out_S[s] = np.float64(words_S[s]) * 2.0**-32
