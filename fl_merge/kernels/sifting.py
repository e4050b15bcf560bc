"""Balances (`ops.scores.balance`) compared with two limits, few of them worked out.

A balance is 2^(s^2) tanh(c s t) times a number that all of a client's have: s is the client's delta in its unit, t the
sum of all deltas in another, c a factor of the client's. Its stand-in v = s t p costs half as much. There p =
(1 + f) 2^k, where k + f = s^2, k is whole and 0 <= f < 1: from 2^(s^2) to 6.15 % more, and a float32 whose bits are
s^2 times 2^23, and some. And tanh(x) is at most x. So a balance that reaches the lower limit has a v that reaches a
first bound, and a v beyond a second bound belongs to a balance beyond the upper limit. Only balances of elements
between the bounds, a few of a hundred, are worked out.
"""

from __future__ import annotations

import math

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from fl_merge.kernels.balances import balances_of, load_group, of_client
from fl_merge.kernels.blocks import by_dtype, compiled_part, from_bits, load_base
from fl_merge.kernels.comparing import packs
from fl_merge.kernels.pairs import PAIR
from fl_merge.kernels.scoring import in_registers
from fl_merge.kernels.series import EXP2, LIFT, LOG2_E, TANH
from fl_merge.kernels.vectors import (
    ADDRESS,
    BITS,
    FLOAT,
    FLOATS,
    GROUP,
    INDEX,
    WIDE,
    WORD,
    add_to,
    clients,
    constant,
    count_lanes,
    everywhere,
    groups,
    load,
    number,
    place_of,
    registers,
    vector,
)

_LOWER = 64
"""The stand-ins' powers of 2 are 2^64 times too small, so that those of many clients fit float32."""

_STEEPEST = 1.0615
"""(1 + f) / 2^f is at most this."""

_SLACK = 1e-4
"""More than what rounding takes balances, stand-ins and bounds from each other: of exponents up to 188 float32 has so
few digits that the powers of 2 are off by 2e-5."""

_SMALLEST, _LARGEST = 2.0**-100, 2.0**100
"""Limits and bounds are between these, so that everything near them is a normal number."""

_INFINITE = 0x7F800000
"""The bits of infinity."""

_UNIT, _TANH_1 = EXP2[0] * TANH[0] * 2.0**LIFT, math.tanh(1.0)


@compiled_part
def bounds_of(codes_N, kind, numbers_2N, rows_R, low_R, high_R, bound_2R):
    """The bounds that stand for limits, which are the bits of balances.

    Args:
        codes_N, kind, numbers_2N: as for `scoring.load_scores`.
        rows_R: of which clients.
        bound_2R: takes the bounds.

    Returns:
        Whether there are any: else all balances have to be worked out, or what is compared are none.
    """
    decay = np.float32(codes_N.size * LOG2_E)
    if in_registers(codes_N, GROUP, kind, decay) == 0:
        return False
    # What a balance is with s = 0, by its tanh; and what a balance is, by its stand-in, if tanh(x) is x.
    least = _UNIT * 2.0 ** -np.float64(decay)
    for r in range(rows_R.size):
        low, high = np.float64(from_bits(low_R[r])), np.float64(from_bits(high_R[r]))
        high = high if high_R[r] < _INFINITE else np.inf
        unit = least * 2.0**_LOWER * np.float64(numbers_2N[1, rows_R[r]]) / np.float64(numbers_2N[1, 0])
        # Where a balance is up to `high`, its tanh is up to `most`, and at least `flattest` times its argument.
        most = high / least * (1.0 + _SLACK)
        flattest = most / np.arctanh(most) if 0.0 < most < _TANH_1 else _TANH_1
        lower, upper = low / unit * (1.0 - _SLACK), high / unit * _STEEPEST / flattest * (1.0 + _SLACK)
        if not (min(low, lower) > _SMALLEST and lower < _LARGEST and (upper < _LARGEST or upper == np.inf)):
            return False
        bound_2R[0, r], bound_2R[1, r] = np.float32(lower), np.float32(upper)
    return True


