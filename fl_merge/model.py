"""The global model between rounds.

It is kept as a float32 master; clients get it in the base's dtype. A model kept in bfloat16 would lose about a tenth
of each round's merged delta to rounding.

The merge computes into the bytes that are sent (`codecs.blank`): of a float32 model, the master, what it is given out
as and what clients are sent are one set of bytes.

Suffix: S elements.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Set
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fl_merge.codecs import DTYPES, blank
from fl_merge.errors import MergeError, RecipeError
from fl_merge.exchange import exchange_of, require_apart
from fl_merge.execute import MergeReport, execute, merged_specs
from fl_merge.lowrank import absent_modules, parted, relative_error
from fl_merge.optimizers import ServerOptimized, optimizer_of, take_step
from fl_merge.pairs import RESIDUAL
from fl_merge.phases import Schedule
from fl_merge.store import MemorySink, MemorySource
from fl_merge.structures import reconfigure
from fl_merge.tuning import Tuner, tune
from fl_merge.types import Cohort, MergeMethod, TensorSpec, Update, compute_dtype

Encoded = Mapping[tuple[str, torch.dtype], bytes]
"""Tensors by name and dtype as they travel: bytes into which the model's own tensors look."""

_PIECE = 1 << 19
"""Elements that are converted at a time: they and what is made of them fit a core's cache."""


