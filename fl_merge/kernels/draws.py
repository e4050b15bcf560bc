"""Rows of deltas of which elements are kept by chance: `ops.draws` and `ops.sparsify.keep_random`, in registers."""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fl_merge.kernels.vectors import (
    ADDRESS,
    BITS,
    FLOAT,
    FLOATS,
    WIDE,
    WORD,
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

_WORDS = vector(WORD, WIDE // 2)
_GAMMA, _STEPS = 0x9E3779B97F4A7C15, ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


def first_state(builder, key, pair):
    """Of the draws of 8 pairs from one on, each in its lane."""
    first = builder.add(key, builder.mul(builder.add(pair, number(1)), number(_GAMMA)))
    lanes = ir.Constant(_WORDS, [lane * _GAMMA % 2**64 for lane in range(WIDE // 2)])
    return builder.add(everywhere(builder, first, WIDE // 2), lanes)


def next_draws(builder, state_L):
    """The next 16 draws, as 8 words, from a register with their state."""
    mixed = state = builder.load(state_L)
    builder.store(builder.add(state, constant(_WORDS, WIDE // 2 * _GAMMA % 2**64)), state_L)
    for shift, times in _STEPS:
        mixed = builder.xor(mixed, builder.lshr(mixed, constant(_WORDS, shift)))
        mixed = builder.mul(mixed, constant(_WORDS, times))
    return builder.xor(mixed, builder.lshr(mixed, constant(_WORDS, 31)))


@intrinsic
def keep_drawn(context, row, key, pair, limit, factor, size):
    """Set to 0 what is not kept of a row, and multiply what is by a factor.

    Args of what this gives:
        row: of float32, with room for a whole last WIDE.
        key: of the draws; element 0 of the row is one of the pair `pair` of these, its first.
        limit: kept is what has a draw, an integer of 32 bits, that is at most this.
    """

    def emit(context, builder, signature, arguments):
        row, key, pair, limit, factor, size = arguments
        limit, factor = everywhere(builder, limit), everywhere(builder, factor)
        (state_L,) = registers(builder, [first_state(builder, key, pair)])
        with groups(builder, size, WIDE) as group:
            mixed = next_draws(builder, state_L)
            kept = builder.icmp_unsigned("<=", builder.bitcast(mixed, BITS), limit)
            place = place_of(builder, row, builder.mul(group.index, number(WIDE)), FLOAT)
            delta = builder.select(kept, load(builder, place, FLOATS), constant(FLOATS, 0.0))
            store(builder, builder.fmul(delta, factor), place)
        return context.get_dummy_value()

    return types.void(ADDRESS, types.uint64, ADDRESS, types.uint32, types.float32, ADDRESS), emit
