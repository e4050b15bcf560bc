"""Rows of scores that are never in memory as a whole: what is counted of them, and passes that go by them.

Suffixes: N clients, R rows, P runs, M of a sample or of what is between, K bins, X blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from fl_merge.kernels.passes import LARGEST, Array, Inputs, cut, largest_magnitude, output

ROOM = 1 << 18
"""For how many magnitudes of a row `between` takes memory at first."""

BINS = 1 << 14
"""How many bins `count` tells apart."""

SCORES = {"deltas": 0, "variance": 1, "balance": 2}
"""What the rows are, with the numbers by which `compiled` knows it."""


@dataclass(frozen=True)
class Counted:
    """How the magnitudes of rows lie to two limits each.

    Args:
        above_R, between_R: how many are above the upper one, and how many from the lower to the upper one; int64.
        used_R, found_RM: how many of these are written down, all or none where the limits are equal, and they: bits,
            uint32, in the order of the blocks.
        starts_X, stops_X, marks_RX: of blocks of elements, in order: the first, the last and one more, and how many
            were between before it.
        complete_R: false if there were more between than had room: then only `above_R` means anything.
    """

    above_R: Array
    between_R: Array
    used_R: Array
    found_RM: Array
    starts_X: Array
    stops_X: Array
    marks_RX: Array
    complete_R: Array


class Rows:
    """Rows of scores of one tensor's elements: the clients' deltas, or what `ops.scores` makes of them.

    Args:
        inputs: the tensor.
        scores: of `SCORES`: "deltas" and "balance" have a row a client, "variance" has one.
        scales: for "balance": (2, N), float32, and whether they divide, as `ops.scores.scales`.
    """

    def __init__(self, inputs: Inputs, scores: str = "deltas", scales: tuple[Tensor, bool] | None = None) -> None:
        self._inputs = inputs
        self._kind = SCORES[scores] if scales is None else _balance(scales)
        self._numbers_2N = np.ones((2, 0), np.float32) if scales is None else scales[0].numpy()
        self._rows_R = np.arange(1 if scores == "variance" else inputs.clients)

    @property
    def numel(self) -> int:
        """Elements of a row."""
        return self._inputs.numel

    def some(self, rows: Sequence[int]) -> Self:
        """The same with some of the rows, which may be there twice."""
        if list(rows) == list(range(len(self._rows_R))):
            return self
        kept: Self = type(self).__new__(type(self))
        kept._inputs, kept._kind, kept._numbers_2N = self._inputs, self._kind, self._numbers_2N
        kept._rows_R = self._rows_R[list(rows)]
        if self._kind == SCORES["deltas"]:
            wanted = kept._rows_R.tolist()
            clients = sorted(set(wanted))
            kept._rows_R = np.array([clients.index(client) for client in wanted])
            kept._inputs = self._inputs.some(clients)
        return kept

    @property
    def _kernels(self) -> ModuleType:
        return self._inputs.kernels

    @property
    def _scored(self) -> tuple[int, int, Array, Array, int, Array]:
        return *self._inputs.addresses, self._kind, self._numbers_2N

    def sample(self, starts_P: Array, length: int) -> Array:
        """(R, P * length) uint32: the bits of the magnitudes in runs of that length, a block's at most."""
        bits_RM = np.empty((len(self._rows_R), len(starts_P) * length), np.uint32)
        self._kernels.sample_magnitudes(*self._scored, self._rows_R, starts_P, bits_RM)
        return bits_RM

    def between(self, start: int, stop: int, low_R: Array, high_R: Array, room: int, expected: int) -> Counted:
        """How the magnitudes of each row from start to stop, as the bits of float32, lie to its limits.

        Args:
            low_R, high_R: (R,), uint32.
            room: how many of a row's that are between are written down at most.
            expected: how many will be, for which memory is taken; where there are more it is taken again.
        """
        rows, block = len(self._rows_R), self._kernels.MARKED
        above_R, between_R, used_R = np.zeros((3, rows), np.int64)
        marks_RX = np.empty((rows, math.ceil((stop - start) / block)), np.int64)
        limits_R = low_R.copy(), high_R.copy()
        found_RM = np.empty((rows, min(expected, ROOM) + 2 * block), np.uint32)
        begin = start
        while True:
            where = *self._scored, self._rows_R, start, begin, stop
            begin = self._kernels.magnitudes_between(*where, *limits_R, above_R, between_R, marks_RX, found_RM, used_R)
            full_R = used_R > room
            # What is between in these has no meaning from here on; nothing more is written down.
            limits_R[0][full_R] = limits_R[1][full_R]
            used_R[full_R] = 0
            if begin == stop:
                starts_X = np.arange(start, stop, block)
                blocks = starts_X, np.minimum(starts_X + block, stop), marks_RX
                return Counted(above_R, between_R, used_R, found_RM, *blocks, low_R == limits_R[0])
            most = int(used_R.max())
            if most + 2 * block > found_RM.shape[1]:
                wider_RM = np.empty((rows, 2 * found_RM.shape[1]), np.uint32)
                wider_RM[:, :most] = found_RM[:, :most]
                found_RM = wider_RM

    def count(self, row: int, start: int, stop: int, low: int, high: int, shift: int) -> Array:
        """(BINS,) int64: how many of a row's magnitudes are in each bin of 2^shift bits from `low` to `high`."""
        counts_K = np.zeros(BINS, np.int64)
        one, limits = self.some([row]), (np.uint32(low), np.uint32(high), np.uint32(shift))
        self._kernels.count_magnitudes(*one._scored, one._rows_R[0], start, stop, *limits, counts_K)
        return counts_K

    def select_two(self, bits_RM: Array, rows_N: Array, ranks_2N: Array, values_2N: Array) -> None:
        """For each of some rows the values at two ranks, 1 for the largest; at rank 0 what was there stays."""
        self._kernels.select_two(bits_RM, rows_N, ranks_2N, values_2N)

    def find_cuts(self, counts_R: Array, low_R: Array, high_R: Array, counted: Counted) -> tuple[Array, Array, Array]:
        """Cuts of rows that have been counted, all elements of them.

        Args:
            counts_R: (R,), int64: how many of each row stay.
            low_R, high_R: (R,), uint32: the limits.

        Returns:
            Of the last element of each row that stays and has the smallest magnitude that does: the bits of that, in
            which block it is, and which one of the equal ones in the block, from 1. A cut that is not between the
            limits has the block -1.
        """
        bits_R = np.zeros(len(counts_R), np.uint32)
        block_R, nth_R = np.empty((2, len(counts_R)), np.int64)
        known = counted.found_RM, counted.above_R, counted.between_R, counted.marks_RX
        counts_R = counts_R * counted.complete_R[: len(counts_R)]  # to keep 0 has no cut
        self._kernels.find_cuts(counts_R, low_R, high_R, *known, bits_R, block_R, nth_R)
        return bits_R, block_R, nth_R

    def nth_equals(self, starts_R: Array, stops_R: Array, bits_R: Array, nth_R: Array) -> Array:
        """(R,), int64: where the nth element of each row is whose magnitude has these bits, from a start to a stop."""
        places_R = np.empty(len(bits_R), np.int64)
        self._kernels.nth_equals(*self._scored, self._rows_R, starts_R, stops_R, bits_R, nth_R, places_R)
        return places_R


