"""Merge adapters, without the model that they belong to."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fl_merge.adapters.config import AdapterConfig, merged_config
from fl_merge.adapters.folder import MANIFEST, Adapter, write_adapter
from fl_merge.adapters.source import fused
from fl_merge.check import check_finite, check_metrics
from fl_merge.errors import MergeError, RecipeError, UpdateError, counted
from fl_merge.execute import execute, worker_pool
from fl_merge.lowrank import SCALINGS, parted, relative_error
from fl_merge.merging import shares
from fl_merge.method import METHODS, as_method, sends
from fl_merge.pairs import RESIDUAL, Pair, pairs_of
from fl_merge.store import MemorySink
from fl_merge.types import Cohort, MergeMethod, TensorSpec, Update

RESIDUAL_FOLDER = "residual"


@dataclass(frozen=True)
class MergedAdapter:
    """What came of a merge: plain factors (scaling 1), and what is to be said of it.

    Args:
        tensors: float32, or float64 of adapters in that; fused experts one by one.
        residual: a second adapter that belongs to it, empty but for `lora_residual`.
        configs: of the adapters that were merged, by name.
        dtype: in which they were stored.
        manifest: inputs with hashes, ranks and weights; per module the rank and what was cut off; notes.
    """

    tensors: Mapping[str, Tensor]
    residual: Mapping[str, Tensor]
    configs: Mapping[str, Any]
    dtype: torch.dtype
    manifest: Mapping[str, Any] = field(repr=False)

    @property
    def notes(self) -> list[str]:
        """What an operator has to know: modules that only some adapters have, what was cut."""
        return list(self.manifest["notes"])

    @property
    def error(self) -> float:
        """The relative error of the cut: the Frobenius norm of what was cut off over that of the whole."""
        return float(self.manifest["relative_error"])

    def save(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write it so that `PeftModel.from_pretrained` loads it: scalings baked in, alpha = rank, rsLoRA off.

        Args:
            folder: made if it is not there; a residual goes to the folder `residual` in it, an adapter of its own.
            dtype: of the factors; by default that of the adapters that were merged.

        Raises:
            MergeError: if a value does not fit the dtype, or the folder cannot be written.
        """
        path = Path(folder)
        for tensors, where in ((self.tensors, path), (self.residual, path / RESIDUAL_FOLDER)):
            if tensors:
                self._write(tensors, where, dtype or self.dtype)

    def _write(self, tensors: Mapping[str, Tensor], folder: Path, dtype: torch.dtype) -> None:
        whole, ranks, parameters = fused(tensors)
        theirs = [set(config.modules) for config in self.configs.values()]
        alike = all(modules == theirs[0] for modules in theirs) and set(ranks) == theirs[0]
        config = merged_config({name: each.config for name, each in self.configs.items()}, ranks, parameters, alike)
        written = {name: _narrowed(name, tensor, dtype) for name, tensor in whole.items()}
        write_adapter(folder, config, written, dict(self.manifest))


@dataclass(frozen=True)
class _Origin:
    """The configuration of an adapter that was merged, and which modules it has in its file."""

    config: Any
    modules: frozenset[str]


