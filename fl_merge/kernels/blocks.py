"""What the compiled passes are built from: blocks of elements that are read and written in any floating dtype.

Arrays come as addresses with a code for their dtype, since numba has no bfloat16 and no lists of arrays of mixed types.
The caller keeps them alive, contiguous and aligned (`fl_merge.kernels.passes`).

Suffix: B the elements of a block.
"""

from __future__ import annotations

import hashlib
import os

import numba
import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from fl_merge.kernels import comparing, pairs, vectors

_parts = hashlib.blake2b(digest_size=8)
for _name in (
    "blocks.py",
    "scoring.py",
    "vectors.py",
    "across.py",
    "draws.py",
    "elections.py",
    "merging.py",
    "places.py",
    "balances.py",
    "comparing.py",
    "pairs.py",
    "networks.py",
    "series.py",
    "sifting.py",
    "varying.py",
):  # whose parts are in other files' passes
    with open(os.path.join(os.path.dirname(__file__), _name), "rb") as _file:
        _parts.update(_file.read())
_PARTS = _parts.hexdigest()

compiled_part = numba.njit(nogil=True, fastmath=False, error_model="numpy")


def compiled_pass(function):
    """Compile a function, and keep what comes of it for the next process.

    numba throws it away when the function's own file has changed; here also when the parts that are in it have.
    """
    compiled = numba.njit(cache=True, nogil=True, fastmath=False, error_model="numpy")(function)
    kept = compiled._cache._cache_file
    kept._source_stamp = (kept._source_stamp, _PARTS)
    return compiled


BLOCK = 1024
"""Elements that are worked on at a time: those of eight clients stay in the fastest cache."""

FLOAT32, FLOAT64, BFLOAT16, FLOAT16 = 0, 1, 2, 3

GROUP = vectors.GROUP

WIDTHS = (4, 8, 2, 2)
"""Bytes of an element of each."""

MAGNITUDE = np.uint32(0x7FFFFFFF)

_GAMMA = np.uint64(0x9E3779B97F4A7C15)


# --- what numba does not have ----------------------------------------------------------------------------------------


@intrinsic
def pointer(context, address):
    """An address as something that `carray` takes."""

    def emit(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), emit


@intrinsic
def from_bfloat16(context, bits):
    def emit(context, builder, signature, arguments):
        word = ir.IntType(32)
        return builder.bitcast(builder.shl(builder.zext(arguments[0], word), ir.Constant(word, 16)), ir.FloatType())

    return types.float32(types.uint16), emit


@intrinsic
def from_float16(context, bits):
    def emit(context, builder, signature, arguments):
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), emit


@intrinsic
def to_float16(context, value):
    def emit(context, builder, signature, arguments):
        return builder.bitcast(builder.fptrunc(arguments[0], ir.HalfType()), ir.IntType(16))

    return types.uint16(types.float32), emit


@intrinsic
def bits_of(context, value):
    def emit(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.uint32(types.float32), emit


@intrinsic
def bits_of_double(context, value):
    def emit(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.IntType(64))

    return types.uint64(types.float64), emit


@intrinsic
def from_double_bits(context, bits):
    def emit(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.DoubleType())

    return types.float64(types.uint64), emit


@intrinsic
def from_bits(context, bits):
    def emit(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), emit


@intrinsic
def lowest_bit(context, number):
    """The place of the lowest bit that is set; there must be one."""

    def emit(context, builder, signature, arguments):
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.uint64), emit


# --- blocks: in and out ----------------------------------------------------------------------------------------------


@compiled_part
def load(address, code, start, out_B):
    """Elements from `start` on, widened (a float64 is rounded) to float32."""
    size = out_B.size
    if code == FLOAT32:
        float_B = carray(pointer(address + 4 * start), (size,), np.float32)
        for s in range(size):
            out_B[s] = float_B[s]
    elif code == BFLOAT16:
        bits_B = carray(pointer(address + 2 * start), (size,), np.uint16)
        for s in range(size):
            out_B[s] = from_bfloat16(bits_B[s])
    elif code == FLOAT16:
        half_B = carray(pointer(address + 2 * start), (size,), np.uint16)
        for s in range(size):
            out_B[s] = from_float16(half_B[s])
    else:
        double_B = carray(pointer(address + 8 * start), (size,), np.float64)
        for s in range(size):
            out_B[s] = np.float32(double_B[s])


