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

ROOM = 1 << 16
"""How many magnitudes of a row `between` writes down at a time."""

BINS = 1 << 14
"""How many bins `count` tells apart."""

SCORES = {"deltas": 0, "variance": 1, "balance": 2}
"""What the rows are, with the numbers by which `compiled` knows it."""


@dataclass(frozen=True)
class Counted:
    """How a row's magnitudes lie to two limits.

    Args:
        above: how many are above the upper one.
        between: how many are from the lower to the upper one.
        parts: these, as bits, uint32, in order; none where the limits are equal.
        starts_X, marks_X: for blocks of elements, in order: the first element, and how many were between before it.
        complete: false if there were more between than had room: then only `above` means anything.
    """

    above: int
    between: int
    parts: Sequence[Array]
    starts_X: Array
    marks_X: Array
    complete: bool


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

    def between(self, start: int, stop: int, low_R: Array, high_R: Array, room: int, expected: int) -> list[Counted]:
        """How the magnitudes of each row from start to stop, as the bits of float32, lie to its limits.

        Args:
            low_R, high_R: (R,), uint32.
            room: how many of a row's that are between are written down at most.
            expected: how many will be, for which memory is taken; where there are more it is taken again.
        """
        rows, block = len(self._rows_R), self._kernels.BLOCK
        above_R, between_R = np.zeros(rows, np.int64), np.zeros(rows, np.int64)
        marks_RX = np.empty((rows, math.ceil((stop - start) / block)), np.int64)
        starts_X = np.arange(start, stop, block)
        parts: list[list[Array]] = [[] for _ in range(rows)]
        limits_R = low_R.copy(), high_R.copy()
        begin = start
        while begin < stop:
            found_RM, used_R = np.empty((rows, min(expected, ROOM) + 2 * block), np.uint32), np.zeros(rows, np.int64)
            where = *self._scored, self._rows_R, begin, stop
            totals = above_R, between_R, marks_RX[:, (begin - start) // block :]
            begin = self._kernels.magnitudes_between(*where, *limits_R, *totals, found_RM, used_R)
            for row, used in enumerate(used_R.tolist()):
                if limits_R[0][row] != limits_R[1][row]:
                    parts[row].append(found_RM[row, :used])
                if sum(map(len, parts[row])) > room:
                    # What is counted from here on has no meaning; nothing more is written down.
                    parts[row].clear()
                    limits_R[0][row] = limits_R[1][row]
        complete_R = low_R == limits_R[0]
        return [
            Counted(above, between, part, starts_X, marks_RX[row], complete=complete)
            for row, (above, between, part, complete) in enumerate(
                zip(above_R.tolist(), between_R.tolist(), parts, complete_R.tolist(), strict=True)
            )
        ]

    def count(self, row: int, start: int, stop: int, low: int, high: int, shift: int) -> Array:
        """(BINS,) int64: how many of a row's magnitudes are in each bin of 2^shift bits from `low` to `high`."""
        counts_K = np.zeros(BINS, np.int64)
        one, limits = self.some([row]), (np.uint32(low), np.uint32(high), np.uint32(shift))
        self._kernels.count_magnitudes(*one._scored, one._rows_R[0], start, stop, *limits, counts_K)
        return counts_K

    def select_two(self, bits_RM: Array, rows_N: Array, ranks_2N: Array, values_2N: Array) -> None:
        """For each of some rows the values at two ranks, 1 for the largest; at rank 0 what was there stays."""
        self._kernels.select_two(bits_RM, rows_N, ranks_2N, values_2N)

    def find_cut(self, values_M: Array, rank: int, marks_X: Array) -> tuple[int, int, int]:
        """The value at a rank of those that are between two limits, and the last of the equal ones that stay: in which
        block it is, and which one of those in the block, from 1.

        Args:
            values_M: in order.
            marks_X: how many of them were before each block.
        """
        value, block, nth = self._kernels.find_cut(values_M, rank, marks_X)
        return int(value), int(block), int(nth)

    def nth_equal(self, row: int, start: int, stop: int, wanted: int, nth: int) -> int:
        """The index of the nth element of one row from start to stop whose magnitude has these bits."""
        one = self.some([row])
        return int(self._kernels.nth_equal(*one._scored, one._rows_R[0], start, stop, np.uint32(wanted), nth))


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
    rows.between(0, 4, np.zeros(2, np.uint32), np.ones(2, np.uint32), room=4, expected=4)
    rows.count(0, 0, 4, 0, 1, 0)
    rows.nth_equal(0, 0, 4, 0, 1)
    few_M, few_X = np.arange(4, dtype=np.uint32), np.zeros(1, np.int64)
    rows.select_two(few_M[None], few_X, np.ones((2, 1), np.int64), np.zeros((2, 1), np.uint32))
    rows.find_cut(few_M, 1, few_X)
    kept_squares(inputs, torch.zeros(2, dtype=torch.float64), 0, 4)
    largest_of_products(inputs, 0, 4)
    combine_balanced(inputs, (torch.ones(2, 2), False), torch.zeros(2, 2, dtype=torch.float64), 1.0, 0, 4, out_S)
    largest_magnitude(kernels, base_S, 0, 4)
    kernels.uniform(np.uint64(1), 0, np.empty(4))
