"""The hot functions of `fl_merge.ops`, compiled by numba. Each equals its torch definition bit for bit.

Products are rounded before they are added and sums run in the clients' order, as in the definitions; numba does not
reorder or contract floating-point operations unless it is told to. Suffixes: N clients, S elements.
"""

from __future__ import annotations

import numba
import numpy as np

_compile = numba.njit(cache=True, nogil=True, fastmath=False)


BLOCK = 1024
"""Elements that are worked on at a time: a few arrays of them stay in the fastest cache."""


@numba.njit(inline="always")
def _draw(key, index):
    """Element `index` of the stream `key`, in [0, 1): see `ops.draws`."""
    state = key + np.uint64(index + 1) * np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    state ^= state >> np.uint64(31)
    return np.float64(state >> np.uint64(11)) * 2.0**-53


@_compile
def weighted_sum(deltas_NS, weights_N, out_S):
    count, size = deltas_NS.shape
    for start in range(0, size, BLOCK):
        stop = min(size, start + BLOCK)
        for s in range(start, stop):
            out_S[s] = deltas_NS[0, s] * weights_N[0]
        for n in range(1, count):
            weight = weights_N[n]
            for s in range(start, stop):
                out_S[s] += deltas_NS[n, s] * weight


@_compile
def add_scaled_delta(total_S, base_S, client_S, coefficient):
    """total += (client - base) * coefficient in float64, for a client's float32 or float64."""
    for s in range(total_S.size):
        total_S[s] += (np.float64(client_S[s]) - base_S[s]) * coefficient


@_compile
def add_scaled_delta_bfloat16(total_S, base_S, bits_S, coefficient):
    """The same for a client's bfloat16, given as its bits."""
    wide_B = np.empty(BLOCK, np.uint32)
    values_B = wide_B.view(np.float32)
    for start in range(0, total_S.size, BLOCK):
        block = min(BLOCK, total_S.size - start)
        for s in range(block):
            wide_B[s] = np.uint32(bits_S[start + s]) << np.uint32(16)
        for s in range(block):
            total_S[start + s] += (np.float64(values_B[s]) - base_S[start + s]) * coefficient


@_compile
def elect_total(deltas_NS, weights_N, out_S):
    count, size = deltas_NS.shape
    zero = deltas_NS.dtype.type(0)
    one = deltas_NS.dtype.type(1)
    for s in range(size):
        total = deltas_NS[0, s] * weights_N[0]
        for n in range(1, count):
            total += deltas_NS[n, s] * weights_N[n]
        out_S[s] = one if total > zero else (-one if total < zero else zero)


@_compile
def elect_disjoint(deltas_NS, weights_N, mean, out_S):
    """Steps 2 and 3 of TIES at once; false if an element's deltas cancel, so that the tensor's tally is needed."""
    count, size = deltas_NS.shape
    zero = deltas_NS.dtype.type(0)
    one = deltas_NS.dtype.type(1)
    elected_B = np.empty(BLOCK, deltas_NS.dtype)
    moved_B = np.empty(BLOCK, deltas_NS.dtype)
    share_B = np.empty(BLOCK, deltas_NS.dtype)
    for start in range(0, size, BLOCK):
        block = min(BLOCK, size - start)
        for n in range(count):
            weight = weights_N[n]
            delta_B = deltas_NS[n, start : start + block]
            if n == 0:
                for s in range(block):
                    elected_B[s] = delta_B[s] * weight
                    moved_B[s] = abs(delta_B[s])
            else:
                for s in range(block):
                    elected_B[s] += delta_B[s] * weight
                    moved_B[s] = max(moved_B[s], abs(delta_B[s]))
        draws = 0
        for s in range(block):
            draws += (elected_B[s] == zero) & (moved_B[s] > zero)
        if draws:
            return False
        total_B = out_S[start : start + block]
        for n in range(count):
            weight = weights_N[n]
            delta_B = deltas_NS[n, start : start + block]
            for s in range(block):
                delta = delta_B[s]
                # Not the sign of a product, which could underflow to 0.
                same = ((delta > zero) & (elected_B[s] > zero)) | ((delta < zero) & (elected_B[s] < zero))
                agrees = one if same else zero
                product = (delta * agrees) * weight
                part = agrees * weight
                total_B[s] = product if n == 0 else total_B[s] + product
                share_B[s] = part if n == 0 else share_B[s] + part
        if mean:
            for s in range(block):
                share = share_B[s]
                quotient = total_B[s] / (share if share > zero else one)
                total_B[s] = quotient if share > zero else zero
    return True


@_compile
def trim_to_largest(deltas_NS, first_index, thresholds_N, last_N, out_NS):
    count, size = deltas_NS.shape
    zero = deltas_NS.dtype.type(0)
    one = deltas_NS.dtype.type(1)
    for n in range(count):
        threshold = thresholds_N[n]
        last = last_N[n] - first_index
        for s in range(size):
            delta = deltas_NS[n, s]
            magnitude = abs(delta)
            kept = magnitude > threshold or (magnitude == threshold and s <= last)
            out_NS[n, s] = delta * (one if kept else zero)


@_compile
def keep_random(deltas_NS, keys_N, start, density, divisor, out_NS):
    count, size = deltas_NS.shape
    zero = deltas_NS.dtype.type(0)
    one = deltas_NS.dtype.type(1)
    for n in range(count):
        for s in range(size):
            kept = _draw(keys_N[n], start + s) < density
            out_NS[n, s] = (deltas_NS[n, s] * (one if kept else zero)) / divisor


@_compile
def select(bits_S, count):
    """The count-th largest of unsigned integers below 2^31, and how many are larger: by counting, not by sorting."""
    upper = np.zeros(1 << 15, np.int64)
    for s in range(bits_S.size):
        upper[(bits_S[s] & 0x7FFFFFFF) >> 16] += 1
    larger = 0
    top = (1 << 15) - 1
    while larger + upper[top] < count:
        larger += upper[top]
        top -= 1
    lower = np.zeros(1 << 16, np.int64)
    for s in range(bits_S.size):
        magnitude = bits_S[s] & 0x7FFFFFFF
        if magnitude >> 16 == top:
            lower[magnitude & 0xFFFF] += 1
    rest = (1 << 16) - 1
    while larger + lower[rest] < count:
        larger += lower[rest]
        rest -= 1
    return (top << 16) | rest, larger


@_compile
def nth_equal(bits_S, wanted, nth):
    """The index of the nth element (from 1) whose magnitude's bits are `wanted`."""
    for s in range(bits_S.size):
        if bits_S[s] & 0x7FFFFFFF == wanted:
            nth -= 1
            if nth == 0:
                return s
    return -1


@_compile
def uniform(key, start, out_S):
    for s in range(out_S.size):
        out_S[s] = _draw(key, start + s)
