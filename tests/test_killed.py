"""Writers that are killed, interrupted, or of which there are two: the model that was there stays, or the new one is
whole, and the next writer leaves nothing of a dead one's."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch

from fl_merge import MergeError
from fl_merge.execute import execute
from fl_merge.methods import weighted_average
from fl_merge.spill import Spill
from fl_merge.store import INDEX_FILE, MemorySource, SafetensorsSink, SafetensorsSource, load, save
from fl_merge.types import Cohort, TensorSpec, Update

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals and locks of POSIX systems")

SHARD = 4000
"""Bytes; the model below is then five shards."""


def model(value):
    return {f"layers.{number}": torch.full((1000,), float(value)) for number in range(5)}


CHILD = """
import os, signal, sys, time
import torch
from fl_merge.execute import execute
from fl_merge.methods import weighted_average
from fl_merge.spill import Spill
from fl_merge.store import MemorySource, SafetensorsSink
from fl_merge.types import Cohort, Update

folder, point, shard_bytes, seconds = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])

def stop():
    print("here", flush=True)
    time.sleep(seconds)

def at(call, number):
    # Stop in front of the call of this number of a function of os, or of the sink.
    owner, name = call
    real, calls = getattr(owner, name), [0]
    def counted(*arguments, **options):
        calls[0] += 1
        if calls[0] == number:
            stop()
        return real(*arguments, **options)
    setattr(owner, name, counted)

torch.set_num_threads(1)
source = MemorySource({f"layers.{n}": torch.full((1000,), 2.0) for n in range(5)})
sink = SafetensorsSink(folder, max_shard_bytes=shard_bytes)
kind, _, number = point.partition(":")
owner = {"write": sink, "place": sink, "finish": sink}.get(kind, os)
if kind == "values":  # half way through the tensors, however the executor writes them
    number, kind = int(number), "read"
    owner = source
at((owner, kind), int(number))
execute(weighted_average(), Cohort(source, (Update("0", 1.0, source),)), sink, threads=1)
print("ended", flush=True)
"""


def child(script, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )


def killed(script, *arguments, with_signal=signal.SIGKILL):
    """Run a script until it says "here", then send it a signal; what it wrote to stderr."""
    with child(script, *arguments) as process:
        try:
            line = process.stdout.readline()
            assert line == "here\n", line + process.stderr.read()
            process.send_signal(with_signal)
            return process.communicate(timeout=60)[1]
        finally:
            process.kill()


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def files_of_a_model(folder):
    """The names that a reader goes by: what no library looks at is left out."""
    if not (folder / INDEX_FILE).exists():
        return {"model.safetensors"} & {path.name for path in folder.iterdir()}
    return {INDEX_FILE, *json.loads((folder / INDEX_FILE).read_text())["weight_map"].values()}


def values_in(folder):
    [value] = {float(value) for tensor in load(folder).values() for value in tensor.unique()}
    return value


# --- SIGKILL ---------------------------------------------------------------------------------------------------------


KILLS = [
    (point, new_shards, old_shards)
    for point in ("posix_fallocate:1", "values:3", "finish:1", "replace:1")
    for new_shards in (SHARD, 10**9)
    for old_shards in (None, SHARD, 10**9)
]
"""Each costs a process that imports torch: by default every fifth, among which are all points and kinds of models."""


@pytest.mark.parametrize(
    ("point", "new_shards", "old_shards"),
    [pytest.param(*kill, marks=[pytest.mark.slow] if number % 5 else []) for number, kill in enumerate(KILLS)],
)
def test_a_killed_merge_leaves_the_old_model_byte_for_byte_and_the_next_cleans_up(
    point, new_shards, old_shards, tmp_path
):
    (tmp_path / "model-of-mine.safetensors").write_text("mine")
    (tmp_path / ".model.safetensors.notes.tmp").write_text("mine")
    mine = contents(tmp_path)
    if old_shards:
        save(model(1), tmp_path, max_shard_bytes=old_shards)
    before = contents(tmp_path)
    killed(CHILD, tmp_path, point, new_shards, 60)
    after = contents(tmp_path)
    assert set(after) - set(before), "the child was killed before it had left anything"
    assert {name: after[name] for name in before} == before
    assert files_of_a_model(tmp_path) == set(before) - set(mine)
    save(model(3), tmp_path, max_shard_bytes=new_shards)
    assert values_in(tmp_path) == 3
    found = contents(tmp_path)
    assert {name: found.pop(name) for name in mine} == mine
    assert set(found) == files_of_a_model(tmp_path)


@pytest.mark.parametrize("old_shards", [SHARD, 10**9], ids=["shards", "one_file"])
@pytest.mark.parametrize(
    ("new_shards", "point", "reads"),
    [
        (SHARD, "posix_fallocate:4", 1),
        (SHARD, "replace:3", 1),
        (SHARD, "replace:6", 1),
        (SHARD, "unlink:1", 2),
        (10**9, "unlink:1", None),
    ],
)
def test_killed_while_the_files_are_renamed(point, reads, new_shards, old_shards, tmp_path):
    """In front of each step a reader has one model, whole, and whoever writes next leaves only its own."""
    save(model(1), tmp_path, max_shard_bytes=old_shards)
    killed(CHILD, tmp_path, point, new_shards, 60)
    assert values_in(tmp_path) == (reads or (1 if old_shards == SHARD else 2))
    sink = SafetensorsSink(tmp_path)  # one that is begun and given up cleans up too, and leaves the model
    value = values_in(tmp_path)
    sink.begin({"w": TensorSpec((3,), torch.float32)})
    sink.abort()
    assert values_in(tmp_path) == value
    assert {path.name for path in tmp_path.iterdir()} == files_of_a_model(tmp_path)
    save(model(3), tmp_path, max_shard_bytes=SHARD)
    assert values_in(tmp_path) == 3
    assert {path.name for path in tmp_path.iterdir()} == files_of_a_model(tmp_path)


def test_killed_at_any_time(tmp_path):
    """Not in front of a chosen step, but whenever it happens to be."""
    script = """
        import sys, torch
        from fl_merge.store import save
        print("here", flush=True)
        value = 1
        while True:
            save({f"layers.{n}": torch.full((1000,), float(value)) for n in range(5)}, sys.argv[1],
                 max_shard_bytes=[4000, 10**9, 8000][value % 3])
            value += 1
    """
    save(model(0), tmp_path)
    for attempt in range(6):
        with child(script, tmp_path) as process:
            try:
                assert process.stdout.readline() == "here\n"
                until = time.monotonic() + 0.05 + 0.0137 * attempt
                while time.monotonic() < until:
                    values_in(tmp_path)  # one model, whole, while it is replaced all the time
            finally:
                process.kill()
        values_in(tmp_path)
        save(model(-1), tmp_path, max_shard_bytes=[8000, 10**9][attempt % 2])
        assert values_in(tmp_path) == -1
        assert {path.name for path in tmp_path.iterdir()} == files_of_a_model(tmp_path)


SPILLS = """
import os, sys, time, torch
from fl_merge.spill import Spill
from fl_merge.store import MemorySource
from fl_merge.types import Update

