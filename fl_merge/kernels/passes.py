"""Calls of the compiled passes with tensors in place of addresses.

Suffixes: N clients, S the elements of a tensor or of a piece of it, K bins.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
"""The dtypes that are read natively, with the numbers by which `compiled` knows them."""

LIMITS = {torch.float32: 0x7F800000, torch.bfloat16: 0x7F7F8000, torch.float16: 0x477FF000}
"""The bits of the smallest float32 magnitude that is rounded to infinity in a dtype."""

ROOM = 1 << 15
"""How many magnitudes of a client `between` writes down at a time."""

BINS = 1 << 14
"""How many bins `count` tells apart."""

Array = np.ndarray[Any, Any]


class Inputs:
    """One tensor of the base and of each client, as the passes take them.

    Args:
        kernels: the compiled module.
        base_S: flattened.
        clients: flattened, in the cohort's order.
    """

    def __init__(self, kernels: ModuleType, base_S: Tensor, clients: Sequence[Tensor]) -> None:
        self._kernels = kernels
        self._kept = (base_S, *clients)
        self.numel = base_S.numel()
        self._base = (base_S.data_ptr(), CODES[base_S.dtype])
        self._addresses_N = np.array([client_S.data_ptr() for client_S in clients], dtype=np.int64)
        self._codes_N = np.array([CODES[client_S.dtype] for client_S in clients], dtype=np.int64)

    @classmethod
    def of(cls, kernels: ModuleType | None, base_S: Tensor, clients: Sequence[Tensor]) -> Self | None:
        """None where the passes do not serve: no kernels, tensors elsewhere than on the CPU, other dtypes, gaps."""
        if kernels is None or not all(readable(tensor_S) for tensor_S in (base_S, *clients)):
            return None
        return cls(kernels, base_S, clients)

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
        out, code = _output(out_S, start)
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
        keys_N: Sequence[int] | None = None,
        density: float = 1.0,
        rescale: bool = False,
        election: str | None = None,
        majority: int = 1,
        normalize: bool = True,
        scale: float = 1.0,
        start: int,
        stop: int,
        out_S: Tensor,
    ) -> tuple[int, int, bool]:
        """Write base + scale * combine(prune(deltas)) of the elements from start to stop to `out_S`.

        Args:
            weights_N: (N,), float64.
            cutoffs_N2: (N, 2), float64: keep the largest, as `ops.sparsify.keep_largest`; indexes within the tensor.
            keys_N: of the draws of each client: keep by chance, as `ops.sparsify.keep_random`.
            density, rescale: of the latter.
            election: None for the plain weighted sum; "total" or "frequency", as `ops.consensus.elect_sign`.
            majority: the sign that wins a draw.
            normalize, scale: as in `fl_merge.stages`.
            out_S: as long as the piece; float32, bfloat16 or float16.

        Returns:
            The bits of the largest float32 magnitude, the sum of the elected signs, whether there were draws.
        """
        out, code = _output(out_S, start)
        count = self.clients
        thresholds_N, last_N = np.zeros(count, np.float32), np.zeros(count, np.int64)
        if cutoffs_N2 is not None:
            thresholds_N, last_N = cutoffs_N2[:, 0].float().numpy(), cutoffs_N2[:, 1].long().numpy()
        largest, tally, draws = self._kernels.prune_combine(
            *self._base,
            self._addresses_N,
            self._codes_N,
            weights_N.float().numpy(),
            1 if cutoffs_N2 is not None else (2 if keys_N is not None else 0),
            np.ascontiguousarray(thresholds_N),
            np.ascontiguousarray(last_N),
            np.array(keys_N if keys_N is not None else [0] * count, dtype=np.uint64),
            np.uint32(math.ceil(density * 2**32) - 1),
            np.float32(density if rescale else 1.0),
            {None: 0, "total": 1, "frequency": 2}[election],
            np.float32(majority),
            bool(normalize),
            np.float32(scale),
            start,
            stop,
            out,
            code,
        )
        return int(largest), int(tally), bool(draws)

    def vectors(self, on: str, start: int, out_NS: Tensor) -> None:
        """Write the float32 deltas or weights from `start` on to `out_NS`, (N, S) float64."""
        self._kernels.vectors(*self._base, self._addresses_N, self._codes_N, on == "deltas", start, out_NS.numpy())

    def sample(self, starts_R: Array, length: int) -> Array:
        """(N, R * length) uint32: the bits of the deltas' magnitudes in runs of that length."""
        bits_NM = np.empty((self.clients, len(starts_R) * length), np.uint32)
        self._kernels.sample_magnitudes(*self._base, self._addresses_N, self._codes_N, starts_R, bits_NM)
        return bits_NM

    def between(self, start: int, stop: int, low_N: Array, high_N: Array) -> tuple[Array, list[Array], Array]:
        """The magnitudes from start to stop, as the bits of float32, that are above `high` or from `low` to `high`.

        Returns:
            How many are above, (N,); of each client those between, uint32, in order (none where low equals high); how
            many are between, (N,).
        """
        above_N, used_N = np.zeros(self.clients, np.int64), np.zeros(self.clients, np.int64)
        found_NM = np.empty((self.clients, ROOM), np.uint32)
        parts: list[list[Array]] = [[] for _ in range(self.clients)]
        while start < stop:
            part_N = np.zeros(self.clients, np.int64)
            start = self._kernels.magnitudes_between(
                *self._base, self._addresses_N, self._codes_N, start, stop, low_N, high_N, above_N, found_NM, part_N
            )
            used_N += part_N
            for client in np.flatnonzero(low_N != high_N):
                parts[client].append(found_NM[client, : part_N[client]].copy())
        return above_N, [np.concatenate([np.empty(0, np.uint32), *found]) for found in parts], used_N

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


def _output(out_S: Tensor, start: int) -> tuple[int, int]:
    """Where element 0 would be, so that element `start` is the first of `out_S`; and the dtype's code."""
    return out_S.data_ptr() - start * out_S.dtype.itemsize, CODES[out_S.dtype]
