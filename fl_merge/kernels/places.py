"""Parts of `ranking` that count, draw, look up and keep.

Counts and look-ups go element by element, the rest in vectors: a core has different units for them, so both are in one
loop, where neither waits for the other.
"""

from __future__ import annotations

import functools

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from fl_merge.kernels import vectors
from fl_merge.kernels.draws import first_state, next_draws
from fl_merge.kernels.vectors import (
    ADDRESS,
    BITS,
    FLOAT,
    FLOATS,
    INDEX,
    WIDE,
    WORD,
    constant,
    everywhere,
    number,
    place_of,
    registers,
    store,
)

DROPPED_BITS, CLASSES, LEAST_CHANCE = 18, 1024, 2.0**-32
"""As in `ops.sparsify`, which says what they are."""

LANES = 2
"""How many counts there are of each class, so that equal neighbours do not wait for each other."""

STRIDE = CLASSES + WIDE
"""From one count of a class to the next: other lines of the cache."""

_SHORT, _LANES = ir.IntType(16), ir.IntType(WIDE)
_ZERO, _ONE = constant(FLOATS, 0.0), constant(FLOATS, 1.0)
_SHORTS = vectors.vector(_SHORT)
_DRAWS, _MOST = constant(FLOATS, 2.0**32), constant(FLOATS, 2.0**32 - 256)


def _classes_of(builder, classes, index):
    """The classes of 16 elements, one after the other. They are read by fours: loads are what there are most of."""
    for four in range(0, WIDE, 4):
        word = vectors.load(builder, place_of(builder, classes, index, _SHORT, four), WORD, align=2)
        for place in range(4):
            yield builder.and_(builder.lshr(word, number(16 * place)), number(0xFFFF))


def _largest_short(builder, numbers):
    """The largest of the lanes of a vector of unsigned numbers of 16 bits, as one of 64."""
    name, kind = f"llvm.vector.reduce.umax.v{WIDE}i16", ir.FunctionType(_SHORT, [_SHORTS])
    return builder.zext(builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [numbers]), WORD)


def _larger(builder, one, other):
    return builder.select(builder.icmp_unsigned(">", one, other), one, other)


@intrinsic
def write_steps(context, deltas, groups, classes):
    """Write the bits of the magnitudes of so many groups of 16 elements, without the DROPPED_BITS, and give the largest
    of them."""

    def emit(context, builder, signature, arguments):
        deltas, groups, classes = arguments
        (largest,) = registers(builder, [constant(_SHORTS, 0)])
        with vectors.clients(builder, groups) as group:
            begin = builder.mul(group.index, number(WIDE))
            bits = vectors.load(builder, place_of(builder, deltas, begin, FLOAT), BITS)
            upper = builder.trunc(builder.lshr(bits, constant(BITS, 16)), _SHORTS)
            # Without the sign, which is the highest.
            steps = builder.lshr(builder.shl(upper, constant(_SHORTS, 1)), constant(_SHORTS, DROPPED_BITS - 16 + 1))
            store(builder, steps, place_of(builder, classes, begin, _SHORT))
            builder.store(_larger(builder, steps, builder.load(largest)), largest)
        return _largest_short(builder, builder.load(largest))

    return types.int64(*[ADDRESS] * 3), emit


@intrinsic
def classify_steps(context, classes, groups, first):
    """What `write_steps` has written becomes classes, given the largest of it; gives the last class but the very last
    that an element is in."""

    def emit(context, builder, signature, arguments):
        classes, groups, first = arguments
        first = everywhere(builder, builder.trunc(first, _SHORT))
        none, least = constant(_SHORTS, 0), constant(_SHORTS, CLASSES - 1)
        (last,) = registers(builder, [none])
        with vectors.clients(builder, groups) as group:
            place = place_of(builder, classes, builder.mul(group.index, number(WIDE)), _SHORT)
            below = builder.sub(first, vectors.load(builder, place, _SHORTS))
            known = builder.icmp_unsigned("<", below, least)
            store(builder, builder.select(known, below, least), place)
            builder.store(_larger(builder, builder.select(known, below, none), builder.load(last)), last)
        return _largest_short(builder, builder.load(last))

    return types.int64(*[ADDRESS] * 3), emit


