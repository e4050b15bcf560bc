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

_SECOND_CACHE = 2
"""LLVM's number for it."""

LINE = 64
"""Bytes that caches take together."""

AHEAD = 1024
"""So many bytes before they are read, the next ones of each model are asked for: by itself a processor notices too late
where it goes on in so many places."""

WIDE = 16
"""Lanes of a vector of float32; of float64 there are half as many."""

WORD, INDEX = ir.IntType(64), ir.IntType(32)
FLOAT, DOUBLE = ir.FloatType(), ir.DoubleType()
_BYTES = {FLOAT: 4, DOUBLE: 8, WORD: 8, INDEX: 4, ir.HalfType(): 2, ir.IntType(16): 2}
ADDRESS = types.int64


def number(value):
    """A constant of 64 bits."""
    return ir.Constant(WORD, value)


def vector(of, lanes=WIDE):
    """The type of a vector."""
    return ir.VectorType(of, lanes)


def constant(kind, value):
    """A constant in every lane."""
    return ir.Constant(kind, [value] * kind.count)


FLOATS, BITS = vector(FLOAT), vector(INDEX)
MAGNITUDES = constant(BITS, 0x7FFFFFFF)


def place_of(builder, address, index, of, more=0):
    """The address of an element of an array, some elements further."""
    index = index if isinstance(index, ir.Value) else number(index)
    return builder.add(builder.add(address, builder.mul(index, number(_BYTES[of]))), number(more * _BYTES[of]))


def load(builder, address, kind, align=None):
    """A number or a vector, aligned as its elements are or as is said."""
    of = kind.element if isinstance(kind, ir.VectorType) else kind
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=align or _BYTES[of])


def store(builder, value, address):
    """Write a vector, aligned as its elements are."""
    of = value.type.element
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=_BYTES[of])


def store_word(builder, value, address):
    """Write a number of 64 bits."""
    builder.store(value, builder.inttoptr(address, WORD.as_pointer()), align=8)


def everywhere(builder, value, lanes=WIDE):
    """One number in every lane."""
    nothing = ir.Constant(vector(value.type, lanes), ir.Undefined)
    first = builder.insert_element(nothing, value, ir.Constant(INDEX, 0))
    return builder.shuffle_vector(first, nothing, constant(vector(INDEX, lanes), 0))


def registers(builder, values):
    """Places that LLVM turns into registers."""
    return [cgutils.alloca_once_value(builder, value) for value in values]


def add_to(builder, place, value, add=None):
    """Add (or whatever `add` does) to what a register holds."""
    builder.store((add or builder.fadd)(builder.load(place), value), place)


def groups(builder, size, group):
    """Loop over the groups of so many elements; the last may be less than whole."""
    return cgutils.for_range(builder, builder.udiv(builder.add(size, number(group - 1)), number(group)), intp=WORD)


def clients(builder, count):
    """Loop over the clients."""
    return cgutils.for_range(builder, count, intp=WORD)


def cast(builder, values, of):
    """Floating-point numbers of another width."""
    wanted, had = vector(of, values.type.count), values.type.element
    if had == of:
        return values
    return builder.fptrunc(values, wanted) if _BYTES[had] > _BYTES[of] else builder.fpext(values, wanted)


# --- models in any dtype ---------------------------------------------------------------------------------------------


def _of(kind):
    """Reads vectors of one dtype, and gives them in its own, or float32 for bfloat16."""

    def read(builder, address, lanes):
        return load(builder, address, vector(kind, lanes))

    return read


def _bfloat16(builder, address, lanes):
    bits = builder.zext(load(builder, address, vector(ir.IntType(16), lanes)), vector(INDEX, lanes))
    return builder.bitcast(builder.shl(bits, constant(vector(INDEX, lanes), 16)), vector(FLOAT, lanes))


