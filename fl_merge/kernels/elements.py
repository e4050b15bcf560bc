"""A compiled pass for methods whose merged delta is an elementwise function of the deltas: order statistics, masks.

Each kind equals its torch definition in `ops.order`, `ops.masks` or the method's file bit for bit, operation by
operation. Suffixes: N clients, B the elements of a block, P pairs.
"""

from __future__ import annotations

import numpy as np

from fl_merge.kernels import across
from fl_merge.kernels.blocks import BLOCK, compiled_part, compiled_pass, load_base, load_deltas, store

MEDIAN, TRIMMED_MEAN, AROUND_MEDIAN, LARGEST, UNIFIED, CONSENSUS, DAMPED = 1, 2, 3, 4, 5, 6, 7

_ZERO, _HALF, _ONE = np.float32(0), np.float32(0.5), np.float32(1)


def _sorts_up_to(most):
    """A function that sorts the columns of at most so many rows; of more it says that it does not."""
    if most < 2:
        return compiled_part(lambda rows, stride, count, size: count < 2)
    fewer, sort_columns = _sorts_up_to(most - 1), across.sorts_columns(most)

    @compiled_part
    def sort(rows, stride, count, size):
        if count == most:
            sort_columns(rows, stride, size)
            return True
        return fewer(rows, stride, count, size)

    return sort


_sort_few = _sorts_up_to(16)


@compiled_part
def _sort(delta_NB, size, pairs_P2):
    """Sort each column by a network of comparisons that is the same for all."""
    if _sort_few(delta_NB.ctypes.data, 4 * delta_NB.shape[1], delta_NB.shape[0], size):
        return
    for p in range(pairs_P2.shape[0]):
        one_B, two_B = delta_NB[pairs_P2[p, 0], :size], delta_NB[pairs_P2[p, 1], :size]
        for s in range(size):
            one, two = one_B[s], two_B[s]
            swap = two < one
            one_B[s] = two if swap else one
            two_B[s] = one if swap else two