def sifts_balances(dtype):
    """Count the elements whose stand-ins are beyond the upper bound, and write down the delta and the sum of all deltas
    of those whose are from the lower to the upper one.

    Args:
        dtype: of the models.

    Args of what this gives:
        bases: of float32.
        models: of addresses of models, in which the elements begin at `start`.
        rows: of numbers of clients, `chosen` of them, whose balances are wanted.
        factors: (N,) of float32: what multiplies each client's deltas.
        common: what multiplies sums of deltas, for all clients.
        bounds: (2, chosen), of float32.
        size: how many elements, a multiple of GROUP.
        scratch: of a group of each client.
        packed: of float32: of each row the deltas and then the sums, `stride` bytes further. WIDE more places are
            written to behind what is written down.
        used, above: (chosen,) of 64 bits: how many are written down, and how many are beyond; are added to.
    """

    @intrinsic
    def sift_balances(
        context,
        bases,
        models,
        start,
        count,
        rows,
        chosen,
        factors,
        common,
        bounds,
        size,
        scratch,
        packed,
        stride,
        used,
        above,
    ):
        def emit(context, builder, signature, arguments):
            bases, models, start, count, rows, chosen, factors, common = arguments[:8]
            bounds, size, scratch, packed, stride, used, above = arguments[8:]
            parts, common = range(0, GROUP, WIDE), everywhere(builder, common)
            add = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(FLOATS, [FLOATS] * 3), f"llvm.fmuladd.v{WIDE}f32"
            )
            one_step, none = constant(FLOATS, 2.0**23), constant(FLOATS, 2.0**23 * (127 - _LOWER))
            keep = packs(context, builder)

            def number_of(place, at, kind):
                return load(builder, place_of(builder, place, at, kind), kind)

            with groups(builder, size, GROUP) as group:
                begin = builder.mul(group.index, number(GROUP))
                totals = load_group(builder, dtype, bases, models, start, begin, count, scratch)
                scaled = [builder.fmul(total, common) for total in totals]
                with clients(builder, chosen) as row:
                    client = number_of(rows, row.index, WORD)
                    of_size = everywhere(builder, number_of(factors, client, FLOAT))
                    low, high = (
                        everywhere(builder, number_of(bounds, at, FLOAT))
                        for at in (row.index, builder.add(row.index, chosen))
                    )
                    deltas_here = builder.add(packed, builder.mul(builder.mul(stride, number(2)), row.index))
                    place = place_of(builder, used, row.index, WORD)
                    (end,) = registers(builder, [load(builder, place, WORD)])
                    beyond = []
                    for at, total, scaled_total in zip(parts, totals, scaled, strict=True):
                        delta = load(builder, of_client(builder, scratch, client, at), FLOATS)
                        part = builder.fmul(delta, of_size)
                        power = builder.call(add, [builder.fmul(part, part), one_step, none])
                        power = builder.bitcast(builder.fptosi(power, BITS), FLOATS)
                        found = builder.fmul(builder.fmul(part, scaled_total), power)
                        larger = builder.fcmp_ordered(">", found, high)
                        between = builder.and_(builder.fcmp_ordered(">=", found, low), builder.not_(larger))
                        some = count_lanes(builder, between)
                        here = place_of(builder, deltas_here, builder.load(end), FLOAT)
                        keep(builder.bitcast(delta, BITS), between, some, here)
                        keep(builder.bitcast(total, BITS), between, some, builder.add(here, stride))
                        add_to(builder, end, some, builder.add)
                        beyond.append(larger)
                    builder.store(builder.load(end), builder.inttoptr(place, WORD.as_pointer()))
                    more, place = _count_all(builder, beyond), place_of(builder, above, row.index, WORD)
                    more = builder.add(load(builder, place, WORD), more)
                    builder.store(more, builder.inttoptr(place, WORD.as_pointer()))
            return context.get_dummy_value()

        return types.void(*[ADDRESS] * 7, types.float32, *[ADDRESS] * 7), emit

    return sift_balances


def _count_all(builder, masks):
    """How many lanes are set in the masks of a group."""
    while len(masks) > 1:
        both = 2 * masks[0].type.count
        lanes = ir.Constant(vector(INDEX, both), list(range(both)))
        masks = [builder.shuffle_vector(*masks[at : at + 2], lanes) for at in range(0, len(masks), 2)]
    return builder.ctpop(builder.bitcast(masks[0], WORD))


_sift = by_dtype(sifts_balances)


@compiled_part
def room_to_sift(count, rows, size):
    """Scratch for `sift`: the base and a group of each client; of each row deltas and sums, and their balances."""
    room = size + WIDE if size else 0
    return (
        np.empty(size, np.float32),
        np.empty((count, GROUP), np.float32),
        np.empty((rows, 2, room), np.float32),
        np.empty((rows, room), np.float32),
    )


@compiled_part
def sift(base, base_code, clients_N, codes_N, numbers_2N, begin, rows_R, bound_2R, scratch, used_R, above_R):
    """Count the balances that are surely above limits, and work out those that may be or may be between them, of as
    many elements as `scratch` was made for.

    Args:
        scratch: of `room_to_sift`; its last part takes the balances of each row.
        used_R: takes how many of them there are: a multiple of PAIR, the last ones 0, of no element.
        above_R: is added to.
    """
    base_B, group_NG, packed_R2M, score_RM = scratch
    size, rows, count = base_B.size, rows_R.size, clients_N.size
    bases, models, chosen = base_B.ctypes.data, clients_N.ctypes.data, rows_R.ctypes.data
    numbers, common, bounds = numbers_2N.ctypes.data, numbers_2N[1, 0], bound_2R.ctypes.data
    packed, stride = packed_R2M.ctypes.data, 4 * packed_R2M.shape[2]
    found = group_NG.ctypes.data, packed, stride, used_R.ctypes.data, above_R.ctypes.data
    load_base(base, base_code, begin, base_B)
    used_R[:] = 0
    _sift(codes_N[0], bases, models, begin, count, chosen, rows, numbers, common, bounds, size, *found)
    decay = np.float32(count * LOG2_E)
    for r in range(rows):
        n, used = rows_R[r], used_R[r]
        whole = (used + PAIR - 1) // PAIR * PAIR
        packed_R2M[r, :, used:whole] = 0.0
        deltas, used_R[r] = packed + 2 * stride * r, whole
        balances_of(deltas, deltas + stride, numbers_2N[0, n], numbers_2N[1, n], decay, whole, score_RM[r].ctypes.data)
