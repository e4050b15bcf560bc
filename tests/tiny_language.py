"""A federation of language models that is as small as it can be, and the journal that it leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

APP = Path(__file__).parents[1] / "clients" / "language"

TINY: dict[str, Any] = {
    "layers": 2,
    "hidden": 32,
    "pretraining-steps": 3,
    "local-steps": 2,
    "batch-size": 2,
    "sequence-length": 32,
    "train-bytes": 10_000,
    "evaluation-bytes": 600,
    "num-server-rounds": 0,
}
"""A run config; as many rounds as the recipe's phases have."""


def journal(folder: str | Path, event: str) -> list[dict[str, Any]]:
    """The events of a kind in a run's folder, in order."""
    lines = [json.loads(line) for line in (Path(folder) / "journal.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]