@intrinsic
def _ask_for(context, address, size):
    """Ask for so many bytes that are read later; they need not exist."""

    def emit(context, builder, signature, arguments):
        address, size = arguments
        with vectors.groups(builder, size, vectors.LINE) as line:
            place = builder.add(address, builder.mul(line.index, vectors.number(vectors.LINE)))
            vectors.fetch(builder, place, vectors.LINE)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), emit


@compiled_part
def load_base(address, code, start, out_B):
    """As `load`, of the base; as many elements behind these are asked for. Between two blocks of it, blocks of all
    clients are read, so that a processor does not notice by itself how it goes on."""
    width = WIDTHS[code]
    _ask_for(address + width * (start + out_B.size), width * out_B.size)
    load(address, code, start, out_B)


@compiled_part
def load_delta(address, code, start, base_B, out_B):
    """A client's elements minus the base's, in float32."""
    size = out_B.size
    if code == FLOAT32:
        float_B = carray(pointer(address + 4 * start), (size,), np.float32)
        for s in range(size):
            out_B[s] = float_B[s] - base_B[s]
    elif code == BFLOAT16:
        bits_B = carray(pointer(address + 2 * start), (size,), np.uint16)
        for s in range(size):
            out_B[s] = from_bfloat16(bits_B[s]) - base_B[s]
    elif code == FLOAT16:
        half_B = carray(pointer(address + 2 * start), (size,), np.uint16)
        for s in range(size):
            out_B[s] = from_float16(half_B[s]) - base_B[s]
    else:
        double_B = carray(pointer(address + 8 * start), (size,), np.float64)
        for s in range(size):
            out_B[s] = np.float32(double_B[s]) - base_B[s]


@compiled_part
def one_dtype(codes_N):
    """Whether all clients have the same dtype."""
    for code in codes_N:
        if code != codes_N[0]:
            return False
    return codes_N.size > 0


def by_dtype(make, **how):
    """What `make` (of `vectors`) gives for each dtype, as one function whose first argument is the dtype's number."""
    float32, float64, bfloat16, float16 = (
        make(dtype, **how) for dtype in (vectors.FLOAT32, vectors.FLOAT64, vectors.BFLOAT16, vectors.FLOAT16)
    )

    @compiled_part
    def chosen(code, *arguments):
        if code == FLOAT32:
            return float32(*arguments)
        if code == BFLOAT16:
            return bfloat16(*arguments)
        if code == FLOAT16:
            return float16(*arguments)
        return float64(*arguments)

    return chosen


load_all = by_dtype(vectors.loads_models)
compare_models, pair_up = by_dtype(comparing.compares_models), by_dtype(pairs.pairs_up)
load_all_models = by_dtype(vectors.loads_models, deltas=False)


@compiled_part
def load_deltas(clients_N, codes_N, start, base_B, out_NB):
    """The elements of all clients minus the base's, in float32.

    Args:
        out_NB: contiguous; a row may be longer than the base.
    """
    size, count, done = base_B.size, clients_N.size, 0
    if one_dtype(codes_N):
        done = size - size % GROUP
        bases, models, rows = base_B.ctypes.data, clients_N.ctypes.data, out_NB.ctypes.data
        load_all(codes_N[0], bases, models, start, count, done, rows, 4 * out_NB.shape[1])
    if done < size:
        for n in range(count):
            load_delta(clients_N[n], codes_N[n], start + done, base_B[done:], out_NB[n, done:size])


