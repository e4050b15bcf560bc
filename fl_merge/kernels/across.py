"""Parts of the compiled passes that go through rows of deltas: sums, elections and variances across the clients.

As in `vectors`, groups of elements are outside and the clients inside, with what is summed in registers.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fl_merge.kernels.networks import sorting_network
from fl_merge.kernels.vectors import (
    ADDRESS,
    DOUBLE,
    FLOAT,
    FLOATS,
    GROUP,
    WIDE,
    add_to,
    cast,
    clients,
    constant,
    everywhere,
    groups,
    load,
    number,
    place_of,
    registers,
    store,
    vector,
)

_ZERO, _MINUS_ZERO, _INFINITE = (constant(FLOATS, value) for value in (0.0, -0.0, float("inf")))


@intrinsic
def add_weighted(context, rows, stride, count, weights, bases, scale, size, out):
    """out[s] = bases[s] + (-0.0 + rows[0, s] * weights[0] + rows[1, s] * weights[1] + ...) * scale, in float32."""

    def emit(context, builder, signature, arguments):
        rows, stride, count, weights, bases, scale, size, out = arguments
        parts, scale = range(0, GROUP, WIDE), everywhere(builder, scale)
        with groups(builder, size, GROUP) as group:
            begin = builder.mul(group.index, number(GROUP))
            sums = registers(builder, [_MINUS_ZERO for _ in parts])
            with clients(builder, count) as client:
                weight = load(builder, place_of(builder, weights, client.index, FLOAT), FLOAT)
                weight = everywhere(builder, weight)
                row = builder.add(rows, builder.mul(stride, client.index))
                for at, kept in zip(parts, sums, strict=True):
                    delta = load(builder, place_of(builder, row, begin, FLOAT, at), FLOATS)
                    add_to(builder, kept, builder.fmul(delta, weight))
            for at, kept in zip(parts, sums, strict=True):
                base = load(builder, place_of(builder, bases, begin, FLOAT, at), FLOATS)
                merged = builder.fadd(base, builder.fmul(builder.load(kept), scale))
                store(builder, merged, place_of(builder, out, begin, FLOAT, at))
        return context.get_dummy_value()

    return types.void(*[ADDRESS] * 5, types.float32, *[ADDRESS] * 2), emit


def inverse_of(builder, count):
    """1 over a number of clients, in every lane."""
    return everywhere(builder, builder.fdiv(ir.Constant(FLOAT, 1.0), builder.uitofp(count, FLOAT)))


def variance_of(builder, total, square, inverse):
    """What registers with the sum of differences from the first client, and of their squares, say of the variance."""
    total, square = builder.load(total), builder.load(square)
    common = builder.fmul(total, builder.fmul(total, inverse))
    left = builder.fsub(square, common)
    left = builder.select(builder.fcmp_ordered(">", left, _ZERO), left, _ZERO)
    fits = builder.fcmp_ordered("<", common, _INFINITE)
    return builder.fmul(builder.select(fits, left, _INFINITE), inverse)


@intrinsic
def variance(context, rows, stride, count, size, out):
    """The variance over the rows, as `ops.scores.variance` of up to MANY clients."""

    def emit(context, builder, signature, arguments):
        rows, stride, count, size, out = arguments
        parts, inverse = range(0, GROUP, WIDE), inverse_of(builder, count)
        with groups(builder, size, GROUP) as group:
            begin = builder.mul(group.index, number(GROUP))
            firsts = [load(builder, place_of(builder, rows, begin, FLOAT, at), FLOATS) for at in parts]
            sums, squares = (registers(builder, [_ZERO for _ in parts]) for _ in range(2))
            with clients(builder, builder.sub(count, number(1))) as client:
                row = builder.add(rows, builder.mul(stride, builder.add(client.index, number(1))))
                for at, first, total, square in zip(parts, firsts, sums, squares, strict=True):
                    apart = builder.fsub(load(builder, place_of(builder, row, begin, FLOAT, at), FLOATS), first)
                    add_to(builder, total, apart)
                    add_to(builder, square, builder.fmul(apart, apart))
            for at, total, square in zip(parts, sums, squares, strict=True):
                found = variance_of(builder, total, square, inverse)
                store(builder, found, place_of(builder, out, begin, FLOAT, at))
        return context.get_dummy_value()

    return types.void(*[ADDRESS] * 5), emit


@intrinsic
def variance_of_many(context, rows, stride, count, size, out):
    """The variance over the rows, as `ops.scores.variance` of more."""

    def emit(context, builder, signature, arguments):
        rows, stride, count, size, out = arguments
        parts = range(0, GROUP, WIDE)
        divisor = everywhere(builder, builder.uitofp(count, FLOAT))
        others = builder.sub(count, number(1))
        with groups(builder, size, GROUP) as group:
            begin = builder.mul(group.index, number(GROUP))
            firsts = [load(builder, place_of(builder, rows, begin, FLOAT, at), FLOATS) for at in parts]

            def apart(client, at, first, begin=begin):
                row = builder.add(rows, builder.mul(stride, builder.add(client, number(1))))
                return builder.fsub(load(builder, place_of(builder, row, begin, FLOAT, at), FLOATS), first)

            sums = registers(builder, [_ZERO for _ in parts])
            with clients(builder, others) as client:
                for at, first, kept in zip(parts, firsts, sums, strict=True):
                    add_to(builder, kept, apart(client.index, at, first))
            means = [builder.fdiv(builder.load(kept), divisor) for kept in sums]
            squares = registers(builder, [builder.fmul(mean, mean) for mean in means])
            with clients(builder, others) as client:
                for at, first, mean, kept in zip(parts, firsts, means, squares, strict=True):
                    left = builder.fsub(apart(client.index, at, first), mean)
                    add_to(builder, kept, builder.fmul(left, left))
            for at, kept in zip(parts, squares, strict=True):
                found = builder.fdiv(builder.load(kept), divisor)
                store(builder, found, place_of(builder, out, begin, FLOAT, at))
        return context.get_dummy_value()

    return types.void(*[ADDRESS] * 5), emit


@intrinsic
def keep_where(context, rows, stride, count, mask, size):
    """0 in every row where the mask is not above 0."""

    def emit(context, builder, signature, arguments):
        rows, stride, count, mask, size = arguments
        parts = range(0, GROUP, WIDE)
        with groups(builder, size, GROUP) as group:
            begin = builder.mul(group.index, number(GROUP))
            masks = [load(builder, place_of(builder, mask, begin, FLOAT, at), FLOATS) for at in parts]
            kept = [builder.fcmp_ordered(">", each, _ZERO) for each in masks]
            with clients(builder, count) as client:
                row = builder.add(rows, builder.mul(stride, client.index))
                for at, keep in zip(parts, kept, strict=True):
                    place = place_of(builder, row, begin, FLOAT, at)
                    store(builder, builder.select(keep, load(builder, place, FLOATS), _ZERO), place)
        return context.get_dummy_value()

    return types.void(*[ADDRESS] * 5), emit


def sorts_columns(count):
    """Sort each column of so many rows: the same comparisons for all, with the values in registers."""
    pairs = sorting_network(count).tolist()

    @intrinsic
    def sort_columns(context, rows, stride, size):
        def emit(context, builder, signature, arguments):
            rows, stride, size = arguments
            places = [rows]
            while len(places) < count:
                places.append(builder.add(places[-1], stride))
            with groups(builder, size, WIDE) as group:
                begin = builder.mul(group.index, number(WIDE))
                at = [place_of(builder, row, begin, FLOAT) for row in places]
                values = [load(builder, place, FLOATS) for place in at]
                for one, two in pairs:
                    smaller, larger = values[one], values[two]
                    swap = builder.fcmp_ordered("<", larger, smaller)
                    values[one] = builder.select(swap, larger, smaller)
                    values[two] = builder.select(swap, smaller, larger)
                for value, place in zip(values, at, strict=True):
                    store(builder, value, place)
            return context.get_dummy_value()

        return types.void(*[ADDRESS] * 3), emit

    return sort_columns


@intrinsic
def mean_around(context, rows, stride, count, kept, middles, size, out):
    """The mean of the `kept` values of each sorted column that are nearest to the column's middle.

    One value is dropped at a time: the first or, unless the first is farther from the middle, the last. What is left
    moves to the first rows.

    Args:
        rows: are overwritten.
        kept: 1 to `count`.
    """

    def emit(context, builder, signature, arguments):
        rows, stride, count, kept, middles, size, out = arguments
        parts = range(0, GROUP, WIDE)
        with groups(builder, size, GROUP) as group:
            begin = builder.mul(group.index, number(GROUP))

            def place(row, at, begin=begin):
                return place_of(builder, builder.add(rows, builder.mul(stride, row)), begin, FLOAT, at)

            middle = [load(builder, place_of(builder, middles, begin, FLOAT, at), FLOATS) for at in parts]
            with clients(builder, builder.sub(count, kept)) as drop:
                last = builder.sub(builder.sub(count, drop.index), number(1))
                first = [load(builder, place(number(0), at), FLOATS) for at in parts]
                farther = [
                    builder.fcmp_ordered(
                        ">",
                        builder.fsub(each, low),
                        builder.fsub(load(builder, place(last, at), FLOATS), each),
                    )
                    for at, each, low in zip(parts, middle, first, strict=True)
                ]
                carried = registers(builder, first)
                with clients(builder, last) as row:
                    for at, moves, held in zip(parts, farther, carried, strict=True):
                        following = load(builder, place(builder.add(row.index, number(1)), at), FLOATS)
                        store(builder, builder.select(moves, following, builder.load(held)), place(row.index, at))
                        builder.store(following, held)
            sums = registers(builder, [_ZERO for _ in parts])
            with clients(builder, kept) as row:
                for at, total in zip(parts, sums, strict=True):
                    add_to(builder, total, load(builder, place(row.index, at), FLOATS))
            divisor = everywhere(builder, builder.uitofp(kept, FLOAT))
            for at, total in zip(parts, sums, strict=True):
                mean = builder.fdiv(builder.load(total), divisor)
                store(builder, mean, place_of(builder, out, begin, FLOAT, at))
        return context.get_dummy_value()

    return types.void(*[ADDRESS] * 7), emit


@intrinsic
def add_squares(context, row, size, sums):
    """sums[l] += the squares, in float64, of the elements l, l + 16, l + 32 ... of a row, one after the other.

    Args:
        row: of float32; 0 from `size` to the end of the last 16.
        sums: (16,) of float64.
    """

    def emit(context, builder, signature, arguments):
        row, size, sums = arguments
        half = WIDE // 2
        kind = vector(DOUBLE, half)
        places = [place_of(builder, sums, 0, DOUBLE, at) for at in (0, half)]
        kept = registers(builder, [load(builder, place, kind) for place in places])
        with groups(builder, size, WIDE) as group:
            begin = builder.mul(group.index, number(WIDE))
            for at, sum_L in zip((0, half), kept, strict=True):
                values = load(builder, place_of(builder, row, begin, FLOAT, at), vector(FLOAT, half))
                wide = cast(builder, values, DOUBLE)
                add_to(builder, sum_L, builder.fmul(wide, wide))
        for place, sum_L in zip(places, kept, strict=True):
            store(builder, builder.load(sum_L), place)
        return context.get_dummy_value()

    return types.void(*[ADDRESS] * 3), emit
