"""A run that is stopped and resumed gives bit for bit what one that is not stopped gives."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import resumed_app as toy
import torch
from safetensors.torch import load_file

from fl_merge import RecipeError, momentum, server_optimizer
from fl_merge.flower.journal import Journal
from fl_merge.flower.resume import Resumption, resuming
from fl_merge.flower.server_app import run
from fl_merge.flower.strategy import RunFailedError
from fl_merge.flower.watch import Watcher
from fl_merge.methods import ties, weighted_average
from fl_merge.model import GlobalModel
from fl_merge.runs import Checkpoint, RunFolder
from fl_merge.runs.checkpoint import latest


def bits(tensors):
    return {
        name: (tensor.dtype, tensor.contiguous().view(-1).view(torch.uint8).tolist())
        for name, tensor in tensors.items()
    }


def everything(model):
    """All that a global model is, as bits."""
    return bits(model.master()), bits(model.sent), bits(model.optimizer_state), dict(model.dtypes)


def journal(folder, *events):
    lines = [json.loads(line) for line in (Path(folder) / "journal.jsonl").read_text().splitlines()]
    return [line for line in lines if not events or line["event"] in events]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Six rounds in one go: the strategy, Flower's result, and the folder."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return *toy.run(folder, 6), folder


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The folder of a run that was to have six rounds and failed in the fourth."""

    class Fails(Watcher):
        def round_started(self, round_number, sampled):
            if round_number == 4:
                raise KeyboardInterrupt

    folder = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.raises(KeyboardInterrupt):
        toy.run(folder, 6, watchers=[Fails()])
    return folder


@pytest.fixture
def half(stopped, tmp_path):
    """A copy of it to go on with."""
    return Path(shutil.copytree(stopped, tmp_path / "half"))


def test_three_rounds_and_three_more_are_six(whole, half):
    strategy, result, folder = whole
    resumed, rest = toy.run(half, 6, resume=True)
    assert everything(resumed.model) == everything(strategy.model)
    assert list(rest.train_metrics_clientapp) == list(rest.evaluate_metrics_clientapp) == [4, 5, 6]
    for number in (4, 5, 6):
        assert rest.train_metrics_clientapp[number] == result.train_metrics_clientapp[number]
        assert rest.evaluate_metrics_clientapp[number] == result.evaluate_metrics_clientapp[number]
    assert bits(load_file(half / "model.safetensors")) == bits(load_file(folder / "model.safetensors"))
    sampled = {line["round"]: line["sampled"] for line in journal(half, "round_started")}
    assert sampled == {line["round"]: line["sampled"] for line in journal(folder, "round_started")}
    assert len({tuple(clients) for clients in sampled.values()}) > 1


def test_the_journal_is_gone_on_with(half):
    before = journal(half)
    with (half / "journal.jsonl").open("a") as file:
        file.write('{"time": 12, "event": "round_st')  # the writer was killed in the middle of a line
    toy.run(half, 4, resume=True)
    after = journal(half)
    assert after[: len(before)] == before
    event = after[len(before)]
    assert (event["event"], event["after_round"], event["rounds"]) == ("resumed", 3, 4)
    assert [line["round"] for line in after[len(before) + 1 :] if line["event"] == "round_started"] == [4]


