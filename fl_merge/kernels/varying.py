"""Parts of the compiled passes that go by the variance over the clients: `ops.scores.variance` of up to MANY clients,
from models to what comes of it in registers.

As in `vectors`, groups of elements are outside and the clients inside. Elements are in the order of `pairs.read_pair`.
"""

from __future__ import annotations

import contextlib

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from fl_merge.kernels.across import inverse_of, variance_of
from fl_merge.kernels.elections import elects
from fl_merge.kernels.pairs import PAIR, as_pair, read_pair, store_pair
from fl_merge.kernels.vectors import (
    ADDRESS,
    AHEAD,
    BFLOAT16,
    DOUBLE,
    FLOAT,
    FLOATS,
    INDEX,
    WIDE,
    WORD,
    add_to,
    clients,
    constant,
    everywhere,
    fetch,
    groups,
    load,
    number,
    place_of,
    registers,
    store,
    vector,
)

_STEP = 2 * PAIR
"""Elements whose squares are added to before the sums go back to memory."""

_HALF = WIDE // 2
_ZERO = constant(FLOATS, 0.0)
_NOTHING = constant(vector(DOUBLE, _HALF), 0.0)


def _model(builder, models, client, offset, size):
    """The address of a client's elements; the next ones are asked for."""
    model = builder.add(load(builder, place_of(builder, models, client, WORD), WORD), offset)
    fetch(builder, builder.add(model, number(AHEAD)), size)
    return model


def _of_client(builder, scratch, client, at):
    """Where a vector of a client's deltas is in scratch."""
    return place_of(builder, scratch, builder.mul(client, number(_STEP)), FLOAT, at * WIDE)


def _variances(builder, dtype, where, base, begin, scratch=None):
    """The variances of some elements, a vector for each of `base`.

    Args:
        where: models, start, count.
        base: vectors, in pairs.
        begin: of the elements.
        scratch: takes the deltas, _STEP elements of each client.
    """
    _, width = dtype
    models, start, count = where
    offset = builder.mul(builder.add(start, begin), number(width))
    inverse = inverse_of(builder, count)

    def deltas(client):
        model, found = _model(builder, models, client, offset, len(base) * WIDE * width), []
        for pair in range(0, len(base), 2):
            here = builder.add(model, number(pair * WIDE * width))
            found += [
                builder.fsub(value, each)
                for value, each in zip(read_pair(builder, dtype, here), base[pair : pair + 2], strict=True)
            ]
        for at, delta in enumerate(found if scratch is not None else ()):
            store(builder, delta, _of_client(builder, scratch, client, at))
        return found

    firsts = deltas(number(0))
    sums, squares = (registers(builder, [_ZERO for _ in base]) for _ in range(2))
    with clients(builder, builder.sub(count, number(1))) as client:
        found = deltas(builder.add(client.index, number(1)))
        for delta, first, total, square in zip(found, firsts, sums, squares, strict=True):
            apart = builder.fsub(delta, first)
            add_to(builder, total, apart)
            add_to(builder, square, builder.fmul(apart, apart))
    return [variance_of(builder, *each, inverse) for each in zip(sums, squares, strict=True)]


def _base(builder, dtype, bases, begin, size):
    """The base of some elements, in pairs of vectors."""
    places = (place_of(builder, bases, begin, FLOAT, at) for at in range(0, size, PAIR))
    return [each for place in places for each in as_pair(builder, dtype, place)]


def finds_variances(dtype):
    """The variance of each element over the clients.

    Args:
        dtype: of the models.

    Args of what this gives:
        bases: of float32.
        models: of addresses of models, in which the elements begin at `start`.
        count: of the models, up to MANY.
        size: how many elements, a multiple of PAIR.
    """

    @intrinsic
    def find_variances(context, bases, models, start, count, size, out):
        def emit(context, builder, signature, arguments):
            bases, models, start, count, size, out = arguments
            with groups(builder, size, PAIR) as group:
                begin = builder.mul(group.index, number(PAIR))
                base = _base(builder, dtype, bases, begin, PAIR)
                found = _variances(builder, dtype, (models, start, count), base, begin)
                store_pair(builder, dtype, found, place_of(builder, out, begin, FLOAT))
            return context.get_dummy_value()

        return types.void(*[ADDRESS] * 6), emit

    return find_variances


