"""Updates kept on disk: the same bytes, nothing left behind, one clear error when there is no room."""

import errno
import os
import signal
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch

from fl_merge import METHODS, MergeError, build
from fl_merge.codecs import DTYPES
from fl_merge.errors import TensorMismatchError, UpdateError
from fl_merge.methods import weighted_average
from fl_merge.model import GlobalModel
from fl_merge.rounds import Refusal, Round, asked_statistics
from fl_merge.spill import PREFIX, Spill, remove_leftovers
from fl_merge.store import MemorySource
from fl_merge.types import Update

NAMES = ("7", "12", "100")


def every_kind_of_tensor(seed=0):
    draw = torch.Generator().manual_seed(seed)
    tensors = {f"of.{label}": torch.randn(37, 3, generator=draw).mul(3).to(dtype) for label, dtype in DTYPES.items()}
    return tensors | {
        "large": torch.randn(300, 1000, generator=draw),
        "layer.weight": torch.randn(4, 3, generator=draw),
        "turned": torch.randn(40, 60, generator=draw).T,
        "number": torch.tensor(-0.0),
        "nothing": torch.zeros(0, 3),
        "norm.num_batches_tracked": torch.tensor(seed),
    }


def bits(tensors):
    return {
        name: (tensor.dtype, tuple(tensor.shape), tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        for name, tensor in tensors.items()
    }


def update(client_id="1", tensors=None, num_examples=1.0, kinds=()):
    inputs = torch.randn(9, 3, generator=torch.Generator().manual_seed(int(num_examples)))
    statistics = {"count": torch.tensor(9.0)}
    statistics |= {"gram/layer": inputs.T @ inputs} if "gram" in kinds else {}
    statistics |= {"fisher/layer.weight": inputs[:4].square()} if "fisher" in kinds else {}
    return Update(
        client_id,
        num_examples,
        MemorySource(tensors or {"w": torch.ones(4)}, {}),
        {"loss": 0.5, "local-steps": 3},
        MemorySource(statistics) if len(statistics) > 1 else None,
    )


def files_in(folder):
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*"))


# --- the same bytes --------------------------------------------------------------------------------------------------


def test_an_update_comes_back_bit_for_bit(tmp_path):
    tensors = every_kind_of_tensor()
    with Spill(tmp_path) as spill:
        kept = spill.keep(update("a/../b", tensors))
        assert (kept.client_id, kept.num_examples, kept.metrics) == ("a/../b", 1.0, {"loss": 0.5, "local-steps": 3})
        found = {name: kept.tensors.read(name) for name in kept.tensors.specs()}
        assert bits(found) == dict(sorted(bits(tensors).items()))
        assert kept.tensors.specs() == MemorySource(tensors).specs()
        assert kept.tensors.aliases() == {}
        [folder, file] = files_in(tmp_path)
        assert file == f"{folder}/000000.safetensors"
        assert folder.startswith(f"{PREFIX}{os.getpid()}-")
        assert (tmp_path / folder).stat().st_mode & 0o777 == 0o700
    assert files_in(tmp_path) == []


def without_float8(tensors):
    return {name: tensor for name, tensor in tensors.items() if "float8" not in name}


@pytest.mark.parametrize("wire", [None, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name, entry in METHODS.items() if entry.merges == "models"])
def test_the_merged_model_is_the_same_with_and_without(name, wire, tmp_path):
    model = GlobalModel.of(without_float8(every_kind_of_tensor()), wire=wire)
    merged = []
    names = (*NAMES, *map(str, range(200, 220)))[: build(name).clients.nearest(len(NAMES))]
    min_replies = min(len(names), 2)
    for spill in (None, Spill(tmp_path)):
        collected = Round(1, model, build(name), names, seed=3, min_replies=min_replies, wire=wire, spill=spill)
        for number, client_id in enumerate(names if spill is None else reversed(names)):
            number = number if spill is None else len(names) - 1 - number
            tensors = {
                key: (tensor.float() + torch.randn(tensor.shape, generator=torch.Generator().manual_seed(number))).to(
                    tensor.dtype
                )
                if tensor.is_floating_point()
                else tensor + number
                for key, tensor in model.sent.items()
                if tensor.dtype != torch.bool
            } | {key: tensor for key, tensor in model.sent.items() if tensor.dtype == torch.bool}
            sent = update(client_id, tensors, 1.0 + number, asked_statistics(build(name)))
            assert collected.offer(client_id, lambda sent=sent: sent) is None
        after, report = collected.merge()
        assert report.failure is None
        files = len(names) * (2 if asked_statistics(build(name)) else 1)
        assert len(files_in(tmp_path)) == (0 if spill is None else 1 + files)
        if spill is not None:
            spill.close()
        merged.append(bits(after.master()))
    assert merged[0] == merged[1]
    assert merged[0] != bits(model.master())
    assert files_in(tmp_path) == []


def test_nothing_of_the_message_is_kept(tmp_path):
    sources = [MemorySource({"w": torch.ones(4)})]
    gone = weakref.ref(sources[0])
    model = GlobalModel.of({"w": torch.zeros(4)})
    with Spill(tmp_path) as spill:
        collected = Round(1, model, weighted_average(), ("1", "2"), spill=spill)
        assert collected.offer("1", lambda: Update("1", 1.0, sources.pop())) is None
        assert gone() is None


def test_statistics_are_kept_count_for_the_room_and_go_with_the_rest(tmp_path):
    with Spill(tmp_path) as spill:
        kept = spill.keep(update("1", kinds=("gram",)))
        assert set(kept.statistics.specs()) == {"count", "gram/layer"}
        assert kept.statistics.read("count") == 9
        [_, *files] = files_in(tmp_path)
        assert [Path(file).name for file in files] == ["000000-statistics.safetensors", "000000.safetensors"]
    assert files_in(tmp_path) == []
    bytes_of_both = 4 * 4 + 4 * (1 + 9)
    with Spill(tmp_path, max_bytes=bytes_of_both) as spill:
        spill.keep(update("1", kinds=("gram",)))
    words = rf"^client '1': {bytes_of_both} bytes are more than"
    with Spill(tmp_path, max_bytes=bytes_of_both - 1) as spill, pytest.raises(UpdateError, match=words):
        spill.keep(update("1", kinds=("gram",)))


# --- no room ---------------------------------------------------------------------------------------------------------


def test_each_client_has_an_equal_share_of_the_room(tmp_path):
    """So it is not for the first, nor for one that sends float64, to decide who else fits."""
    model = GlobalModel.of({"w": torch.zeros(4)})
    with Spill(tmp_path, max_bytes=48, clients=3) as spill:
        collected = Round(1, model, weighted_average(), NAMES, spill=spill)
        large = update("7", {"w": torch.ones(4).double()})
        assert str(collected.offer("7", lambda: large)) == (
            "client '7': 32 bytes are more than a client's share of max_spill_bytes (48 for 3); raise it to 96"
        )
        for client_id in NAMES[1:]:
            assert collected.offer(client_id, lambda each=client_id: update(each)) is None
        assert collected.merge()[0].sent["w"].tolist() == [1.0] * 4
    with pytest.raises(UpdateError, match="raise it to 16"):
        Spill(tmp_path, max_bytes=15).keep(update())
    assert files_in(tmp_path) == []


@pytest.mark.parametrize("fails", ["claim", "write"])
def test_a_full_disk_costs_the_round_and_is_said_once(tmp_path, monkeypatch, fails):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    model = GlobalModel.of({"w": torch.zeros(4)})
    with Spill(tmp_path) as spill:
        collected = Round(1, model, weighted_average(), NAMES, min_replies=1, spill=spill)
        assert collected.offer("12", lambda: update("12")) is None
        if fails == "claim":
            monkeypatch.setattr("fl_merge.spill.claim", full)
        else:
            monkeypatch.setattr("fl_merge.spill.os.write", full)
        assert collected.offer("7", lambda: update("7")) == Refusal("7", "the server could not keep it")
        assert len(files_in(tmp_path)) == 2  # the folder, and the update that was kept
        monkeypatch.undo()
        late = Refusal("100", "came after the server could keep no more updates")
        assert collected.offer("100", lambda: update("100")) == late
        merged, report = collected.merge()
    assert merged is None
    assert report.failure == (
        f"cannot keep an update of 16 bytes in '{tmp_path}' (spill_folder): No space left on device"
    )
    assert files_in(tmp_path) == []


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MergeError, match=r"cannot make a folder for updates in '.*file' \(spill_folder\): "):
        Spill(tmp_path / "file").open()


