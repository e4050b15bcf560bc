"""Recipes whose models are adapters:

merge_method: lora_svd
parameters: {rank: 16}
models:
  - {model: adapters/hospital, parameters: {weight: 3}}
  - {model: adapters/clinic}
dtype: bfloat16
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch

from fl_merge.adapters import Adapter, MergedAdapter, load_adapter, merge_adapters, require_free
from fl_merge.adapters.merging import absent_notes, adapter_cohort
from fl_merge.errors import MergeError, RecipeError
from fl_merge.hyperparameters import nearest
from fl_merge.lowrank import REPORT, Merger, Module, Products
from fl_merge.method import METHODS, Method, build
from fl_merge.offline.estimate import FIXED, Estimate
from fl_merge.offline.plan import require_models
from fl_merge.types import Output, compute_dtype

_KEYS = ("merge_method", "parameters", "models", "dtype")
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}


def merges_adapters(content: object) -> TypeGuard[Mapping[str, Any]]:
    """Whether a recipe's method is one for adapters and the recipe names its models."""
    if not isinstance(content, Mapping) or "models" not in content:
        return False
    entry = METHODS.get(str(content.get("merge_method")))
    return entry is not None and entry.merges == "adapters"


@dataclass(frozen=True)
class AdapterRecipe:
    """What a recipe for adapters says, checked.

    Args:
        method: that merges.
        adapters: by their folders.
        weights: likewise.
        dtype: of what is written; None for the widest of the adapters'.
    """

    method: Method
    adapters: Mapping[str, Adapter]
    weights: Mapping[str, float]
    dtype: torch.dtype | None


@dataclass(frozen=True)
class AdapterPlan:
    """What a merge of adapters will do.

    Args:
        recipe: of the merge.
        weights: the adapters' shares, in order of name.
        modules: each with how it is merged; None for one that no adapter has.
        outputs: all that is merged, without the reports on what was cut.
        notes: what an operator has to know.
        estimate: of what it takes.
    """

    recipe: AdapterRecipe
    weights: Mapping[str, float]
    modules: tuple[tuple[Module, Merger | None], ...]
    outputs: tuple[Output, ...]
    notes: tuple[str, ...]
    estimate: Estimate


def merge_recipe(
    content: Mapping[str, Any], recipe: Path, folder: Path, *, seed: int, threads: int | None, force: bool
) -> MergedAdapter:
    """Merge the adapters that a recipe names, and write the result.

    Args:
        content: of the recipe's file.
        recipe: that file; adapters are looked for beside it too.
        folder: of the merged adapter.
        seed: of random draws.
        threads: as for `execute`.
        force: replace an adapter that is there.

    Raises:
        RecipeError: naming the recipe, and what is wrong with it; if the method cannot merge these; if the folder is
            taken.
        MergeError: if the result cannot be computed, or the folder cannot be written.
    """
    found = plan_recipe(content, recipe, threads).recipe
    try:
        require_free(folder, [Path(path) for path in found.adapters], force=force)
        merged = merge_adapters(found.method, found.adapters, found.weights, seed, threads=threads)
    except RecipeError as error:
        raise RecipeError(f"recipe '{recipe}': {error}") from None
    merged.save(folder, found.dtype)
    return merged