@compiled_part
def load_double(address, code, start, out_B):
    """Elements from `start` on in float64."""
    size = out_B.size
    if code == FLOAT32:
        float_B = carray(pointer(address + 4 * start), (size,), np.float32)
        for s in range(size):
            out_B[s] = float_B[s]
    elif code == BFLOAT16:
        bits_B = carray(pointer(address + 2 * start), (size,), np.uint16)
        for s in range(size):
            out_B[s] = from_bfloat16(bits_B[s])
    elif code == FLOAT16:
        half_B = carray(pointer(address + 2 * start), (size,), np.uint16)
        for s in range(size):
            out_B[s] = from_float16(half_B[s])
    else:
        double_B = carray(pointer(address + 8 * start), (size,), np.float64)
        for s in range(size):
            out_B[s] = double_B[s]


@compiled_part
def add_scaled_delta(address, code, start, base_B, coefficient, total_B):
    """total += (client - base) * coefficient, in float64."""
    size = total_B.size
    if code == FLOAT32:
        float_B = carray(pointer(address + 4 * start), (size,), np.float32)
        for s in range(size):
            total_B[s] += (np.float64(float_B[s]) - base_B[s]) * coefficient
    elif code == BFLOAT16:
        bits_B = carray(pointer(address + 2 * start), (size,), np.uint16)
        for s in range(size):
            total_B[s] += (np.float64(from_bfloat16(bits_B[s])) - base_B[s]) * coefficient
    elif code == FLOAT16:
        half_B = carray(pointer(address + 2 * start), (size,), np.uint16)
        for s in range(size):
            total_B[s] += (np.float64(from_float16(half_B[s])) - base_B[s]) * coefficient
    else:
        double_B = carray(pointer(address + 8 * start), (size,), np.float64)
        for s in range(size):
            total_B[s] += (double_B[s] - base_B[s]) * coefficient


@compiled_part
def store(values_B, address, code, start):
    """Write float32 values in the dtype of the output; gives the bits of the largest magnitude among them."""
    size = values_B.size
    largest = np.uint32(0)
    for s in range(size):
        largest = max(largest, np.uint32(bits_of(values_B[s]) & MAGNITUDE))
    if code == FLOAT32:
        float_B = carray(pointer(address + 4 * start), (size,), np.float32)
        for s in range(size):
            float_B[s] = values_B[s]
    elif code == BFLOAT16:
        bits_B = carray(pointer(address + 2 * start), (size,), np.uint16)
        for s in range(size):
            bits = bits_of(values_B[s])
            # To nearest, ties to even.
            odd = (bits >> np.uint32(16)) & np.uint32(1)
            bits_B[s] = np.uint16((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))
    else:
        half_B = carray(pointer(address + 2 * start), (size,), np.uint16)
        for s in range(size):
            half_B[s] = to_float16(values_B[s])
    return largest


# --- sums -------------------------------------------------------------------------------------------------------------


@compiled_part
def sum_of_lanes(sum_L):
    """The sum of 16 numbers, by halves; they are overwritten."""
    for half in (8, 4, 2, 1):
        for lane in range(half):
            sum_L[lane] += sum_L[lane + half]
    return sum_L[0]


@compiled_part
def sum_by_halves(total_G, groups):
    """The sum of the first so many numbers, neighbours first; they are overwritten."""
    left = groups
    while left > 1:
        for g in range(left // 2):
            total_G[g] = total_G[2 * g] + total_G[2 * g + 1]
        if left % 2:
            total_G[left // 2] = total_G[left - 1]
        left = (left + 1) // 2
    return total_G[0]


# --- draws -----------------------------------------------------------------------------------------------------------


@compiled_part
def _mix(state):
    """SplitMix64's output function."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


@compiled_part
def uniform_words(key, first_pair, draws_H):
    """The draws from element 2 * first_pair on, two of 32 bits in each."""
    first = key + np.uint64(first_pair + 1) * _GAMMA
    for h in range(draws_H.size):
        draws_H[h] = _mix(first + np.uint64(h) * _GAMMA)