@dataclass(frozen=True)
class GlobalModel:
    """The model between rounds; made by `GlobalModel.of`. Its tensors are read-only: they may be parts of messages.

    Args:
        sent: what clients start from.
        kept: the master, for tensors that are sent in a narrower dtype than they are kept in.
        dtypes: the base's, in which the model is given out.
        tied: names that are another name's tensor (tied weights), and that name.
        encoded: the bytes of those tensors of `sent` and `kept` that were made as they travel.
        optimizer_state: of the method's server optimizer, by name (`fl_merge.optimizers`), or the forms in which
            clients have their adapters (`fl_merge.exchange`). The next model takes it over
            and changes it.
        architecture: the config from which clients build the model; empty where they know it themselves.
    """

    sent: Mapping[str, Tensor]
    kept: Mapping[str, Tensor]
    dtypes: Mapping[str, torch.dtype]
    tied: Mapping[str, str] = field(default_factory=dict)
    encoded: Encoded = field(default_factory=dict, repr=False)
    optimizer_state: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    architecture: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def initial(
        cls,
        tensors: Mapping[str, Tensor],
        method: MergeMethod,
        *,
        wire: torch.dtype | None = None,
        tied: Mapping[str, str] | None = None,
        architecture: Mapping[str, Any] | None = None,
    ) -> GlobalModel:
        """The model that a run starts from, checked with all that can be known before clients are asked.

        Args:
            tensors, wire, tied: as for `of`.
            method: that will merge, or a schedule of phases.
            architecture: the model's config, for clients that build it from that.

        Raises:
            RecipeError: if there are no tensors, one is not finite, tied names do not fit, or the method does not fit
                the tensors or changes their names or shapes.
        """
        if not tensors:
            raise RecipeError("the initial model has no arrays; pass ArrayRecord(model.state_dict())")
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not _all_finite(tensor):
                raise RecipeError(f"the initial model is not finite: tensor '{name}'")
        for name, first in (tied or {}).items():
            if name not in tensors or first not in tensors:
                raise RecipeError(f"tied: the model has no tensor '{name if name not in tensors else first}'")
            if first == name or first in (tied or {}) or not torch.equal(tensors[name], tensors[first]):
                raise RecipeError(f"tied: '{name}' is not a second name of the tensor '{first}'")
        model = replace(cls.of(tensors, wire=wire, tied=tied), architecture=dict(architecture or {}))
        specs = {name: spec for name, spec in model.specs().items() if name not in model.tied}
        if isinstance(method, Schedule):
            method.check(specs, architecture)
            return model
        planned = merged_specs(method, specs)
        if exchange_of(method) is not None:
            if tied:
                raise RecipeError(f"tied: {method} merges adapters, whose factors are not tied")
            require_apart(specs)
        elif planned is not None and planned != specs:
            changed = next(name for name in [*planned, *specs] if planned.get(name) != specs.get(name))
            raise RecipeError(f"{method} changes the model's tensors ('{changed}'), which a run cannot carry on with")
        return model

    @classmethod
    def of(
        cls,
        tensors: Mapping[str, Tensor],
        *,
        wire: torch.dtype | None = None,
        dtypes: Mapping[str, torch.dtype] | None = None,
        tied: Mapping[str, str] | None = None,
        encoded: Encoded | None = None,
    ) -> GlobalModel:
        """The model with these values.

        Args:
            tensors: in any precision. They become the model's own.
            wire: the floating dtype that clients are sent; None for each tensor's own.
            dtypes: the base's; by default those of `tensors`.
            tied: tied weights.
            encoded: the bytes into which some of the tensors look.

        Raises:
            MergeError: if a value does not fit the dtype that it is sent in.
        """
        dtypes = {name: (dtypes or {}).get(name, tensor.dtype) for name, tensor in tensors.items()}
        sent, kept, data = {}, {}, dict(encoded or {})
        for name, tensor in tensors.items():
            dtype = wire if wire is not None and tensor.is_floating_point() else dtypes[name]
            if dtype == tensor.dtype:
                sent[name] = tensor
                continue
            sent[name], whole = _blank(TensorSpec(tuple(tensor.shape), dtype))
            if whole is not None:
                data[name, dtype] = whole
            if not _converted(tensor, sent[name]) and tensor.is_floating_point():
                raise MergeError(f"tensor '{name}': the model does not fit {str(dtype).removeprefix('torch.')}")
            if tensor.is_floating_point():
                kept[name] = tensor.to(compute_dtype(tensor.dtype))
        return cls(sent, kept, dtypes, dict(tied or {}), data)

    def specs(self) -> dict[str, TensorSpec]:
        """Names, shapes and dtypes as clients see them."""
        return {name: TensorSpec.of(tensor) for name, tensor in self.sent.items()}

    def master(self) -> dict[str, Tensor]:
        """The model as it is kept: float32 where the base or what is sent is narrower."""
        return {name: self.kept.get(name, tensor) for name, tensor in self.sent.items()}

    def tensors(self) -> dict[str, Tensor]:
        """The model in the base's dtypes."""
        return {
            name: tensor if tensor.dtype == self.dtypes[name] else self.kept.get(name, tensor).to(self.dtypes[name])
            for name, tensor in self.sent.items()
        }

    def merged(
        self,
        method: MergeMethod,
        updates: tuple[Update, ...],
        *,
        seed: int,
        round_number: int,
        wire: torch.dtype | None = None,
        tuner: Tuner | None = None,
    ) -> tuple[GlobalModel, MergeReport]:
        """The next global model.

        The merged delta is what the clients did to `sent`; it is added to the master, or the method's server optimizer
        steps from the master along it. Before that, `tuner` chooses how far to go along it.

        Raises:
            MergeError: as `execute` and `of`.
        """
        if exchange_of(method) is not None:
            return self._merged_adapter(method, updates, seed, round_number, wire)
        sink = self.sink()
        cohort = Cohort(MemorySource(self.sent, self.tied), updates, seed, round_number)
        report = execute(method, cohort, sink, master=True)
        report = self.tuned(sink, report, tuner)
        return self.next(sink, wire=wire, optimized=optimizer_of(method)), report

    def tuned(self, merged: EncodedSink, report: MergeReport, tuner: Tuner | None) -> MergeReport:
        """Scale the merged delta as scores best, in place; gives the report with what was tried."""
        if tuner is None:
            return report
        found = tune(tuner, merged.tensors, self.sent, self.dtypes, self.kept, self.tied)
        return replace(report, found={**report.found, "auto_scale": found})

    def _merged_adapter(
        self, method: MergeMethod, updates: tuple[Update, ...], seed: int, round_number: int, wire: torch.dtype | None
    ) -> tuple[GlobalModel, MergeReport]:
        """The next global adapter, whose ranks may be others. Its products take the place of those before.

        What clients were not sent of the master for lack of precision is not carried on: the factors are others after
        every round, and so is what rounding does to them.
        """
        sink = MemorySink()
        cohort = Cohort(MemorySource(self.master(), {}), updates, seed, round_number)
        report = execute(method, cohort, sink, master=True)
        adapter, residual, reports = parted(sink.tensors)
        tensors = {**adapter, **{RESIDUAL + name: tensor for name, tensor in residual.items()}}
        dtypes = {name: self.dtypes[name.removeprefix(RESIDUAL)] for name in tensors}
        model = GlobalModel.of({n: t.contiguous() for n, t in tensors.items()}, wire=wire, dtypes=dtypes)
        found = {**report.found, "lora-relative-error": relative_error(reports)}
        notes = {**report.notes, **absent_modules(cohort.spec())}
        return model, replace(report, notes=notes, found=found)

    def restructured(
        self,
        method: MergeMethod,
        updates: tuple[Update, ...],
        *,
        seed: int,
        round_number: int,
        wire: torch.dtype | None = None,
    ) -> tuple[GlobalModel, MergeReport]:
        """The next global model by a method that changes names and shapes, and its new architecture.

        What the master has beyond what clients were sent (the rest of a rounding) does not go over.

        Raises:
            MergeError: as `execute` and `of`, or if the method does not fit the architecture.
        """
        base = {name: tensor.to(self.dtypes[name]) for name, tensor in self.sent.items()}
        cohort = Cohort(MemorySource(base, self.tied), updates, seed, round_number)
        architecture = dict(self.architecture)
        if architecture:
            try:
                architecture = reconfigure(architecture, method, len(updates))
            except RecipeError as error:  # so many clients could not be known before
                raise MergeError(str(error)) from None
        sink = MemorySink()
        report = execute(method, cohort, sink, master=True)
        dtypes = {output.name: output.spec.dtype for output in method.plan(cohort.spec())}
        tied = {name: first for name, first in self.tied.items() if {name, first} <= sink.tensors.keys()}
        dtypes |= {name: dtypes[first] for name, first in tied.items()}
        model = GlobalModel.of(sink.tensors, wire=wire, dtypes=dtypes, tied=tied)
        return replace(model, architecture=architecture), report

    def part(self, names: Collection[str]) -> GlobalModel:
        """The model with some of its tensors alone, for a round in which clients train only these.

        Raises:
            RecipeError: if of two tied names only one is there.
        """
        for name, first in self.tied.items():
            if (name in names) != (first in names):
                raise RecipeError(f"train: '{name}' and '{first}' are one tensor: wanted both or neither")
        wanted = [name for name in self.sent if name in names]
        return replace(
            self,
            sent={name: self.sent[name] for name in wanted},
            kept={name: self.kept[name] for name in wanted if name in self.kept},
            dtypes={name: self.dtypes[name] for name in wanted},
            tied={name: first for name, first in self.tied.items() if name in wanted},
            encoded={key: data for key, data in self.encoded.items() if key[0] in wanted},
        )

    def with_part(self, part: GlobalModel) -> GlobalModel:
        """The model with the tensors of `part` in place of its own; all else keeps its bits."""
        return replace(
            self,
            sent={name: part.sent.get(name, tensor) for name, tensor in self.sent.items()},
            kept={n: t for n, t in self.kept.items() if n not in part.sent} | dict(part.kept),
            encoded={key: data for key, data in self.encoded.items() if key[0] not in part.sent} | dict(part.encoded),
            optimizer_state=part.optimizer_state,
        )

    def sink(self) -> EncodedSink:
        """Where the model that comes after this one is merged to."""
        return EncodedSink({name: {self.dtypes[name], tensor.dtype} for name, tensor in self.sent.items()})

    def next(
        self, merged: EncodedSink, *, wire: torch.dtype | None = None, optimized: ServerOptimized | None = None
    ) -> GlobalModel:
        """The model after this one.

        Args:
            merged: what was made of `sent`; what stands in the master beyond that is added to it, in place.
            wire: as for `of`.
            optimized: the method with its server optimizer, whose pseudo-gradient the merged delta then is.

        Raises:
            MergeError: as `of`.
        """
        state: Mapping[str, Tensor] = {}
        stepped: set[str] = set()
        if optimized is not None:
            own = {name: tensor for name, tensor in merged.tensors.items() if name not in self.tied}
            stepped = {
                name for name, tensor in own.items() if tensor.is_floating_point() and optimized.steps_along(name)
            }
            dtypes = {name: self.sent[name].dtype for name in stepped}
            state = take_step(optimized, own, self.sent, self.master(), self.optimizer_state, dtypes)
            for name, first in self.tied.items():
                if first in stepped:
                    merged.tensors[name].copy_(merged.tensors[first])
                    stepped.add(name)
        for name, merged_tensor in merged.tensors.items():
            if name in self.kept and name not in stepped:
                _add_difference(merged_tensor, self.kept[name], self.sent[name])
        model = GlobalModel.of(merged.tensors, wire=wire, dtypes=self.dtypes, tied=self.tied, encoded=merged.encoded)
        return replace(model, optimizer_state=state, architecture=self.architecture)