def stop(*arguments):
    print("here", flush=True)
    time.sleep(60)

spill = Spill(sys.argv[1])
update = Update("1", 1.0, MemorySource({f"layers.{n}": torch.ones(1000) for n in range(5)}))
if sys.argv[2] == "rename":
    from pathlib import Path
    Path.rename = stop
else:
    spill.keep(update)
    if sys.argv[2] == "write":
        real, calls = os.write, [0]
        def write(*arguments):
            calls[0] += 1
            return stop() if calls[0] == 3 else real(*arguments)
        os.write = write
    else:
        setattr(os, sys.argv[2], stop)
spill.keep(update)
"""


@pytest.mark.parametrize("point", ["posix_fallocate", "write", "replace"])
def test_a_process_killed_while_it_keeps_an_update(point, tmp_path):
    killed(SPILLS, tmp_path, point)
    [folder] = tmp_path.iterdir()
    assert "000001.safetensors" not in {path.name for path in folder.iterdir()}
    assert load(folder / "000000.safetensors")["layers.0"].sum() == 1000
    with Spill(tmp_path) as spill:
        mine = spill.open()
        assert list(tmp_path.iterdir()) == [mine]
    assert not list(tmp_path.iterdir())


def test_a_process_killed_before_its_folder_was_locked(tmp_path):
    killed(SPILLS, tmp_path, "rename")
    [left] = tmp_path.iterdir()
    with Spill(tmp_path) as spill:
        spill.open()
        assert left.exists()  # it may be another's that is about to lock it
        os.utime(left, (time.time() - 4000,) * 2)
        with Spill(tmp_path) as other:
            other.open()
            assert not left.exists()


# --- being interrupted -----------------------------------------------------------------------------------------------

WORKER = 2
"""Seconds that the child waits to be interrupted: a worker thread is not, and the merge ends when it is done."""


@pytest.mark.parametrize("point", ["posix_fallocate:3", "values:6", "replace:3", "replace:6"])
def test_ctrl_c_leaves_nothing(point, tmp_path):
    save(model(1), tmp_path, max_shard_bytes=SHARD)
    before = contents(tmp_path)
    problem = killed(CHILD, tmp_path, point, SHARD, WORKER, with_signal=signal.SIGINT)
    assert "KeyboardInterrupt" in problem
    assert contents(tmp_path) == before


def test_sigterm_leaves_nothing_where_it_ends_the_program_in_good_order(tmp_path):
    """As in a server that Flower has started. Unhandled it is a SIGKILL by another name, and the next writer's work."""
    handled = "import signal, sys\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n" + CHILD
    for script in (CHILD, handled):
        killed(script, tmp_path, "values:6", SHARD, WORKER, with_signal=signal.SIGTERM)
        assert bool(contents(tmp_path)) == (script is CHILD)


