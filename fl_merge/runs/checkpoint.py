"""What a run goes on from: the model as the server keeps it, the server optimizer's state, and where it stands.

    checkpoints/round-000003/
        checkpoint.json              round, seed, method, recipe, the tensors' dtypes
        master/model.safetensors     the float32 master; what clients are sent is that, rounded
        optimizer/model.safetensors  where the method has a server optimizer

A checkpoint is written under a temporary name and renamed when it is whole; the one before is removed after that. So a
writer that is killed leaves a whole one. There is no fsync: a loss of power is not covered.

Fields that a reader does not know are left alone, so that later versions can add to them; `format` changes when an
older reader would go wrong.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fl_merge.errors import MergeError, RecipeError
from fl_merge.model import GlobalModel
from fl_merge.store import MemorySource, load, save, write_text
from fl_merge.types import TensorSpec

FORMAT = 1
FOLDER = "checkpoints"
_NAME = re.compile(r"round-(\d+)(?:-again-(\d+))?")
_TEMPORARY = re.compile(r"\.round-\d+(-again-\d+)?\.[0-9a-f]+\.tmp")


@dataclass(frozen=True)
class Checkpoint:
    """Where a run stands.

    Args:
        round_number: the last round that is in the model.
        seed: of the run.
        method: that merged, as text.
        recipe: the same as YAML; None where no recipe can say it.
        model: the global model with its master and optimizer state.
    """

    round_number: int
    seed: int
    method: str
    recipe: str | None
    model: GlobalModel

    def write(self, run_folder: str | Path) -> Path:
        """Put it into a run's folder in place of the one that is there.

        Raises:
            MergeError: if it cannot be written; the one before is then untouched.
        """
        folder = Path(run_folder) / FOLDER
        final = folder / f"round-{self.round_number:06d}"
        before = latest(run_folder)
        if before is not None and _order(before)[0] == self.round_number:  # the round was done again
            final = folder / f"{final.name}-again-{_order(before)[1] + 1}"
        temporary = folder / f".{final.name}.{secrets.token_hex(4)}.tmp"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for path in folder.iterdir():
                if _TEMPORARY.fullmatch(path.name):
                    shutil.rmtree(path, ignore_errors=True)
            temporary.mkdir()
            save(MemorySource(self.model.master(), self.model.tied), temporary / "master")
            if self.model.optimizer_state:
                save(self.model.optimizer_state, temporary / "optimizer")
            write_text(temporary / "checkpoint.json", json.dumps(self._fields(), indent=2) + "\n")
            os.rename(temporary, final)
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise MergeError(f"cannot write the checkpoint '{final}': {error.strerror}") from error
        for path in folder.iterdir():
            if _NAME.fullmatch(path.name) and path != final:
                shutil.rmtree(path, ignore_errors=True)
        return final

    def _fields(self) -> dict[str, Any]:
        model = self.model
        return {
            "format": FORMAT,
            "round": self.round_number,
            "seed": self.seed,
            "method": self.method,
            "recipe": self.recipe,
            "tensors": [
                {
                    "name": name,
                    "shape": list(tensor.shape),
                    "dtype": _text(model.dtypes[name]),
                    "sent": _text(tensor.dtype),
                }
                for name, tensor in model.sent.items()
            ],
            "tied": dict(model.tied),
            "architecture": dict(model.architecture),
        }

    @classmethod
    def read(cls, run_folder: str | Path) -> Checkpoint:
        """The latest checkpoint in a run's folder.

        Raises:
            RecipeError: if there is none, or it is not one that this version can read.
        """
        found = latest(run_folder)
        if found is None:
            raise RecipeError(
                f"'{run_folder}' holds no checkpoint to resume from; wanted the folder of a run of which a round has "
                "made a model"
            )
        try:
            fields = json.loads((found / "checkpoint.json").read_text(encoding="utf-8"))
            if fields["format"] > FORMAT:
                raise RecipeError(
                    f"checkpoint '{found}' is of format {fields['format']}, this version of fl_merge reads {FORMAT}"
                )
            return cls(
                int(fields["round"]),
                int(fields["seed"]),
                str(fields["method"]),
                fields["recipe"],
                _model(found, fields),
            )
        except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, RecipeError):
                raise
            raise RecipeError(f"checkpoint '{found}' cannot be read: {type(error).__name__}: {error}") from error


def latest(run_folder: str | Path) -> Path | None:
    """The folder of a run's latest checkpoint; None if it has none."""
    try:
        there = [path for path in (Path(run_folder) / FOLDER).iterdir() if _NAME.fullmatch(path.name)]
    except OSError:
        return None
    return max(there, key=_order, default=None)


def _order(folder: Path) -> tuple[int, int]:
    """The round that a checkpoint is of, and how many times that was done again."""
    found = _NAME.fullmatch(folder.name)
    assert found is not None
    return int(found[1]), int(found[2] or 0)


def _model(folder: Path, fields: Mapping[str, Any]) -> GlobalModel:
    """The model as it was: what was sent is the master, rounded again as it was the first time."""
    master = load(folder / "master")
    tied = {str(name): str(first) for name, first in fields["tied"].items()}
    sent, kept, dtypes = {}, {}, {}
    for entry in fields["tensors"]:
        name = str(entry["name"])
        tensor: Tensor = master[tied.get(name, name)]
        dtypes[name], dtype = _dtype(entry["dtype"]), _dtype(entry["sent"])
        wanted = TensorSpec(tuple(entry["shape"]), dtype)
        if tuple(tensor.shape) != wanted.shape:
            raise ValueError(f"tensor '{name}': shape {tuple(tensor.shape)}, wanted {wanted.shape}")
        sent[name] = tensor.to(dtype)
        if tensor.dtype != dtype:
            kept[name] = tensor
    state = load(folder / "optimizer") if (folder / "optimizer").exists() else {}
    architecture = dict(fields.get("architecture", {}))  # a checkpoint of an earlier version has none
    return GlobalModel(sent, kept, dtypes, tied, optimizer_state=state, architecture=architecture)


def _text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype(text: str) -> torch.dtype:
    dtype = getattr(torch, text)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"'{text}' is no dtype")
    return dtype