class EncodedSink(MemorySink):
    """A sink in memory whose tensors look into the bytes as which they travel, where they travel in the merge's dtype.

    Args:
        dtypes: those in which each tensor travels: as it is given out, and as it is sent.
    """

    def __init__(self, dtypes: Mapping[str, Set[torch.dtype]]) -> None:
        super().__init__()
        self.encoded: dict[tuple[str, torch.dtype], bytes] = {}
        self._dtypes = dtypes

    def begin(self, specs: Mapping[str, TensorSpec]) -> None:
        """Make room for these tensors."""
        for name, spec in specs.items():
            if spec.dtype not in self._dtypes.get(name, ()):
                self.tensors[name] = torch.empty(spec.shape, dtype=spec.dtype)
                continue
            self.tensors[name], data = _blank(spec)
            if data is not None:
                self.encoded[name, spec.dtype] = data

    def abort(self) -> None:
        """Forget what was written."""
        super().abort()
        self.encoded = {}


def _blank(spec: TensorSpec) -> tuple[Tensor, bytes | None]:
    """An empty tensor, and the bytes into which it looks if it is one that travels."""
    made = blank(spec) if spec.dtype in DTYPES.values() else None
    if made is None:
        return torch.empty(spec.shape, dtype=spec.dtype), None
    data, flat_S = made
    return flat_S.view(spec.shape), data


