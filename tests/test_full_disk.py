"""Disks that are full, limits that are reached and file systems that cannot claim room: one clear error, the old model
as it was, nothing left behind."""

import contextlib
import errno
import os
import subprocess
import sys

import pytest
import torch

from fl_merge import MergeError
from fl_merge.spill import Spill
from fl_merge.store import MemorySource, SafetensorsSink, load, save
from fl_merge.types import TensorSpec, Update

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="limits and mounts of POSIX systems")

BIG = {"w": torch.zeros(1_000_000)}


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    with contextlib.suppress(OSError):
        if subprocess.run(mount, capture_output=True).returncode == 0:
            yield folder
            subprocess.run(["umount", "--lazy", str(folder)], check=True)
            return
    pytest.skip("cannot mount a small file system here")


def no_claim(number):
    def fallocate(*arguments):
        raise OSError(number, os.strerror(number))

    return fallocate


@pytest.mark.parametrize("cannot", [None, errno.EOPNOTSUPP, errno.EINVAL, "missing"])
@pytest.mark.parametrize("shard_bytes", [10**9, 1_000_000])
def test_a_disk_that_is_full(small_disk, cannot, shard_bytes, monkeypatch):
    """Also where room cannot be claimed ahead: to write through a mapping would be the end of the process there."""
    save({"old": torch.ones(3)}, small_disk)
    before = contents(small_disk)
    if cannot == "missing":
        monkeypatch.delattr(os, "posix_fallocate")
    elif cannot is not None:
        monkeypatch.setattr(os, "posix_fallocate", no_claim(cannot))
    model = {f"w.{number}": torch.zeros(250_000) for number in range(4)}
    with pytest.raises(MergeError) as caught:
        save(model, small_disk, max_shard_bytes=shard_bytes)
    file, size = ("model.safetensors", "4,000,000")
    if shard_bytes != 10**9:
        file, size = ("model-00003-of-00004.safetensors", "1,000,000")
    assert str(caught.value) == (
        f"cannot write '{small_disk / file}' ({size} bytes): No space left on device; make room on that disk or write "
        "to another"
    )
    assert contents(small_disk) == before
    save({"w": torch.ones(100_000)}, small_disk)
    assert load(small_disk)["w"].sum() == 100_000


@pytest.mark.parametrize("cannot", [None, errno.EOPNOTSUPP])
def test_an_update_for_which_the_disk_has_no_room(small_disk, cannot, monkeypatch):
    if cannot is not None:
        monkeypatch.setattr(os, "posix_fallocate", no_claim(cannot))
    with Spill(small_disk) as spill:
        kept = spill.keep(Update("1", 1.0, MemorySource({"w": torch.ones(10)})))
        with pytest.raises(MergeError, match=r"4,000,000 bytes in '.*' \(spill_folder\): No space left on device$"):
            spill.keep(Update("2", 1.0, MemorySource(BIG)))
        assert [path.name for path in spill.open().iterdir()] == ["000000.safetensors"]
        assert kept.tensors.read("w").sum() == 10
    assert not list(small_disk.iterdir())


def test_a_disk_that_fills_up_while_it_is_written_where_room_was_claimed(small_disk):
    sink = SafetensorsSink(small_disk)
    sink.begin({"w": TensorSpec((250_000,), torch.float32)})
    with contextlib.suppress(OSError), open(small_disk / "another's", "wb", buffering=0) as file:
        while True:
            file.write(bytes(100_000))
    sink.write("w", 0, torch.ones(250_000))
    with contextlib.suppress(MergeError):  # the notes of one line may find no room
        sink.finish()
        assert load(small_disk)["w"].sum() == 250_000
    sink.abort()
    (small_disk / "another's").unlink()
    assert {path.name for path in small_disk.iterdir()} <= {"model.safetensors"}


LIMITED = """
import resource, sys, torch
from fl_merge import MergeError
from fl_merge.spill import Spill
from fl_merge.store import MemorySource, save
from fl_merge.types import Update
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
big = {"w": torch.zeros(1_000_000)}
for write in (lambda: save(big, sys.argv[1]), lambda: Spill(sys.argv[2]).keep(Update("1", 1.0, MemorySource(big)))):
    try:
        write()
    except MergeError as error:
        print(error)
"""


def test_a_limit_on_the_size_of_files(tmp_path):
    out, spill = tmp_path / "out", tmp_path / "spill"
    save({"old": torch.ones(3)}, out)
    before = contents(out)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", LIMITED, str(out), str(spill)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert ended.stdout == (
        f"cannot write '{out / 'model.safetensors'}' (4,000,000 bytes): File too large; raise the limit on the size of "
        f"a file (ulimit -f) or write smaller shards\n"
        f"cannot keep an update of 4,000,000 bytes in '{spill}' (spill_folder): File too large\n"
    ), ended.stderr
    assert contents(out) == before


@pytest.mark.parametrize("failing", ["rewrite", "index", "replace"])
def test_no_room_for_the_small_files_at_the_end(failing, tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    save({"a": torch.ones(3), "b": torch.ones(3)}, tmp_path, max_shard_bytes=12)
    before = contents(tmp_path)
    sink = SafetensorsSink(tmp_path, max_shard_bytes=12)
    sink.begin({name: TensorSpec((3,), torch.float32) for name in "ab"})
    target = {"rewrite": "os.pwrite", "index": "fl_merge.store.sink.write_text", "replace": "os.replace"}[failing]
    with monkeypatch.context() as patch:
        patch.setattr(target, full)
        with pytest.raises(MergeError, match="No space left on device; make room"):
            sink.finish()
    sink.abort()
    assert contents(tmp_path) == before
