"""Parts of the compiled passes that weigh elements by their balance: `ops.scores.balance`, operation by operation.

As in `vectors`, groups of elements are outside and the clients inside. Scratch holds the deltas of one group.
"""

from __future__ import annotations

from numba import types
from numba.extending import intrinsic

from fl_merge.kernels.series import EXP2, LEAST, ROUNDING, TANH
from fl_merge.kernels.vectors import (
    ADDRESS,
    AHEAD,
    BITS,
    FLOAT,
    FLOATS,
    GROUP,
    MAGNITUDES,
    WIDE,
    WORD,
    add_to,
    cast,
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
)

_ZERO, _MINUS_ZERO, _ONE, _MINUS_ONE = (constant(FLOATS, each) for each in (0.0, -0.0, 1.0, -1.0))
_LEAST, _ROUNDING = constant(FLOATS, LEAST), constant(FLOATS, ROUNDING)
_PARTS = range(0, GROUP, WIDE)


def _each(build, *values):
    """One operation for each vector of a group: next to one another, since none waits for another."""
    count = max(len(value) for value in values if isinstance(value, list))
    columns = [value if isinstance(value, list) else [value] * count for value in values]
    return [build(*column) for column in zip(*columns, strict=True)]


def _polynomial(builder, values, terms):
    """By Horner's rule, from the highest term on."""
    found = constant(FLOATS, terms[-1])
    found = [found for _ in values]
    for term in reversed(terms[:-1]):
        found = _each(builder.fadd, _each(builder.fmul, found, values), constant(FLOATS, term))
    return found


def _balance(builder, deltas, totals, of_size, of_total, decay):
    sizes = _each(builder.fmul, deltas, of_size)
    agreements = _each(builder.fmul, sizes, _each(builder.fmul, totals, of_total))
    agreements = [
        builder.select(builder.fcmp_ordered(">", agreement, _ZERO), agreement, _ZERO) for agreement in agreements
    ]
    squares = _each(builder.fmul, sizes, sizes)
    exponents = _each(builder.fsub, squares, decay)
    moved = _each(builder.fadd, exponents, _ROUNDING)
    rests = _each(builder.fsub, exponents, _each(builder.fsub, moved, _ROUNDING))
    powers = [builder.bitcast(power, BITS) for power in _polynomial(builder, rests, EXP2)]
    # The last bits of what was moved are the whole part, and the lift.
    steps = [builder.shl(builder.bitcast(each, BITS), constant(BITS, 23)) for each in moved]
    powers = [builder.bitcast(power, FLOATS) for power in _each(builder.add, powers, steps)]
    curves = _polynomial(builder, _each(builder.fmul, agreements, agreements), TANH)
    return _each(builder.fmul, powers, _each(builder.fmul, agreements, curves))


def load_group(builder, dtype, bases, models, start, begin, count, scratch):
    """Write the deltas of a group to scratch (as `of_client` tells), and give their sums."""
    read, width = dtype
    base = [load(builder, place_of(builder, bases, begin, FLOAT, at), FLOATS) for at in _PARTS]
    offset = builder.mul(builder.add(start, begin), number(width))
    totals = registers(builder, [_MINUS_ZERO for _ in _PARTS])
    with clients(builder, count) as client:
        model = builder.add(load(builder, place_of(builder, models, client.index, WORD), WORD), offset)
        fetch(builder, builder.add(model, number(AHEAD)), GROUP * width)
        for at, each, total in zip(_PARTS, base, totals, strict=True):
            value = cast(builder, read(builder, builder.add(model, number(width * at)), WIDE), FLOAT)
            delta = builder.fsub(value, each)
            store(builder, delta, of_client(builder, scratch, client.index, at))
            add_to(builder, total, delta)
    return [builder.load(total) for total in totals]


def of_client(builder, scratch, client, at):
    """Where a vector of a client's deltas is in the scratch of a group."""
    return place_of(builder, scratch, builder.mul(client, number(GROUP)), FLOAT, at)


def _balances(builder, scratch, client, count, totals, factors, decay):
    """The balances of a client in a group."""
    of_size, of_total = (
        everywhere(builder, load(builder, place_of(builder, factors, at, FLOAT), FLOAT))
        for at in (client, builder.add(client, count))
    )
    deltas = [load(builder, of_client(builder, scratch, client, at), FLOATS) for at in _PARTS]
    found = []
    for at in range(0, len(deltas), 2):
        found += _balance(builder, deltas[at : at + 2], totals[at : at + 2], of_size, of_total, decay)
    return found


@intrinsic
def balances_of(context, deltas, totals, of_size, of_total, decay, size, out):
    """The balances of one client, from its deltas and the sums of all clients' ones.

    Args:
        size: how many elements, a multiple of 2 WIDE.
    """

    def emit(context, builder, signature, arguments):
        deltas, totals, of_size, of_total, decay, size, out = arguments
        numbers = [everywhere(builder, each) for each in (of_size, of_total, decay)]
        with groups(builder, size, 2 * WIDE) as group:
            begin = builder.mul(group.index, number(2 * WIDE))
            rows = [
                [load(builder, place_of(builder, row, begin, FLOAT, at), FLOATS) for at in (0, WIDE)]
                for row in (deltas, totals)
            ]
            for at, found in zip((0, WIDE), _balance(builder, *rows, *numbers), strict=True):
                store(builder, found, place_of(builder, out, begin, FLOAT, at))
        return context.get_dummy_value()

    return types.void(*[ADDRESS] * 2, *[types.float32] * 3, *[ADDRESS] * 2), emit


