"""Flower's own style of app, with nothing but its strategy changed, in all three engines."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from apps import FEDMERGE, QUICKSTART, quickstart
from torch import Tensor

from fl_merge.flower.apps import load_app, run_app
from flower_processes import FlowerHome, Run, SuperLink

pytestmark = pytest.mark.end_to_end

NODES = 2
Model = dict[str, Tensor]


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quickstart(tmp_path_factory.mktemp("quickstart") / "app", server=FEDMERGE)


@pytest.fixture(scope="module")
def in_process(app: Path) -> Model:
    final = app.parent / "in_process.pt"
    run_app(load_app(app), nodes=NODES, workers=0, run_config={"final-model": str(final)})
    return torch.load(final)


@pytest.fixture(scope="module")
def simulation(app: Path, flower: FlowerHome) -> tuple[Run, Model]:
    final = app.parent / "simulation.pt"
    run = flower.flwr_run(app, simulated_nodes=NODES, run_config={"final-model": str(final)})
    assert run.status == "finished:completed", run.log
    return run, torch.load(final)


@pytest.fixture(scope="module")
def deployment(app: Path, superlink: SuperLink) -> tuple[Run, Model]:
    final = app.parent / "deployment.pt"
    run = superlink.home.flwr_run(app, superlink.connection, run_config={"final-model": str(final)})
    assert run.status == "finished:completed", run.log
    return run, torch.load(final)


@pytest.fixture(scope="module")
def initial() -> Model:
    """What the app's server begins with."""
    threads = torch.get_num_threads()
    net = runpy.run_path(str(QUICKSTART / "quickstart" / "task.py"))["Net"]
    torch.set_num_threads(threads)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return net().state_dict()


def test_in_process(in_process: Model, initial: Model) -> None:
    check_model(in_process, initial)


def test_flwr_run_in_simulation(simulation: tuple[Run, Model], initial: Model) -> None:
    run, model = simulation
    check_model(model, initial)
    check_log(run.log)


def test_superlink_with_two_supernodes(deployment: tuple[Run, Model], initial: Model) -> None:
    run, model = deployment
    check_model(model, initial)
    check_log(run.log)


def test_the_engines_agree(in_process: Model, simulation: tuple[Run, Model], deployment: tuple[Run, Model]) -> None:
    for _, model in (simulation, deployment):
        torch.testing.assert_close(model, in_process, rtol=1e-5, atol=1e-5)


def check_model(model: Model, initial: Model) -> None:
    """The right tensors, in their own dtypes, finite, and not where they started."""
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in model.items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in initial.items()
    }
    for name, tensor in model.items():
        assert torch.isfinite(tensor).all(), name
        assert not torch.equal(tensor, initial[name]), name


def check_log(log: str) -> None:
    """Both rounds trained and evaluated."""
    assert "[ROUND 2/2]" in log
    assert log.count("eval_acc") >= 2