def test_a_run_that_was_killed_goes_on(whole, tmp_path):
    """SIGKILL in round 4, then the rest in another process."""
    folder = tmp_path / "run"
    command = [sys.executable, toy.__file__, str(folder), "6"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "begun 4\n"
        with pytest.raises(RecipeError, match="its run has not ended: a process writes there"):
            toy.run(folder, 6, resume=True)
        process.send_signal(signal.SIGKILL)
    assert [line["report"]["round_number"] for line in journal(folder, "round_ended")] == [1, 2, 3]
    subprocess.run([*command, "resume"], stdin=subprocess.DEVNULL, check=True, timeout=120)
    strategy = whole[0]
    assert everything(Checkpoint.read(folder).model) == everything(strategy.model)


def test_a_writer_that_is_killed_leaves_the_checkpoint_before(half):
    """Half a checkpoint of round 4, under its temporary name; the next writer removes it."""
    was = latest(half)
    left = half / "checkpoints" / ".round-000004.1234abcd.tmp"
    shutil.copytree(was, left)
    (left / "checkpoint.json").unlink()
    assert Checkpoint.read(half).round_number == 3
    toy.run(half, 4, resume=True)
    assert [path.name for path in (half / "checkpoints").iterdir()] == ["round-000004"]


def test_a_checkpoint_is_written_whole_or_not_at_all(half, monkeypatch):
    checkpoint = Checkpoint.read(half)

    def fails(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", fails)
    newer = Checkpoint(4, 5, checkpoint.method, None, checkpoint.model)
    with pytest.raises(Exception, match=r"cannot write the checkpoint '.*round-000004': No space left on device"):
        newer.write(half)
    assert [path.name for path in (half / "checkpoints").iterdir()] == ["round-000003"]


@pytest.mark.parametrize("wire", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_checkpoint_gives_back_all_of_a_model(tmp_path, dtype, wire):
    master = {
        name: tensor.float() * 1.001 if tensor.is_floating_point() else tensor for name, tensor in toy.initial().items()
    }
    if dtype == torch.float64:
        master["w"] = master["w"].double() * 1.001
    master["again"] = master["b"].clone()
    dtypes = {"w": dtype, "b": torch.float32}
    model = GlobalModel.of(master, wire=wire, dtypes=dtypes, tied={"again": "b"})
    Checkpoint(12, 3, "ties()", None, model).write(tmp_path)
    found = Checkpoint.read(tmp_path)
    assert (found.round_number, found.seed, found.method, found.recipe) == (12, 3, "ties()", None)
    assert everything(found.model) == everything(model)
    assert list(found.model.sent) == list(model.sent)
    assert found.model.tied == model.tied


def test_a_field_that_is_not_known_is_left_alone_and_a_later_format_refused(half):
    path = latest(half) / "checkpoint.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps(fields | {"architecture": {"layers": 3}}))
    assert Checkpoint.read(half).round_number == 3
    path.write_text(json.dumps(fields | {"format": 2}))
    with pytest.raises(RecipeError, match="is of format 2, this version of fl_merge reads 1"):
        Checkpoint.read(half)
    for broken in ("{", "[]", json.dumps({"format": 1}), json.dumps(fields | {"tensors": [{"name": "x"}]})):
        path.write_text(broken)
        with pytest.raises(RecipeError, match=r"^checkpoint '.*' cannot be read: "):
            Checkpoint.read(half)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"merge": ties()}, "the run merges with server_optimizer(dare_linear("),
        ({"merge": server_optimizer(toy.method().method, momentum())}, "the run merges with server_optimizer(dare_lin"),
        ({"seed": 6}, "the run has seed 5, found 6"),
        ({"wire_dtype": "float32"}, "tensor 'w' is (40, 30) bfloat16 in the run's model, (40, 30) float32 in the init"),
        ({"model": {"w": torch.zeros(3)}}, "tensor 'w' is (40, 30) bfloat16 in the run's model, (3,) float32 in the"),
        (
            {"model": toy.initial() | {"x": torch.zeros(1)}},
            "tensor 'x' is not in the run's model, (1,) float32 in the in",
        ),
    ],
)
def test_another_run_is_not_gone_on_with_unless_forced(half, options, message):
    lines = len(journal(half))
    with pytest.raises(RecipeError) as caught:
        toy.run(half, 6, resume=True, **options)
    assert str(caught.value).startswith(f"resume '{half}': {message}")
    assert str(caught.value).endswith("; give the run's own, or force it (force=True, --force, resume-force = true)")
    assert len(journal(half)) == lines


def test_it_can_be_forced(half):
    """Another method from the third round's model; the state of an optimizer that is gone is forgotten."""
    strategy = toy.strategy(Journal(half, {}, resumed=True), merge=weighted_average())
    with toy.InProcessGrid(toy.app, 8, workers=0, seed=3) as grid, resuming(Resumption(half, force=True)):
        result = strategy.start(grid, toy.to_record(toy.initial()), num_rounds=4)
    assert list(result.train_metrics_clientapp) == [4]
    assert not strategy.model.optimizer_state
    assert Checkpoint.read(half).method == "weighted_average()"


