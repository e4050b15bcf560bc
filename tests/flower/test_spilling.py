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
from fl_merge.errors import RecipeError
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


class Shares:
    """weighted_average, as a method that says to be a running sum."""

    running = 1.0

    def plan(self, spec):
        return weighted_average().plan(spec)


def test_a_running_sum_keeps_nothing_of_a_client(tmp_path):
    ordinary, _ = run(weighted_average(), tmp_path)
    summed, looks = run(Shares(), tmp_path, spill_folder=tmp_path, running_sum=True)
    assert looks.seen == [0] * 8
    assert all(report.failure is None for report in looks.rounds)
    assert list(tmp_path.iterdir()) == []
    assert summed["steps"] == ordinary["steps"]
    one, other = (torch.frombuffer(bytearray(each["w"][-20000:]), dtype=torch.float32) for each in (summed, ordinary))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_a_running_sum_is_refused_for_other_methods_when_the_strategy_is_made():
    with pytest.raises(RecipeError, match=r"^running_sum: found ties"):
        FedMerge(ties(), running_sum=True)


def test_a_full_disk_fails_the_round_of_a_running_sum(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fl_merge.running.claim", full)
    with pytest.raises(RunFailedError, match=r"cannot keep a running sum .*No space left"):
        run(Shares(), tmp_path, spill_folder=tmp_path, running_sum=True)
    assert list(tmp_path.iterdir()) == []


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


FEDERATION = """
import gc, sys, threading, time
import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from fl_merge import kernels
from fl_merge.flower import FedMerge, to_record
from fl_merge.flower._flwr import Run, TaskIdentity

clients, rounds, folder, running = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4] == "running"
TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1
torch.set_num_threads(1)
kernels.load()
noise = torch.randn(1_250_000)  # 5 MB: a block that glibc keeps for itself

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) / 1000

def record(seed):  # 40 MB, a tensor at a time
    arrays = {}
    for number in range(8):
        arrays |= to_record({f"layers.{number}": noise * (seed + number)})
    return ArrayRecord(arrays)

class Makes(Grid):
    asked = {}
    run = Run.create_empty(1)
    set_run = create_message = send_and_receive = None

    def get_node_ids(self):
        return list(range(1, clients + 1))

    def push_messages(self, messages):
        for number, message in enumerate(messages):
            message.metadata.__dict__["_message_id"] = f"{message.metadata.group_id}-{number}"
            self.asked[message.metadata.message_id] = message.metadata.dst_node_id
        return [message.metadata.message_id for message in messages]

    def pull_messages(self, ids):
        nodes = [self.asked.pop(each) for each in ids]
        return [
            Message(
                RecordDict({"arrays": record(node), "metrics": MetricRecord({"num-examples": node})}),
                dst_node_id=node,
                message_type="train",
            )
            for node in nodes
        ]

class Shares:
    running = 1.0
    plan = FedMerge("weighted_average").method.plan

def start(initial, rounds):
    method = Shares() if running else "weighted_average"
    strategy = FedMerge(method, fraction_evaluate=0.0, spill_folder=folder, running_sum=running)
    strategy.start(Makes(), initial.pop(), num_rounds=rounds)

start([record(98)], 1)  # what is loaded and allocated once
initial = [record(99)]
gc.collect()
gc.disable()
before = peak = anonymous()
done = threading.Event()

def watch():
    global peak
    while not done.is_set():
        peak = max(peak, anonymous())
        time.sleep(0.002)

watcher = threading.Thread(target=watch)
watcher.start()
start(initial, rounds)
done.set()
watcher.join()
print(f"extra {peak - before:.1f}")
"""


def extra_of_a_federation(clients, rounds, folder, how="spill"):
    """Peak anonymous memory of a federation in megabytes, above the start, where the initial model is there already.

    With the C library's own settings: what it keeps for itself counts.
    """
    command = [sys.executable, "-c", FEDERATION, str(clients), str(rounds), str(folder), how]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=180, env=environment)
    assert ended.returncode == 0, ended.stderr[-2000:]
    return float(ended.stdout.rpartition("extra ")[2])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("how", ["spill", "running"])
def test_a_run_takes_the_memory_of_a_model_whatever_the_clients_and_the_rounds(how, tmp_path):
    once, often = extra_of_a_federation(3, 1, tmp_path, how), extra_of_a_federation(8, 2, tmp_path, how)
    assert max(once, often) < 1.5 * 40 + 40, (once, often)  # eight models are 320 MB
