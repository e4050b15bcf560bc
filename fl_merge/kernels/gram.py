"""Inner products of every pair of clients, in the order of additions that `ops.gram.gram_partials` defines.

A product of two float32 is exact in float64, so that fused multiply-adds round as products that are added do.
Suffixes: N clients, B the elements of a chunk, T tiles, P pairs of a tile, L lanes.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from fl_merge.kernels import vectors
from fl_merge.kernels.blocks import (
    compiled_part,
    compiled_pass,
    load,
    load_all,
    load_all_models,
    load_base,
    load_delta,
    one_dtype,
    sum_by_halves,
    sum_of_lanes,
)

LANES, GROUP, BLOCK = 16, 1024, 16384
"""As `ops.gram` has them."""

_CHUNK = 512
"""Elements that are worked on at a time: those of eight clients take half of the fastest cache."""

_SIDE, _WIDE = 4, 8
"""Clients of a tile, whose pairs' sums are kept in registers together, and how many lanes of each."""

_SQUARE = [(row, column) for row in range(_SIDE) for column in range(_SIDE)]
_TRIANGLE = [(row, column) for row, column in _SQUARE if row <= column]


def _adder(pairs):
    """sums[pair, l] += sum over steps of rows[r, step, l] * columns[c, step, l], one step after the other.

    Args of what this gives:
        rows, columns: addresses of _SIDE vectors of float32, `stride` bytes apart; each has `steps` times LANES
            elements. They are widened as they are read: other units do that than multiply.
        sums: the address of (len(pairs), LANES) float64.
    """

    @intrinsic
    def add_products(context, rows, columns, stride, steps, sums):
        def emit(context, builder, signature, arguments):
            rows, columns, stride, steps, sums = arguments
            word, vector = ir.IntType(64), ir.VectorType(ir.DoubleType(), _WIDE)
            narrow = ir.VectorType(ir.FloatType(), _WIDE)
            fma = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(vector, [vector] * 3), f"llvm.fma.v{_WIDE}f64"
            )

            def number(value):
                return ir.Constant(word, value)

            def at(address, kind=vector):
                return builder.inttoptr(address, kind.as_pointer())

            for first in range(0, LANES, _WIDE):
                places = [builder.add(sums, number(8 * (LANES * pair + first))) for pair in range(len(pairs))]
                kept = [cgutils.alloca_once(builder, vector) for _ in places]
                for place, sum_L in zip(places, kept, strict=True):
                    builder.store(builder.load(at(place), align=8), sum_L)
                with cgutils.for_range(builder, steps, intp=word) as loop:
                    offset = builder.add(builder.mul(loop.index, number(4 * LANES)), number(4 * first))

                    def four(start, offset=offset):
                        starts = (builder.add(start, builder.mul(stride, number(n))) for n in range(_SIDE))
                        numbers = (builder.load(at(builder.add(each, offset), narrow), align=4) for each in starts)
                        return [builder.fpext(each, vector) for each in numbers]

                    left = four(rows)
                    right = left if pairs is _TRIANGLE else four(columns)
                    for (row, column), sum_L in zip(pairs, kept, strict=True):
                        builder.store(builder.call(fma, [left[row], right[column], builder.load(sum_L)]), sum_L)
                for place, sum_L in zip(places, kept, strict=True):
                    builder.store(builder.load(sum_L), at(place), align=8)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5), emit

    return add_products


_add_square, _add_triangle = _adder(_SQUARE), _adder(_TRIANGLE)


@compiled_pass
def gram(base, base_code, clients_N, codes_N, deltas, start, stop, out_XNN):
    """Inner products of the clients' float32 deltas, or of their float32 weights, of one block after the other.

    Args:
        out_XNN: takes them, a block of BLOCK elements in each.
    """
    count = clients_N.size
    padded = (count + _SIDE - 1) // _SIDE * _SIDE
    sides = padded // _SIDE
    base_store = np.empty(_CHUNK, np.float32)
    chunk_NB = np.zeros((padded, _CHUNK), np.float32)
    sums_TPL = np.empty((sides * (sides + 1) // 2, _SIDE * _SIDE, LANES), np.float64)
    totals_NNG = np.zeros((padded, padded, BLOCK // GROUP), np.float64)
    alike, bases = one_dtype(codes_N), base_store.ctypes.data
    chunks, sums, stride = chunk_NB.ctypes.data, sums_TPL.ctypes.data, 4 * _CHUNK
    for x in range(out_XNN.shape[0]):
        block = start + x * BLOCK
        end = min(block + BLOCK, stop)
        groups = (end - block + GROUP - 1) // GROUP
        for group in range(groups):
            sums_TPL[:] = 0.0
            first = block + group * GROUP
            for begin in range(first, min(first + GROUP, end), _CHUNK):
                size = min(_CHUNK, end - begin)
                base_B, done = base_store[:size], 0
                if deltas:
                    load_base(base, base_code, begin, base_B)
                if alike:
                    done, where = size - size % vectors.GROUP, (bases, clients_N.ctypes.data, begin, count)
                    if deltas:
                        load_all(codes_N[0], *where, done, chunks, stride)
                    else:
                        load_all_models(codes_N[0], *where, done, chunks, stride)
                if done < size:
                    for n in range(count):
                        rest_B = chunk_NB[n, done:size]
                        if deltas:
                            load_delta(clients_N[n], codes_N[n], begin + done, base_B[done:], rest_B)
                        else:
                            load(clients_N[n], codes_N[n], begin + done, rest_B)
                if size < _CHUNK:
                    chunk_NB[:, size:] = 0.0
                _add_tiles(chunks, stride, padded, (size + LANES - 1) // LANES, sums)
            _add_lanes(sums_TPL, padded, totals_NNG[:, :, group])
        for row in range(count):
            for column in range(row, count):
                total = sum_by_halves(totals_NNG[row, column], groups)
                out_XNN[x, row, column] = total
                out_XNN[x, column, row] = total


@compiled_part
def _add_tiles(chunks, stride, padded, steps, sums):
    """Add the products of every pair of a chunk's rows, tile by tile."""
    tile = sums
    for row in range(0, padded, _SIDE):
        rows = chunks + stride * row
        _add_triangle(rows, rows, stride, steps, tile)
        for column in range(row + _SIDE, padded, _SIDE):
            tile += 8 * LANES * _SIDE * _SIDE
            _add_square(rows, chunks + stride * column, stride, steps, tile)
        tile += 8 * LANES * _SIDE * _SIDE


@compiled_part
def _add_lanes(sums_TPL, padded, out_NN):
    """The sum over the lanes of every pair, by halves."""
    tile = 0
    for row in range(0, padded, _SIDE):
        for column in range(row, padded, _SIDE):
            pair = 0
            for r in range(_SIDE):
                for c in range(r if row == column else 0, _SIDE):
                    out_NN[row + r, column + c] = sum_of_lanes(sums_TPL[tile, pair])
                    pair += 1
            tile += 1
