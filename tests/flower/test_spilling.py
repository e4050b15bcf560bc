"""FedMerge with updates on disk: the same model, folders that are gone afterwards, and memory that does not grow."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fl_merge import Coordinate
from fl_merge.flower import FedMerge, RunFailedError, to_record
from fl_merge.flower.client import receive, reply
from fl_merge.flower.inprocess import InProcessGrid
from fl_merge.flower.watch import Watcher
from fl_merge.methods import dare_ties, ties, weighted_average

BASE = {"w": torch.linspace(-1, 1, 5000).reshape(50, 100), "steps": torch.tensor(0)}


def app():
    made = ClientApp()

    @made.train()
    def train(message: Message, context: Context) -> Message:
        draw = torch.Generator().manual_seed(context.node_id)
        tensors = receive(message)
        moved = {"w": tensors["w"] + torch.randn(tensors["w"].shape, generator=draw), "steps": tensors["steps"] + 1}
        return reply(message, moved, context.node_id % 5 + 1, {"loss": 1.0})

    return made


class Looks(Watcher):
    """What stands in the folder while replies come in, and the rounds' reports."""

    def __init__(self, folder):
        self.folder, self.seen, self.rounds = Path(folder), [], []

    def replied(self, *event):
        self.seen.append(len(list(self.folder.glob("fl-merge-spill-*/*.safetensors"))))

    def round_ended(self, report, model):
        self.rounds.append(report)


def run(method, folder, num_rounds=2, **options):
    looks = Looks(folder)
    strategy = FedMerge(method, fraction_evaluate=0.0, seed=5, watchers=[looks], **options)
    with InProcessGrid(app(), 4, workers=0) as grid:
        result = strategy.start(grid, to_record(BASE), num_rounds=num_rounds, timeout=60)
    return {name: array.data for name, array in result.arrays.items()}, looks


