"""A federation of language models that becomes a mixture of experts, on a real SuperLink with two SuperNodes.

Once in one go, and once with its server killed between the phases.
"""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_language import APP, TINY, journal

from fl_merge.flower.apps import load_app, run_app
from fl_merge.runs import Checkpoint
from fl_merge.store import load
from flower_processes import FlowerHome, SuperLink, processes_of
from language_clients import base, corpus
from language_clients.settings import Settings

pytestmark = [pytest.mark.end_to_end, pytest.mark.slow]  # every message starts a process that loads transformers

RECIPE = """
phases:
  - {merge_method: moe_upcycle, parameters: {router: hidden, top_k: 2}}
  - {rounds: 1, train: router, merge_method: weighted_average}
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    home = tmp_path_factory.mktemp("phases")
    (home / "recipe.yaml").write_text(RECIPE)
    config = TINY | {
        "recipe": str(home / "recipe.yaml"),
        "num-server-rounds": 2,
        "fraction-evaluate": 0.0,
        "local-steps": 3,
        "cache-folder": str(home / "cache"),
    }
    base.folder(Settings.read(config))  # once, before three processes want it
    return config


@pytest.fixture(scope="module")
def whole(superlink: SuperLink, config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    there = {**config, "run-folder": str(folder)}
    run = superlink.home.flwr_run(APP, superlink.connection, run_config=there, timeout=500.0)
    assert run.status == "finished:completed", run.log
    return folder


def test_dense_to_mixture_to_trained_router(whole: Path, config: dict[str, Any], tmp_path: Path) -> None:
    check_report(whole)
    reports = [line["report"] for line in journal(whole, "round_ended")]
    assert reports[1]["accepted"][0]["num_bytes"] == 2 * 2 * 32 * 2
    described = json.loads((whole / "architecture.json").read_text())
    assert (described["model_type"], described["num_local_experts"]) == ("mixtral", 2)

    # The order of the two clients, and so of the experts, is that of the nodes' ids, which a SuperLink draws.
    run_app(load_app(APP), nodes=2, workers=0, run_config={**config, "run-folder": str(tmp_path / "here")})
    found, here = load(whole), load(tmp_path / "here")
    assert found.keys() == here.keys()
    for name in found:
        if "block_sparse_moe" not in name:
            torch.testing.assert_close(found[name], here[name], rtol=0.02, atol=0.002)


def test_a_server_that_is_killed_between_the_phases_goes_on_in_a_second_run(
    superlink: SuperLink, whole: Path, config: dict[str, Any], tmp_path: Path
) -> None:
    """The server app's process is killed when the mixture is there and its router is being trained."""
    home, folder = superlink.home, tmp_path / "run"
    settings = " ".join(f"{key}={json.dumps(value)}" for key, value in {**config, "run-folder": str(folder)}.items())
    _, said = home.flwr("run", str(APP), superlink.connection, "--run-config", settings, timeout=120.0)
    until = time.monotonic() + 400.0
    while not (folder / "checkpoints" / "round-000001").exists():
        assert time.monotonic() < until, said
        time.sleep(0.1)
    for process in server_apps(home):
        os.kill(process, signal.SIGKILL)
    while server_apps(home):
        time.sleep(0.1)
    stopped = Checkpoint.read(folder)
    assert (stopped.round_number, stopped.model.architecture["model_type"]) == (1, "mixtral")
    assert len(journal(folder, "round_ended")) == 1

    again = {**config, "resume": str(folder)}
    run = home.flwr_run(APP, superlink.connection, run_config=again, timeout=500.0)
    assert run.status == "finished:completed", run.log
    assert [line["after_round"] for line in journal(folder, "resumed")] == [1]
    check_report(folder)
    found, wanted = load(folder), load(whole)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def server_apps(home: FlowerHome) -> list[int]:
    """The processes in which a ServerApp runs."""
    return [process for process, command in processes_of(home.path).items() if "serverapp" in command]


def check_report(folder: Path) -> None:
    """Both rounds took both clients in; the load of each expert, by client and by domain; results by domain."""
    reports = [line["report"] for line in journal(folder, "round_ended")]
    assert [len(report["accepted"]) for report in reports] == [2, 2]
    assert all(len(accepted["metrics"]["expert-load"]) == 2 for accepted in reports[1]["accepted"])
    last = journal(folder, "server_evaluated")[-1]
    assert last["round"] == 2
    for domain in corpus.DOMAINS:
        assert 0 < last["metrics"][f"bits-per-byte/{domain}"] < 10
        assert sum(last["metrics"][f"expert-load/{domain}"]) == pytest.approx(1)
