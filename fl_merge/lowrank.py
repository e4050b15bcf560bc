"""The shape of a merge method for LoRA adapters: it merges the products B A of one module, whatever their ranks.

An adapter's tensors come in pairs (`fl_merge.pairs`). Here every scaling (alpha / rank) is in B already:
`fl_merge.adapters` puts it there. The base of such a cohort is an adapter too, the one that clients were sent, or a
template of zeros; a delta is a client's whole product.

The other tensors of an adapter (modules_to_save, biases) are averaged over the clients that have them.

Beside A and B the plan gives each module a `x.lora_report`: what was cut off. Suffixes as in `ops.lowrank`.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fl_merge.errors import MergeError, RecipeError
from fl_merge.ops.lowrank import Compressed, Factors, none
from fl_merge.pairs import RESIDUAL, SUFFIXES, Pair, factors, pairs_of
from fl_merge.shapes import Copy
from fl_merge.types import BASE, CohortSpec, Output, Read, TensorSpec, Whole, compute_dtype

Missing = Literal["zero", "renormalise"]

REPORT = ".lora_report"
"""After the name of a module: what was cut off, the norm of the whole, the rank that is left."""

SCALINGS = "lora-scalings"
"""The metric in which a client's scalings stand, one a module in order of name, for methods that need them to agree."""


@dataclass(frozen=True)
class Module:
    """One module of a cohort of adapters: all that may be known before its tensors are read.

    Args:
        name: of the module.
        outputs, inputs: rows and columns of its products.
        spec: the clients that take part, with their weights; the cohort's settings.
        ranks_P: of each, 0 for one that does not have the module.
        scalings_P: of each, where it is known; NaN where not.
        base_rank: of the adapter that was sent.
    """

    name: str
    outputs: int
    inputs: int
    spec: CohortSpec
    ranks_P: tuple[int, ...]
    scalings_P: tuple[float, ...]
    base_rank: int

    @property
    def full_rank(self) -> int:
        """The rank that no result can exceed but by padding."""
        return max(1, min(sum(self.ranks_P), self.outputs, self.inputs))


class Merger(NamedTuple):
    """How one module is merged: known when the cohort is.

    Args:
        rank: of the result, at most; what is less is padded with zeros.
        merge: from the clients' factors and those of the base to the result.
        survey: called before with a function that gives the clients' factors of all modules by name, for methods that
            measure the whole model; it is called for each module, from any thread.
        held: bytes that are in memory meanwhile beside factors, roughly.
    """

    rank: int
    merge: Callable[[Sequence[Factors], Factors], Compressed]
    survey: Callable[[Callable[[], Mapping[str, Sequence[Factors]]]], None] | None = None
    held: int = 0


@dataclass(frozen=True)
class Exchange:
    """What a federation does with a method for adapters: clients may have ranks of their own.

    Args:
        ordered: whether a client is sent the leading singular values of the product that its rank has room for; if
            not, the factors as they are, which all clients have in one rank.
        prefix: whether clients may have lower ranks all the same, and are sent the first rows and columns.
        share: which factors travel: clients keep the other one.
        trains: which factors clients train in a round, by its number ("A", "B" or "AB").
    """

    ordered: bool = True
    prefix: bool = False
    share: Literal["AB", "A", "B"] = "AB"
    trains: Callable[[int], str] = field(default=lambda round_number: "AB")


