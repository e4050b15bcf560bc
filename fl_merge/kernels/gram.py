"""Inner products of every pair of clients, in the order of additions that `ops.gram.gram_partials` defines.

A product of two float32 is exact in float64, so that fused multiply-adds round as products that are added do.
Suffixes: N clients, B the elements of a chunk, T tiles of pairs, L lanes.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from fl_merge.kernels.blocks import compiled_pass, load, load_delta

LANES, GROUP = 16, 1024
"""As `ops.gram` has them."""

_CHUNK = 256
"""Elements that are worked on at a time: those of eight clients, in float64, take half of the fastest cache."""

_ROWS, _COLUMNS, _WIDE = 4, 2, 8
"""Pairs whose sums are kept in registers together, and how many lanes of each."""


@intrinsic
def _add_products(context, rows, columns, stride, steps, sums):
    """sums[r, c, l] += sum over steps of rows[r, step, l] * columns[c, step, l], one step after the other.

    Args:
        rows, columns: addresses of _ROWS and _COLUMNS vectors of float64, `stride` bytes apart; each has `steps` times
            LANES elements.
        sums: the address of (_ROWS, _COLUMNS, LANES) float64.
    """

    def emit(context, builder, signature, arguments):
        rows, columns, stride, steps, sums = arguments
        word, vector = ir.IntType(64), ir.VectorType(ir.DoubleType(), _WIDE)
        fma = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(vector, [vector] * 3), f"llvm.fma.v{_WIDE}f64"
        )

        def number(value):
            return ir.Constant(word, value)

        def at(address):
            return builder.inttoptr(address, vector.as_pointer())

        for first in range(0, LANES, _WIDE):
            places = [builder.add(sums, number(8 * (LANES * pair + first))) for pair in range(_ROWS * _COLUMNS)]
            kept = [cgutils.alloca_once(builder, vector) for _ in places]
            for place, sum_L in zip(places, kept, strict=True):
                builder.store(builder.load(at(place), align=8), sum_L)
            with cgutils.for_range(builder, steps, intp=word) as loop:
                offset = builder.add(builder.mul(loop.index, number(8 * LANES)), number(8 * first))

                def vectors(start, count, offset=offset):
                    starts = (builder.add(start, builder.mul(stride, number(n))) for n in range(count))
                    return [builder.load(at(builder.add(each, offset)), align=8) for each in starts]

                left, right = vectors(rows, _ROWS), vectors(columns, _COLUMNS)
                for pair, sum_L in enumerate(kept):
                    factors = left[pair // _COLUMNS], right[pair % _COLUMNS]
                    builder.store(builder.call(fma, [*factors, builder.load(sum_L)]), sum_L)
            for place, sum_L in zip(places, kept, strict=True):
                builder.store(builder.load(sum_L), at(place), align=8)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), emit


@compiled_pass
def gram(base, base_code, clients_N, codes_N, deltas, start, stop, out_NN):
    """Inner products of the clients' float32 deltas, or of their float32 weights, of one block; above the diagonal."""
    count = clients_N.size
    padded = (count + _ROWS - 1) // _ROWS * _ROWS
    tiles = 0
    for row in range(0, padded, _ROWS):
        tiles += (padded - row) // _COLUMNS
    groups = (stop - start + GROUP - 1) // GROUP
    base_store, vector_store = np.empty(_CHUNK, np.float32), np.empty(_CHUNK, np.float32)
    chunk_NB = np.zeros((padded, _CHUNK), np.float64)
    sums_TL = np.empty((tiles, _ROWS * _COLUMNS, LANES), np.float64)
    chunks, sums = chunk_NB.ctypes.data, sums_TL.ctypes.data
    totals_NNG = np.zeros((padded, padded, groups), np.float64)
    for group in range(groups):
        sums_TL[:] = 0.0
        first = start + group * GROUP
        for begin in range(first, min(first + GROUP, stop), _CHUNK):
            size = min(_CHUNK, stop - begin)
            base_B, vector_B = base_store[:size], vector_store[:size]
            if deltas:
                load(base, base_code, begin, base_B)
            for n in range(count):
                if deltas:
                    load_delta(clients_N[n], codes_N[n], begin, base_B, vector_B)
                else:
                    load(clients_N[n], codes_N[n], begin, vector_B)
                out_B = chunk_NB[n]
                for s in range(size):
                    out_B[s] = vector_B[s]
                for s in range(size, _CHUNK):
                    out_B[s] = 0.0
            tile = 0
            for row in range(0, padded, _ROWS):
                for column in range(row, padded, _COLUMNS):
                    _add_products(
                        chunks + 8 * _CHUNK * row,
                        chunks + 8 * _CHUNK * column,
                        8 * _CHUNK,
                        (size + LANES - 1) // LANES,
                        sums + 8 * LANES * _ROWS * _COLUMNS * tile,
                    )
                    tile += 1
        tile = 0
        for row in range(0, padded, _ROWS):
            for column in range(row, padded, _COLUMNS):
                for pair in range(_ROWS * _COLUMNS):
                    sum_L = sums_TL[tile, pair]
                    for half in (8, 4, 2, 1):
                        for s in range(half):
                            sum_L[s] += sum_L[s + half]
                    totals_NNG[row + pair // _COLUMNS, column + pair % _COLUMNS, group] = sum_L[0]
                tile += 1
    for row in range(count):
        for column in range(row, count):
            total_G = totals_NNG[row, column]
            left = groups
            while left > 1:
                for g in range(left // 2):
                    total_G[g] = total_G[2 * g] + total_G[2 * g + 1]
                if left % 2:
                    total_G[left // 2] = total_G[left - 1]
                left = (left + 1) // 2
            out_NN[row, column] = total_G[0]
            out_NN[column, row] = total_G[0]
