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

_DEVIATIONS = 4.0
"""How far around the sample's quantile the cut is looked for, in its standard deviations. With three, one row in 400 is
not found there, and goes through histograms."""

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
    within = 1.0
    if left and total > _EVERYTHING:
        low_N[left], high_N[left], within = _guess(parts, [wanted[at] for at in left], total, mapped)
    while left:
        room = _ROOM // (len(left) * len(pieces))
        # How many are above 0 is counted in the same pass.
        unknown = [at for at in left if callable(counts[at])]
        rows, zeros = [wanted[at][0] for at in (*left, *unknown)], np.zeros(len(unknown), np.uint32)
        low_R, high_R = (np.concatenate([limit_N[left], zeros]) for limit_N in (low_N, high_N))
        found = list(mapped(functools.partial(_counted, rows, low_R, high_R, room, within), pieces))
        counted = _joined(found)
        for place, at in enumerate(unknown, start=len(left)):
            of_positive = counts[at]
            assert callable(of_positive)
            counts[at] = of_positive(int(counted.above_R[place]))
        count_R = np.array([counts[at] for at in left], np.int64)
        blocks_P = np.cumsum([len(each.starts_X) for each in found])
        cut_R, place_R = _found(rows[: len(left)], count_R, low_R, high_R, pieces, blocks_P, counted)
        misled = []
        for at, row, count, cut, place in zip(left, rows, count_R.tolist(), cut_R, place_R, strict=False):
            if place >= 0:
                cutoffs_N2[at, 0], cutoffs_N2[at, 1] = float(cut), int(place)
            elif 0 < count < total:
                low_N[at] = high_N[at] = _by_histograms(row, count, pieces, mapped)
                misled.append(at)
        left = misled
    for at, stay in enumerate(counts):
        if stay in (0, total):
            cutoffs_N2[at] = torch.tensor([0.0, total - 1.0] if stay else [math.inf, -1.0])
    return cutoffs_N2


def _counted(rows: list[int], low_R: Array, high_R: Array, room: int, within: float, at: _Piece) -> Counted:
    expected = math.ceil(2 * within * (at.stop - at.start))
    return at.part.rows.some(rows).between(at.start, at.stop, low_R, high_R, room, expected)


def _joined(found: Sequence[Counted]) -> Counted:
    """What was counted of all pieces, in their order."""
    if len(found) == 1:
        return found[0]
    before_PR = np.cumsum([0 * found[0].between_R, *(each.between_R for each in found)], axis=0)
    complete_R = np.logical_and.reduce([each.complete_R for each in found])
    used_R = np.sum([each.used_R for each in found], axis=0) * complete_R
    found_RM = np.empty((len(used_R), int(used_R.max(initial=0))), np.uint32)
    for row in np.flatnonzero(used_R):
        np.concatenate([each.found_RM[row, : each.used_R[row]] for each in found], out=found_RM[row, : used_R[row]])
    return Counted(
        np.sum([each.above_R for each in found], axis=0),
        before_PR[-1],
        used_R,
        found_RM,
        np.concatenate([each.starts_X for each in found]),
        np.concatenate([each.stops_X for each in found]),
        np.concatenate([each.marks_RX + before_PR[at][:, None] for at, each in enumerate(found)], axis=1),
        complete_R,
    )


def _found(
    rows: Sequence[int],
    counts_R: Array,
    low_R: Array,
    high_R: Array,
    pieces: Sequence[_Piece],
    blocks_P: Array,
    counted: Counted,
) -> tuple[Array, Array]:
    """The cuts of rows of which all elements have been counted.

    Args:
        blocks_P: how many blocks there are up to each piece's end.

    Returns:
        (R,) and (R,): the smallest magnitude that stays, and the place of the last element that has it and stays; -1
        where the cut is not between the limits.
    """
    bits_R, block_R, nth_R = pieces[0].part.rows.find_cuts(counts_R, low_R, high_R, counted)
    place_R, piece_R = np.full(len(rows), -1, np.int64), np.searchsorted(blocks_P, block_R, side="right")
    piece_R[block_R < 0] = -1
    for piece in map(int, np.unique(piece_R[block_R >= 0])):
        here, at = np.flatnonzero(piece_R == piece), pieces[piece]
        blocks = block_R[here]
        some = at.part.rows.some([rows[row] for row in here.tolist()])
        limits = counted.starts_X[blocks], counted.stops_X[blocks]
        place_R[here] = at.part.offset + some.nth_equals(*limits, bits_R[here], nth_R[here])
    return bits_R.view(np.float32), place_R


def _guess(
    parts: Sequence[Part], wanted: Sequence[tuple[int, Count]], total: int, mapped: Mapped
) -> tuple[Array, Array, float]:
    """Between which bits each cut should be, by a sample.

    Returns:
        (N,) and (N,), uint32; and the largest fraction of a row's elements that should be between them.
    """
    size_wanted = min(max(total // 64, 1 << 12), 1 << 18)
    rows = sorted({row for row, _ in wanted})

    def sampled(part: Part) -> Array:
        runs = min(math.ceil(size_wanted * part.rows.numel / total / _RUN), part.rows.numel // _RUN)
        starts = np.linspace(0, part.rows.numel - _RUN, runs).astype(np.int64)
        return part.rows.some(rows).sample(starts, _RUN)

    long_enough = [part for part in parts if part.rows.numel >= _RUN]
    low_high_2N = np.zeros((2, len(wanted)), np.uint32)
    low_high_2N[1] = LARGEST
    if not long_enough:
        return *low_high_2N, 1.0
    samples = list(mapped(sampled, long_enough))
    bits_RM = samples[0] if len(samples) == 1 else np.concatenate(samples, axis=1)
    size, rows_N = bits_RM.shape[1], np.array([rows.index(row) for row, _ in wanted])
    ranks_2N, within = np.zeros((2, len(wanted)), np.int64), 0.0
    for at, (_, count) in enumerate(wanted):
        if callable(count):
            count = count(round(np.count_nonzero(bits_RM[rows_N[at]]) / size * total))
        fraction = count / total
        margin = _DEVIATIONS * math.sqrt(size * fraction * (1 - fraction)) + 1
        upper, lower = max(0, math.floor(size * fraction - margin)), math.ceil(size * fraction + margin)
        ranks_2N[:, at] = lower if lower <= size else 0, upper
        within = max(within, (min(lower, size) - upper) / size)
    parts[0].rows.select_two(bits_RM, rows_N, ranks_2N, low_high_2N)
    return *low_high_2N, within


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


def within_tensor(cutoffs_N2: Tensor, scope_start: int) -> Tensor:
    """The same cuts, counted within a tensor that begins at `scope_start`, with thresholds that float32 has: what is
    just on one of these was above the cut, or below."""
    found_N, last_N = cutoffs_N2.unbind(1)
    last_N = last_N - scope_start
    threshold_N = found_N.float().double()
    last_N = torch.where(threshold_N > found_N, math.inf, torch.where(threshold_N < found_N, -1.0, last_N))
    return torch.stack([threshold_N, last_N.clamp(-1.0, 2.0**62)], dim=1)