def _narrowed(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    narrow = tensor.to(dtype)
    if not torch.isfinite(narrow.float()).all():
        raise MergeError.of_value(name, float(tensor.abs().max()), str(dtype))
    return narrow.contiguous()


class _Template:
    """The base of a merge of files: zeros under all names, and the first adapter's tensors that are no factors."""

    def __init__(self, adapters: Sequence[Adapter]) -> None:
        self._specs: dict[str, TensorSpec] = {}
        self._adapters = adapters
        for adapter in adapters:
            for name, spec in adapter.plain.specs().items():
                self._specs.setdefault(name, spec)

    def specs(self) -> Mapping[str, TensorSpec]:
        return self._specs

    def read(self, name: str) -> Tensor:
        spec = self._specs[name]
        if ".lora_" in name:
            return torch.zeros((), dtype=spec.dtype).expand(spec.shape)
        return next(each for each in self._adapters if name in each.plain.specs()).plain.read(name)

    def aliases(self) -> Mapping[str, str]:
        return {}


def merge_adapters(
    method: MergeMethod | str,
    adapters: Sequence[Adapter] | Mapping[str, Adapter],
    weights: Sequence[float] | Mapping[str, float] | None = None,
    seed: int = 0,
    *,
    metrics: Mapping[str, Mapping[str, Any]] | None = None,
    threads: int | None = None,
) -> MergedAdapter:
    """Merge adapters into one.

    Args:
        method: for adapters, such as `lora_svd(rank=16)`, or its name.
        adapters: a list (they are then called by their folders, or "0", "1", ... where two have one name) or by name.
        weights: one positive number an adapter, in the same form; equal shares if left out.
        seed: of the draws of methods that draw.
        metrics: what each client reported, by name, for methods that need it (`fednova`: `local-steps`).
        threads: as for `execute`.

    Raises:
        RecipeError: for weights that do not fit, adapters whose configurations disagree, or a method for models.
        UpdateError: if an adapter's values are not finite.
        MergeError: if the method cannot merge these.
    """
    chosen, named, cohort = adapter_cohort(method, adapters, weights, seed, metrics=metrics)
    with worker_pool(threads or os.cpu_count() or 1) as pool:
        for _ in pool.map(_require_finite, cohort.updates):
            pass
    origins = {update.client_id: _origin(named[update.client_id]) for update in cohort.updates}
    sink = MemorySink()
    execute(chosen, cohort, sink, threads=threads, master=True)
    tensors, residual, reports = parted(sink.tensors)
    wide = max((each.dtype for each in named.values()), key=lambda dtype: dtype.itemsize)
    manifest = _manifest(chosen, cohort, named, tensors, reports)
    return MergedAdapter(tensors, residual, origins, wide, manifest)


def adapter_cohort(
    method: MergeMethod | str,
    adapters: Sequence[Adapter] | Mapping[str, Adapter],
    weights: Sequence[float] | Mapping[str, float] | None = None,
    seed: int = 0,
    *,
    metrics: Mapping[str, Mapping[str, Any]] | None = None,
) -> tuple[MergeMethod, dict[str, Adapter], Cohort]:
    """The method, the adapters by name, and what of them is merged; no value has been read.

    Args, raises: as `merge_adapters`.
    """
    chosen = as_method(method)
    entry = METHODS.get(getattr(chosen, "name", ""))
    if entry is not None and entry.merges != "adapters":
        raise RecipeError(
            f"found {chosen}, a method for models; wanted one for adapters, such as lora_svd(rank=16) or "
            f"lora_merge(method='{entry.name}')"
        )
    if not adapters:
        raise RecipeError("there is nothing to merge: no adapter")
    named = dict(adapters) if isinstance(adapters, Mapping) else _named(adapters)
    share = shares(list(named), weights)
    said = {name: {**(metrics or {}).get(name, {}), **_scalings(each)} for name, each in named.items()}
    updates = tuple(Update(name, share[name], each.plain, said[name]) for name, each in named.items())
    for update in updates:
        try:
            check_metrics(update.metrics, sends(chosen))
        except UpdateError as error:
            raise error.of_client(update.client_id) from None
    cohort = Cohort(
        _Template([named[update.client_id] for update in Cohort(_Nothing(), updates).updates]), updates, seed
    )
    # What can be refused of the configurations is refused before anything is computed.
    merged_config({name: each.config for name, each in named.items()}, {"x": 1}, set(), False)
    return chosen, named, cohort


def plain_adapter(tensors: Mapping[str, Tensor], config: Mapping[str, Any], where: str = "config") -> MergedAdapter:
    """Plain factors, such as the global adapter of a federation, as an adapter that can be saved for PEFT.

    Args:
        tensors: scaling 1; a residual (`residual.` before its names) becomes the second adapter.
        config: an adapter_config.json of a client's: its targets and its model are taken, its rank and alpha are not.
        where: for messages.

    Raises:
        RecipeError: for a configuration that cannot be merged, or tensors that are no adapter.
    """
    read = AdapterConfig.read(config, where)
    residual = {name.removeprefix(RESIDUAL): t for name, t in tensors.items() if name.startswith(RESIDUAL)}
    main = {name: tensor for name, tensor in tensors.items() if not name.startswith(RESIDUAL)}
    try:
        pairs, _ = pairs_of({name: TensorSpec.of(tensor) for name, tensor in main.items()})
    except MergeError as error:
        raise RecipeError(str(error)) from None
    if not pairs:
        raise RecipeError(f"found no 'lora_A' and 'lora_B' among {counted(len(main), 'tensor')}; wanted an adapter")
    origin = _Origin(read, frozenset(module.partition("[")[0] for module in pairs))
    modules = {module: {"rank": pair.rank} for module, pair in pairs.items()}
    manifest = {"made_by": "fl_merge", "inputs": [], "relative_error": 0.0, "notes": [], "modules": modules}
    dtype = next(tensor.dtype for name, tensor in main.items() if ".lora_" in name)
    return MergedAdapter(main, residual, {where: origin}, dtype, manifest)


class _Nothing:
    def specs(self) -> Mapping[str, TensorSpec]:
        return {}

    def read(self, name: str) -> Tensor:
        raise KeyError(name)

    def aliases(self) -> Mapping[str, str]:
        return {}


def _named(adapters: Sequence[Adapter]) -> dict[str, Adapter]:
    names = [adapter.name for adapter in adapters]
    if len(set(names)) == len(names):
        return dict(zip(names, adapters, strict=True))
    return {str(number): adapter for number, adapter in enumerate(adapters)}


def _scalings(adapter: Adapter) -> dict[str, Any]:
    return {SCALINGS: [adapter.plain.scalings[module] for module in sorted(adapter.plain.scalings)]}


def _origin(adapter: Adapter) -> _Origin:
    modules = {module.partition("[")[0] for module in adapter.plain.scalings}
    return _Origin(adapter.config, frozenset(modules))


def _require_finite(update: Update) -> None:
    for name, spec in update.tensors.specs().items():
        if spec.is_floating:
            try:
                check_finite(name, update.tensors.read(name), spec.dtype, None)
            except UpdateError as error:
                raise error.of_client(update.client_id) from None


def _manifest(
    method: MergeMethod,
    cohort: Cohort,
    named: Mapping[str, Adapter],
    tensors: Mapping[str, Tensor],
    reports: Mapping[str, Tensor],
) -> dict[str, Any]:
    pairs: dict[str, Pair] = pairs_of({name: TensorSpec.of(tensor) for name, tensor in tensors.items()})[0]
    modules = {}
    for module, (error, norm, _) in ((module, report.tolist()) for module, report in sorted(reports.items())):
        rank = pairs[module].rank if module in pairs else int(reports[module][2])
        modules[module] = {"rank": rank, "error": error, "norm": norm, "relative_error": error / norm if norm else 0.0}
    inputs = []
    for update, weight in zip(cohort.updates, cohort.weights_N, strict=True):
        adapter = named[update.client_id]
        ranks = {module: pair.rank for module, pair in pairs_of(adapter.plain.specs())[0].items()}
        inputs.append(
            {
                "name": update.client_id,
                "sha256": adapter.sha256,
                "weight": weight,
                "ranks": sorted(set(ranks.values())),
                "scalings": sorted(set(adapter.plain.scalings.values())),
                "modules": len(ranks),
            }
        )
    relative = relative_error(reports)
    notes = absent_notes(cohort, method)
    if relative > 1e-6:
        notes.append(f"what was cut off is {relative:.3g} of the norm of the whole")
    return {
        "made_by": "fl_merge",
        "method": str(method),
        "inputs": inputs,
        "relative_error": relative,
        "notes": notes,
        "modules": modules,
    }


def absent_notes(cohort: Cohort, method: MergeMethod) -> list[str]:
    """What becomes of the modules that only some adapters have."""
    missing = getattr(method, "parameters", {}).get("missing", "zero")
    notes = []
    everyone = [update.tensors.specs() for update in cohort.updates]
    for name in cohort.base.specs():
        absent = [u.client_id for u, specs in zip(cohort.updates, everyone, strict=True) if name not in specs]
        if not absent or name.endswith((".lora_B.weight", ".lora_embedding_B")):
            continue
        who = ", ".join(f"'{client}'" for client in absent)
        module = name.removesuffix(".lora_A.weight").removesuffix(".lora_embedding_A")
        factor = module != name
        how = "counts as zero there" if factor and missing == "zero" else "is left out there"
        notes.append(f"module '{module}' is not in {who}: {how}")
    return notes


__all__ = ["MANIFEST", "MergedAdapter", "absent_notes", "adapter_cohort", "merge_adapters"]
