"""The folder that a merge writes: made beside its place under a name of its own, and moved there when it is whole."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fl_merge.architectures import restacked
from fl_merge.errors import MergeError, RecipeError
from fl_merge.offline.models import TOKENIZER_FILES
from fl_merge.offline.plan import OfflinePlan
from fl_merge.store import lock_folder

_OF_A_MODEL = re.compile(r".*\.(safetensors|json|model|txt|jinja|md|ya?ml)|\.fl-merge\.lock")
"""Files that may stand in a folder that `--force` replaces."""


def require_writable(out: Path, inputs: Iterable[Path], *, force: bool) -> None:
    """Refuse a place where something would be lost.

    Raises:
        RecipeError: if there is a model already (unless `force`), the place is an input's, or it holds other things
            than a model.
    """
    place = out.resolve()
    for path in inputs:
        if path.resolve() == place or place in path.resolve().parents:
            raise RecipeError(f"'{out}' is, or holds, the input '{path}'; write to another folder")
    if not out.exists():
        return
    if not out.is_dir():
        raise RecipeError(f"'{out}' is a file, wanted a folder to write")
    found = sorted(out.iterdir())
    if found and not force:
        raise RecipeError(f"folder '{out}' is not empty; give another one, or --force to replace the model in it")
    for path in found:
        if not path.is_file() or not _OF_A_MODEL.fullmatch(path.name):
            raise RecipeError(f"folder '{out}' holds '{path.name}', which is not a model's: --force does not remove it")


@contextlib.contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A new folder beside `out` that takes its place at the end, or is removed if anything fails.

    What a process that was killed has left of such folders is removed first.

    Raises:
        MergeError: if it cannot be made or moved.
    """
    parent = out.resolve().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for left in parent.glob(f".{out.name}.*.partial"):
            if (lock := lock_folder(left)) is not None:
                shutil.rmtree(left, ignore_errors=True)
                lock.release()
        folder = parent / f".{out.name}.{secrets.token_hex(4)}.partial"
        folder.mkdir()
    except OSError as error:
        raise MergeError(f"cannot make a folder beside '{out}': {error.strerror}") from error
    held = lock_folder(folder)
    try:
        yield folder
        _move(folder, out.resolve())
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        if held is not None:
            held.release()


def _move(folder: Path, place: Path) -> None:
    old = place.with_name(f"{folder.name.removesuffix('.partial')}.old")
    try:
        if place.exists() and any(place.iterdir()):
            os.rename(place, old)
            try:
                os.rename(folder, place)
            except OSError:
                os.rename(old, place)
                raise
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(folder, place)
    except OSError as error:
        raise MergeError(f"cannot move the merged model to '{place}': {error.strerror}") from error


def write_config(plan: OfflinePlan, folder: Path) -> None:
    """config.json of the donor with the dtype and depth of the merged model, and the donor's other files."""
    donor = plan.donor
    if donor.config is not None:
        text = json.dumps(merged_config(plan), indent=2, sort_keys=True)
        (folder / "config.json").write_text(text + "\n", encoding="utf-8")
    if donor.folder is None:
        return
    for name in ("generation_config.json", *TOKENIZER_FILES):
        if (donor.folder / name).is_file():
            shutil.copyfile(donor.folder / name, folder / name)


def merged_config(plan: OfflinePlan) -> dict[str, Any]:
    """The donor's config with what the merge has changed."""
    config = dict(plan.donor.config or {})
    if plan.recipe.dtype is not None:
        key = "torch_dtype" if "torch_dtype" in config else "dtype"
        config[key] = str(plan.recipe.dtype).removeprefix("torch.")
    if plan.recipe.stacked:
        layers = [(plan.models[ref].config or {}, layer) for ref, layer in plan.layout.layers()]
        config |= dict(restacked(config, plan.donor.architecture, layers))
    return config


def readme(
    plan: OfflinePlan, name: str, recipe_text: str, hashes: Mapping[str, Mapping[str, str]], version: str
) -> str:
    """README.md: the recipe, what it was run on, and what to know about the result."""
    lines = ["---", "library_name: transformers", "tags: [merge]", "---", "", f"# {name}", ""]
    lines += [f"Merged by fl_merge {version} ({plan.recipe.merge_method}).", "", "## Recipe", "", "```yaml"]
    lines += [recipe_text.strip(), "```", "", "## Inputs", "", "| model | file | SHA-256 |", "|---|---|---|"]
    for model, files in hashes.items():
        lines += [f"| {model} | {file} | `{digest}` |" for file, digest in files.items()]
    if plan.notices:
        lines += ["", "## Notes", "", *(f"- {notice}" for notice in plan.notices)]
    return "\n".join(lines) + "\n"
