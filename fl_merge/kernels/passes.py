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

_ELECTIONS = {None: 0, "total": 1, "frequency": 2, "sum": 3}

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

LARGEST = float(np.finfo(np.float32).max)
"""Of float32."""

Array = np.ndarray[Any, Any]


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

    @property
    def kernels(self) -> ModuleType:
        """The compiled module."""
        return self._kernels

    @property
    def addresses(self) -> tuple[int, int, Array, Array]:
        """Of the base and its dtype's code, and of the clients and theirs: what every pass begins with."""
        return *self._base, self._addresses_N, self._codes_N

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
        out, code = output(out_S, start, stop)
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
        varying_2: Tensor | None = None,
        keys_N: Sequence[int] | None = None,
        density_N: Sequence[float] | None = None,
        factor_N: Sequence[float] | None = None,
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
            varying_2: (2,), float64: keep elements whose variance over the clients is above this cut; for elections by
                "sum", as by "total" with equal weights.
            keys_N: of the draws of each client: keep by chance, as `ops.sparsify.keep_random`.
            density_N, factor_N, divisor_N: of the latter, for each client; what is kept is multiplied by the factor,
                and divided by the divisor.
            election: None for the plain weighted sum; "total" or "frequency", as `ops.consensus.elect_sign`. Plus wins
                where an election is a draw.
            normalize, scale: as in `fl_merge.stages`.
            out_S: as long as the piece; float32, bfloat16 or float16.
            room: for how many draws to note what minus would give.

        Returns:
            The bits of the largest float32 magnitude where there was no draw, and the election's draws.
        """
        ones_N = [1.0] * self.clients
        prune = 2 if keys_N is not None else (3 if upper_N2 is not None else 1 if cutoffs_N2 is not None else 0)
        if varying_2 is not None:
            prune, cutoffs_N2 = 4, varying_2.expand(self.clients, 2)
        found = self._kernels.prune_combine(
            *self.addresses,
            weights_N.float().numpy(),
            prune,
            *cut(cutoffs_N2, self.clients),
            *cut(upper_N2, self.clients),
            np.array(keys_N if keys_N is not None else [0] * self.clients, dtype=np.uint64),
            np.array([math.ceil(density * 2**32) - 1 for density in density_N or ones_N], dtype=np.uint32),
            np.array(factor_N or ones_N, dtype=np.float32),
            np.array(divisor_N or ones_N, dtype=np.float32),
            *_merging(election, normalize, scale),
            start,
            stop,
            *output(out_S, start, stop),
            *(noted := (np.empty(room, np.int64), np.empty(room, np.float32))),
        )
        return _noted(found, *noted)

    def rank_combine(
        self,
        weights_N: Tensor,
        *,
        row: int,
        keys_N: Sequence[int],
        lines_N2: Sequence[tuple[float, float]],
        divisor_N: Sequence[float] | None,
        election: str | None = None,
        normalize: bool = True,
        scale: float = 1.0,
        start: int,
        stop: int,
        out_S: Tensor,
        room: int = 0,
    ) -> tuple[int, Draws]:
        """The same where elements are kept by chance, the more likely the larger they are within their row.

        Args:
            row: how many elements a row has.
            keys_N: of the draws of each client.
            lines_N2: of each client, as `ops.sparsify.rank_line`.
            divisor_N: what is kept is divided by; None for each element's own chance.
            start, stop: of whole rows.

        The other arguments and what comes back are those of `prune_combine`.
        """
        highest_N, steps_N = np.array(lines_N2, dtype=np.float32).T.copy()
        found = self._kernels.rank_combine(
            *self.addresses,
            row,
            np.array(keys_N, dtype=np.uint64),
            highest_N,
            steps_N,
            divisor_N is None,
            np.array([1.0] * self.clients if divisor_N is None else divisor_N, dtype=np.float32),
            weights_N.float().numpy(),
            *_merging(election, normalize, scale),
            start,
            stop,
            *output(out_S, start, stop),
            *(noted := (np.empty(room, np.int64), np.empty(room, np.float32))),
        )
        return _noted(found, *noted)

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
        out, code = output(out_S, start, stop)
        numbers_K = np.zeros(3, np.float32)
        numbers_K[: len(numbers)] = np.clip(numbers, -LARGEST, LARGEST)
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
                np.float32(np.clip(scale, -LARGEST, LARGEST)),
                start,
                stop,
                out,
                code,
            )
        )

    def gram(self, on: str, start: int, stop: int, out_XNN: Tensor) -> None:
        """Write the inner products of the float32 deltas or weights of each block (of `ops.gram`) to `out_XNN`,
        (blocks, N, N) float64."""
        self._kernels.gram(*self.addresses, on == "deltas", start, stop, out_XNN.numpy())


def _merging(election: str | None, normalize: bool, scale: float) -> tuple[int, bool, np.float32]:
    """How what was kept is merged."""
    return _ELECTIONS[election], bool(normalize), np.float32(np.clip(scale, -LARGEST, LARGEST))


def _noted(found: tuple[Any, ...], places_M: Array, otherwise_M: Array) -> tuple[int, Draws]:
    """What a pass with elections gives back, and what it noted of draws."""
    largest, largest_drawn, tally, draws = (int(each) for each in found)
    noted = min(draws, len(places_M))
    return largest, Draws(tally, draws, largest_drawn, places_M[:noted].copy(), otherwise_M[:noted].copy())


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


def output(out_S: Tensor, start: int, stop: int) -> tuple[int, int]:
    """Where element 0 would be, so that element `start` is the first of `out_S`; and the dtype's code."""
    if not readable(out_S) or out_S.dtype not in LIMITS or out_S.numel() != stop - start:
        raise ValueError(
            f"{tuple(out_S.shape)} {out_S.dtype} on {out_S.device} is no place for {stop - start} elements"
        )
    return out_S.data_ptr() - start * out_S.dtype.itemsize, CODES[out_S.dtype]


def cut(cutoffs_N2: Tensor | None, clients: int) -> tuple[Array, Array, Array]:
    """Thresholds, what an element is at least that is above each (the next float32), and last places."""
    if cutoffs_N2 is None:
        cutoffs_N2 = torch.zeros(clients, 2, dtype=torch.float64)
    thresholds_N = np.ascontiguousarray(cutoffs_N2[:, 0].float().numpy())
    last_N = np.ascontiguousarray(cutoffs_N2[:, 1].long().numpy())
    # Nothing is at least NaN.
    above_N = np.where(np.isinf(thresholds_N), np.float32(np.nan), np.nextafter(thresholds_N, np.float32(np.inf)))
    return thresholds_N, above_N, last_N
