"""Parts of the compiled passes that keep their sums in registers while they go through the clients.

numba's own loops go through the clients outside and the elements inside, and load and store every sum once a client.
Here groups of elements are outside. The additions are the same, in the same order.

All arrays are given by address. Rows of deltas are float32, `stride` bytes apart, and there is room behind them for a
whole last group. Suffixes: N clients, B the elements of a block.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_WIDE, _TOGETHER = 16, 4

GROUP = _WIDE * _TOGETHER
"""Elements whose sums are kept in registers together."""

_WORD, _FLOAT = ir.IntType(64), ir.FloatType()
_VECTOR = ir.VectorType(_FLOAT, _WIDE)


def _everywhere(value):
    return ir.Constant(_VECTOR, [value] * _WIDE)


_ZERO, _MINUS_ZERO, _ONE = _everywhere(0.0), _everywhere(-0.0), _everywhere(1.0)


def _number(value):
    return ir.Constant(_WORD, value)


def _at(builder, address):
    return builder.inttoptr(address, _VECTOR.as_pointer())


def _spread(builder, address, index):
    """One float32 of an array, in every lane."""
    place = builder.add(address, builder.mul(index, _number(4)))
    value = builder.load(builder.inttoptr(place, _FLOAT.as_pointer()))
    first = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
    lanes = ir.Constant(ir.VectorType(ir.IntType(32), _WIDE), [0] * _WIDE)
    return builder.shuffle_vector(first, ir.Constant(_VECTOR, ir.Undefined), lanes)


def _groups(builder, size):
    """Loop over the groups of so many elements; gives the offset of each in bytes."""
    count = builder.udiv(builder.add(size, _number(GROUP - 1)), _number(GROUP))
    return cgutils.for_range(builder, count, intp=_WORD)


def _registers(builder, value):
    kept = [cgutils.alloca_once(builder, _VECTOR) for _ in range(_TOGETHER)]
    for each in kept:
        builder.store(value, each)
    return kept


@intrinsic
def add_weighted(context, rows, stride, count, weights, size, out):
    """out[s] = -0.0 + rows[0, s] * weights[0] + rows[1, s] * weights[1] + ..."""

    def emit(context, builder, signature, arguments):
        rows, stride, count, weights, size, out = arguments
        with _groups(builder, size) as group:
            first = builder.mul(group.index, _number(4 * GROUP))
            sums = _registers(builder, _MINUS_ZERO)
            with cgutils.for_range(builder, count, intp=_WORD) as client:
                weight = _spread(builder, weights, client.index)
                row = builder.add(builder.add(rows, builder.mul(stride, client.index)), first)
                for part, kept in enumerate(sums):
                    delta = builder.load(_at(builder, builder.add(row, _number(4 * _WIDE * part))), align=4)
                    builder.store(builder.fadd(builder.load(kept), builder.fmul(delta, weight)), kept)
            for part, kept in enumerate(sums):
                place = builder.add(builder.add(out, first), _number(4 * _WIDE * part))
                builder.store(builder.load(kept), _at(builder, place), align=4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6), emit


def _signs(builder, number):
    """1, -1 or 0."""
    negative = builder.select(builder.fcmp_ordered("<", number, _ZERO), _everywhere(-1.0), _ZERO)
    return builder.select(builder.fcmp_ordered(">", number, _ZERO), _ONE, negative)


def _count(builder, lanes):
    """How many lanes are set."""
    return builder.zext(builder.ctpop(builder.bitcast(lanes, ir.IntType(_WIDE))), _WORD)


@intrinsic
def elect(context, rows, stride, count, voices, by_number, size, signs, drawn):
    """The sign of each element: that of the sum of rows[n] * voices[n] or, `by_number`, of the sum of their signs.

    An election is a draw where the sum is 0 and a delta is not: plus wins, and `drawn` is 1 there; elsewhere it is 0.

    Args:
        rows: 0 from `size` to the end of the last group.

    Returns:
        How many elections plus has won less how many minus has, draws aside; and how many draws there are.
    """

    def emit(context, builder, signature, arguments):
        rows, stride, count, voices, by_number, size, signs, drawn = arguments
        word = ir.VectorType(ir.IntType(32), _WIDE)
        magnitude = ir.Constant(word, [0x7FFFFFFF] * _WIDE)
        tally, draws = (cgutils.alloca_once_value(builder, _number(0)) for _ in range(2))
        with _groups(builder, size) as group:
            first = builder.mul(group.index, _number(4 * GROUP))
            sums = _registers(builder, _MINUS_ZERO)
            moves = [cgutils.alloca_once(builder, word) for _ in range(_TOGETHER)]
            for each in moves:
                builder.store(ir.Constant(word, [0] * _WIDE), each)
            with cgutils.for_range(builder, count, intp=_WORD) as client:
                voice = _spread(builder, voices, client.index)
                row = builder.add(builder.add(rows, builder.mul(stride, client.index)), first)
                for part in range(_TOGETHER):
                    delta = builder.load(_at(builder, builder.add(row, _number(4 * _WIDE * part))), align=4)
                    said = builder.select(by_number, _signs(builder, delta), builder.fmul(delta, voice))
                    builder.store(builder.fadd(builder.load(sums[part]), said), sums[part])
                    moved = builder.and_(builder.bitcast(delta, word), magnitude)
                    builder.store(builder.or_(builder.load(moves[part]), moved), moves[part])
            for part in range(_TOGETHER):
                total, moved = builder.load(sums[part]), builder.load(moves[part])
                up, down = (builder.fcmp_ordered(sign, total, _ZERO) for sign in "><")
                draw = builder.and_(
                    builder.fcmp_ordered("==", total, _ZERO),
                    builder.icmp_unsigned("!=", moved, ir.Constant(word, [0] * _WIDE)),
                )
                won = builder.sub(_count(builder, up), _count(builder, down))
                builder.store(builder.add(builder.load(tally), won), tally)
                builder.store(builder.add(builder.load(draws), _count(builder, draw)), draws)
                place = builder.add(first, _number(4 * _WIDE * part))
                sign = builder.select(builder.or_(up, draw), _ONE, builder.select(down, _everywhere(-1.0), _ZERO))
                builder.store(sign, _at(builder, builder.add(signs, place)), align=4)
                builder.store(builder.select(draw, _ONE, _ZERO), _at(builder, builder.add(drawn, place)), align=4)
        return context.make_tuple(builder, signature.return_type, [builder.load(tally), builder.load(draws)])

    result = types.UniTuple(types.int64, 2)
    return result(*[types.int64] * 4, types.boolean, *[types.int64] * 3), emit


@intrinsic
def add_agreeing(context, rows, stride, count, weights, signs, size, normalize, out):
    """The sum over the clients whose delta has the sign in `signs` (1 or -1; 0 for none); if wanted, over the sum of
    their weights, and 0 where that is 0."""

    def emit(context, builder, signature, arguments):
        rows, stride, count, weights, signs, size, normalize, out = arguments
        with _groups(builder, size) as group:
            first = builder.mul(group.index, _number(4 * GROUP))
            sums, shares = _registers(builder, _MINUS_ZERO), _registers(builder, _ZERO)
            elected = [
                builder.load(_at(builder, builder.add(builder.add(signs, first), _number(4 * _WIDE * part))), align=4)
                for part in range(_TOGETHER)
            ]
            with cgutils.for_range(builder, count, intp=_WORD) as client:
                weight = _spread(builder, weights, client.index)
                row = builder.add(builder.add(rows, builder.mul(stride, client.index)), first)
                for part in range(_TOGETHER):
                    delta = builder.load(_at(builder, builder.add(row, _number(4 * _WIDE * part))), align=4)
                    # Times a sign, which cannot underflow to 0.
                    agrees = builder.fcmp_ordered(">", builder.fmul(delta, elected[part]), _ZERO)
                    moved = builder.select(agrees, builder.fmul(delta, weight), _ZERO)
                    builder.store(builder.fadd(builder.load(sums[part]), moved), sums[part])
                    share = builder.select(agrees, weight, _ZERO)
                    builder.store(builder.fadd(builder.load(shares[part]), share), shares[part])
            for part in range(_TOGETHER):
                total, share = builder.load(sums[part]), builder.load(shares[part])
                some = builder.fcmp_ordered(">", share, _ZERO)
                mean = builder.select(some, builder.fdiv(total, builder.select(some, share, _ONE)), _ZERO)
                place = builder.add(builder.add(out, first), _number(4 * _WIDE * part))
                builder.store(builder.select(normalize, mean, total), _at(builder, place), align=4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6, types.boolean, types.int64), emit