# --- two writers -----------------------------------------------------------------------------------------------------


def test_a_second_writer_is_refused_while_the_first_lives(tmp_path):
    save(model(1), tmp_path)
    with child(CHILD, tmp_path, "finish:1", SHARD, 60) as process:
        try:
            assert process.stdout.readline() == "here\n"
            before = contents(tmp_path)
            with pytest.raises(MergeError) as caught:
                save(model(3), tmp_path)
            assert str(caught.value) == (
                f"another merge is writing to '{tmp_path}' (it has the lock '.fl-merge.lock' there); wait for its end, "
                "or write to another folder"
            )
            assert contents(tmp_path) == before
        finally:
            process.kill()
    save(model(3), tmp_path)
    assert values_in(tmp_path) == 3


def test_two_sinks_of_one_process_and_one_that_is_forgotten(tmp_path):
    first, second = SafetensorsSink(tmp_path), SafetensorsSink(tmp_path)
    specs = {"w": TensorSpec((3,), torch.float32)}
    first.begin(specs)
    with pytest.raises(MergeError, match="another merge is writing"):
        second.begin(specs)
    second.abort()
    with pytest.raises(MergeError, match="another merge is writing"):
        second.begin(specs)
    del first
    second.begin(specs)
    second.write("w", 0, torch.ones(3))
    second.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_neither_ends_its_parents_lock_nor_keeps_it(tmp_path):
    sink = SafetensorsSink(tmp_path)
    sink.begin({"w": TensorSpec((3,), torch.float32)})
    reads, writes = os.pipe()
    child_id = os.fork()
    if child_id == 0:
        os.close(writes)
        del sink
        os.read(reads, 1)  # lives until the test lets it go
        os._exit(0)
    os.close(reads)
    time.sleep(0.1)
    with pytest.raises(MergeError, match="another merge is writing"):
        save(model(1), tmp_path)
    sink.write("w", 0, torch.ones(3))
    sink.finish()
    save(model(3), tmp_path)
    os.close(writes)
    os.waitpid(child_id, 0)
    assert values_in(tmp_path) == 3


def test_without_locks_two_writers_do_not_mix_and_nothing_is_taken_for_a_dead_ones(tmp_path, monkeypatch):
    monkeypatch.setattr("fl_merge.store.lock.fcntl.flock", no_locks)
    (tmp_path / ".model.safetensors.12345678.tmp").write_text("a living writer's, for all we know")
    first, second = (SafetensorsSink(tmp_path, max_shard_bytes=SHARD) for _ in range(2))
    specs = MemorySource(model(0)).specs()
    for sink, value in ((first, 1.0), (second, 2.0)):
        sink.begin(specs)
        for name in specs:
            sink.write(name, 0, torch.full((1000,), value))
    first.finish()
    assert values_in(tmp_path) == 1
    second.finish()
    assert values_in(tmp_path) == 2
    assert {path.name for path in tmp_path.iterdir()} - files_of_a_model(tmp_path) == {
        ".model.safetensors.12345678.tmp"
    }


def no_locks(*arguments):
    raise OSError(95, "Operation not supported")


# --- a reader while the model is replaced ----------------------------------------------------------------------------


def test_a_model_that_is_replaced_while_it_is_opened_is_opened_again(tmp_path, monkeypatch):
    from fl_merge.store import source as module

    save(model(1), tmp_path, max_shard_bytes=SHARD)
    real, left = module.safe_open, [2.0, 3.0]

    def replaced_first(*arguments, **options):
        if left:
            save(model(left.pop(0)), tmp_path, max_shard_bytes=SHARD)
        return real(*arguments, **options)

    monkeypatch.setattr(module, "safe_open", replaced_first)
    source = SafetensorsSource(tmp_path)
    assert {float(source.read(name)[0]) for name in source.specs()} == {3.0}


def test_a_source_reads_the_model_that_it_opened(tmp_path):
    save(model(1), tmp_path)
    source = SafetensorsSource(tmp_path)
    save(model(2), tmp_path)
    assert {float(source.read(name)[0]) for name in source.specs()} == {1.0}


def test_a_merge_into_the_folder_of_its_own_base(tmp_path):
    save(model(1), tmp_path)
    base = SafetensorsSource(tmp_path)
    execute(weighted_average(), Cohort(base, (Update("0", 1.0, MemorySource(model(2))),)), SafetensorsSink(tmp_path))
    assert (values_in(tmp_path), float(base.read("layers.0")[0])) == (2, 1)
