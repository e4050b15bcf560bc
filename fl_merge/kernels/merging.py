"""Compiled passes that merge: they read a piece of a tensor's base and clients where they are (mapped files, messages),
each in its own dtype, and write the merged elements where they belong. Each equals its torch definition bit for bit.

Products are rounded before they are added and sums run in the clients' order, as in the definitions; numba does not
reorder or contract floating-point operations unless it is told to. Suffixes: N clients, B the elements of a block.
"""

from __future__ import annotations

import numpy as np

from fl_merge.kernels import across, vectors
from fl_merge.kernels.across import add_weighted
from fl_merge.kernels.blocks import (
    GROUP,
    MAGNITUDE,
    add_scaled_delta,
    bits_of,
    by_dtype,
    compiled_part,
    compiled_pass,
    load,
    load_delta,
    load_deltas,
    load_double,
    load_trimmed,
    lowest_bit,
    one_dtype,
    store,
    uniform_words,
)
from fl_merge.kernels.draws import keep_drawn
from fl_merge.kernels.scoring import load_varying
from fl_merge.kernels.vectors import DOUBLES

KEEP_LARGEST, KEEP_RANDOM, KEEP_MIDDLE, KEEP_VARYING = 1, 2, 3, 4
ELECT_NONE, ELECT_TOTAL, ELECT_FREQUENCY = 0, 1, 2

_BLOCK = 256
"""Elements of all clients whose deltas are at hand together: beside what is read and written they leave room in the
fastest cache."""

_ZERO, _ONE = np.float32(0), np.float32(1)

_add_models = by_dtype(vectors.adds_models)
_elect_by_number, _elect_by_total = across.elects(by_number=True), across.elects(by_number=False)


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
def _load_largest(clients_N, codes_N, start, base_B, known, limit_N, delta_NB):
    """Deltas of which an element is kept that is above its client's threshold, or just on it and not behind the place
    `last`.

    Args:
        known: thresholds_N, above_N, last_N: above is the float32 that follows the threshold.
        limit_N: scratch.
    """
    thresholds_N, above_N, last_N = known
    size, count, done = base_B.size, clients_N.size, 0
    whole = one_dtype(codes_N)
    for n in range(count):
        whole = whole and not start < last_N[n] + 1 < start + size
        limit_N[n] = thresholds_N[n] if start < last_N[n] + 1 else above_N[n]
    if whole:
        done = size - size % GROUP
        bases, models, limits = base_B.ctypes.data, clients_N.ctypes.data, limit_N.ctypes.data
        load_trimmed(codes_N[0], bases, models, start, count, limits, done, delta_NB.ctypes.data, 4 * delta_NB.shape[1])
    if done < size:
        for n in range(count):
            delta_B = delta_NB[n, done:size]
            load_delta(clients_N[n], codes_N[n], start + done, base_B[done:], delta_B)
            for s in range(delta_B.size):
                limit = thresholds_N[n] if start + done + s <= last_N[n] else above_N[n]
                delta_B[s] = delta_B[s] if abs(delta_B[s]) >= limit else _ZERO


@compiled_part
def _drop_largest(delta_B, threshold, above, last):
    """What `_load_largest` would keep is set to 0."""
    before = min(max(last + 1, 0), delta_B.size)
    head_B, tail_B = delta_B[:before], delta_B[before:]
    for s in range(head_B.size):
        head_B[s] = _ZERO if abs(head_B[s]) >= threshold else head_B[s]
    for s in range(tail_B.size):
        tail_B[s] = _ZERO if abs(tail_B[s]) >= above else tail_B[s]


@compiled_part
def _with_minus(delta_NB, weights_N, s, normalize):
    """What one element's deltas give if minus is elected."""
    total, share = -_ZERO, _ZERO
    for n in range(weights_N.size):
        if delta_NB[n, s] < _ZERO:
            total = np.float32(total + delta_NB[n, s] * weights_N[n])
            share = np.float32(share + weights_N[n])
        else:
            total = np.float32(total + _ZERO)
    if normalize:
        return np.float32(total / share) if share > _ZERO else _ZERO
    return total