def _add_difference(merged: Tensor, kept: Tensor, sent: Tensor) -> None:
    """merged += kept - sent, in place: what clients were not sent of the master stays in it."""
    merged_S, kept_S, sent_S = merged.view(-1), kept.reshape(-1), sent.reshape(-1)

    def add(piece: slice) -> None:
        merged_S[piece] += kept_S[piece] - sent_S[piece].to(kept_S.dtype)

    _for_pieces(add, merged_S.numel())


def _converted(tensor: Tensor, into: Tensor) -> bool:
    """Write a tensor into one of another dtype; false if a number has no place in that."""
    from_S, into_S = tensor.reshape(-1), into.view(-1)
    dtype = compute_dtype(tensor.dtype)

    def convert(piece: slice) -> bool:
        into_S[piece] = from_S[piece].to(into_S.dtype)
        return not into_S.is_floating_point() or bool(into_S[piece].to(dtype).abs().amax().isfinite())

    return all(_for_pieces(convert, from_S.numel()))


def _all_finite(tensor: Tensor) -> bool:
    tensor_S, dtype = tensor.reshape(-1), compute_dtype(tensor.dtype)
    pieces = _for_pieces(lambda piece: bool(tensor_S[piece].to(dtype).abs().amax().isfinite()), tensor_S.numel())
    return all(pieces)


def _for_pieces(work: Callable[[slice], bool | None], numel: int) -> list[bool | None]:
    """Do elementwise work on all of a tensor, a piece at a time; torch has its threads for each."""
    return [work(slice(start, min(start + _PIECE, numel))) for start in range(0, numel, _PIECE)]