FLOAT32, FLOAT64, BFLOAT16, FLOAT16 = (_of(FLOAT), 4), (_of(DOUBLE), 8), (_bfloat16, 2), (_of(ir.HalfType()), 2)
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
    lanes = WIDE // 2

    @intrinsic
    def add_models(context, bases, models, start, count, scaling, coefficients, size, sums):
        def emit(context, builder, signature, arguments):
            bases, models, start, count, scaling, coefficients, size, sums = arguments
            parts = range(0, DOUBLES, lanes)
            scaling = everywhere(builder, scaling, lanes)
            with groups(builder, size, DOUBLES) as group:
                begin = builder.mul(group.index, number(DOUBLES))
                base = [load(builder, place_of(builder, bases, begin, DOUBLE, at), scaling.type) for at in parts]
                kept = registers(builder, [builder.fmul(each, scaling) for each in base])
                offset = builder.mul(builder.add(start, begin), number(width))
                with clients(builder, count) as client:
                    coefficient = load(builder, place_of(builder, coefficients, client.index, DOUBLE), DOUBLE)
                    coefficient = everywhere(builder, coefficient, lanes)
                    model = builder.add(load(builder, place_of(builder, models, client.index, WORD), WORD), offset)
                    fetch(builder, builder.add(model, number(AHEAD)), DOUBLES * width)
                    for at, each, sum_L in zip(parts, base, kept, strict=True):
                        value = cast(builder, read(builder, builder.add(model, number(width * at)), lanes), DOUBLE)
                        add_to(builder, sum_L, builder.fmul(builder.fsub(value, each), coefficient))
                for at, sum_L in zip(parts, kept, strict=True):
                    rounded = cast(builder, builder.load(sum_L), FLOAT)
                    store(builder, rounded, place_of(builder, sums, begin, FLOAT, at))
            return context.get_dummy_value()

        return types.void(*[ADDRESS] * 4, types.float64, *[ADDRESS] * 3), emit

    return add_models


def loads_models(dtype, *, deltas=True, ahead=None):
    """rows[n, s] = models[n][s] - bases[s], in float32.

    Args:
        dtype: of the models.
        deltas: if false, the models themselves.
        ahead: so many elements before they are read the next ones are asked for; by default, AHEAD bytes.

    Args of what this gives:
        bases: of float32.
        models: of addresses of models, in which the elements begin at `start`.
        size: how many elements, a multiple of GROUP.
    """
    read, width = dtype

    @intrinsic
    def load_models(context, bases, models, start, count, size, rows, stride):
        def emit(context, builder, signature, arguments):
            bases, models, start, count, size, rows, stride = arguments
            parts = range(0, GROUP, WIDE)
            with groups(builder, size, GROUP) as group:
                begin = builder.mul(group.index, number(GROUP))
                base = [load(builder, place_of(builder, bases, begin, FLOAT, at), FLOATS) for at in parts]
                offset = builder.mul(builder.add(start, begin), number(width))
                with clients(builder, count) as client:
                    model = builder.add(load(builder, place_of(builder, models, client.index, WORD), WORD), offset)
                    fetch(builder, builder.add(model, number(AHEAD if ahead is None else ahead * width)), GROUP * width)
                    row = builder.add(rows, builder.mul(stride, client.index))
                    for at, each in zip(parts, base, strict=True):
                        value = cast(builder, read(builder, builder.add(model, number(width * at)), WIDE), FLOAT)
                        value = builder.fsub(value, each) if deltas else value
                        store(builder, value, place_of(builder, row, begin, FLOAT, at))
            return context.get_dummy_value()

        return types.void(*[ADDRESS] * 7), emit

    return load_models


def fetch(builder, address, size):
    """Ask for so many bytes that are read later, into the second cache. They need not exist."""
    name, kind = "llvm.prefetch.p0", ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, INDEX, INDEX, INDEX])
    prefetch = cgutils.get_or_insert_function(builder.module, kind, name)
    for at in range(0, size, LINE):
        place = builder.inttoptr(builder.add(address, number(at)), cgutils.voidptr_t)
        builder.call(prefetch, [place, INDEX(0), INDEX(_SECOND_CACHE), INDEX(1)])


def count_lanes(builder, lanes):
    """How many lanes are set."""
    return builder.zext(builder.ctpop(builder.bitcast(lanes, ir.IntType(WIDE))), WORD)


def largest_lane(builder, numbers):
    """The largest of the lanes of a vector of unsigned numbers of 32 bits."""
    name, kind = f"llvm.vector.reduce.umax.v{WIDE}i32", ir.FunctionType(INDEX, [BITS])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [numbers])
