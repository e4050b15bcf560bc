"""A run's folder: what was asked for, what happened, and the model.

recipe.yaml           how it merged
config.json           the app's run config
simulation.json       number of nodes and seed, if the run was simulated
journal.jsonl         one line an event: rounds, replies, refusals, metrics
model.safetensors     the latest merged model, replaced when a round has made a new one
architecture.json     its config, of a run that knows one
adapter/              the same in PEFT's format, if it is an adapter in plain factors
checkpoints/          what the run can be resumed from (`checkpoint.py`)
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fl_merge.adapters.federated import write_global
from fl_merge.errors import RecipeError
from fl_merge.store import save, write_text
from fl_merge.store.lock import LockedError, take

ADAPTER = "adapter"
CONFIG = "config.json"
ARCHITECTURE = "architecture.json"
SIMULATED = "simulation.json"


class RunFolder:
    """Writes a run's folder.

    Args:
        path: made if it is not there.
        resumed: go on with the run that is there; a last line that its writer could not finish is taken off.

    Raises:
        FileExistsError: if a run has already been written there, or one still writes there.
    """

    def __init__(self, path: str | Path, *, resumed: bool = False) -> None:
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)
        self._journal = self.path / "journal.jsonl"
        if self._journal.exists() and not resumed:
            raise FileExistsError(f"'{self.path}' already holds a run; give another run folder")
        self._journal.touch()
        try:  # for as long as this object or its process lives
            self._lock = take(os.open(self._journal, os.O_RDONLY))
        except LockedError:
            raise FileExistsError(f"'{self.path}': its run has not ended: a process writes there") from None
        with self._journal.open("r+b") as file:
            whole, end, _ = file.read().rpartition(b"\n")
            file.truncate(len(whole + end))

    def write_recipe(self, text: str) -> None:
        """The recipe, as YAML."""
        write_text(self.path / "recipe.yaml", text)

    def write_config(self, config: Mapping[str, Any], simulated: Mapping[str, int] | None = None) -> None:
        """The run config, and the number of nodes and the seed of a simulation."""
        write_text(self.path / CONFIG, json.dumps(dict(config), indent=2, sort_keys=True) + "\n")
        if simulated is not None:
            write_text(self.path / SIMULATED, json.dumps(dict(simulated)) + "\n")

    def write_architecture(self, architecture: Mapping[str, Any]) -> None:
        """The config from which the latest model is built."""
        write_text(self.path / ARCHITECTURE, json.dumps(dict(architecture), indent=2, sort_keys=True) + "\n")

    def record(self, event: str, **values: Any) -> None:
        """Append an event to the journal."""
        line = json.dumps(_plain({"time": round(time.time(), 3), "event": event, **values}), allow_nan=False)
        with self._journal.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def write_model(self, tensors: Mapping[str, Tensor], **metadata: Any) -> None:
        """Replace the model; a reader sees the old one or the new one, never half of it."""
        save(tensors, self.path, metadata={key: str(value) for key, value in metadata.items()})

    def write_adapter(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any], about: Mapping[str, Any]) -> None:
        """Replace the adapter in PEFT's format, its tensors last."""
        write_global(self.path / ADAPTER, tensors, config, _plain(about))


def read_config(path: str | Path) -> dict[str, Any]:
    """What a run's folder says of how it was run: `config`, and for a simulation `nodes` and `seed`.

    Raises:
        RecipeError: if it is not the folder of a run.
    """
    found: dict[str, Any] = {}
    try:
        found["config"] = json.loads((Path(path) / CONFIG).read_text(encoding="utf-8"))
        if (Path(path) / SIMULATED).exists():
            found |= json.loads((Path(path) / SIMULATED).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise RecipeError(f"'{path}' is not the folder of a run, it has no {CONFIG} to read: {reason}") from None
    return found


def _plain(value: Any) -> Any:
    """Values as JSON has them: dataclasses as objects, null for a number that is not finite."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)
