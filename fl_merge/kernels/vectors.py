"""Parts of the compiled passes that keep bases and sums in registers while they go through the clients.

numba's own loops go through the clients outside and the elements inside, so that every sum is loaded and stored once a
client. Here groups of elements are outside. The operations are the same, in the same order.

All arrays are given by address; rows are `stride` bytes apart, with room behind them for a whole last group.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

GROUP, DOUBLES = 64, 32
"""Elements whose float32, and whose float64, are kept in registers together."""

_WIDE = 16
"""Lanes of a vector of float32; of float64 there are half as many."""

_WORD, _INDEX = ir.IntType(64), ir.IntType(32)
_FLOAT, _DOUBLE = ir.FloatType(), ir.DoubleType()
_BYTES = {_FLOAT: 4, _DOUBLE: 8, _WORD: 8, ir.HalfType(): 2, ir.IntType(16): 2}
_PLACES = types.int64


def _number(value):
    return ir.Constant(_WORD, value)


def _vector(of, lanes=_WIDE):
    return ir.VectorType(of, lanes)


def _all(kind, value):
    """A constant in every lane."""
    return ir.Constant(kind, [value] * kind.count)


_FLOATS, _BITS = _vector(_FLOAT), _vector(_INDEX)
_ZERO, _MINUS_ZERO, _ONE, _MINUS_ONE = (_all(_FLOATS, value) for value in (0.0, -0.0, 1.0, -1.0))
_NO_BITS, _MAGNITUDE = _all(_BITS, 0), _all(_BITS, 0x7FFFFFFF)


def _place(builder, address, index, of, more=0):
    """The address of an element of an array, some elements further."""
    index = index if isinstance(index, ir.Value) else _number(index)
    return builder.add(builder.add(address, builder.mul(index, _number(_BYTES[of]))), _number(more * _BYTES[of]))


def _load(builder, address, kind):
    of = kind.element if isinstance(kind, ir.VectorType) else kind
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=_BYTES[of])


def _store(builder, value, address):
    of = value.type.element
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=_BYTES[of])


def _everywhere(builder, value, lanes=_WIDE):
    """One number in every lane."""
    nothing = ir.Constant(_vector(value.type, lanes), ir.Undefined)
    first = builder.insert_element(nothing, value, ir.Constant(_INDEX, 0))
    return builder.shuffle_vector(first, nothing, _all(_vector(_INDEX, lanes), 0))


def _registers(builder, values):
    """Places that LLVM turns into registers."""
    return [cgutils.alloca_once_value(builder, value) for value in values]


def _add(builder, place, value, add=None):
    builder.store((add or builder.fadd)(builder.load(place), value), place)


def _groups(builder, size, group):
    """Loop over the groups of so many elements; the last may be less than whole."""
    return cgutils.for_range(builder, builder.udiv(builder.add(size, _number(group - 1)), _number(group)), intp=_WORD)


def _clients(builder, count):
    return cgutils.for_range(builder, count, intp=_WORD)


# --- models in any dtype ---------------------------------------------------------------------------------------------


def _of(kind):
    """Reads vectors of one dtype, and gives them in its own, or float32 for bfloat16."""

    def read(builder, address, lanes):
        return _load(builder, address, _vector(kind, lanes))

    return read


def _bfloat16(builder, address, lanes):
    bits = builder.zext(_load(builder, address, _vector(ir.IntType(16), lanes)), _vector(_INDEX, lanes))
    return builder.bitcast(builder.shl(bits, _all(_vector(_INDEX, lanes), 16)), _vector(_FLOAT, lanes))


def _cast(builder, values, of):
    wanted, had = _vector(of, values.type.count), values.type.element
    if had == of:
        return values
    return builder.fptrunc(values, wanted) if _BYTES[had] > _BYTES[of] else builder.fpext(values, wanted)


FLOAT32, FLOAT64, BFLOAT16, FLOAT16 = (_of(_FLOAT), 4), (_of(_DOUBLE), 8), (_bfloat16, 2), (_of(ir.HalfType()), 2)
"""Dtypes of models: what reads them, and bytes of an element."""


def adds_models(dtype):
    """sums[s] = bases[s] * scaling + (models[0][s] - bases[s]) * coefficients[0] + ..., in float64, rounded to float32
    as it is written.

    Args:
        dtype: of the models.

    Args of what this gives:
        bases: of float64.
        models: of addresses of models, in which the elements begin at `start`.
        size: how many elements, a multiple of DOUBLES.
    """
    read, width = dtype
    lanes = _WIDE // 2

    @intrinsic
    def add_models(context, bases, models, start, count, scaling, coefficients, size, sums):
        def emit(context, builder, signature, arguments):
            bases, models, start, count, scaling, coefficients, size, sums = arguments
            parts = range(0, DOUBLES, lanes)
            scaling = _everywhere(builder, scaling, lanes)
            with _groups(builder, size, DOUBLES) as group:
                begin = builder.mul(group.index, _number(DOUBLES))
                base = [_load(builder, _place(builder, bases, begin, _DOUBLE, at), scaling.type) for at in parts]
                kept = _registers(builder, [builder.fmul(each, scaling) for each in base])
                offset = builder.mul(builder.add(start, begin), _number(width))
                with _clients(builder, count) as client:
                    coefficient = _load(builder, _place(builder, coefficients, client.index, _DOUBLE), _DOUBLE)
                    coefficient = _everywhere(builder, coefficient, lanes)
                    model = builder.add(_load(builder, _place(builder, models, client.index, _WORD), _WORD), offset)
                    for at, each, sum_L in zip(parts, base, kept, strict=True):
                        value = _cast(builder, read(builder, builder.add(model, _number(width * at)), lanes), _DOUBLE)
                        _add(builder, sum_L, builder.fmul(builder.fsub(value, each), coefficient))
                for at, sum_L in zip(parts, kept, strict=True):
                    rounded = _cast(builder, builder.load(sum_L), _FLOAT)
                    _store(builder, rounded, _place(builder, sums, begin, _FLOAT, at))
            return context.get_dummy_value()

        return types.void(*[_PLACES] * 4, types.float64, *[_PLACES] * 3), emit

    return add_models


def loads_models(dtype, *, deltas=True, trimmed=False, wide=False):
    """rows[n, s] = models[n][s] - bases[s], in float32.

    Args:
        dtype: of the models.
        deltas: if false, the models themselves.
        trimmed: 0 in place of what has a magnitude below limits[n].
        wide: write float64.

    Args of what this gives:
        bases: of float32.
        models: of addresses of models, in which the elements begin at `start`.
        limits: of float32; not looked at unless `trimmed`.
        size: how many elements, a multiple of GROUP.
    """
    read, width = dtype

    @intrinsic
    def load_models(context, bases, models, start, count, limits, size, rows, stride):
        def emit(context, builder, signature, arguments):
            bases, models, start, count, limits, size, rows, stride = arguments
            parts = range(0, GROUP, _WIDE)
            with _groups(builder, size, GROUP) as group:
                begin = builder.mul(group.index, _number(GROUP))
                base = [_load(builder, _place(builder, bases, begin, _FLOAT, at), _FLOATS) for at in parts]
                offset = builder.mul(builder.add(start, begin), _number(width))
                with _clients(builder, count) as client:
                    model = builder.add(_load(builder, _place(builder, models, client.index, _WORD), _WORD), offset)
                    row = builder.add(rows, builder.mul(stride, client.index))
                    if trimmed:
                        limit = _load(builder, _place(builder, limits, client.index, _FLOAT), _FLOAT)
                        limit = _everywhere(builder, limit)
                    for at, each in zip(parts, base, strict=True):
                        value = _cast(builder, read(builder, builder.add(model, _number(width * at)), _WIDE), _FLOAT)
                        value = builder.fsub(value, each) if deltas else value
                        if trimmed:
                            magnitude = builder.bitcast(
                                builder.and_(builder.bitcast(value, _BITS), _MAGNITUDE), _FLOATS
                            )
                            value = builder.select(builder.fcmp_ordered(">=", magnitude, limit), value, _ZERO)
                        of = _DOUBLE if wide else _FLOAT
                        _store(builder, _cast(builder, value, of), _place(builder, row, begin, of, at))
            return context.get_dummy_value()

        return types.void(*[_PLACES] * 8), emit

    return load_models


# --- rows of deltas --------------------------------------------------------------------------------------------------


@intrinsic
def add_weighted(context, rows, stride, count, weights, size, out):
    """out[s] = -0.0 + rows[0, s] * weights[0] + rows[1, s] * weights[1] + ..., in float32."""

    def emit(context, builder, signature, arguments):
        rows, stride, count, weights, size, out = arguments
        parts = range(0, GROUP, _WIDE)
        with _groups(builder, size, GROUP) as group:
            begin = builder.mul(group.index, _number(GROUP))
            sums = _registers(builder, [_MINUS_ZERO for _ in parts])
            with _clients(builder, count) as client:
                weight = _load(builder, _place(builder, weights, client.index, _FLOAT), _FLOAT)
                weight = _everywhere(builder, weight)
                row = builder.add(rows, builder.mul(stride, client.index))
                for at, kept in zip(parts, sums, strict=True):
                    delta = _load(builder, _place(builder, row, begin, _FLOAT, at), _FLOATS)
                    _add(builder, kept, builder.fmul(delta, weight))
            for at, kept in zip(parts, sums, strict=True):
                _store(builder, builder.load(kept), _place(builder, out, begin, _FLOAT, at))
        return context.get_dummy_value()

    return types.void(*[_PLACES] * 6), emit


def _count(builder, lanes):
    """How many lanes are set."""
    return builder.zext(builder.ctpop(builder.bitcast(lanes, ir.IntType(_WIDE))), _WORD)


def _sign_of(builder, number):
    """Lanes above 0, lanes below, and 1, -1 or 0."""
    up, down = (builder.fcmp_ordered(than, number, _ZERO) for than in "><")
    return up, down, builder.select(up, _ONE, builder.select(down, _MINUS_ONE, _ZERO))


def elects(*, by_number):
    """The sign of each element: that of the sum of rows[n] * voices[n] or, `by_number`, of the sum of their signs.

    An election is a draw where the sum is 0 and a delta is not: plus wins, and `drawn` is 1 there; elsewhere it is 0.

    Args of what this gives:
        rows: 0 from `size` to the end of the last group.

    What this gives returns how many elections plus has won less how many minus has, draws aside; and how many draws
    there are.
    """

    @intrinsic
    def elect(context, rows, stride, count, voices, size, signs, drawn):

        def emit(context, builder, signature, arguments):
            rows, stride, count, voices, size, signs, drawn = arguments
            parts = range(0, GROUP, _WIDE)
            tally, draws = _registers(builder, [_number(0), _number(0)])

            with _groups(builder, size, GROUP) as group:
                begin = builder.mul(group.index, _number(GROUP))
                sums = _registers(builder, [_MINUS_ZERO for _ in parts])
                moves = _registers(builder, [_NO_BITS for _ in parts])
                with _clients(builder, count) as client:
                    voice = _load(builder, _place(builder, voices, client.index, _FLOAT), _FLOAT)
                    voice = _everywhere(builder, voice)
                    row = builder.add(rows, builder.mul(stride, client.index))
                    for at, kept, moved in zip(parts, sums, moves, strict=True):
                        delta = _load(builder, _place(builder, row, begin, _FLOAT, at), _FLOATS)
                        _add(builder, kept, _sign_of(builder, delta)[2] if by_number else builder.fmul(delta, voice))
                        magnitude = builder.and_(builder.bitcast(delta, _BITS), _MAGNITUDE)
                        _add(builder, moved, magnitude, builder.or_)
                for at, kept, moved in zip(parts, sums, moves, strict=True):
                    total = builder.load(kept)
                    up, down, sign = _sign_of(builder, total)
                    still = builder.fcmp_ordered("==", total, _ZERO)
                    draw = builder.and_(still, builder.icmp_unsigned("!=", builder.load(moved), _NO_BITS))
                    _add(builder, tally, builder.sub(_count(builder, up), _count(builder, down)), builder.add)
                    _add(builder, draws, _count(builder, draw), builder.add)
                    _store(builder, builder.select(draw, _ONE, sign), _place(builder, signs, begin, _FLOAT, at))
                    _store(builder, builder.select(draw, _ONE, _ZERO), _place(builder, drawn, begin, _FLOAT, at))
            return context.make_tuple(builder, signature.return_type, [builder.load(tally), builder.load(draws)])

        return types.UniTuple(types.int64, 2)(*[_PLACES] * 7), emit

    return elect


@intrinsic
def add_agreeing(context, rows, stride, count, weights, signs, size, normalize, out):
    """The sum of rows[n] * weights[n] over the clients whose delta has the sign in `signs` (1 or -1; 0 for none); if
    wanted, over the sum of their weights, and 0 where that is 0."""

    def emit(context, builder, signature, arguments):
        rows, stride, count, weights, signs, size, normalize, out = arguments
        parts = range(0, GROUP, _WIDE)
        with _groups(builder, size, GROUP) as group:
            begin = builder.mul(group.index, _number(GROUP))
            sums = _registers(builder, [_MINUS_ZERO for _ in parts])
            shares = _registers(builder, [_ZERO for _ in parts])
            elected = [_load(builder, _place(builder, signs, begin, _FLOAT, at), _FLOATS) for at in parts]
            with _clients(builder, count) as client:
                weight = _load(builder, _place(builder, weights, client.index, _FLOAT), _FLOAT)
                weight = _everywhere(builder, weight)
                row = builder.add(rows, builder.mul(stride, client.index))
                for at, sign, total, share in zip(parts, elected, sums, shares, strict=True):
                    delta = _load(builder, _place(builder, row, begin, _FLOAT, at), _FLOATS)
                    # Times a sign, which cannot underflow to 0.
                    agrees = builder.fcmp_ordered(">", builder.fmul(delta, sign), _ZERO)
                    _add(builder, total, builder.select(agrees, builder.fmul(delta, weight), _ZERO))
                    _add(builder, share, builder.select(agrees, weight, _ZERO))
            for at, kept, kept_share in zip(parts, sums, shares, strict=True):
                total, share = builder.load(kept), builder.load(kept_share)
                some = builder.fcmp_ordered(">", share, _ZERO)
                mean = builder.select(some, builder.fdiv(total, builder.select(some, share, _ONE)), _ZERO)
                _store(builder, builder.select(normalize, mean, total), _place(builder, out, begin, _FLOAT, at))
        return context.get_dummy_value()

    return types.void(*[_PLACES] * 6, types.boolean, _PLACES), emit
