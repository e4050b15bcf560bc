"""The base and the clients' versions of one tensor, a slice at a time, and from slices what runs over a whole scope.

Suffixes: N clients, S elements.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from types import ModuleType
from typing import Protocol

import torch
from torch import Tensor

from fl_merge.errors import MergeError
from fl_merge.kernels.passes import LIMITS, Inputs, readable
from fl_merge.ops.combine import add_scaled_delta
from fl_merge.ops.gram import BLOCK, gram_partials
from fl_merge.types import BASE, Cohort, Output, Read, TensorSource, TensorSpec, compute_dtype


class Versions:
    """One tensor of the base and of each client, flattened.

    Args:
        cohort: where they are read from.
        output: which tensor.
        device: where the arithmetic runs.
        kernels: the compiled passes, if there are any. They are used if they can read every tensor where it is.

    Raises:
        MergeError: if a source gives a tensor of another size than it described.
    """

    def __init__(self, cohort: Cohort, output: Output, device: torch.device, kernels: ModuleType | None) -> None:
        self._device = device
        self._dtype = compute_dtype(output.spec.dtype)
        self.numel = output.spec.numel
        self._base_S = sliced(cohort, next(read for read in output.reads if read.source == BASE))
        self._clients = [sliced(cohort, read) for read in output.reads if read.source != BASE]
        self.clients = len(self._clients)
        for tensor_S in (self._base_S, *self._clients):
            if tensor_S.numel() != self.numel:
                raise MergeError(f"tensor '{output.name}': {tensor_S.numel()} elements were read, wanted {self.numel}")
        self.native: Inputs | None = None
        tensors = [each for each in (self._base_S, *self._clients) if isinstance(each, Tensor) and readable(each)]
        if kernels is not None and serves(output, device) and len(tensors) == 1 + self.clients:
            self.native = Inputs(kernels, tensors[0], tensors[1:])

    def base(self, start: int, stop: int) -> Tensor:
        """(S,), in the dtype of the arithmetic."""
        return self._widened(self._base_S, start, stop)

    def delta(self, client: int, start: int, stop: int) -> Tensor:
        """(S,): one client minus the base."""
        return self._widened(self._clients[client], start, stop) - self.base(start, stop)

    def deltas(self, start: int, stop: int) -> Tensor:
        """(N, S): every client minus the base."""
        base_S = self.base(start, stop)
        deltas_NS = torch.empty(len(self._clients), stop - start, dtype=self._dtype, device=self._device)
        for delta_S, client_S in zip(deltas_NS, self._clients, strict=True):
            torch.sub(self._widened(client_S, start, stop), base_S, out=delta_S)
        return deltas_NS

    def combination(
        self, base_coefficient: float | Tensor, coefficients_N: Iterable[float | Tensor], start: int, stop: int
    ) -> Tensor:
        """(S,): base_coefficient * theta_0 + sum c_i tau_i, added in float64 and rounded once.

        Args:
            base_coefficient, coefficients_N: numbers, or (S,) float64 where each element has its own.
        """
        base_S = self._base_S[start:stop].to(self._device, torch.float64)
        total_S = base_S * base_coefficient
        for client_S, coefficient in zip(self._clients, coefficients_N, strict=True):
            add_scaled_delta(total_S, base_S, client_S[start:stop], coefficient)
        return total_S.to(self._dtype)

    def lines(self, on: str, width: int, start: int, stop: int) -> Tensor:
        """(N, rows, width) float64: rows from start to stop of the tensor as a matrix of that width."""
        at = start * width, stop * width
        vectors_NS = self.deltas(*at) if on == "deltas" else self._weights(*at)
        return vectors_NS.double().view(len(self._clients), stop - start, width)

    def gram_partials(self, on: str, start: int, stop: int) -> Tensor:
        """(blocks, N, N) float64: the inner products of the deltas or weights, a block at a time.

        Args:
            start: a multiple of BLOCK.
        """
        if self.native is None:
            vectors_NS = self.deltas(start, stop) if on == "deltas" else self._weights(start, stop)
            return gram_partials(vectors_NS)
        partials = torch.empty(math.ceil((stop - start) / BLOCK), *2 * [len(self._clients)], dtype=torch.float64)
        self.native.gram(on, start, stop, partials)
        return partials

    def _weights(self, start: int, stop: int) -> Tensor:
        return torch.stack([self._widened(client_S, start, stop) for client_S in self._clients])

    def _widened(self, tensor_S: Sliced, start: int, stop: int) -> Tensor:
        return tensor_S[start:stop].to(self._device, self._dtype)


class Sliced(Protocol):
    """A flat tensor, or what makes one's slices when they are asked for: a source that does so has a `sliced(name)`."""

    def numel(self) -> int:
        """Elements."""
        ...

    def __getitem__(self, piece: slice) -> Tensor:
        """Some of them, the same bits in every slice."""
        ...


def flat(cohort: Cohort, read: Read) -> Tensor:
    """A whole tensor of the base or of a client, flattened, in its own dtype."""
    return shaped(cohort, read).reshape(-1)


def sliced(cohort: Cohort, read: Read) -> Sliced:
    """The same, or as much of it as is asked for, where the source can."""
    by_slices = getattr(source_of(cohort, read), "sliced", None)
    found: Sliced = flat(cohort, read) if by_slices is None else by_slices(read.name)
    return found


def shaped(cohort: Cohort, read: Read) -> Tensor:
    """The same in its shape."""
    return source_of(cohort, read).read(read.name)


def source_of(cohort: Cohort, read: Read) -> TensorSource:
    """Where a tensor is read from."""
    if read.source == BASE:
        return cohort.base
    update = cohort.updates[read.source]
    if read.of == "tensors":
        return update.tensors
    if update.statistics is None:
        raise MergeError(f"'{read.name}' is planned from statistics of client '{update.client_id}', which sent none")
    return update.statistics


def serves(output: Output, device: torch.device) -> bool:
    """Whether the compiled passes can make this output: float32 arithmetic on the CPU."""
    return device.type == "cpu" and output.spec.dtype in LIMITS


def row_length(spec: TensorSpec) -> int:
    """How many elements a row has: one entry of the first dimension; all of them if there is but one dimension."""
    return max(1, spec.numel // spec.shape[0] if len(spec.shape) > 1 and spec.shape[0] else spec.numel)


def pieces(numel: int, step: int) -> list[tuple[int, int]]:
    """The first and last-plus-one element of each slice; one empty slice for an empty tensor."""
    return [(start, min(start + step, numel)) for start in range(0, max(numel, 1), step)]


def whole_deltas(versions: Sequence[Versions], clients: int) -> Iterator[Tensor]:
    """Each client's deltas of several tensors as one vector, in the widest of their dtypes."""
    for client in range(clients):
        deltas = [each.delta(client, 0, each.numel) for each in versions]
        widest = max((delta_S.dtype for delta_S in deltas), key=lambda dtype: dtype.itemsize)
        yield torch.cat([delta_S.to(widest) for delta_S in deltas])
