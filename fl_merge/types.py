"""The types that everything else speaks: tensors by name, updates, cohorts, outputs.

Shape suffixes used in this package: N clients, S the elements of a tensor (its own shape, or a slice of it flattened).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

__all__ = [
    "BASE",
    "Cohort",
    "CohortSpec",
    "Compute",
    "MergeMethod",
    "Output",
    "Read",
    "Scope",
    "Tensor",
    "TensorSink",
    "TensorSource",
    "TensorSpec",
    "Update",
    "Whole",
    "client_order",
    "compute_dtype",
]

BASE = -1
"""The source index of the base; clients count from 0 in the order of the cohort."""


@dataclass(frozen=True)
class TensorSpec:
    """A tensor's shape and dtype, without its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Number of elements; 1 for a 0-d tensor."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.numel * self.dtype.itemsize

    @property
    def is_floating(self) -> bool:
        """Whether the tensor is merged by arithmetic (counters and masks are not)."""
        return self.dtype.is_floating_point

    @classmethod
    def of(cls, tensor: Tensor) -> TensorSpec:
        """The description of a tensor that is at hand."""
        return cls(tuple(tensor.shape), tensor.dtype)

    def __str__(self) -> str:
        return f"{self.shape} {str(self.dtype).removeprefix('torch.')}"


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a tensor of `dtype` is merged: float64 stays, every other float is widened to float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@runtime_checkable
class TensorSource(Protocol):
    """Named tensors that can be described without being read."""

    def specs(self) -> Mapping[str, TensorSpec]:
        """Names, shapes and dtypes."""
        ...

    def read(self, name: str) -> Tensor:
        """The tensor, read-only. It may be a view of a mapped file or of a message: only what is touched is read."""
        ...

    def aliases(self) -> Mapping[str, str]:
        """Tied weights: names that share the storage of another name, which is given. Empty where there are none."""
        ...


class TensorSink(Protocol):
    """Where merged tensors go. `begin` once, then `write` in any order, then `finish`; `abort` instead on failure."""

    def begin(self, specs: Mapping[str, TensorSpec]) -> None:
        """Names, shapes and dtypes of all that will be written."""
        ...

    def write(self, name: str, start: int, values_S: Tensor) -> None:
        """Elements from `start` on of the flattened tensor, in its dtype. Called from several threads.

        An element may be written more than once, never from two threads at a time: the last write counts.
        """
        ...

    def place(self, name: str) -> Tensor | None:
        """The whole tensor, flattened, to be written in place of calls of `write`; None if it is nowhere in memory."""
        ...

    def finish(self) -> None:
        """Everything is written: make it visible."""
        ...

    def abort(self) -> None:
        """Leave nothing behind."""
        ...


@dataclass(frozen=True)
class Update:
    """What one client sent.

    Args:
        client_id: unique within the cohort.
        num_examples: the client's weight before normalisation, > 0 and finite.
        tensors: its tensors, under the base's names.
        metrics: whatever numbers it reported beside them.
        statistics: what a method asked for beyond the model (Gram matrices, Fisher information); None for nothing.
    """

    client_id: str
    num_examples: float
    tensors: TensorSource
    metrics: Mapping[str, float | int | list[float] | list[int]] = field(default_factory=dict)
    statistics: TensorSource | None = None


def client_order(client_id: str) -> tuple[int, int, str]:
    """The key by which clients are sorted: numbers by value, then everything else as text."""
    if re.fullmatch(r"[0-9]+", client_id):
        return (0, int(client_id), client_id)
    return (1, 0, client_id)


@dataclass(frozen=True)
class CohortSpec:
    """A cohort without its values: all that `plan` may look at.

    Args:
        tensors: the base's tensors by name, tied names left out.
        client_ids: in the cohort's order.
        weights_N: the clients' shares, summing to 1.
        seed: of the run.
        round: counted from 1; 0 outside a federation.
        metrics_N: what each client reported; empty where nothing is known of it.
        statistics: of those that every client sent, in one shape.
        clients_N: each client's tensors, where they may have other names and shapes than the base's (adapters); empty
            where they have the base's.
    """

    tensors: Mapping[str, TensorSpec]
    client_ids: tuple[str, ...]
    weights_N: tuple[float, ...]
    seed: int = 0
    round: int = 0
    metrics_N: tuple[Mapping[str, float | int | list[float] | list[int]], ...] = ()
    statistics: Mapping[str, TensorSpec] = field(default_factory=dict)
    clients_N: tuple[Mapping[str, TensorSpec], ...] = ()

    def only(self, names: Sequence[str]) -> CohortSpec:
        """The same cohort with some of its tensors."""
        return replace(self, tensors={name: self.tensors[name] for name in names})

    def of_clients(self, clients: Sequence[int]) -> CohortSpec:
        """The same cohort with some of its clients, in that order, their shares summing to 1 again."""
        total = math.fsum(self.weights_N[client] for client in clients) or 1.0
        return replace(
            self,
            client_ids=tuple(self.client_ids[client] for client in clients),
            weights_N=tuple(self.weights_N[client] / total for client in clients),
            metrics_N=tuple(self.metrics_N[client] for client in clients) if self.metrics_N else (),
            clients_N=tuple(self.clients_N[client] for client in clients) if self.clients_N else (),
        )