@compiled_part
def _median(sorted_NB, out_B):
    count, size = sorted_NB.shape[0], out_B.size
    low_B, high_B = sorted_NB[(count - 1) // 2, :size], sorted_NB[count // 2, :size]
    if count % 2:
        for s in range(size):
            out_B[s] = low_B[s] + _ZERO
    else:
        for s in range(size):
            out_B[s] = (low_B[s] + high_B[s]) * _HALF + _ZERO


@compiled_part
def _mean(sorted_NB, first, count, out_B):
    size = out_B.size
    out_B[:] = _ZERO
    for n in range(first, first + count):
        row_B = sorted_NB[n, :size]
        for s in range(size):
            out_B[s] += row_B[s]
    divisor = np.float32(count)
    for s in range(size):
        out_B[s] = out_B[s] / divisor


@compiled_part
def _largest(delta_NB, out_B):
    size = out_B.size
    out_B[:] = delta_NB[0, :size]
    for n in range(1, delta_NB.shape[0]):
        delta_B = delta_NB[n, :size]
        for s in range(size):
            out_B[s] = delta_B[s] if abs(delta_B[s]) > abs(out_B[s]) else out_B[s]


@compiled_part
def _sum(delta_NB, factors_N, out_B):
    """The weighted sum in the clients' order; each product is rounded before it is added."""
    size = out_B.size
    out_B[:] = -_ZERO
    for n in range(delta_NB.shape[0]):
        delta_B, factor = delta_NB[n, :size], factors_N[n]
        for s in range(size):
            out_B[s] += delta_B[s] * factor


@compiled_part
def _unified(delta_NB, factors_N, sign_B, out_B):
    size = out_B.size
    _sum(delta_NB, factors_N, sign_B)
    out_B[:] = _ZERO
    for s in range(size):
        sign_B[s] = _ONE if sign_B[s] > _ZERO else (-_ONE if sign_B[s] < _ZERO else _ZERO)
    for n in range(delta_NB.shape[0]):
        delta_B = delta_NB[n, :size]
        for s in range(size):
            aligned = delta_B[s] * sign_B[s]
            out_B[s] = aligned if aligned > out_B[s] else out_B[s]
    for s in range(size):
        out_B[s] = sign_B[s] * out_B[s] + _ZERO


@compiled_part
def _consensus(delta_NB, factors_N, factor, threshold, at_least, votes_B, out_B):
    size = out_B.size
    _sum(delta_NB, factors_N, out_B)
    votes_B[:] = _ZERO
    for s in range(size):
        out_B[s] = out_B[s] * factor
    for n in range(delta_NB.shape[0]):
        delta_B = delta_NB[n, :size]
        for s in range(size):
            votes_B[s] += _ONE if abs(delta_B[s]) > abs(out_B[s] - delta_B[s]) * threshold else _ZERO
    for s in range(size):
        out_B[s] = out_B[s] if votes_B[s] >= at_least else _ZERO


@compiled_part
def _damped(delta_NB, factors_N, scale, threshold, agreement_B, out_B):
    size = out_B.size
    agreement_B[:] = -_ZERO
    for n in range(delta_NB.shape[0]):
        delta_B, factor = delta_NB[n, :size], factors_N[n]
        for s in range(size):
            sign = _ONE if delta_B[s] > _ZERO else (-_ONE if delta_B[s] < _ZERO else _ZERO)
            agreement_B[s] += sign * factor
    _sum(delta_NB, factors_N, out_B)
    for s in range(size):
        agreement = abs(agreement_B[s])
        mask = _ONE if agreement >= threshold else agreement
        out_B[s] = (mask * scale) * out_B[s]


@compiled_pass
def combine_elements(
    base, base_code, clients_N, codes_N, kind, count, factors_N, numbers_K, pairs_P2, scale, start, stop, out, out_code
):
    """base + the merged delta of that kind.

    Args:
        count: how many values are averaged (TRIMMED_MEAN, AROUND_MEDIAN).
        factors_N: of the deltas, where they are added.
        numbers_K: three numbers of the kind.
        pairs_P2: a network that sorts N values.
        scale: multiplies the merged delta of LARGEST and UNIFIED.

    Returns:
        The bits of the largest float32 magnitude in the result.
    """
    base_store = np.empty(BLOCK, np.float32)
    value_store = np.empty(BLOCK, np.float32)
    other_store = np.empty(BLOCK, np.float32)
    delta_NB = np.empty((clients_N.size, BLOCK), np.float32)
    rows, middles, values = delta_NB.ctypes.data, other_store.ctypes.data, value_store.ctypes.data
    largest = np.uint32(0)
    for begin in range(start, stop, BLOCK):
        size = min(BLOCK, stop - begin)
        base_B, value_B, other_B = base_store[:size], value_store[:size], other_store[:size]
        load_base(base, base_code, begin, base_B)
        load_deltas(clients_N, codes_N, begin, base_B, delta_NB)
        if kind <= AROUND_MEDIAN:
            _sort(delta_NB, size, pairs_P2)
            if kind == MEDIAN:
                _median(delta_NB, value_B)
            elif kind == TRIMMED_MEAN:
                _mean(delta_NB, (clients_N.size - count) // 2, count, value_B)
            else:
                _median(delta_NB, other_B)
                across.mean_around(rows, 4 * BLOCK, clients_N.size, count, middles, size, values)
        elif kind == CONSENSUS:
            _consensus(delta_NB, factors_N, numbers_K[0], numbers_K[1], numbers_K[2], other_B, value_B)
        elif kind == DAMPED:
            _damped(delta_NB, factors_N, scale, numbers_K[0], other_B, value_B)
        else:
            if kind == LARGEST:
                _largest(delta_NB, value_B)
            else:
                _unified(delta_NB, factors_N, other_B, value_B)
            for s in range(size):
                value_B[s] = value_B[s] * scale
        for s in range(size):
            value_B[s] = base_B[s] + value_B[s]
        largest = max(largest, store(value_B, out, out_code, begin))
    return largest