def test_a_dtype_that_the_format_does_not_have(tmp_path):
    """It is no fault of the others': a floating dtype other than the base's passes the check."""
    model = GlobalModel.of({"w": torch.zeros(4)})
    odd = update("7", {"w": torch.ones(4).to(torch.float8_e4m3fnuz)})
    with Spill(tmp_path) as spill:
        collected = Round(1, model, weighted_average(), NAMES, spill=spill)
        assert str(collected.offer("7", lambda: odd)).startswith(
            "client '7', tensor 'w': dtype float8_e4m3fnuz cannot be kept on disk, wanted one of float64, float32, "
        )
        with pytest.raises(TensorMismatchError):
            spill.keep(odd)
        for client_id in NAMES[1:]:
            assert collected.offer(client_id, lambda each=client_id: update(each)) is None
        assert collected.merge()[0].sent["w"].tolist() == [1.0] * 4


def test_a_name_that_the_format_does_not_have(tmp_path):
    with pytest.raises(MergeError, match=r"^tensor '__metadata__': the name is taken in a safetensors file"):
        Spill(tmp_path).keep(update("1", {"__metadata__": torch.zeros(2)}))


# --- what was written is what is merged ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda path: os.truncate(path, path.stat().st_size - 4), "the file has "),
        (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\x01"), "tensor 'w' does not have its checksum"),
    ],
)
def test_a_file_that_was_changed_costs_the_round(tmp_path, spoil, problem):
    model = GlobalModel.of({"w": torch.zeros(4)})
    with Spill(tmp_path) as spill:
        collected = Round(1, model, weighted_average(), ("1", "2"), spill=spill)
        for client_id in ("1", "2"):
            assert collected.offer(client_id, lambda each=client_id: update(each)) is None
        spoil(next(tmp_path.rglob("000001.safetensors")))
        merged, report = collected.merge()
    assert merged is None
    assert report.failure.startswith("client '2': its update in ")
    assert f"has changed since it came: {problem}" in report.failure


