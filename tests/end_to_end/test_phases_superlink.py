"""A federation of language models that becomes a mixture of experts, on a real SuperLink with two SuperNodes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fl_merge.flower.apps import load_app, run_app
from fl_merge.store import load
from flower_processes import SuperLink
from language_clients import base
from language_clients.settings import Settings

pytestmark = [pytest.mark.end_to_end, pytest.mark.slow]  # every message starts a process that loads transformers

APP = Path(__file__).resolve().parents[2] / "clients" / "language"

RECIPE = """
phases:
  - {merge_method: moe_upcycle, parameters: {router: hidden, top_k: 2}}
  - {rounds: 1, train: router, merge_method: weighted_average}
"""


def test_dense_to_mixture_to_trained_router(superlink: SuperLink, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    config = {
        "recipe": str(tmp_path / "recipe.yaml"),
        "num-server-rounds": 2,
        "fraction-evaluate": 0.0,
        "layers": 2,
        "hidden": 32,
        "pretraining-steps": 3,
        "local-steps": 3,
        "batch-size": 2,
        "sequence-length": 32,
        "train-bytes": 10_000,
        "evaluation-bytes": 600,
        "cache-folder": str(tmp_path / "cache"),
    }
    base.folder(Settings.read(config))  # once, before three processes want it
    there = {**config, "run-folder": str(tmp_path / "run")}
    run = superlink.home.flwr_run(APP, superlink.connection, run_config=there, timeout=500.0)
    assert run.status == "finished:completed", run.log
    lines = [json.loads(line) for line in (tmp_path / "run" / "journal.jsonl").read_text().splitlines()]
    reports = [line["report"] for line in lines if line["event"] == "round_ended"]
    assert [len(report["accepted"]) for report in reports] == [2, 2]
    assert all(len(accepted["metrics"]["expert-load"]) == 2 for accepted in reports[1]["accepted"])
    assert reports[1]["accepted"][0]["num_bytes"] == 2 * 2 * 32 * 2
    described = json.loads((tmp_path / "run" / "architecture.json").read_text())
    assert (described["model_type"], described["num_local_experts"]) == ("mixtral", 2)

    # The order of the two clients, and so of the experts, is that of the nodes' ids, which a SuperLink draws.
    run_app(load_app(APP), nodes=2, workers=0, run_config={**config, "run-folder": str(tmp_path / "here")})
    found, here = load(tmp_path / "run"), load(tmp_path / "here")
    assert found.keys() == here.keys()
    for name in found:
        if "block_sparse_moe" not in name:
            torch.testing.assert_close(found[name], here[name], rtol=0.02, atol=0.002)
