"""Elements of models as pairs of vectors, in the order that costs least to read: of bfloat16 one load gives the even
elements and the odd ones.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fl_merge.kernels.vectors import (
    ADDRESS,
    BFLOAT16,
    BITS,
    FLOAT,
    FLOATS,
    INDEX,
    WIDE,
    WORD,
    cast,
    constant,
    groups,
    load,
    number,
    place_of,
    store,
    vector,
)

PAIR = 2 * WIDE
"""Elements that are read as two vectors, in whatever order costs least."""

_IN_ORDER = list(range(WIDE)), list(range(WIDE, PAIR))
_EVEN_AND_ODD = list(range(0, PAIR, 2)), list(range(1, PAIR, 2))


def read_pair(builder, dtype, address):
    """PAIR elements of a model, in float32: of bfloat16 the even ones, and the odd ones."""
    read, width = dtype
    if dtype is not BFLOAT16:
        places = (builder.add(address, number(width * at)) for at in (0, WIDE))
        return [cast(builder, read(builder, place, WIDE), FLOAT) for place in places]
    words = load(builder, address, BITS, align=width)
    upper = builder.and_(words, constant(BITS, 0xFFFF0000))
    return [builder.bitcast(bits, FLOATS) for bits in (builder.shl(words, constant(BITS, 16)), upper)]


def as_pair(builder, dtype, address):
    """PAIR numbers of an array of float32, in the order of `read_pair`."""
    two = [load(builder, address, FLOATS), load(builder, builder.add(address, number(4 * WIDE)), FLOATS)]
    return [_shuffled(builder, *two, lanes) for lanes in _EVEN_AND_ODD] if dtype is BFLOAT16 else two


def store_pair(builder, dtype, values, address):
    """Write what is in the order of `read_pair` to an array of float32."""
    for at, lanes in enumerate(_IN_ORDER):
        if dtype is BFLOAT16:
            lanes = [WIDE * (lane % 2) + lane // 2 for lane in lanes]
        store(builder, _shuffled(builder, *values, lanes), builder.add(address, number(4 * WIDE * at)))


def bits_of_pair(builder, dtype, masks):
    """The lanes of two masks, in the order of `read_pair`, as the bits of one word, the first element lowest."""
    first, second = (builder.zext(builder.bitcast(lanes, ir.IntType(WIDE)), WORD) for lanes in masks)
    if dtype is not BFLOAT16:
        return builder.or_(first, builder.shl(second, number(WIDE)))

    def spread(bits):
        for shift, kept in ((8, 0x00FF00FF), (4, 0x0F0F0F0F), (2, 0x33333333), (1, 0x55555555)):
            bits = builder.and_(builder.or_(bits, builder.shl(bits, number(shift))), number(kept))
        return bits

    return builder.or_(spread(first), builder.shl(spread(second), number(1)))


def _shuffled(builder, one, two, lanes):
    return builder.shuffle_vector(one, two, ir.Constant(vector(INDEX), lanes))


def pairs_up(dtype):
    """Arrange an array of float32 as `read_pair` reads models of a dtype.

    Args of what this gives:
        size: how many elements, a multiple of PAIR.
    """

    @intrinsic
    def pair_up(context, numbers, size):
        def emit(context, builder, signature, arguments):
            numbers, size = arguments
            if dtype is BFLOAT16:
                with groups(builder, size, PAIR) as group:
                    here = place_of(builder, numbers, builder.mul(group.index, number(PAIR)), FLOAT)
                    for half, values in enumerate(as_pair(builder, dtype, here)):
                        store(builder, values, builder.add(here, number(4 * WIDE * half)))
            return context.get_dummy_value()

        return types.void(*[ADDRESS] * 2), emit

    return pair_up