@dataclass(frozen=True)
class Products:
    """A method that merges the products of each module.

    Args:
        mergers: from the modules of the cohort to how each is merged, by name. Refuses a cohort that does not fit.
        missing: what a client without a module does to it: "zero" counts it as a product of zeros, "renormalise"
            leaves it out and shares its weight among the others.
        exchange: how it travels in a federation.
        second: from a module and the rank of the second adapter that was sent (0 for none) to how that is made, where
            there is one (`lora_residual`).
        keeps: the rank to which a sum of products is cut, where that is all that the method does: the sum can then be
            kept while adapters come in (`fl_merge.running_products`).
        sends: what clients send beside their adapters, as in `MethodEntry`.
    """

    mergers: Callable[[Sequence[Module]], Mapping[str, Merger]]
    missing: Missing = "zero"
    exchange: Exchange = Exchange()
    second: Callable[[Module, int], Merger] | None = None
    keeps: int | None = None
    sends: tuple[str, ...] = ()

    def merged_modules(self, spec: CohortSpec) -> list[tuple[Module, Merger | None]]:
        """Every module of the adapter and how it is merged; None for one that no client has.

        Raises:
            RecipeError, MergeError: as `plan`.
        """
        return [(module, merger) for _, module, merger, _ in self._modules(spec, *_adapter_of(spec))]

    def plan(self, spec: CohortSpec) -> Iterator[Output]:
        """A, B and the report of each module, then the other tensors.

        Raises:
            RecipeError: if the base is no adapter.
            MergeError: if a client's tensors are no factors of the base's modules, or the method refuses the cohort.
        """
        pairs, others = _adapter_of(spec)
        spec = replace(spec, clients_N=spec.clients_N or (spec.tensors,) * len(spec.client_ids))
        found = self._modules(spec, pairs, others)
        surveyed = {module.name: (module, reads) for _, module, merger, reads in found if merger is not None}
        for pair, module, merger, reads in found:
            if merger is None:
                yield from _kept(pair)
                continue
            base = (Read(BASE, pair.a), Read(BASE, pair.b))
            yield from _outputs(pair, module, merger, base, reads, surveyed)
            if self.second is not None:
                yield from self._second(spec, pair, module, reads)
        for name in others:
            yield _averaged(name, spec)

    def _modules(
        self, spec: CohortSpec, pairs: Mapping[str, Pair], others: Sequence[str]
    ) -> list[tuple[Pair, Module, Merger | None, tuple[Read, ...]]]:
        ours = {*others, *(name for pair in pairs.values() for name in (pair.a, pair.b))}
        each_N = spec.clients_N or (spec.tensors,) * len(spec.client_ids)
        clients = [pairs_of({n: t for n, t in each.items() if n in ours})[0] for each in each_N]
        modules = [self._module(spec, pair, clients) for pair in pairs.values()]
        mergers = self.mergers([module for module in modules if any(module.ranks_P)])
        return [
            (pair, module, mergers.get(module.name), _reads(module, spec, clients))
            for pair, module in zip(pairs.values(), modules, strict=True)
        ]

    def _module(self, spec: CohortSpec, pair: Pair, clients: Sequence[Mapping[str, Pair]]) -> Module:
        ranks, scalings = [], []
        for at, theirs in enumerate(clients):
            found = theirs.get(pair.module)
            ranks.append(0 if found is None else found.rank)
            scalings.append(_scaling(spec, at, pair.module, sorted(theirs)))
            if found is None:
                continue
            problem = found.problem()
            if problem is None and (found.outputs, found.inputs) != (pair.outputs, pair.inputs):
                problem = (
                    f"a product of {found.outputs} x {found.inputs}, the adapter's is {pair.outputs} x {pair.inputs}"
                )
            if problem is not None:
                raise MergeError(f"client '{spec.client_ids[at]}', module '{pair.module}': {problem}")
        part = spec
        if self.missing == "renormalise" and any(ranks):
            who = [at for at, rank in enumerate(ranks) if rank]
            total = math.fsum(spec.weights_N[at] for at in who)
            part = replace(
                spec,
                client_ids=tuple(spec.client_ids[at] for at in who),
                weights_N=tuple(spec.weights_N[at] / total for at in who),
            )
            ranks, scalings = [ranks[at] for at in who], [scalings[at] for at in who]
        return Module(pair.module, pair.outputs, pair.inputs, part, tuple(ranks), tuple(scalings), pair.rank)

    def _second(self, spec: CohortSpec, pair: Pair, module: Module, reads: tuple[Read, ...]) -> Iterator[Output]:
        assert self.second is not None
        there = {n.removeprefix(RESIDUAL): t for n, t in spec.tensors.items() if n.startswith(RESIDUAL)}
        known = pairs_of(there)[0].get(pair.module)
        merger = self.second(module, 0 if known is None else known.rank)
        second = replace(pair, module=RESIDUAL + pair.module, a=RESIDUAL + pair.a, b=RESIDUAL + pair.b)
        base: tuple[Read, ...] = () if known is None else (Read(BASE, second.a), Read(BASE, second.b))
        yield from _outputs(second, module, merger, base, reads, {})