def plan_recipe(content: Mapping[str, Any], recipe: Path, threads: int | None = None) -> AdapterPlan:
    """What `merge_recipe` will read, do and write; of the adapters' files only the headers are read.

    Raises:
        RecipeError: as `merge_recipe`.
    """
    found = _read(content, recipe)
    try:
        method, _, cohort = adapter_cohort(found.method, found.adapters, found.weights)
        spec = cohort.spec()
        outputs = tuple(output for output in method.plan(spec) if not output.name.endswith(REPORT))
        assert isinstance(found.method.shape, Products)
        modules = tuple(found.method.shape.merged_modules(spec))
    except (RecipeError, MergeError) as error:  # the method and these adapters: what the recipe asks for cannot be
        raise RecipeError(f"recipe '{recipe}': {error}") from None
    dtype = found.dtype or max((each.dtype for each in found.adapters.values()), key=lambda dtype: dtype.itemsize)
    kept = sum(output.spec.numel * compute_dtype(output.spec.dtype).itemsize for output in outputs)
    written = sum(o.spec.numel * (dtype if o.spec.is_floating else o.spec.dtype).itemsize for o in outputs)
    at_once = sorted((_held(module, merger) for module, merger in modules if merger is not None), reverse=True)
    # A, B and the report of a module are made together: so many modules can be in work by that many threads.
    working = sum(at_once[: ((threads or os.cpu_count() or 1) + 1) // 3 + 1])
    read = sum(spec.nbytes for each in found.adapters.values() for spec in each.plain.stored_specs().values())
    shares = dict(zip((update.client_id for update in cohort.updates), cohort.weights_N, strict=True))
    estimate = Estimate(len(outputs), read, written, FIXED + kept + written + working)
    return AdapterPlan(found, shares, modules, outputs, tuple(absent_notes(cohort, method)), estimate)


def _held(module: Module, merger: Merger) -> int:
    """Bytes that merging a module holds at a time, roughly: factors as read, in float64, stacked and decomposed."""
    rank = sum(module.ranks_P)
    return (module.outputs + module.inputs) * (40 * rank + 48 * merger.rank) + 128 * rank * rank + merger.held


def _read(content: Mapping[str, Any], recipe: Path) -> AdapterRecipe:
    where = f"recipe '{recipe}'"
    for key in content:
        if key not in _KEYS:
            raise RecipeError(f"{where}: unknown key '{key}' in a recipe for adapters{nearest(str(key), _KEYS)}")
    dtype = content.get("dtype")
    if dtype is not None and str(dtype).removeprefix("torch.") not in _DTYPES:
        raise RecipeError(f"{where}: dtype: found {dtype!r}, wanted one of {', '.join(_DTYPES)}")
    parameters = content.get("parameters") or {}
    if not isinstance(parameters, Mapping):
        raise RecipeError(f"{where}: parameters: found {parameters!r}, wanted a mapping")
    try:
        method = build(str(content["merge_method"]), **parameters)
        listed = [_entry(entry, recipe.resolve().parent) for entry in _list(content["models"])]
        if len({path for path, _ in listed}) < len(listed):
            raise RecipeError("models: an adapter is named twice; give it a larger weight instead")
        require_models(method, len(listed), "adapter")
        adapters = {str(path): load_adapter(path) for path, _ in listed}
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from None
    weights = {str(path): weight for path, weight in listed}
    return AdapterRecipe(
        method, adapters, weights, None if dtype is None else _DTYPES[str(dtype).removeprefix("torch.")]
    )


def _list(models: object) -> list[Any]:
    if not isinstance(models, list) or not models:
        raise RecipeError(f"models: found {models!r}, wanted a list of adapters' folders")
    return models


def _entry(entry: object, beside: Path) -> tuple[Path, float]:
    """An adapter's folder and its weight."""
    if isinstance(entry, str):
        entry = {"model": entry}
    if (
        not isinstance(entry, Mapping)
        or not isinstance(entry.get("model"), str)
        or set(entry) - {"model", "parameters"}
    ):
        raise RecipeError(f"models: found {entry!r}, wanted {{model: folder, parameters: {{weight: number}}}}")
    given = entry.get("parameters") or {}
    if not isinstance(given, Mapping) or set(given) - {"weight"}:
        raise RecipeError(f"models: '{entry['model']}': found parameters {given!r}, wanted {{weight: number}}")
    weight = given.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        raise RecipeError(f"models: '{entry['model']}': weight: found {weight!r}, wanted a number > 0")
    path = Path(entry["model"]).expanduser()
    return (path if path.exists() or path.is_absolute() else beside / path), float(weight)