@pytest.mark.parametrize("rounds", [1, 3])
def test_there_must_be_rounds_left(half, rounds):
    with pytest.raises(RecipeError, match=rf"round 3 is done and the run is to have {rounds}: wanted more rounds"):
        toy.run(half, rounds, resume=True)


def test_a_folder_without_a_checkpoint_is_refused(tmp_path):
    RunFolder(tmp_path / "run")
    for folder in ("run", "nowhere"):
        with pytest.raises(RecipeError, match=rf"/{folder}' holds no checkpoint to resume from; wanted"):
            toy.run(tmp_path / folder, 3, resume=True)


def test_a_resumed_run_without_a_new_model_fails(half):
    with pytest.raises(RunFailedError, match="no round of 2 since it was resumed made a model"):
        toy.run(half, 5, resume=True, min_replies=5, max_num_examples=1.0)
    assert Checkpoint.read(half).round_number == 3


def test_in_python_a_run_folder_is_all_it_takes(whole, tmp_path):
    """The same six rounds with `run_folder` in place of a journal made by hand."""
    folder = tmp_path / "run"
    for rounds, resume in ((2, None), (6, folder)):
        strategy = toy.strategy(run_folder=folder)
        with toy.InProcessGrid(toy.app, 8, workers=0, seed=3) as grid:
            strategy.start(grid, toy.to_record(toy.initial()), num_rounds=rounds, resume=resume)
    assert everything(strategy.model) == everything(whole[0].model)
    assert [line["event"] for line in journal(folder, "run_started", "resumed")] == ["run_started", "resumed"]
    strategy = toy.strategy(run_folder=folder)
    with toy.InProcessGrid(toy.app, 8, workers=0) as grid, pytest.raises(RecipeError, match="already holds a run"):
        strategy.start(grid, toy.to_record(toy.initial()), num_rounds=6)


def test_the_run_config_resumes_a_server(tmp_path):
    """`resume` in the run config goes on in that folder, or in another one that `run-folder` names."""
    config = {"merge-method": "dare_linear", "server-optimizer": "momentum", "min-train-nodes": 4}

    def serve(rounds, **more):
        with toy.InProcessGrid(toy.app, 4, workers=0, seed=3) as grid:
            run(grid, config | {"num-server-rounds": rounds} | more, lambda config: toy.initial())

    serve(4, **{"run-folder": str(tmp_path / "whole")})
    serve(2, **{"run-folder": str(tmp_path / "half")})
    serve(4, **{"resume": str(tmp_path / "half"), "run-folder": str(tmp_path / "rest")})
    serve(3, resume=str(tmp_path / "half"))
    assert everything(Checkpoint.read(tmp_path / "rest").model) == everything(Checkpoint.read(tmp_path / "whole").model)
    assert Checkpoint.read(tmp_path / "half").round_number == 3
    with pytest.raises(RecipeError, match="the run has seed 0, found 1"):
        serve(4, resume=str(tmp_path / "half"), seed=1)
    serve(4, resume=str(tmp_path / "half"), seed=1, **{"resume-force": True})
    assert [line["event"] for line in journal(tmp_path / "half", "run_started", "resumed")] == ["run_started"] + [
        "resumed"
    ] * 2


def test_a_round_that_is_done_again_never_leaves_the_run_without_a_checkpoint(half, monkeypatch):
    """The older checkpoint of the same round goes only after the newer one is there, and the newer one counts."""
    checkpoint = Checkpoint.read(half)
    removed = shutil.rmtree

    def watched(path, **options):
        assert latest(half) is not None
        assert latest(half) != path
        removed(path, **options)

    monkeypatch.setattr(shutil, "rmtree", watched)
    for again in (1, 2):
        newer = Checkpoint(3, 5, f"method {again}", None, checkpoint.model)
        assert newer.write(half) == latest(half)
        assert Checkpoint.read(half).method == f"method {again}"
        assert [path.name for path in (half / "checkpoints").iterdir()] == [f"round-000003-again-{again}"]
