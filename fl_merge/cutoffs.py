"""Where to cut so that a given number of elements of largest magnitude stay, found by counting and not by sorting.

The definition is `ops.sparsify.largest_cutoff` on the whole delta. Here the delta is never there as a whole: a sample
says between which two magnitudes the cut must be, one pass counts the elements above and writes down the few between,
and among these the cut is selected exactly. Where the sample was misleading, histograms of the bits take its place.

Magnitudes are compared as the bits of float32, which have their order. Suffix: N clients.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fl_merge.kernels.passes import Array
from fl_merge.kernels.rows import BINS, Counted, Rows

LARGEST = 0x7FFFFFFF
"""No magnitude has larger bits."""

_RUN = 64
"""Neighbouring elements that are sampled together."""

_EVERYTHING = 1 << 15
"""Of fewer elements no sample is taken."""

_ROOM = 1 << 24
"""How many magnitudes are written down at most, of all clients together: 64 MiB."""

_DEVIATIONS = 3.0
"""How far around the sample's quantile the cut is looked for, in its standard deviations."""

Mapped = Callable[..., Iterable[Any]]


@dataclass(frozen=True)
class Part:
    """A tensor within the scope of the cut: its rows, and the place of its first element."""

    rows: Rows
    offset: int


@dataclass(frozen=True)
class _Piece:
    part: Part
    start: int
    stop: int


@dataclass(frozen=True)
class _Cut:
    """Where a row is cut: the bits, and how many elements just on it stay."""

    bits: int
    wanted: int


Count = int | Callable[[int], int]
"""How many elements of a row stay; or that from how many of its magnitudes are above 0."""


def largest_cutoffs(parts: Sequence[Part], wanted: Sequence[tuple[int, Count]], mapped: Mapped, piece: int) -> Tensor:
    """Cuts of rows of scores: clients' deltas, say.

    Args:
        parts: in the order of their places; at least one element.
        wanted: of which row a cut is to be found, and how many elements stay, 0 to all.
        mapped: like `map`, perhaps in several threads.
        piece: elements that one call goes through.

    Returns:
        (len(wanted), 2), float64: the smallest magnitude that stays, and the place of the last element that has it and
        stays; (inf, -1) where none stays.
    """
    total = sum(part.rows.numel for part in parts)
    counts = [count for _, count in wanted]
    cutoffs_N2 = torch.empty(len(wanted), 2, dtype=torch.float64)
    left = [place for place, count in enumerate(counts) if callable(count) or 0 < count < total]
    pieces = [
        _Piece(part, start, min(start + piece, part.rows.numel))
        for part in parts
        for start in range(0, part.rows.numel, piece)
    ]
    low_N, high_N = np.zeros(len(wanted), np.uint32), np.full(len(wanted), LARGEST, np.uint32)
    if left and total > _EVERYTHING:
        low_N[left], high_N[left] = _guess(parts, [wanted[at] for at in left], total, mapped)
    while left:
        room = _ROOM // (len(left) * len(pieces))
        # How many are above 0 is counted in the same pass.
        unknown = [at for at in left if callable(counts[at])]
        rows, zeros = [wanted[at][0] for at in (*left, *unknown)], np.zeros(len(unknown), np.uint32)
        low_R, high_R = (np.concatenate([limit_N[left], zeros]) for limit_N in (low_N, high_N))
        found = list(mapped(functools.partial(_counted, rows, low_R, high_R, room), pieces))
        for place, at in enumerate(unknown, start=len(left)):
            of_positive = counts[at]
            assert callable(of_positive)
            counts[at] = of_positive(sum(counted[place].above for counted in found))
        chosen = functools.partial(_chosen, wanted, counts, pieces, low_N, found)
        within = [(place, at) for place, at in enumerate(left) if 0 < _known(counts[at]) < total]
        misled = []
        for (_, at), cut in zip(within, mapped(chosen, within), strict=True):
            if cut is None:
                low_N[at] = high_N[at] = _by_histograms(wanted[at][0], _known(counts[at]), pieces, mapped)
                misled.append(at)
            else:
                cutoffs_N2[at] = torch.tensor(cut, dtype=torch.float64)
        left = misled
    for at, count in enumerate(counts):
        if count in (0, total):
            cutoffs_N2[at] = torch.tensor([0.0, total - 1.0] if count else [math.inf, -1.0])
    return cutoffs_N2


def _known(count: Count) -> int:
    assert isinstance(count, int)
    return count


def _chosen(
    wanted: Sequence[tuple[int, Count]],
    counts: Sequence[Count],
    pieces: Sequence[_Piece],
    low_N: Array,
    found: Sequence[Sequence[Counted]],
    which: tuple[int, int],
) -> tuple[float, int] | None:
    """The cut of one row, if it is between its limits.

    Args:
        found: what was counted of each piece.
        which: the row's place in what was counted, and in what is wanted.
    """
    place, at = which
    counted, row = [each[place] for each in found], wanted[at][0]
    cut = _found(int(low_N[at]), _known(counts[at]), counted, pieces[0].part.rows)
    if cut is None:
        return None
    return float(np.uint32(cut.bits).view(np.float32)), _last(row, cut, pieces, counted)