@dataclass(frozen=True)
class Cohort:
    """The base and one round's updates, sorted by client id whatever their order of arrival."""

    base: TensorSource
    updates: tuple[Update, ...]
    seed: int = 0
    round: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "updates", tuple(sorted(self.updates, key=lambda u: client_order(u.client_id))))

    @property
    def weights_N(self) -> tuple[float, ...]:
        """Shares of the clients, from their numbers of examples, summing to 1 in float64."""
        total = math.fsum(update.num_examples for update in self.updates)
        return tuple(update.num_examples / total for update in self.updates)

    def spec(self) -> CohortSpec:
        """The description that methods plan from."""
        tied = self.base.aliases()
        tensors = {name: spec for name, spec in self.base.specs().items() if name not in tied}
        return CohortSpec(
            tensors,
            tuple(update.client_id for update in self.updates),
            self.weights_N,
            self.seed,
            self.round,
            tuple(update.metrics for update in self.updates),
            self._statistics(),
            tuple(update.tensors.specs() for update in self.updates),
        )

    def _statistics(self) -> dict[str, TensorSpec]:
        sent = [update.statistics.specs() if update.statistics is not None else {} for update in self.updates]
        first = sent[0] if sent else {}
        return {name: spec for name, spec in first.items() if all(each.get(name) == spec for each in sent)}


@dataclass(frozen=True)
class Read:
    """One tensor of one source: BASE, or a client's place in the cohort.

    Args:
        source, name: which.
        of: "tensors" of the model, or the "statistics" that a client sent beside it.
    """

    source: int
    name: str
    of: Literal["tensors", "statistics"] = "tensors"


@dataclass(frozen=True)
class Whole:
    """How to make an output out of whole tensors, for what changes shapes or needs a matrix at once.

    Args:
        function: from the tensors of `Output.reads`, in that order and in their own dtypes, to the merged tensor.
    """

    function: Callable[..., Tensor]


@dataclass(frozen=True)
class Scope:
    """The tensors over which a method's statistics run: one tensor, or all that a rule covers.

    Args:
        names: in the order in which their elements are counted.
        offsets: where each name's elements begin in that count.
    """

    names: tuple[str, ...]
    offsets: Mapping[str, int] = field(compare=False)

    @classmethod
    def over(cls, tensors: Mapping[str, TensorSpec]) -> Scope:
        """A scope over these tensors, in order of name."""
        names, offsets, total = sorted(tensors), {}, 0
        for name in names:
            offsets[name] = total
            total += tensors[name].numel
        return cls(tuple(names), offsets)


class Compute(Protocol):
    """How an output comes from its reads. The executor knows `Copy`, `Span`, `Coordinate`, `Matrix` and `Whole`."""


@dataclass(frozen=True)
class Output:
    """One tensor of the merged model: what to read and the pure function to apply.

    Args:
        name, spec: of the merged tensor.
        reads: what the computation needs, and nothing else: the base's tensor and those of all clients or of some.
        compute: how.
        scope: over which tensors statistics run; None for the tensor itself.
        weights_N: the shares of the clients that are read, as they are; None for the cohort's.
        note: what the report says of it: that it was not merged as the method says, and why.
        merged_as: under which name the tensor is merged, where it is written under another one (a layer that is
            stacked twice): statistics, draws and places within the scope go by it. Empty for `name`.
    """

    name: str
    spec: TensorSpec
    reads: tuple[Read, ...]
    compute: Compute
    scope: Scope | None = None
    weights_N: tuple[float, ...] | None = None
    note: str = ""
    merged_as: str = ""

    @property
    def tensor(self) -> str:
        """The name under which it is merged."""
        return self.merged_as or self.name


class MergeMethod(Protocol):
    """Plans a merge from descriptions alone; it is handed no tensor and can do no I/O."""

    def plan(self, spec: CohortSpec) -> Iterator[Output]:
        """One output a tensor of the merged model.

        Raises:
            RecipeError: if the method's settings do not fit these tensors.
            MergeError: if the cohort is not one that the method can merge.
        """
        ...