@intrinsic
def count_and_draw(context, classes, groups, counts, key, pair, draws):
    """Count the classes of so many groups of 16 elements, and write as many draws.

    Args:
        counts: of uint32, LANES counts of each class, STRIDE apart.
        key, pair: of the draws, and which pair of them is the first.
    """

    def emit(context, builder, signature, arguments):
        classes, groups, counts, key, pair, draws = arguments
        (state_L,) = registers(builder, [first_state(builder, key, pair)])
        with vectors.clients(builder, groups) as group:
            begin = builder.mul(group.index, number(WIDE))
            for lane, found in enumerate(_classes_of(builder, classes, begin)):
                index = builder.add(found, number(lane % LANES * STRIDE))
                place = builder.inttoptr(place_of(builder, counts, index, INDEX), INDEX.as_pointer())
                builder.store(builder.add(builder.load(place, align=4), ir.Constant(INDEX, 1)), place, align=4)
            word = builder.mul(group.index, number(WIDE // 2))
            store(builder, next_draws(builder, state_L), place_of(builder, draws, word, WORD))
        return context.get_dummy_value()

    return types.void(ADDRESS, ADDRESS, ADDRESS, types.uint64, ADDRESS, ADDRESS), emit


@intrinsic
def chances_of_classes(context, counts, size, highest, step, own_chance, chances):
    """The chance of each of the first `size` classes, given how many elements are in each; the counts become 0.

    Args of what this gives:
        own_chance: whether what is kept is divided by its chance.
        chances: takes two words of 32 bits for each class: the largest draw of what is kept, and, of float32, what that
            is multiplied by.
    """

    def emit(context, builder, signature, arguments):
        counts, size, highest, step, own_chance, chances = arguments
        ceil = builder.module.declare_intrinsic(f"llvm.ceil.v{WIDE}f32", (), ir.FunctionType(FLOATS, [FLOATS]))
        none, least = constant(BITS, 0), constant(FLOATS, LEAST_CHANCE)
        highest, step = everywhere(builder, highest), everywhere(builder, step)
        (before,) = registers(builder, [none])
        with vectors.groups(builder, size, WIDE) as group:
            begin = builder.mul(group.index, number(WIDE))
            places = [place_of(builder, counts, begin, INDEX, lane * STRIDE) for lane in range(LANES)]
            count = functools.reduce(builder.add, [vectors.load(builder, place, BITS) for place in places])
            some = builder.bitcast(builder.icmp_unsigned("!=", count, none), _LANES)
            # Of classes that no element is in nothing is looked up.
            with builder.if_then(builder.icmp_unsigned("!=", some, ir.Constant(_LANES, 0))):
                for place in places:
                    store(builder, none, place)
                upto = count
                for by in (1, 2, 4, 8):
                    moved = ir.Constant(BITS, [WIDE if lane < by else lane - by for lane in range(WIDE)])
                    upto = builder.add(upto, builder.shuffle_vector(upto, none, moved))
                upto = builder.add(upto, builder.load(before))
                builder.store(builder.shuffle_vector(upto, none, constant(BITS, WIDE - 1)), before)
                twice = builder.sub(builder.sub(builder.add(upto, upto), count), constant(BITS, 1))
                chance = builder.fsub(highest, builder.fmul(builder.uitofp(twice, FLOATS), step))
                chance = builder.select(builder.fcmp_ordered(">", chance, least), chance, least)
                limit = builder.fmul(chance, _DRAWS)
                limit = builder.call(ceil, [builder.select(builder.fcmp_ordered("<", limit, _MOST), limit, _MOST)])
                limit = builder.sub(builder.fptoui(limit, BITS), constant(BITS, 1))
                limit = builder.select(builder.fcmp_ordered(">=", chance, _ONE), constant(BITS, -1), limit)
                factor = builder.select(own_chance, builder.fdiv(_ONE, chance), _ONE)
                both = limit, builder.bitcast(factor, BITS)
                for half in (0, 1):
                    lanes = [WIDE * (lane % 2) + (WIDE * half + lane) // 2 for lane in range(WIDE)]
                    found = builder.shuffle_vector(*both, ir.Constant(BITS, lanes))
                    store(builder, found, place_of(builder, chances, begin, WORD, half * WIDE // 2))
        return context.get_dummy_value()

    return types.void(ADDRESS, ADDRESS, types.float32, types.float32, types.boolean, ADDRESS), emit


@intrinsic
def look_up_and_keep(context, classes, chances, groups, words, deltas, divisor, kept):
    """Of so many groups of 16 elements: keep by the chance of each element's class, and divide what is kept.

    Args:
        chances: as `chances_of_classes` has them.
        words: of uint32: the draws.
    """

    def emit(context, builder, signature, arguments):
        classes, chances, groups, words, deltas, divisor, kept = arguments
        divides = builder.fcmp_ordered("!=", divisor, ir.Constant(FLOAT, 1.0))
        divisor = everywhere(builder, divisor)
        eight = vectors.vector(WORD, WIDE // 2)
        with vectors.clients(builder, groups) as group:
            begin = builder.mul(group.index, number(WIDE))
            halves = [ir.Constant(eight, ir.Undefined)] * 2
            for lane, found in enumerate(_classes_of(builder, classes, begin)):
                word = vectors.load(builder, place_of(builder, chances, found, WORD), WORD)
                half, at = divmod(lane, WIDE // 2)
                halves[half] = builder.insert_element(halves[half], word, ir.Constant(INDEX, at))
            halves = [builder.bitcast(half, BITS) for half in halves]
            limit, factor = (
                builder.shuffle_vector(*halves, ir.Constant(BITS, list(range(first, 2 * WIDE, 2)))) for first in (0, 1)
            )
            word = vectors.load(builder, place_of(builder, words, begin, INDEX), BITS)
            below = builder.icmp_unsigned("<=", word, limit)
            delta = vectors.load(builder, place_of(builder, deltas, begin, FLOAT), FLOATS)
            found = builder.fmul(builder.select(below, delta, _ZERO), builder.bitcast(factor, FLOATS))
            place = place_of(builder, kept, begin, FLOAT)
            with builder.if_else(divides) as (over, alone):
                with over:
                    store(builder, builder.fdiv(found, divisor), place)
                with alone:
                    store(builder, found, place)
        return context.get_dummy_value()

    return types.void(*[ADDRESS] * 5, types.float32, ADDRESS), emit
