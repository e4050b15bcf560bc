"""A run's folder: what was asked for, what happened, and the model.

recipe.yaml           how it merged
config.json           the app's run config
journal.jsonl         one line an event: rounds, replies, refusals, metrics
model.safetensors     the latest merged model, replaced when a round has made a new one
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fl_merge.store import save, write_text


class RunFolder:
    """Writes a run's folder.

    Args:
        path: made if it is not there.

    Raises:
        FileExistsError: if a run has already been written there.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)
        self._journal = self.path / "journal.jsonl"
        if self._journal.exists():
            raise FileExistsError(f"'{self.path}' already holds a run; give another run folder")
        self._journal.touch()

    def write_recipe(self, text: str) -> None:
        """The recipe, as YAML."""
        write_text(self.path / "recipe.yaml", text)

    def write_config(self, config: Mapping[str, Any]) -> None:
        """The run config."""
        write_text(self.path / "config.json", json.dumps(dict(config), indent=2, sort_keys=True) + "\n")

    def record(self, event: str, **values: Any) -> None:
        """Append an event to the journal."""
        line = json.dumps(_plain({"time": round(time.time(), 3), "event": event, **values}), allow_nan=False)
        with self._journal.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def write_model(self, tensors: Mapping[str, Tensor], **metadata: Any) -> None:
        """Replace the model; a reader sees the old one or the new one, never half of it."""
        save(tensors, self.path, metadata={key: str(value) for key, value in metadata.items()})


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