def _balance(scales: tuple[Tensor, bool]) -> int:
    """By which number `compiled` knows balances whose numbers divide, or do not."""
    return SCORES["balance"] + int(scales[1])


def largest_of_products(inputs: Inputs, start: int, stop: int) -> Tensor:
    """(2 N,) float64: the largest magnitudes of each client's deltas, and of their products with the sum of all."""
    largest_N, product_N = np.zeros(inputs.clients, np.uint32), np.zeros(inputs.clients, np.uint64)
    inputs.kernels.largest_of_products(*inputs.addresses, start, stop, largest_N, product_N)
    return torch.from_numpy(np.concatenate([largest_N.view(np.float32).astype(np.float64), product_N.view(np.float64)]))


def kept_squares(inputs: Inputs, varying_2: Tensor, start: int, stop: int) -> Tensor:
    """(X, N) float64: the sums of squares of each client's deltas where their variance is above a cut.

    Args:
        varying_2: (2,), float64: the cut.
        start: a multiple of SUM_BLOCK, over which each sum runs.
    """
    sums_XN = np.empty((math.ceil((stop - start) / inputs.kernels.SUM_BLOCK), inputs.clients), np.float64)
    (threshold,), (above,), (last,) = cut(varying_2[None], 1)
    inputs.kernels.kept_squares(*inputs.addresses, threshold, above, last, start, stop, sums_XN)
    return torch.from_numpy(sums_XN)