def _adapter_of(spec: CohortSpec) -> tuple[dict[str, Pair], list[str]]:
    """The pairs of the adapter that was sent, without its residual, and the names of its other tensors."""
    ours = {name: tensor for name, tensor in spec.tensors.items() if not name.startswith(RESIDUAL)}
    pairs, others = pairs_of(ours)
    if not pairs:
        shown = ", ".join(list(spec.tensors)[:4])
        raise RecipeError(f"a method for LoRA adapters: found no 'lora_A' and 'lora_B' among the tensors ({shown})")
    return pairs, others


def _scaling(spec: CohortSpec, at: int, module: str, modules: Sequence[str]) -> float:
    """What a client says its scaling of a module is; NaN if it says nothing."""
    said = spec.metrics_N[at].get(SCALINGS) if at < len(spec.metrics_N) else None
    if not isinstance(said, list) or len(said) != len(modules) or module not in modules:
        return math.nan
    return float(said[modules.index(module)])


def _reads(module: Module, spec: CohortSpec, clients: Sequence[Mapping[str, Pair]]) -> tuple[Read, ...]:
    """A and B of each client that takes part in a module and has it."""
    who = [
        at for at, each in enumerate(spec.client_ids) if each in module.spec.client_ids and module.name in clients[at]
    ]
    return tuple(Read(at, name) for at in who for name in (clients[at][module.name].a, clients[at][module.name].b))


def _parts(module: Module, tensors: Iterable[Tensor]) -> list[Factors]:
    """The clients' factors from what was read of them; those without the module have zeros of rank 0."""
    theirs = iter(tensors)
    nothing = none(module.outputs, module.inputs)
    return [factors(next(theirs), next(theirs)) if rank else nothing for rank in module.ranks_P]


def _kept(pair: Pair) -> Iterator[Output]:
    """A module of the base that no client has: it stays as it is."""
    yield Output(pair.a, pair.a_spec, (Read(BASE, pair.a),), Copy())
    yield Output(pair.b, pair.b_spec, (Read(BASE, pair.b),), Copy())


class _Once:
    """One merge of a module, of which each of its outputs takes a part; forgotten with the last."""

    def __init__(self, work: Callable[[Sequence[Tensor]], tuple[Tensor, ...]], parts: int) -> None:
        self._work, self._left = work, parts
        self._lock = threading.Lock()
        self._made: tuple[Tensor, ...] | None = None

    def part(self, number: int) -> Callable[..., Tensor]:
        def taken(*tensors: Tensor) -> Tensor:
            with self._lock:
                made = self._made if self._made is not None else self._work(tensors)
                self._left -= 1
                self._made = made if self._left else None
                return made[number]

        return taken


