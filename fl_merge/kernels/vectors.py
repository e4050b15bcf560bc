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

_FEW = 4
"""So many lanes are written at less cost than all."""

_SECOND_CACHE = 2
"""LLVM's number for it."""

_LINE = 64
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
            keep = _packs(context, builder)
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


def fetch(builder, address, size):
    """Ask for so many bytes that are read later, into the second cache. They need not exist."""
    name, kind = "llvm.prefetch.p0", ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, INDEX, INDEX, INDEX])
    prefetch = cgutils.get_or_insert_function(builder.module, kind, name)
    for at in range(0, size, _LINE):
        place = builder.inttoptr(builder.add(address, number(at)), cgutils.voidptr_t)
        builder.call(prefetch, [place, INDEX(0), INDEX(_SECOND_CACHE), INDEX(1)])


def count_lanes(builder, lanes):
    """How many lanes are set."""
    return builder.zext(builder.ctpop(builder.bitcast(lanes, ir.IntType(WIDE))), WORD)


def largest_lane(builder, numbers):
    """The largest of the lanes of a vector of unsigned numbers of 32 bits."""
    name, kind = f"llvm.vector.reduce.umax.v{WIDE}i32", ir.FunctionType(INDEX, [BITS])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [numbers])


def _packs(context, builder):
    """What writes the chosen lanes of a vector to an address, one behind the other; and perhaps more behind them."""
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