def combine_balanced(
    inputs: Inputs,
    scales: tuple[Tensor, bool],
    cutoffs_N2: Tensor,
    scale: float,
    start: int,
    stop: int,
    out_S: Tensor,
) -> int:
    """Write base + scale * the mean of the deltas weighed by their balance, where that is above its client's cut.

    Args:
        scales: as for `Rows`.
        cutoffs_N2: (N, 2), float64: the cuts.
        out_S: as long as the piece; float32, bfloat16 or float16.

    Returns:
        The bits of the largest float32 magnitude in it.
    """
    out, code = output(out_S, start, stop)
    known = _balance(scales), scales[0].numpy(), *cut(cutoffs_N2, inputs.clients)
    scaled = np.float32(np.clip(scale, -LARGEST, LARGEST))
    return int(inputs.kernels.combine_balanced(*inputs.addresses, *known, scaled, start, stop, out, code))


def warm_up(kernels: ModuleType) -> None:
    """Call every pass once, so that what can go wrong in compiling them goes wrong here."""
    base_S, out_S = torch.zeros(4), torch.empty(4)
    inputs = Inputs(kernels, base_S, [torch.ones(4), torch.ones(4, dtype=torch.bfloat16)])
    weights_N = torch.tensor([0.5, 0.5], dtype=torch.float64)
    inputs.weighted_sum(1.0, [0.5, 0.5], 0, 4, out_S)
    inputs.prune_combine(weights_N, election="total", start=0, stop=4, out_S=out_S)
    inputs.combine_elements(
        "median", count=1, factors_N=[1.0, 1.0], numbers=(), scale=1.0, start=0, stop=4, out_S=out_S
    )
    inputs.gram("deltas", 0, 4, torch.empty(1, 2, 2, dtype=torch.float64))
    ranked: dict[str, Any] = {"row": 4, "keys_N": [1, 2], "lines_N2": [(0.6, 0.1)] * 2, "divisor_N": None}
    inputs.rank_combine(weights_N, **ranked, start=0, stop=4, out_S=out_S)
    rows = Rows(inputs)
    rows.sample(np.zeros(1, np.int64), 4)
    low_R, high_R, ones_R = np.zeros(2, np.uint32), np.full(2, 1 << 30, np.uint32), np.ones(2, np.int64)
    counted = rows.between(0, 4, low_R, high_R, room=4, expected=4)
    bits_R, _, nth_R = rows.find_cuts(ones_R, low_R, high_R, counted)
    rows.nth_equals(0 * ones_R, 4 * ones_R, bits_R, nth_R)
    rows.count(0, 0, 4, 0, 1, 0)
    few_M, few_X = np.arange(4, dtype=np.uint32), np.zeros(1, np.int64)
    rows.select_two(few_M[None], few_X, np.ones((2, 1), np.int64), np.zeros((2, 1), np.uint32))
    kept_squares(inputs, torch.zeros(2, dtype=torch.float64), 0, 4)
    largest_of_products(inputs, 0, 4)
    combine_balanced(inputs, (torch.ones(2, 2), False), torch.zeros(2, 2, dtype=torch.float64), 1.0, 0, 4, out_S)
    largest_magnitude(kernels, base_S, 0, 4)
    kernels.uniform(np.uint64(1), 0, np.empty(4))