def _counted(rows: list[int], low_R: Array, high_R: Array, room: int, at: _Piece) -> list[Counted]:
    return at.part.rows.some(rows).between(at.start, at.stop, low_R, high_R, room)


def _guess(
    parts: Sequence[Part], wanted: Sequence[tuple[int, Count]], total: int, mapped: Mapped
) -> tuple[Array, Array]:
    """Between which bits each cut should be, by a sample; (N,) and (N,), uint32."""
    size_wanted = min(max(total // 64, 1 << 12), 1 << 18)
    rows = sorted({row for row, _ in wanted})

    def sampled(part: Part) -> Array:
        runs = min(math.ceil(size_wanted * part.rows.numel / total / _RUN), part.rows.numel // _RUN)
        starts = np.linspace(0, part.rows.numel - _RUN, runs).astype(np.int64)
        return part.rows.some(rows).sample(starts, _RUN)

    long_enough = [part for part in parts if part.rows.numel >= _RUN]
    if not long_enough:
        return np.zeros(len(wanted), np.uint32), np.full(len(wanted), LARGEST, np.uint32)
    bits_NM = np.concatenate(list(mapped(sampled, long_enough)), axis=1)
    size = bits_NM.shape[1]

    def limits(of: tuple[int, Count]) -> tuple[int, int]:
        row, count = of
        bits_M = bits_NM[rows.index(row)]
        if callable(count):
            count = count(round(np.count_nonzero(bits_M) / size * total))
        fraction = count / total
        margin = _DEVIATIONS * math.sqrt(size * fraction * (1 - fraction)) + 1
        upper, lower = math.floor(size * fraction - margin), math.ceil(size * fraction + margin)
        select = parts[0].rows.select
        low = select(bits_M.copy(), lower)[0] if 1 <= lower <= size else 0
        return low, select(bits_M.copy(), upper)[0] if upper >= 1 else LARGEST

    low_high_N2 = np.array(list(mapped(limits, wanted)), np.uint32).reshape(-1, 2)
    return low_high_N2[:, 0], low_high_N2[:, 1]


def _found(low: int, count: int, counted: Sequence[Counted], rows: Rows) -> _Cut | None:
    """The cut, if it is between the limits.

    Args:
        low: the lower limit.
        counted: of each piece.
        rows: any; they have the pass that selects.
    """
    above, between = sum(each.above for each in counted), sum(each.between for each in counted)
    if not all(each.complete for each in counted) or not above < count <= above + between:
        return None
    values_M = np.concatenate([each.between_M for each in counted])
    if not values_M.size:
        return _Cut(low, count - above)
    bits, larger = rows.select(values_M, count - above)
    return _Cut(bits, count - above - larger)


def _by_histograms(row: int, count: int, pieces: Sequence[_Piece], mapped: Mapped) -> int:
    """The bits of one row's cut."""
    low, high, rank = 0, LARGEST, count
    while True:
        shift = max(0, (high - low).bit_length() - (BINS.bit_length() - 1))
        limits = low, high, shift
        counts_K = np.zeros(BINS, np.int64)
        for here_K in mapped(functools.partial(_count, row, limits), pieces):
            counts_K += here_K
        larger_K = np.cumsum(counts_K[::-1])
        chosen = BINS - 1 - int(np.searchsorted(larger_K, rank))
        rank -= int(larger_K[BINS - 1 - chosen] - counts_K[chosen])
        low, high = low + (chosen << shift), min(high, low + ((chosen + 1) << shift) - 1)
        if shift == 0:
            return low


def _count(row: int, limits: tuple[int, int, int], at: _Piece) -> Array:
    return at.part.rows.count(row, at.start, at.stop, *limits)


def _last(row: int, cut: _Cut, pieces: Sequence[_Piece], counted: Sequence[Counted]) -> int:
    """The place of the last element just on the cut that stays: of those the first `cut.wanted` do."""
    wanted = cut.wanted
    for at, each in zip(pieces, counted, strict=True):
        listed = each.between_M.size > 0
        equal_M = np.flatnonzero(each.between_M == cut.bits)
        here = len(equal_M) if listed else each.between
        if wanted > here:
            wanted -= here
            continue
        # Which one of those between the limits it is, tells the block in which it is; that is searched.
        rank = equal_M[wanted - 1] if listed else wanted - 1
        block = int(np.searchsorted(each.marks, rank, side="right")) - 1
        before = int(np.searchsorted(equal_M, each.marks[block])) if listed else int(each.marks[block])
        start = int(each.starts[block])
        stop = int(each.starts[block + 1]) if block + 1 < len(each.starts) else at.stop
        return at.part.offset + at.part.rows.nth_equal(row, start, stop, cut.bits, wanted - before)
    raise AssertionError("fewer elements than were counted")