def test_bytes_that_change_after_they_were_read_are_found_when_they_are_read_again(tmp_path):
    with Spill(tmp_path) as spill:
        kept = spill.keep(update("2"))
        assert kept.tensors.read("w").tolist() == [1.0] * 4
        path = next(tmp_path.rglob("*.safetensors"))
        with open(path, "r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\x01")
        os.utime(path, ns=(0, 0))  # whatever the clock's grain
        with pytest.raises(MergeError, match="has changed since it came: tensor 'w' does not have its checksum"):
            kept.tensors.read("w")


def test_bytes_are_compared_once_while_the_file_stays_as_it_is(tmp_path, monkeypatch):
    with Spill(tmp_path) as spill:
        kept = spill.keep(update())
        kept.tensors.read("w")
        monkeypatch.setattr("fl_merge.spill.zlib.crc32", lambda data: pytest.fail("again"))
        assert kept.tensors.read("w").tolist() == [1.0] * 4


def test_an_update_stays_readable_when_its_file_has_been_removed(tmp_path):
    with Spill(tmp_path) as spill:
        kept = spill.keep(update())
        next(tmp_path.rglob("*.safetensors")).unlink()
        assert kept.tensors.read("w").tolist() == [1.0] * 4


# --- what dead processes left ----------------------------------------------------------------------------------------

KEEPS_AND_WAITS = """
import sys, time, torch
from fl_merge.spill import Spill
from fl_merge.store import MemorySource
from fl_merge.types import Update
spill = Spill(sys.argv[1])
spill.keep(Update("1", 1.0, MemorySource({"w": torch.ones(4)})))
print("kept", flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no locks on folders")
def test_the_folder_of_a_dead_process_is_removed_and_that_of_a_living_one_stays(tmp_path):
    command = [sys.executable, "-c", KEEPS_AND_WAITS, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "kept\n"
            left = files_in(tmp_path)
            assert len(left) == 2
            assert left[0].startswith(f"{PREFIX}{process.pid}-")
            remove_leftovers(tmp_path)
            assert files_in(tmp_path) == left
            process.send_signal(signal.SIGKILL)
            process.wait(30)
            assert files_in(tmp_path) == left
            with Spill(tmp_path) as spill, Spill(tmp_path) as other:
                mine = [spill.open().name, other.open().name]  # the second leaves the first's alone
                assert files_in(tmp_path) == sorted(mine)
        finally:
            process.kill()
    assert files_in(tmp_path) == []


def test_what_is_not_ours_is_left_alone(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("x")
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / f"{PREFIX}1-link").symlink_to(elsewhere)
    (inside / f"{PREFIX}file").write_text("x")
    (inside / "model.safetensors").write_text("x")
    before = files_in(tmp_path)
    remove_leftovers(inside)
    assert files_in(tmp_path) == before