def _outputs(
    pair: Pair,
    module: Module,
    merger: Merger,
    base: tuple[Read, ...],
    reads: tuple[Read, ...],
    surveyed: Mapping[str, tuple[Module, tuple[Read, ...]]],
) -> Iterator[Output]:
    a_spec, b_spec = pair.of_rank(merger.rank)
    own = len(base) + len(reads)

    def work(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        sent = factors(tensors[0], tensors[1]) if base else none(module.outputs, module.inputs)
        if merger.survey is not None:
            rest = tensors[own:]

            def everything() -> dict[str, list[Factors]]:
                each = iter(rest)
                return {name: _parts(other, [next(each) for _ in theirs]) for name, (other, theirs) in surveyed.items()}

            merger.survey(everything)
        merged = merger.merge(_parts(module, tensors[len(base) : own]), sent)
        b_OR, a_RI = merged.factors
        padded_a = a_RI.new_zeros(merger.rank, module.inputs)
        padded_b = b_OR.new_zeros(module.outputs, merger.rank)
        padded_a[: len(a_RI)], padded_b[:, : b_OR.shape[1]] = a_RI, b_OR
        report = torch.tensor([merged.error, merged.norm, float(merged.factors.rank)], dtype=torch.float64)
        wide = compute_dtype(a_spec.dtype), compute_dtype(b_spec.dtype)
        return padded_a.to(wide[0]).view(a_spec.shape), padded_b.to(wide[1]).view(b_spec.shape), report

    once = _Once(work, 3)
    others = () if merger.survey is None else tuple(read for _, theirs in surveyed.values() for read in theirs)
    everything = (*base, *reads, *others)
    yield Output(pair.a, a_spec, everything, Whole(once.part(0)))
    yield Output(pair.b, b_spec, everything, Whole(once.part(1)))
    yield Output(pair.module + REPORT, TensorSpec((3,), torch.float64), everything, Whole(once.part(2)))


def _averaged(name: str, spec: CohortSpec) -> Output:
    """Another tensor: the weighted average over those that have it, whole numbers the base's."""
    tensor = spec.tensors[name]
    who = [at for at, each in enumerate(spec.clients_N) if name in each]
    if not who or not tensor.is_floating:
        return Output(name, tensor, (Read(BASE, name),), Copy())
    for at in who:
        if spec.clients_N[at][name].shape != tensor.shape:
            raise MergeError(
                f"client '{spec.client_ids[at]}', tensor '{name}': shape {spec.clients_N[at][name].shape}, the "
                f"adapter's is {tensor.shape}"
            )
    total = math.fsum(spec.weights_N[at] for at in who)
    shares = [spec.weights_N[at] / total for at in who]

    def average(*tensors: Tensor) -> Tensor:
        first, *rest = tensors
        base = first.to(torch.float64)
        result = base.clone()
        for tensor, share in zip(rest, shares[1:], strict=True):
            result += (tensor.to(torch.float64) - base) * share
        return result.to(compute_dtype(first.dtype))

    return Output(name, tensor, tuple(Read(at, name) for at in who), Whole(average))


def parted(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """What a merge of adapters has written: the adapter, its residual, and the reports by module.

    Columns of zeros at the end, with which an output is padded to the rank that was planned, are cut off.
    """
    reports = {name.removesuffix(REPORT): t for name, t in tensors.items() if name.endswith(REPORT)}
    rest = {name: tensor for name, tensor in tensors.items() if not name.endswith(REPORT)}
    residual = {name.removeprefix(RESIDUAL): t for name, t in rest.items() if name.startswith(RESIDUAL)}
    main = {name: tensor for name, tensor in rest.items() if not name.startswith(RESIDUAL)}
    ours = {module: report for module, report in reports.items() if not module.startswith(RESIDUAL)}
    theirs = {m.removeprefix(RESIDUAL): report for m, report in reports.items() if m.startswith(RESIDUAL)}
    return _trimmed(main, ours), _trimmed(residual, theirs), reports


def _trimmed(tensors: dict[str, Tensor], reports: Mapping[str, Tensor]) -> dict[str, Tensor]:
    pairs, _ = pairs_of({name: TensorSpec.of(tensor) for name, tensor in tensors.items()})
    for module, report in reports.items():
        pair, kept = pairs[module], max(1, int(report[2]))
        tensors[pair.a], tensors[pair.b] = tensors[pair.a][:kept], tensors[pair.b][:, :kept].contiguous()
    return tensors


def relative_error(reports: Mapping[str, Tensor]) -> float:
    """What was cut off in all modules, relative to the norm of all: Frobenius norms."""
    error = math.sqrt(math.fsum(float(report[0]) ** 2 for report in reports.values()))
    norm = math.sqrt(math.fsum(float(report[1]) ** 2 for report in reports.values()))
    return error / norm if norm else 0.0


def absent_modules(spec: CohortSpec) -> dict[str, str]:
    """Notes on the modules that only some clients have, by name of the A."""
    notes = {}
    for name in spec.tensors:
        if not name.endswith(tuple(SUFFIXES)) or name.startswith(RESIDUAL):
            continue
        absent = [who for who, each in zip(spec.client_ids, spec.clients_N, strict=True) if name not in each]
        if absent:
            notes[name] = f"clients without this module: {', '.join(absent)}"
    return notes
