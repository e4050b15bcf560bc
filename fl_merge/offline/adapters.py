"""Recipes whose models are adapters:

merge_method: lora_svd
parameters: {rank: 16}
models:
  - {model: adapters/hospital, parameters: {weight: 3}}
  - {model: adapters/clinic}
dtype: bfloat16
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

import torch

from fl_merge.adapters import MergedAdapter, load_adapter, merge_adapters, require_free
from fl_merge.errors import RecipeError
from fl_merge.hyperparameters import nearest
from fl_merge.method import METHODS, build

_KEYS = ("merge_method", "parameters", "models", "dtype")
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}


def merges_adapters(content: object) -> TypeGuard[Mapping[str, Any]]:
    """Whether a recipe's method is one for adapters and the recipe names its models."""
    if not isinstance(content, Mapping) or "models" not in content:
        return False
    entry = METHODS.get(str(content.get("merge_method")))
    return entry is not None and entry.merges == "adapters"


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
        RecipeError: naming the recipe, and what is wrong with it; if the folder is taken.
        MergeError: if the method cannot merge these, or the folder cannot be written.
    """
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
        require_free(folder, [path for path, _ in listed], force=force)
        adapters = {str(path): load_adapter(path) for path, _ in listed}
        weights = {str(path): weight for path, weight in listed}
        merged = merge_adapters(method, adapters, weights, seed, threads=threads)
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from None
    merged.save(folder, None if dtype is None else _DTYPES[str(dtype).removeprefix("torch.")])
    return merged


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