@pytest.mark.parametrize("method", [weighted_average(), ties(density=0.3), dare_ties(density=0.5)], ids=str)
def test_the_model_is_the_same_and_the_folder_empty_afterwards(method, tmp_path):
    folder = tmp_path / "made" / "here"
    in_memory, _ = run(method, folder)
    on_disk, looks = run(method, folder, spill_folder=folder)
    assert on_disk == in_memory
    assert looks.seen == [1, 2, 3, 4] * 2
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(("above", "spills"), [(4 * 20008, False), (4 * 20008 - 1, True), (None, False), (0, True)])
def test_without_a_folder_large_rounds_go_to_the_systems(above, spills, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    _, looks = run(weighted_average(), tmp_path, num_rounds=1, spill_above_bytes=above)
    assert looks.seen == ([1, 2, 3, 4] if spills else [0] * 4)
    assert list(tmp_path.iterdir()) == []


def test_a_round_that_fails_leaves_nothing(tmp_path):
    def combine(deltas_NS, weights_N, at):
        raise RuntimeError("no luck")

    with pytest.raises(RunFailedError, match="no luck"):
        run(Coordinate(combine), tmp_path, spill_folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_ends_the_run_leaves_nothing(tmp_path):
    class Interrupt(Looks):
        def replied(self, *event):
            super().replied(*event)
            raise KeyboardInterrupt

    looks = Interrupt(tmp_path)
    strategy = FedMerge(weighted_average(), watchers=[looks], spill_folder=tmp_path)
    with InProcessGrid(app(), 4, workers=0) as grid, pytest.raises(KeyboardInterrupt):
        strategy.start(grid, to_record(BASE), num_rounds=1, timeout=60)
    assert looks.seen == [1]
    assert list(tmp_path.iterdir()) == []


def test_too_little_room_is_said_with_the_setting_to_raise(tmp_path):
    looks = Looks(tmp_path)
    strategy = FedMerge(weighted_average(), watchers=[looks], spill_folder=tmp_path, max_spill_bytes=4 * 20007)
    with InProcessGrid(app(), 4, workers=0) as grid, pytest.raises(RunFailedError, match="0 usable replies of 4"):
        strategy.start(grid, to_record(BASE), num_rounds=1, timeout=60)
    assert looks.rounds[0].refused[0].reason == (
        "20,008 bytes are more than a client's share of max_spill_bytes (80,028 for 4); raise it to 80,032"
    )


def test_a_full_disk_in_a_later_round_leaves_the_old_model(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    class Fills(Looks):
        def round_ended(self, report, model):
            super().round_ended(report, model)
            monkeypatch.setattr("fl_merge.spill.claim", full)

    first, _ = run(weighted_average(), tmp_path, num_rounds=1)
    looks = Fills(tmp_path)
    strategy = FedMerge(weighted_average(), fraction_evaluate=0, seed=5, watchers=[looks], spill_folder=tmp_path)
    with InProcessGrid(app(), 4, workers=0) as grid:
        result = strategy.start(grid, to_record(BASE), num_rounds=2, timeout=60)
    assert {name: array.data for name, array in result.arrays.items()} == first
    assert [report.failure is None for report in looks.rounds] == [True, False]
    assert looks.rounds[1].failure.endswith("(spill_folder): No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_said_before_clients_train(tmp_path):
    (tmp_path / "file").write_text("")
    looks = Looks(tmp_path)
    strategy = FedMerge(weighted_average(), watchers=[looks], spill_folder=tmp_path / "file")
    with InProcessGrid(app(), 4, workers=0) as grid, pytest.raises(RunFailedError, match="spill_folder"):
        strategy.start(grid, to_record(BASE), num_rounds=1, timeout=60)
    assert looks.seen == []


def test_a_function_for_metrics_gets_the_replies_without_their_arrays(tmp_path):
    seen = []

    def metrics(contents: list[RecordDict], weighted_by_key: str) -> MetricRecord:
        seen.append([sorted(content) for content in contents])
        return MetricRecord({"n": len(contents)})

    for folder in (None, tmp_path):
        run(weighted_average(), tmp_path, num_rounds=1, spill_folder=folder, train_metrics_aggr_fn=metrics)
    assert seen == [[["arrays", "metrics"]] * 4, [["metrics"]] * 4]


# --- memory ----------------------------------------------------------------------------------------------------------

MEASURED = """
import contextlib, ctypes, gc, sys, threading, time
import torch
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from fl_merge import kernels
from fl_merge.flower import FedMerge, to_record
from fl_merge.flower.inprocess import InProcessGrid
from flwr.clientapp import ClientApp

clients, folder, method = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.set_num_threads(2)
kernels.load()  # else numba's own memory would come in the middle, with however many elements that takes

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) / 1000

def model(seed):  # 20 MB
    draw = torch.Generator().manual_seed(seed)
    return {f"layers.{i}": torch.randn(1_000_000, generator=draw) for i in range(5)}

def replies(messages):
    for number, message in enumerate(messages):
        metrics = MetricRecord({"num-examples": number + 1})
        yield Message(RecordDict({"arrays": to_record(model(number)), "metrics": metrics}), reply_to=message)

peak, done = 0.0, threading.Event()
def watch():
    global peak
    while not done.is_set():
        peak = max(peak, anonymous())
        time.sleep(0.002)

def a_round(number, strategy, arrays, grid):
    messages = list(strategy.configure_train(number, arrays, ConfigRecord(), grid))
    merged, _ = strategy.aggregate_train(number, replies(messages))
    assert merged is not None
    return merged

with InProcessGrid(ClientApp(), clients, workers=0) as grid:
    strategy = FedMerge(method, spill_folder=None if folder == "none" else folder)
    arrays = a_round(1, strategy, to_record(model(99)), grid)  # what is loaded and allocated once
    gc.collect()
    gc.disable()  # what only the collector frees is there for as long as it likes
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
    before = peak = anonymous()
    watcher = threading.Thread(target=watch)
    watcher.start()
    arrays = a_round(2, strategy, arrays, grid)
    done.set()
    watcher.join()
print(f"{peak - before:.1f}")
"""


def extra_megabytes(clients, folder, method="weighted_average"):
    """Peak anonymous memory of a second round, above what the process had before it.

    glibc is told to give large blocks back when they are freed: measured is what is held, not what it sets aside.
    """
    command = [sys.executable, "-c", MEASURED, str(clients), str(folder), method]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_ARENA_MAX": "2"}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert ended.returncode == 0, ended.stderr[-2000:]
    return float(ended.stdout)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_memory_is_that_of_one_model_however_many_clients_there_are(tmp_path):
    few, many = extra_megabytes(8, tmp_path), extra_megabytes(24, tmp_path)
    assert max(few, many) < 1.5 * 20 + 100, (few, many)
    assert many - few < 20, (few, many)  # sixteen messages more are 320 MB