@compiled_part
def merge_rows(delta_NG, base_G, size, how, scratch, out, out_code, begin, noted):
    """Merge what is kept of the deltas of the elements from `begin` on, and write it.

    Args:
        delta_NG, base_G: in whole groups; what is behind `size` becomes 0.
        how: weights_N, voices_N, elect_by, normalize, scale, as in `prune_combine`.
        scratch: for the merged values, and a word for each group.
        noted: drawn_M, otherwise_M, and how many draws there have been.

    Returns:
        What `prune_combine` does, of these elements.
    """
    weights_N, voices_N, elect_by, normalize, scale = how
    value_G, drawn_G = scratch
    drawn_M, otherwise_M, draws = noted
    rows, bases, value, stride = delta_NG.ctypes.data, base_G.ctypes.data, value_G.ctypes.data, 4 * delta_NG.shape[1]
    weights, voices, drawn = weights_N.ctypes.data, voices_N.ctypes.data, drawn_G.ctypes.data
    count, value_B = weights_N.size, value_G[:size]
    if elect_by == ELECT_NONE:
        add_weighted(rows, stride, count, weights, bases, scale, size, value)
        return store(value_B, out, out_code, begin), np.uint32(0), 0, 0
    delta_NG[:, size:] = _ZERO
    base_G[size:] = _ZERO
    where = voices, weights, bases, scale, normalize, size, value, drawn
    if elect_by == ELECT_FREQUENCY:
        won, here, most = _elect_by_number(rows, stride, count, *where)
    else:
        won, here, most = _elect_by_total(rows, stride, count, *where)
    store(value_B, out, out_code, begin)
    largest_drawn = np.uint32(0)
    for g in range((size + GROUP - 1) // GROUP if here else 0):
        left = drawn_G[g]
        while left:
            s = np.uint64(g * GROUP + lowest_bit(left))
            left &= left - np.uint64(1)
            largest_drawn = max(largest_drawn, np.uint32(bits_of(value_B[s]) & MAGNITUDE))
            if draws < drawn_M.size:
                drawn_M[draws] = begin + s
                otherwise_M[draws] = base_G[s] + _with_minus(delta_NG, weights_N, s, normalize) * scale
            draws += 1
    return np.uint32(most), largest_drawn, won, here


@compiled_pass
def prune_combine(
    base,
    base_code,
    clients_N,
    codes_N,
    weights_N,
    voices_N,
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
        weights_N, voices_N: in the sum, and in an election by total.
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
    count = clients_N.size
    base_store, value_store = np.zeros(_BLOCK, np.float32), np.empty(_BLOCK, np.float32)
    delta_NB, limit_N = np.zeros((count, _BLOCK), np.float32), np.empty(count, np.float32)
    drawn_G = np.empty(_BLOCK // GROUP, np.uint64)
    rows, stride = delta_NB.ctypes.data, 4 * _BLOCK
    how, scratch = (weights_N, voices_N, elect_by, normalize, scale), (value_store, drawn_G)
    largest, largest_drawn = np.uint32(0), np.uint32(0)
    tally, draws = 0, 0
    for begin in range(start, stop, _BLOCK):
        size = min(_BLOCK, stop - begin)
        base_B = base_store[:size]
        load(base, base_code, begin, base_B)
        if prune in (KEEP_LARGEST, KEEP_MIDDLE):
            known = thresholds_N, above_N, last_N
            _load_largest(clients_N, codes_N, begin, base_B, known, limit_N, delta_NB)
        elif prune == KEEP_VARYING:
            cut = thresholds_N[0], above_N[0], last_N[0]
            load_varying(clients_N, codes_N, begin, base_B, cut, delta_NB, value_store)
        else:
            load_deltas(clients_N, codes_N, begin, base_B, delta_NB)
        if prune == KEEP_MIDDLE:
            for n in range(count):
                _drop_largest(delta_NB[n, :size], top_thresholds_N[n], top_above_N[n], top_last_N[n] - begin)
        if prune == KEEP_RANDOM:
            for n in range(count):
                keep_drawn(rows + stride * n, keys_N[n], begin // 2, limits_N[n], factors_N[n], size)
                if divisors_N[n] != _ONE:
                    for s in range(size):
                        delta_NB[n, s] /= divisors_N[n]
        noted = drawn_M, otherwise_M, draws
        found = merge_rows(delta_NB, base_store, size, how, scratch, out, out_code, begin, noted)
        largest, largest_drawn = max(largest, found[0]), max(largest_drawn, found[1])
        tally += found[2]
        draws += found[3]
    return largest, largest_drawn, tally, draws


@compiled_pass
def uniform(key, start, out_S):
    """The draws of `ops.draws` from an even element on, in [0, 1)."""
    draws_H = np.empty((out_S.size + 1) // 2, np.uint64)
    uniform_words(key, start // 2, draws_H)
    words_S = draws_H.view(np.uint32)
    for s in range(out_S.size):
        out_S[s] = np.float64(words_S[s]) * 2.0**-32
