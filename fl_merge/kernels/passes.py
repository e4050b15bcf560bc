"""Calls of the compiled passes with tensors in place of addresses.

Suffixes: N clients, S the elements of a tensor or of a piece of it, K bins.
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

from fl_merge.kernels.networks import sorting_network

CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
"""The dtypes that are read natively, with the numbers by which `compiled` knows them."""

LIMITS = {torch.float32: 0x7F800000, torch.bfloat16: 0x7F7F8000, torch.float16: 0x477FF000}
"""The bits of the smallest float32 magnitude that is rounded to infinity in a dtype."""

ROOM = 1 << 15
"""How many magnitudes of a client `between` writes down at a time."""

BINS = 1 << 14
"""How many bins `count` tells apart."""

_DELTA32 = 4

KINDS = {
    "median": 1,
    "trimmed_mean": 2,
    "mean_around_median": 3,
    "largest": 4,
    "unified": 5,
    "consensus": 6,
    "damped": 7,
}
"""The elementwise methods that have a pass, with the numbers by which `compiled` knows them."""

_LARGEST = float(np.finfo(np.float32).max)

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Counted:
    """How a client's magnitudes lie to two limits.

    Args:
        above: how many are above the upper one.
        between: how many are from the lower to the upper one.
        between_M: these, as bits, uint32, in order; none where the limits are equal.
        starts, marks: for blocks of elements, in order: the first element, and how many were between before it.
        complete: false if there were more between than had room: then only `above` means anything.
    """

    above: int
    between: int
    between_M: Array
    starts: Array
    marks: Array
    complete: bool


@dataclass(frozen=True)
class Draws:
    """The elections of a piece.

    Args:
        tally: the sum of the elected signs.
        count: how many elections were draws.
        largest: the bits of the largest float32 magnitude of the merged values there, now that plus has won.
        places_M: where, within the tensor, as far as there was room.
        otherwise_M: float32: what the merged values would be there if minus had won.
    """

    tally: int
    count: int
    largest: int
    places_M: Array
    otherwise_M: Array


class Inputs:
    """One tensor of the base and of each client, as the passes take them.

    Args:
        kernels: the compiled module.
        base_S: flattened.
        clients: flattened, in the cohort's order.

    Raises:
        ValueError: if they cannot be read through their addresses, or are not of one length.
    """

    def __init__(self, kernels: ModuleType, base_S: Tensor, clients: Sequence[Tensor]) -> None:
        for tensor_S in (base_S, *clients):
            if not readable(tensor_S):
                raise ValueError(f"a {tensor_S.dtype} tensor on {tensor_S.device} cannot be read through its address")
            if tensor_S.numel() != base_S.numel():
                raise ValueError(f"{tensor_S.numel()} elements, wanted the base's {base_S.numel()}")
        self._kernels = kernels
        self._kept: tuple[Tensor, ...] = (base_S, *clients)
        self.numel = base_S.numel()
        self._base = (base_S.data_ptr(), CODES[base_S.dtype])
        self._addresses_N = np.array([client_S.data_ptr() for client_S in clients], dtype=np.int64)
        self._codes_N = np.array([CODES[client_S.dtype] for client_S in clients], dtype=np.int64)

    @property
    def clients(self) -> int:
        """How many there are."""
        return len(self._addresses_N)

    def some(self, clients: Sequence[int]) -> Self:
        """The same with some of the clients."""
        kept: Self = type(self).__new__(type(self))
        kept._kernels, kept._kept, kept.numel, kept._base = self._kernels, self._kept, self.numel, self._base
        kept._addresses_N, kept._codes_N = self._addresses_N[list(clients)], self._codes_N[list(clients)]
        return kept

    def weighted_sum(
        self, scaling: float, coefficients_N: Sequence[float], start: int, stop: int, out_S: Tensor
    ) -> int:
        """Write scaling * base + sum of coefficients * deltas of the elements from start to stop to `out_S`.

        Args:
            out_S: as long as the piece; float32, bfloat16 or float16.

        Returns:
            The bits of the largest float32 magnitude in it.
        """
        out, code = _output(out_S, start, stop)
        return int(
            self._kernels.weighted_sum(
                *self._base,
                self._addresses_N,
                self._codes_N,
                float(scaling),
                np.array(coefficients_N, dtype=np.float64),
                start,
                stop,
                out,
                code,
            )
        )

    def prune_combine(
        self,
        weights_N: Tensor,
        *,
        cutoffs_N2: Tensor | None = None,
        upper_N2: Tensor | None = None,
        keys_N: Sequence[int] | None = None,
        density_N: Sequence[float] | None = None,
        divisor_N: Sequence[float] | None = None,
        election: str | None = None,
        normalize: bool = True,
        scale: float = 1.0,
        start: int,
        stop: int,
        out_S: Tensor,
        room: int = 0,
    ) -> tuple[int, Draws]:
        """Write base + scale * combine(prune(deltas)) of the elements from start to stop to `out_S`.

        Args:
            weights_N: (N,), float64.
            cutoffs_N2: (N, 2), float64: keep the largest, as `ops.sparsify.keep_largest`; indexes within the tensor.
            upper_N2: the same of what is dropped as the largest, as `ops.sparsify.trim_to_middle`.
            keys_N: of the draws of each client: keep by chance, as `ops.sparsify.keep_random`.
            density_N, divisor_N: of the latter, for each client; what is kept is divided by the divisor.
            election: None for the plain weighted sum; "total" or "frequency", as `ops.consensus.elect_sign`. Plus wins
                where an election is a draw.
            normalize, scale: as in `fl_merge.stages`.
            out_S: as long as the piece; float32, bfloat16 or float16.
            room: for how many draws to note what minus would give.

        Returns:
            The bits of the largest float32 magnitude where there was no draw, and the election's draws.
        """
        out, code = _output(out_S, start, stop)
        ones_N = [1.0] * self.clients
        prune = 2 if keys_N is not None else (3 if upper_N2 is not None else 1 if cutoffs_N2 is not None else 0)
        places_M, otherwise_M = np.empty(room, np.int64), np.empty(room, np.float32)
        largest, largest_drawn, tally, draws = self._kernels.prune_combine(
            *self._base,
            self._addresses_N,
            self._codes_N,
            weights_N.float().numpy(),
            prune,
            *_cut(cutoffs_N2, self.clients),
            *_cut(upper_N2, self.clients),
            np.array(keys_N if keys_N is not None else [0] * self.clients, dtype=np.uint64),
            np.array([math.ceil(density * 2**32) - 1 for density in density_N or ones_N], dtype=np.uint32),
            np.array(divisor_N or ones_N, dtype=np.float32),
            {None: 0, "total": 1, "frequency": 2}[election],
            bool(normalize),
            np.float32(np.clip(scale, -_LARGEST, _LARGEST)),
            start,
            stop,
            out,
            code,
            places_M,
            otherwise_M,
        )
        noted = min(int(draws), room)
        places_M, otherwise_M = places_M[:noted].copy(), otherwise_M[:noted].copy()
        return int(largest), Draws(int(tally), int(draws), int(largest_drawn), places_M, otherwise_M)

    def keep_ranked(
        self,
        start: int,
        stop: int,
        *,
        row: int,
        keys_N: Sequence[int],
        density_N: Sequence[float],
        epsilon: float,
        divisor_N: Sequence[float] | None,
    ) -> Self:
        """The same inputs with what is kept of each delta in place of the clients, for the elements from start to stop.

        Args:
            start, stop: of whole rows.
            row: how many elements a row has.
            keys_N: of the draws of each client.
            density_N, epsilon: as `ops.sparsify.rank_chances`.
            divisor_N: what is kept is divided by; None for each element's own chance.
        """
        kept_NS = np.empty((self.clients, stop - start), np.float32)
        for client in range(self.clients):
            density = density_N[client]
            self._kernels.keep_ranked(
                *self._base,
                self._addresses_N[client],
                self._codes_N[client],
                start,
                stop,
                row,
                np.uint64(keys_N[client]),
                density + epsilon / 2,
                epsilon if density < 1 else -1.0,
                divisor_N is None,
                np.float32(1.0 if divisor_N is None else divisor_N[client]),
                kept_NS[client],
            )
        kept = self.some(range(self.clients))
        kept._kept = (*self._kept, torch.from_numpy(kept_NS))
        kept._addresses_N = np.array([kept_S.ctypes.data - 4 * start for kept_S in kept_NS], dtype=np.int64)
        kept._codes_N = np.full(self.clients, _DELTA32, dtype=np.int64)
        return kept

    def combine_elements(
        self,
        kind: str,
        *,
        count: int,
        factors_N: Sequence[float],
        numbers: Sequence[float],
        scale: float,
        start: int,
        stop: int,
        out_S: Tensor,
    ) -> int:
        """Write base + merged delta of the elements from start to stop to `out_S`.

        Args:
            kind: one of `KINDS`.
            count, factors_N, numbers, scale: as `kernels.elements.combine_elements`.
            out_S: as long as the piece; float32, bfloat16 or float16.

        Returns:
            The bits of the largest float32 magnitude in it.
        """
        out, code = _output(out_S, start, stop)
        numbers_K = np.zeros(3, np.float32)
        numbers_K[: len(numbers)] = np.clip(numbers, -_LARGEST, _LARGEST)
        return int(
            self._kernels.combine_elements(
                *self._base,
                self._addresses_N,
                self._codes_N,
                KINDS[kind],
                count,
                np.array(factors_N, dtype=np.float32),
                numbers_K,
                sorting_network(self.clients),
                np.float32(np.clip(scale, -_LARGEST, _LARGEST)),
                start,
                stop,
                out,
                code,
            )
        )

    def gram(self, on: str, start: int, stop: int, out_NN: Tensor) -> None:
        """Write the inner products of the float32 deltas or weights of one block to `out_NN`, (N, N) float64."""
        where = *self._base, self._addresses_N, self._codes_N
        self._kernels.gram(*where, on == "deltas", start, stop, out_NN.numpy())

    def sample(self, starts_R: Array, length: int) -> Array:
        """(N, R * length) uint32: the bits of the deltas' magnitudes in runs of that length."""
        bits_NM = np.empty((self.clients, len(starts_R) * length), np.uint32)
        self._kernels.sample_magnitudes(*self._base, self._addresses_N, self._codes_N, starts_R, bits_NM)
        return bits_NM

    def between(self, start: int, stop: int, low_N: Array, high_N: Array, room: int) -> list[Counted]:
        """How the magnitudes of each client's deltas from start to stop, as the bits of float32, lie to its limits.

        Args:
            low_N, high_N: (N,), uint32.
            room: how many of a client's that are between are written down at most.
        """
        above_N, between_N = np.zeros(self.clients, np.int64), np.zeros(self.clients, np.int64)
        found_NM = np.empty((self.clients, ROOM), np.uint32)
        parts: list[list[Array]] = [[] for _ in range(self.clients)]
        starts, marks = [], []
        limits_N = low_N.copy(), high_N.copy()
        while start < stop:
            used_N = np.zeros(self.clients, np.int64)
            where = *self._base, self._addresses_N, self._codes_N, start, stop
            marks_NM = np.empty((self.clients, math.ceil((stop - start) / self._kernels.BLOCK)), np.int64)
            totals = above_N, between_N, marks_NM
            end = self._kernels.magnitudes_between(*where, *limits_N, *totals, found_NM, used_N)
            starts.append(np.arange(start, end, self._kernels.BLOCK))
            marks.append(marks_NM[:, : len(starts[-1])])
            start = end
            for client, used in enumerate(used_N):
                if limits_N[0][client] != limits_N[1][client]:
                    parts[client].append(found_NM[client, :used].copy())
                if sum(part.size for part in parts[client]) > room:
                    # What is counted from here on has no meaning; nothing more is written down.
                    parts[client].clear()
                    limits_N[0][client] = limits_N[1][client]
        return [
            Counted(
                int(above),
                int(between),
                np.concatenate([np.empty(0, np.uint32), *part]),
                np.concatenate(starts),
                marks_M,
                complete=bool(low == limits_N[0][client]),
            )
            for client, (above, between, part, marks_M, low) in enumerate(
                zip(above_N, between_N, parts, np.concatenate(marks, axis=1), low_N, strict=True)
            )
        ]

    def count(self, client: int, start: int, stop: int, low: int, high: int, shift: int) -> Array:
        """(BINS,) int64: how many of a client's magnitudes are in each bin of 2^shift bits from `low` to `high`."""
        counts_K = np.zeros(BINS, np.int64)
        address, code = self._addresses_N[client], self._codes_N[client]
        limits = np.uint32(low), np.uint32(high), np.uint32(shift)
        self._kernels.count_magnitudes(*self._base, address, code, start, stop, *limits, counts_K)
        return counts_K

    def nth_equal(self, client: int, start: int, stop: int, wanted: int, nth: int) -> int:
        """The index of the nth delta of one client from start to stop whose magnitude has these bits."""
        address, code = self._addresses_N[client], self._codes_N[client]
        return int(self._kernels.nth_equal(*self._base, address, code, start, stop, np.uint32(wanted), nth))


