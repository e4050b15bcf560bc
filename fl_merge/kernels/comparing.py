"""Comparing a model's differences from the base with two limits, and writing down what is between them."""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from fl_merge.kernels.pairs import PAIR, read_pair
from fl_merge.kernels.vectors import (
    ADDRESS,
    BITS,
    FLOAT,
    FLOATS,
    INDEX,
    MAGNITUDES,
    WIDE,
    WORD,
    add_to,
    count_lanes,
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

_FEW = 4
"""So many lanes are written at less cost than all."""


def compares_models(dtype):
    """Count the elements of one model whose difference from the base has a magnitude beyond two limits, and write down
    the magnitudes between them. Magnitudes and limits are the bits of float32.

    Args:
        dtype: of the model.

    Args of what this gives:
        bases: of float32, as `pairs_up` arranges them.
        model: the address of the first element.
        low, beyond: what is at least `low` and less than `beyond` is between them.
        size: how many elements, a multiple of GROUP; as many bytes that follow are asked for, to be read next.
        found: uint32, takes what is between, in the order of PAIRs. WIDE more places behind it are written to as well.
        listed: 1; or 0 if nothing is to be written down: then only the first WIDE places are written to.

    What this gives returns how many are at least `beyond`, and how many are between.
    """
    _, width = dtype

    @intrinsic
    def compare_models(context, bases, model, low, beyond, size, found, listed):
        def emit(context, builder, signature, arguments):
            bases, model, low, beyond, size, found, listed = arguments
            apart = everywhere(builder, builder.sub(beyond, low))
            low, beyond = everywhere(builder, low), everywhere(builder, beyond)
            above, between, end = registers(builder, [number(0), number(0), found])
            step = builder.mul(listed, number(4))
            keep = packs(context, builder)
            with groups(builder, size, PAIR) as group:
                begin = builder.mul(group.index, number(PAIR))
                start = builder.add(model, builder.mul(begin, number(width)))
                fetch(builder, builder.add(start, builder.mul(size, number(width))), PAIR * width)
                larger = []
                for half, value in enumerate(read_pair(builder, dtype, start)):
                    base = load(builder, place_of(builder, bases, begin, FLOAT, half * WIDE), FLOATS)
                    magnitudes = builder.and_(builder.bitcast(builder.fsub(value, base), BITS), MAGNITUDES)
                    larger.append(builder.icmp_unsigned(">=", magnitudes, beyond))
                    chosen = builder.icmp_unsigned("<", builder.sub(magnitudes, low), apart)
                    some = count_lanes(builder, chosen)
                    keep(magnitudes, chosen, some, builder.load(end))
                    add_to(builder, between, some, builder.add)
                    add_to(builder, end, builder.mul(some, step), builder.add)
                both = builder.shuffle_vector(*larger, ir.Constant(vector(INDEX, PAIR), list(range(PAIR))))
                more = builder.ctpop(builder.bitcast(both, ir.IntType(PAIR)))
                add_to(builder, above, builder.zext(more, WORD), builder.add)
            return context.make_tuple(builder, signature.return_type, [builder.load(above), builder.load(between)])

        limits = [types.uint32] * 2
        return types.UniTuple(types.int64, 2)(*[ADDRESS] * 2, *limits, *[ADDRESS] * 3), emit

    return compare_models


def packs(context, builder):
    """What writes the chosen lanes of a vector, of 32 bits each, to an address, one behind the other; and perhaps more
    behind them."""
    if "+avx512f" in context.codegen().magic_tuple()[2]:
        name, kind = f"llvm.experimental.vector.compress.v{WIDE}i32", [BITS, vector(ir.IntType(1)), BITS]
        compress = cgutils.get_or_insert_function(builder.module, ir.FunctionType(BITS, kind), name)

        def pack(numbers, chosen, count, address):
            packed = builder.call(compress, [numbers, chosen, ir.Constant(BITS, ir.Undefined)])
            few = ir.Constant(vector(INDEX, _FEW), list(range(_FEW)))
            store(builder, builder.shuffle_vector(packed, packed, few), address)
            with builder.if_then(builder.icmp_unsigned(">", count, number(_FEW)), likely=False):
                store(builder, packed, address)

        return pack

    # Few are chosen: one after the other.
    room = cgutils.alloca_once(builder, BITS)
    lane_of, mask = ir.IntType(WIDE), ir.IntType(1)

    def pick(numbers, chosen, count, address):
        builder.store(numbers, room)
        left, end = registers(builder, [builder.bitcast(chosen, lane_of), address])
        test, body, behind = (builder.append_basic_block() for _ in range(3))
        builder.branch(test)
        builder.position_at_end(test)
        builder.cbranch(builder.icmp_unsigned("!=", builder.load(left), lane_of(0)), body, behind)
        builder.position_at_end(body)
        lane = builder.zext(builder.cttz(builder.load(left), mask(1)), INDEX)
        first = builder.bitcast(room, INDEX.as_pointer())
        here = builder.load(end)
        builder.store(builder.load(builder.gep(first, [lane])), builder.inttoptr(here, INDEX.as_pointer()), align=4)
        builder.store(builder.add(here, number(4)), end)
        builder.store(builder.and_(builder.load(left), builder.sub(builder.load(left), lane_of(1))), left)
        builder.branch(test)
        builder.position_at_end(behind)

    return pick
