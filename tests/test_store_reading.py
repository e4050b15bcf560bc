"""Reading without copies, files that are cut off, and the odd cases of writing."""

import gc
import json
import os
import re
import struct
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fl_merge import MergeError, build
from fl_merge.errors import DecodeError
from fl_merge.execute import execute
from fl_merge.store import MemorySink, SafetensorsSink, SafetensorsSource, load, save
from fl_merge.store import source as module
from fl_merge.types import Cohort, TensorSpec, Update

READS = """
import sys, torch
from fl_merge.store import SafetensorsSource
def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) / 1000
torch.ones(10).sum()
before = anonymous()
source = SafetensorsSource(sys.argv[1])
kept = [source.read(name) for name in source.specs()]
for tensor in kept:
    tensor.view(-1).view(torch.uint8)[::4096].max()
print(anonymous() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_tensors_are_views_of_the_file_in_every_dtype(tmp_path):
    dtypes = (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool)
    save({str(dtype): torch.ones(40_000_000 // dtype.itemsize).to(dtype) for dtype in dtypes}, tmp_path)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", READS, str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert ended.returncode == 0, ended.stderr
    assert float(ended.stdout) < 15  # of 200 MB


def unaligned(path):
    entries = {
        "byte": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "floats": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
    }
    head = json.dumps(entries).encode()
    head += b" " * (-len(head) % 8)
    path.write_bytes(struct.pack("<Q", len(head)) + head + b"\x07" + struct.pack("<2f", 1.5, 2.5))
    return path


@pytest.mark.parametrize("large", [False, True])
def test_a_tensor_that_is_not_aligned_is_read_right(large, tmp_path, monkeypatch):
    if large:
        refuse_to_map(monkeypatch)
    source = SafetensorsSource(unaligned(tmp_path / "m.safetensors"))
    tensor = source.read("floats")
    assert (tensor.tolist(), tensor.data_ptr() % 4, source.read("byte").item()) == ([1.5, 2.5], 0, 7)


def refuse_to_map(monkeypatch):
    """As for a file that is larger than the memory."""

    def refusing(path, shared, nbytes):
        raise RuntimeError(f"unable to mmap {nbytes} bytes from file <{path}>: Cannot allocate memory (12)")

    monkeypatch.setattr(torch.UntypedStorage, "from_file", refusing)


@pytest.mark.skipif(not module.NO_RESERVE, reason="Linux")
def test_a_file_larger_than_the_memory_is_read_too(tmp_path, monkeypatch):
    tensors = odd_tensors()
    save(tensors, tmp_path)
    refuse_to_map(monkeypatch)
    found = load(tmp_path)
    assert all(torch.equal(found[name], tensors[name]) for name in tensors | found)


def test_a_file_that_is_cut_off_after_it_was_opened_is_an_error_and_not_the_end(tmp_path):
    save({"w": torch.ones(10_000)}, tmp_path)
    source = SafetensorsSource(tmp_path)
    os.truncate(tmp_path / "model.safetensors", 100)
    with pytest.raises(DecodeError, match=r"has 100 bytes, had 40,\d\d\d when it was opened$"):
        source.read("w")


def resident(path):
    """Bytes of a mapped file that are in this process's memory."""
    text, ours = Path("/proc/self/smaps").read_text().splitlines(), False
    total = 0
    for line in text:
        if re.match("[0-9a-f]+-[0-9a-f]+ ", line):
            ours = line.endswith(str(path))
        elif ours and line.startswith("Rss:"):
            total += 1024 * int(line.split()[1])
    return total