def adds_varying_squares(dtype):
    """sums[n, l] += the squares, in float64, of those of a client's deltas whose variance is at least the limit, one
    after the other.

    Args:
        dtype: of the models.

    Args of what this gives: as for `finds_variances`, and
        limit: of float32.
        size: how many elements, a multiple of 64.
        scratch: of 64 float32 for each client.
        sums: (count, 16) of float64: a lane for every 16th element; those in the order of `pairs.read_pair`, of 16
            elements: for bfloat16 first the even lanes, then the odd ones.
    """

    @intrinsic
    def add_squares(context, bases, models, start, count, limit, size, scratch, sums):
        def emit(context, builder, signature, arguments):
            bases, models, start, count, limit, size, scratch, sums = arguments
            kind = vector(DOUBLE, _HALF)
            fma = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(kind, [kind] * 3), f"llvm.fma.v{_HALF}f64"
            )
            limit = everywhere(builder, limit)
            with groups(builder, size, _STEP) as group:
                begin = builder.mul(group.index, number(_STEP))
                base = _base(builder, dtype, bases, begin, _STEP)
                found = _variances(builder, dtype, (models, start, count), base, begin, scratch)
                varies = [builder.fcmp_ordered(">=", each, limit) for each in found]
                parts = [
                    (at, half, _part(builder, keep, half)) for at, keep in enumerate(varies) for half in (0, _HALF)
                ]
                with clients(builder, count) as client:
                    row = builder.mul(client.index, number(WIDE))
                    places = [place_of(builder, sums, row, DOUBLE, at) for at in (0, _HALF)]
                    kept = [load(builder, place, kind) for place in places]
                    for at, half, keep in parts:
                        place = builder.add(_of_client(builder, scratch, client.index, at), number(4 * half))
                        wide = builder.fpext(load(builder, place, vector(FLOAT, _HALF)), kind)
                        wide = builder.select(keep, wide, _NOTHING)
                        lanes = _lanes(dtype, at, half)
                        kept[lanes] = builder.call(fma, [wide, wide, kept[lanes]])
                    for place, sum_L in zip(places, kept, strict=True):
                        store(builder, sum_L, place)
            return context.get_dummy_value()

        return types.void(*[ADDRESS] * 4, types.float32, *[ADDRESS] * 3), emit

    return add_squares


def puts_in_order(dtype):
    """Put the lanes of what `adds_varying_squares` of that dtype has added up in their order.

    Args of what this gives:
        sums: (count, 16) of float64.
    """

    @intrinsic
    def put_in_order(context, sums, count):
        def emit(context, builder, signature, arguments):
            sums, count = arguments
            if dtype is BFLOAT16:
                kind = vector(DOUBLE, WIDE)
                places = ir.Constant(vector(INDEX), [lane // 2 + _HALF * (lane % 2) for lane in range(WIDE)])
                with clients(builder, count) as client:
                    place = place_of(builder, sums, builder.mul(client.index, number(WIDE)), DOUBLE)
                    found = load(builder, place, kind)
                    store(builder, builder.shuffle_vector(found, found, places), place)
            return context.get_dummy_value()

        return types.void(*[ADDRESS] * 2), emit

    return put_in_order


def _part(builder, lanes, first):
    """Eight lanes of a mask."""
    chosen = ir.Constant(vector(INDEX, _HALF), list(range(first, first + _HALF)))
    return builder.shuffle_vector(lanes, lanes, chosen)


def _lanes(dtype, at, half):
    """To which half of the sums half a vector is added: of bfloat16 a vector has the even lanes twice, or the odd ones;
    of the others both halves of 16 elements."""
    return at % 2 if dtype is BFLOAT16 else half // _HALF


@contextlib.contextmanager
def _each_varying(builder, dtype, where, limits, begin, base):
    """As `elections.elects` wants it: all clients' deltas are kept of elements whose variance is at least the limit.

    Args:
        limits: the address of the least variance, and of scratch of 64 float32 for each client.
    """
    least, scratch = limits
    least = everywhere(builder, load(builder, least, FLOAT))
    found = _variances(builder, dtype, where, base, begin, scratch)
    varies = [builder.fcmp_ordered(">=", each, least) for each in found]
    with clients(builder, where[2]) as client:
        deltas = [load(builder, _of_client(builder, scratch, client.index, at), FLOATS) for at in range(len(base))]
        yield client.index, list(zip(varies, deltas, strict=True))


def elects_varying(dtype):
    """As `elections.elects_kept` by "sum", where what is kept are the deltas of elements that vary.

    Args of what this gives: as there, but
        limits: of one float32: the least variance with which an element is kept.
        tops: scratch of 64 float32 for each client.
    """
    return elects(dtype, by="sum", each_kept=_each_varying, two_limits=True)
