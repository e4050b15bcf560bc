"""From models to merged elements without a stop: what is kept of the deltas is elected and added up in registers.

As in `vectors`, groups of elements are outside and the clients inside.
"""

from __future__ import annotations

import contextlib

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fl_merge.kernels.pairs import PAIR, as_pair, bits_of_pair, read_pair, store_pair
from fl_merge.kernels.vectors import (
    ADDRESS,
    AHEAD,
    BITS,
    FLOAT,
    FLOAT32,
    FLOATS,
    MAGNITUDES,
    WORD,
    add_to,
    clients,
    constant,
    count_lanes,
    everywhere,
    fetch,
    groups,
    largest_lane,
    load,
    number,
    place_of,
    registers,
    store_word,
    vector,
)

_ZERO, _MINUS_ZERO, _ONE, _MINUS_ONE = (constant(FLOATS, value) for value in (0.0, -0.0, 1.0, -1.0))
_NO_BITS = constant(BITS, 0)
_NO_LANES = constant(vector(ir.IntType(1)), 0)


@contextlib.contextmanager
def _each_large(builder, dtype, where, limits, begin, base):
    """Loop over the clients. Within it: which one, and of both vectors of a pair which deltas are kept, and all deltas.

    Args:
        where: models, start, count.
        limits: arrays, by client, of the least magnitude that is kept, and perhaps of the least larger one that is not.
        begin, base: of the elements.
    """
    _, width = dtype
    models, start, count = where
    offset = builder.mul(builder.add(start, begin), number(width))
    with clients(builder, count) as client:
        model = builder.add(load(builder, place_of(builder, models, client.index, WORD), WORD), offset)
        fetch(builder, builder.add(model, number(AHEAD)), PAIR * width)
        # Bits of magnitudes have their order; what is below the least is far above all when that is taken from it.
        least, *most = (builder.bitcast(_part_of(builder, numbers, client.index), BITS) for numbers in limits)
        width_of_kept = None
        if most:
            some = builder.icmp_unsigned(">", most[0], least)
            width_of_kept = builder.select(some, builder.sub(most[0], least), _NO_BITS)
        found = []
        for value, each in zip(read_pair(builder, dtype, model), base, strict=True):
            delta = builder.fsub(value, each)
            magnitude = builder.and_(builder.bitcast(delta, BITS), MAGNITUDES)
            if width_of_kept is None:
                kept = builder.icmp_unsigned(">=", magnitude, least)
            else:
                kept = builder.icmp_unsigned("<", builder.sub(magnitude, least), width_of_kept)
            found.append((kept, delta))
        yield client.index, found


@contextlib.contextmanager
def _each_of_rows(builder, dtype, where, limits, begin, base):
    """As `_each_large`, of rows of float32 in which what is not kept is 0; which deltas are kept needs no saying."""
    rows, _, count = where
    with clients(builder, count) as client:
        row = load(builder, place_of(builder, rows, client.index, WORD), WORD)
        yield client.index, [(None, delta) for delta in read_pair(builder, dtype, place_of(builder, row, begin, FLOAT))]


def _part_of(builder, numbers, client):
    return everywhere(builder, load(builder, place_of(builder, numbers, client, FLOAT), FLOAT))


def sums_kept(dtype):
    """out[s] = added[s] + scale * (-0.0 + kept[0, s] * weights[0] + kept[1, s] * weights[1] + ...), where kept[n, s] is
    models[n][s] - bases[s] if its magnitude is at least limits[n] and not at least tops[n], or else 0.

    Args:
        dtype: of the models.

    Args of what this gives:
        bases, added: of float32.
        models: of addresses of models, in which the elements begin at `start`.
        limits, tops: nothing is at least NaN.
        size: how many elements, a multiple of PAIR.
    """

    @intrinsic
    def sum_kept(context, bases, models, start, count, limits, tops, weights, added, scale, size, out):
        def emit(context, builder, signature, arguments):
            bases, models, start, count, limits, tops, weights, added, scale, size, out = arguments
            where, scale = (models, start, count), everywhere(builder, scale)
            with groups(builder, size, PAIR) as group:
                begin = builder.mul(group.index, number(PAIR))
                base = as_pair(builder, dtype, place_of(builder, bases, begin, FLOAT))
                sums = registers(builder, [_MINUS_ZERO, _MINUS_ZERO])
                with _each_large(builder, dtype, where, (limits, tops), begin, base) as (client, found):
                    weight = _part_of(builder, weights, client)
                    for (kept, delta), total in zip(found, sums, strict=True):
                        add_to(builder, total, builder.fmul(builder.select(kept, delta, _ZERO), weight))
                place = place_of(builder, added, begin, FLOAT)
                merged = [
                    builder.fadd(each, builder.fmul(builder.load(total), scale))
                    for each, total in zip(as_pair(builder, dtype, place), sums, strict=True)
                ]
                store_pair(builder, dtype, merged, place_of(builder, out, begin, FLOAT))
            return context.get_dummy_value()

        return types.void(*[ADDRESS] * 8, types.float32, *[ADDRESS] * 2), emit

    return sum_kept