@pytest.mark.skipif(sys.platform != "linux", reason="Linux")
@pytest.mark.parametrize("large", [False, True])
def test_a_tensor_that_is_released_leaves_the_memory_and_can_be_read_again(large, tmp_path, monkeypatch):
    if large:
        refuse_to_map(monkeypatch)
    file = tmp_path.resolve() / "model.safetensors"
    tensors = {name: torch.randn(1_000_003) for name in "abc"}
    save(tensors, tmp_path)
    source = SafetensorsSource(tmp_path)
    views = {name: source.read(name) for name in tensors}
    assert all(torch.equal(views[name], tensors[name]) for name in tensors)
    everything = resident(file)
    source.release(["b"])
    assert everything > 12_000_000
    assert everything - 4_100_000 < resident(file) < everything - 3_900_000
    assert all(torch.equal(views[name], tensors[name]) for name in tensors)
    source.release(["c", "a", "b"])
    assert resident(file) < 20_000
    del views
    assert all(torch.equal(source.read(name), tensors[name]) for name in tensors)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux")
def test_a_merge_lets_go_of_what_it_has_read(tmp_path):
    save({"w": torch.zeros(1_000_000)}, tmp_path / "base")
    save({"w": torch.ones(1_000_000)}, tmp_path / "client")
    base, client = (SafetensorsSource(tmp_path / name) for name in ("base", "client"))
    sink = MemorySink()
    execute(build("weighted_average"), Cohort(base, (Update("c", 1.0, client),)), sink)
    assert float(sink.tensors["w"].mean()) == 1.0
    assert resident(tmp_path.resolve() / "client" / "model.safetensors") < 200_000


def test_specs_are_made_once(tmp_path):
    save({"w": torch.ones(3)}, tmp_path)
    source = SafetensorsSource(tmp_path)
    assert source.specs() is source.specs()


# --- writing ---------------------------------------------------------------------------------------------------------


def odd_tensors():
    return {
        "": torch.ones(2),
        'é"\\ \n\t/..': torch.tensor(3.0),
        "none": torch.empty(0, 3),
        "flags": torch.tensor([True, False, True]),
    }


@pytest.mark.parametrize("tensors", [{}, odd_tensors(), {"none": torch.empty(0)}], ids=["none", "odd", "empty"])
@pytest.mark.parametrize("shard_bytes", [4, 10**9])
def test_odd_models(tensors, shard_bytes, tmp_path):
    save(tensors, tmp_path, max_shard_bytes=shard_bytes)
    found = load(tmp_path)
    theirs = {k: v for path in tmp_path.glob("*.safetensors") for k, v in load_file(path).items()}
    assert set(found) == set(theirs) == set(tensors)
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert all(torch.equal(theirs[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize(("name", "problem"), [("__metadata__", "the name is taken"), ("a\udc80", "not text that")])
def test_names_that_the_format_cannot_hold(name, problem, tmp_path):
    with pytest.raises(MergeError, match=problem):
        save({name: torch.ones(1)}, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_the_order_of_calls(tmp_path):
    specs = {"w": TensorSpec((3,), torch.float32)}
    sink = SafetensorsSink(tmp_path)
    sink.abort()
    with pytest.raises(MergeError, match=r"finish\(\) without a begin\(\)"):
        sink.finish()
    sink.begin(specs)
    with pytest.raises(MergeError, match=r"begin\(\) was called twice"):
        sink.begin(specs)
    sink.abort()
    sink.abort()
    assert not list(tmp_path.iterdir())
    with pytest.raises(MergeError, match="'w' is not among those that were begun"):
        sink.place("w")
    sink.begin(specs)
    sink.place("w").fill_(2.0)
    sink.finish()
    sink.abort()
    assert load(tmp_path)["w"].tolist() == [2.0] * 3


@pytest.mark.parametrize("end", ["finish", "abort"])
def test_no_mapping_outlives_the_end(end, tmp_path):
    sink = SafetensorsSink(tmp_path)
    sink.begin({"w": TensorSpec((3,), torch.float32)})
    mapped = weakref.ref(sink._shards[0]._map)
    place = sink.place("w")
    getattr(sink, end)()
    assert mapped() is not None  # whoever has a place may still look into it
    del place
    gc.collect()
    assert mapped() is None