def largest_magnitude(kernels: ModuleType, tensor_S: Tensor, start: int, stop: int) -> float:
    """The largest magnitude in a piece of a readable tensor; infinity or NaN if there is one."""
    bits = int(kernels.largest_magnitude(tensor_S.data_ptr(), CODES[tensor_S.dtype], start, stop))
    word = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor_S.dtype.itemsize]
    return float(torch.tensor(bits, dtype=word).view(tensor_S.dtype))


def readable(tensor_S: Tensor) -> bool:
    """Whether a flattened tensor can be read through its address."""
    return (
        tensor_S.dtype in CODES
        and tensor_S.device.type == "cpu"
        and tensor_S.is_contiguous()
        and tensor_S.data_ptr() % tensor_S.dtype.itemsize == 0
        and not tensor_S.is_conj()
        and not tensor_S.is_neg()
    )


def _output(out_S: Tensor, start: int, stop: int) -> tuple[int, int]:
    """Where element 0 would be, so that element `start` is the first of `out_S`; and the dtype's code."""
    if not readable(out_S) or out_S.dtype not in LIMITS or out_S.numel() != stop - start:
        raise ValueError(
            f"{tuple(out_S.shape)} {out_S.dtype} on {out_S.device} is no place for {stop - start} elements"
        )
    return out_S.data_ptr() - start * out_S.dtype.itemsize, CODES[out_S.dtype]


def _cut(cutoffs_N2: Tensor | None, clients: int) -> tuple[Array, Array, Array]:
    """Thresholds, the float32 that follows each, and last places."""
    if cutoffs_N2 is None:
        cutoffs_N2 = torch.zeros(clients, 2, dtype=torch.float64)
    thresholds_N = np.ascontiguousarray(cutoffs_N2[:, 0].float().numpy())
    last_N = np.ascontiguousarray(cutoffs_N2[:, 1].long().numpy())
    return thresholds_N, np.nextafter(thresholds_N, np.float32(np.inf)), last_N


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
    inputs.gram("deltas", 0, 4, torch.empty(2, 2, dtype=torch.float64))
    inputs.keep_ranked(0, 4, row=4, keys_N=[1, 2], density_N=[0.5, 0.5], epsilon=0.1, divisor_N=None)
    inputs.sample(np.zeros(1, np.int64), 4)
    inputs.between(0, 4, np.zeros(2, np.uint32), np.ones(2, np.uint32), room=4)
    inputs.count(0, 0, 4, 0, 1, 0)
    inputs.nth_equal(0, 0, 4, 0, 1)
    largest_magnitude(kernels, base_S, 0, 4)
    kernels.uniform(np.uint64(1), 0, np.empty(4))