def finds_balances(dtype):
    """The balances of all clients, in a row for each.

    Args:
        dtype: of the models.

    Args of what this gives:
        bases: of float32.
        models: of addresses of models, in which the elements begin at `start`.
        factors: (2, N), of float32: what multiplies deltas and their sum.
        decay: N log2(e), of float32.
        size: how many elements, a multiple of GROUP.
        scratch: of a group of each client.
    """

    @intrinsic
    def find_balances(context, bases, models, start, count, factors, decay, size, scratch, rows, stride):
        def emit(context, builder, signature, arguments):
            bases, models, start, count, factors, decay, size, scratch, rows, stride = arguments
            decay = everywhere(builder, decay)
            with groups(builder, size, GROUP) as group:
                begin = builder.mul(group.index, number(GROUP))
                totals = load_group(builder, dtype, bases, models, start, begin, count, scratch)
                with clients(builder, count) as client:
                    row = builder.add(rows, builder.mul(stride, client.index))
                    each = _balances(builder, scratch, client.index, count, totals, factors, decay)
                    for at, found in zip(_PARTS, each, strict=True):
                        store(builder, found, place_of(builder, row, begin, FLOAT, at))
            return context.get_dummy_value()

        return types.void(*[ADDRESS] * 5, types.float32, *[ADDRESS] * 4), emit

    return find_balances


def adds_balanced(dtype):
    """The sum of the deltas, each times its share (`ops.scores.shares`) in the balances that are at least their
    client's limit.

    Args of what this gives: as for `finds_balances`, and
        limits: (N,), of float32.
        scratch: of two groups of each client.
    """

    @intrinsic
    def add_balanced(context, bases, models, start, count, factors, decay, limits, size, scratch, out):
        def emit(context, builder, signature, arguments):
            bases, models, start, count, factors, decay, limits, size, scratch, out = arguments
            decay = everywhere(builder, decay)
            kept_scratch = of_client(builder, scratch, count, 0)
            with groups(builder, size, GROUP) as group:
                begin = builder.mul(group.index, number(GROUP))
                totals = load_group(builder, dtype, bases, models, start, begin, count, scratch)
                wholes = registers(builder, [_MINUS_ZERO for _ in _PARTS])
                with clients(builder, count) as client:
                    limit = everywhere(builder, load(builder, place_of(builder, limits, client.index, FLOAT), FLOAT))
                    each = _balances(builder, scratch, client.index, count, totals, factors, decay)
                    for at, whole, found in zip(_PARTS, wholes, each, strict=True):
                        kept = builder.select(builder.fcmp_ordered(">=", found, limit), found, _ZERO)
                        store(builder, kept, of_client(builder, kept_scratch, client.index, at))
                        add_to(builder, whole, kept)
                wholes = [builder.load(whole) for whole in wholes]
                some = [builder.fcmp_ordered(">=", whole, _LEAST) for whole in wholes]
                # Where there is nothing, nothing is the whole of it.
                wholes = [builder.select(each, whole, _MINUS_ONE) for each, whole in zip(some, wholes, strict=True)]
                inverses = [
                    builder.select(each, builder.fdiv(_ONE, whole), _ZERO)
                    for each, whole in zip(some, wholes, strict=True)
                ]
                sums = registers(builder, [_MINUS_ZERO for _ in _PARTS])
                with clients(builder, count) as client:
                    for at, whole, factor, total in zip(_PARTS, wholes, inverses, sums, strict=True):
                        kept = load(builder, of_client(builder, kept_scratch, client.index, at), FLOATS)
                        delta = load(builder, of_client(builder, scratch, client.index, at), FLOATS)
                        alone = builder.fcmp_ordered("==", kept, whole)
                        share = builder.select(alone, _ONE, builder.fmul(kept, factor))
                        add_to(builder, total, builder.fmul(share, delta))
                for at, total in zip(_PARTS, sums, strict=True):
                    store(builder, builder.load(total), place_of(builder, out, begin, FLOAT, at))
            return context.get_dummy_value()

        return types.void(*[ADDRESS] * 5, types.float32, *[ADDRESS] * 4), emit

    return add_balanced


def finds_largest(dtype):
    """The largest bits, in each lane, of the magnitudes of a client's deltas, and of the float32 products of these with
    the sum of all deltas.

    Args of what this gives: as for `finds_balances`, and
        found: (2, N, WIDE), of uint32; what is there is kept where it is larger.
    """

    @intrinsic
    def find_largest(context, bases, models, start, count, size, scratch, found):
        def emit(context, builder, signature, arguments):
            bases, models, start, count, size, scratch, found = arguments

            def larger(one, other):
                return builder.select(builder.icmp_unsigned(">", one, other), one, other)

            with groups(builder, size, GROUP) as group:
                begin = builder.mul(group.index, number(GROUP))
                totals = load_group(builder, dtype, bases, models, start, begin, count, scratch)
                with clients(builder, count) as client:
                    places = [
                        place_of(builder, found, builder.mul(which, number(WIDE)), FLOAT)
                        for which in (client.index, builder.add(client.index, count))
                    ]
                    largest, product = (load(builder, place, BITS) for place in places)
                    for at, total in zip(_PARTS, totals, strict=True):
                        delta = load(builder, of_client(builder, scratch, client.index, at), FLOATS)
                        here = builder.bitcast(builder.fmul(delta, total), BITS)
                        largest = larger(builder.and_(builder.bitcast(delta, BITS), MAGNITUDES), largest)
                        product = larger(builder.and_(here, MAGNITUDES), product)
                    for place, bits in zip(places, (largest, product), strict=True):
                        store(builder, bits, place)
            return context.get_dummy_value()

        return types.void(*[ADDRESS] * 7), emit

    return find_largest