def elects_kept(dtype, *, by, middle=False):
    """Elect the sign of each element. Then out[s] = added[s] + scale * the sum of kept[n] * weights[n] (`kept` as
    `sums_kept` has it) over the clients whose delta has that sign; if wanted, that sum over their weights, and 0 where
    these are 0.

    An election is a draw where its sum is 0 and a delta is not: plus wins.

    Args:
        dtype: of the models.
        by: what is summed up to elect a sign: kept[n] * weights[n] ("total"), kept[n] ("sum"), or the signs of kept[n]
            ("frequency").
        middle: whether `tops` are looked at.

    Args of what this gives:
        limits: above 0.
        weights: none is negative.
        others, their_weights: take the sum over the clients that have a minus, and that of their weights.
        draws: of uint64, takes a word for each PAIR: which elections are draws.

    What this gives returns how many elections plus has won less how many minus has, draws aside; how many draws there
    are; and the bits of the largest magnitude in `out` where there is none.
    """
    return elects(dtype, by=by, each_kept=_each_large, two_limits=middle)


def elects_rows(*, by):
    """As `elects_kept`, of rows in which what is not kept is 0.

    Args of what this gives: as there, but
        models: of addresses of rows of float32; `bases`, `start`, `limits` and `tops` are not looked at.
    """
    return elects(FLOAT32, by=by, each_kept=_each_of_rows, two_limits=False)


def elects(dtype, *, by, each_kept, two_limits):
    """As `elects_kept`, with what is kept by another rule.

    Args:
        each_kept: as `_each_large`.
        two_limits: whether it gets `tops` too.
    """

    @intrinsic
    def elect_kept(
        context,
        bases,
        models,
        start,
        count,
        limits,
        tops,
        weights,
        added,
        scale,
        normalize,
        size,
        out,
        others,
        their_weights,
        draws,
    ):
        def emit(context, builder, signature, arguments):
            bases, models, start, count, limits, tops, weights, *behind = arguments
            added, scale, normalize, size, out, others, their_weights, draws = behind
            where, scale = (models, start, count), everywhere(builder, scale)
            both = (limits, tops) if two_limits else (limits,)
            tally, drawn, largest = registers(builder, [number(0), number(0), _NO_BITS])
            with groups(builder, size, PAIR) as group:
                begin = builder.mul(group.index, number(PAIR))
                base = as_pair(builder, dtype, place_of(builder, bases, begin, FLOAT))
                votes, up, up_weights, down, down_weights = (registers(builder, [_ZERO, _ZERO]) for _ in range(5))
                moves = registers(builder, [_NO_LANES, _NO_LANES])
                with each_kept(builder, dtype, where, both, begin, base) as (client, found):
                    weight = _part_of(builder, weights, client)
                    for half, (kept, delta) in enumerate(found):
                        plus, minus = (builder.fcmp_ordered(than, delta, _ZERO) for than in "><")
                        part = builder.fmul(delta, weight)
                        if kept is None:
                            kept = moved = builder.or_(plus, minus)
                        else:
                            plus, minus = builder.and_(kept, plus), builder.and_(kept, minus)
                            part = builder.select(kept, part, _ZERO)
                            # Of what varies, some may be 0.
                            moved = builder.or_(plus, minus) if by == "sum" else kept
                        if by == "frequency":
                            _add_where(builder, votes[half], plus, _ONE)
                            _add_where(builder, votes[half], minus, _MINUS_ONE)
                        elif by == "total":
                            add_to(builder, votes[half], part)
                        else:
                            _add_where(builder, votes[half], kept, delta)
                        add_to(builder, moves[half], moved, builder.or_)
                        for which, total, share in ((plus, up, up_weights), (minus, down, down_weights)):
                            _add_where(builder, total[half], which, part)
                            _add_where(builder, share[half], which, weight)

                still, merged = [], []
                for half, each in enumerate(as_pair(builder, dtype, place_of(builder, added, begin, FLOAT))):
                    vote = builder.load(votes[half])
                    plus, minus = (builder.fcmp_ordered(than, vote, _ZERO) for than in "><")
                    won = builder.sub(count_lanes(builder, plus), count_lanes(builder, minus))
                    add_to(builder, tally, won, builder.add)
                    draw = builder.and_(builder.fcmp_ordered("==", vote, _ZERO), builder.load(moves[half]))
                    total, share = (
                        builder.select(minus, builder.load(two[half]), builder.load(one[half]))
                        for one, two in ((up, down), (up_weights, down_weights))
                    )
                    some = builder.fcmp_ordered(">", share, _ZERO)
                    mean = builder.select(some, builder.fdiv(total, share), _ZERO)
                    change = builder.select(normalize, mean, total)
                    merged.append(builder.fadd(each, builder.fmul(change, scale)))
                    still.append(draw)
                    magnitude = builder.and_(builder.bitcast(merged[-1], BITS), MAGNITUDES)
                    magnitude = builder.select(draw, _NO_BITS, magnitude)
                    larger = builder.icmp_unsigned(">", magnitude, builder.load(largest))
                    builder.store(builder.select(larger, magnitude, builder.load(largest)), largest)
                store_pair(builder, dtype, merged, place_of(builder, out, begin, FLOAT))
                for kept, to in ((down, others), (down_weights, their_weights)):
                    values = [builder.load(each) for each in kept]
                    store_pair(builder, dtype, values, place_of(builder, to, begin, FLOAT))
                word = bits_of_pair(builder, dtype, still)
                store_word(builder, word, place_of(builder, draws, group.index, WORD))
                add_to(builder, drawn, builder.ctpop(word), builder.add)
            most = largest_lane(builder, builder.load(largest))
            results = [builder.load(tally), builder.load(drawn), builder.zext(most, WORD)]
            return context.make_tuple(builder, signature.return_type, results)

        given = [*[ADDRESS] * 8, types.float32, types.boolean, *[ADDRESS] * 5]
        return types.UniTuple(types.int64, 3)(*given), emit

    return elect_kept


def _add_where(builder, place, lanes, value):
    before = builder.load(place)
    builder.store(builder.select(lanes, builder.fadd(before, value), before), place)
