"""Safetensors in and out: read back by the format's own library, shards and index, and what a failure leaves behind."""

import errno
import json
import os
import shutil
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fl_merge import MergeError, RecipeError, store
from fl_merge.errors import DecodeError
from fl_merge.execute import execute
from fl_merge.methods import weighted_average
from fl_merge.store import (
    INDEX_FILE,
    SAFETENSORS_DTYPES,
    MemorySource,
    SafetensorsSink,
    SafetensorsSource,
    load,
    save,
)
from fl_merge.types import Cohort, TensorSpec, Update


def every_dtype():
    """One tensor a dtype, in an order that would leave them unaligned, with 0-d, empty and odd-sized ones."""
    tensors = {}
    for dtype in sorted(SAFETENSORS_DTYPES, key=str):
        label = str(dtype).removeprefix("torch.")
        tensors[f"{label}.odd"] = torch.tensor([1, 0, 1]).to(dtype)
        tensors[f"{label}.scalar"] = torch.tensor(1).to(dtype)
        tensors[f"{label}.none"] = torch.empty(0, 2).to(dtype)
    tensors["turned"] = torch.arange(6.0).reshape(2, 3).T
    return tensors


def same(found, wanted):
    assert set(found) == set(wanted)
    for name in wanted:
        assert (found[name].dtype, found[name].shape) == (wanted[name].dtype, wanted[name].shape), name
        as_bytes = [t.contiguous().view(-1).view(torch.uint8) for t in (found[name], wanted[name])]
        assert torch.equal(*as_bytes), name
    return True


def header_of(path):
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), 8 + length, len(data)


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


# --- what is written can be read -------------------------------------------------------------------------------------


def test_the_formats_own_library_reads_it_back(tmp_path):
    save(every_dtype(), tmp_path, metadata={"round": "3"})
    assert names_in(tmp_path) == ["model.safetensors"]
    assert same(load_file(tmp_path / "model.safetensors"), every_dtype())
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "round": "3"}


def test_we_read_it_back_and_what_the_library_writes(tmp_path):
    save(every_dtype(), tmp_path)
    assert same(load(tmp_path), every_dtype())
    contiguous = {name: tensor.contiguous() for name, tensor in every_dtype().items()}
    save_file(contiguous, tmp_path / "theirs.safetensors")
    assert same(load(tmp_path / "theirs.safetensors"), every_dtype())


def test_every_tensor_is_aligned_to_its_elements(tmp_path):
    save(every_dtype(), tmp_path)
    header, start, size = header_of(tmp_path / "model.safetensors")
    assert start % 8 == 0
    ends = []
    for name, tensor in every_dtype().items():
        begin, end = header[name]["data_offsets"]
        assert (start + begin) % tensor.dtype.itemsize == 0, name
        assert end - begin == tensor.nbytes
        ends.append(end)
    assert start + max(ends) == size


def test_loaded_tensors_outlive_the_file(tmp_path):
    save({"w": torch.ones(3)}, tmp_path)
    tensors = load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert tensors["w"].tolist() == [1.0, 1.0, 1.0]


def test_a_source_describes_without_reading_and_reads_views(tmp_path):
    save({"w": torch.ones(3), "h": torch.ones(2, 2, dtype=torch.bfloat16)}, tmp_path)
    source = SafetensorsSource(tmp_path)
    assert source.specs() == {"h": TensorSpec((2, 2), torch.bfloat16), "w": TensorSpec((3,), torch.float32)}
    assert source.read("w").tolist() == [1.0, 1.0, 1.0]
    assert source.aliases() == {}


def test_of_tied_names_the_first_is_written(tmp_path):
    shared = torch.ones(2)
    save({"embed": shared, "head": shared}, tmp_path)
    assert list(load_file(tmp_path / "model.safetensors")) == ["embed"]


# --- shards ----------------------------------------------------------------------------------------------------------

MODEL = {f"layers.{i}.weight": torch.full((10,), float(i)) for i in range(5)} | {"big": torch.zeros(100)}


def test_shards_and_their_index(tmp_path):
    save(MODEL, tmp_path, max_shard_bytes=80)
    shards = [f"model-{number:05d}-of-00004.safetensors" for number in range(1, 5)]
    assert names_in(tmp_path) == [*shards, INDEX_FILE]
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    assert index["metadata"] == {"total_size": 5 * 40 + 400}
    assert index["weight_map"] == {
        "layers.0.weight": shards[0],
        "layers.1.weight": shards[0],
        "layers.2.weight": shards[1],
        "layers.3.weight": shards[1],
        "layers.4.weight": shards[2],
        "big": shards[3],  # larger than a shard may be, and still in one piece
    }
    assert same(load_file(tmp_path / shards[1]), {name: MODEL[name] for name in ("layers.2.weight", "layers.3.weight")})
    for path in (tmp_path, tmp_path / INDEX_FILE):
        assert same(load(path), MODEL)


def test_a_model_replaces_another_and_leaves_nothing_of_it(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    save(MODEL, tmp_path, max_shard_bytes=80)
    save({"w": torch.ones(1)}, tmp_path)
    assert names_in(tmp_path) == ["model.safetensors", "notes.txt"]
    save(MODEL, tmp_path, max_shard_bytes=300)
    assert names_in(tmp_path) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        INDEX_FILE,
        "notes.txt",
    ]
    assert same(load(tmp_path), MODEL)


# --- merging from files to files -------------------------------------------------------------------------------------


def test_a_merge_from_files_to_shards_is_the_merge_in_memory(tmp_path):
    generator = torch.Generator().manual_seed(0)
    models = [
        {"a": torch.randn(50_000, generator=generator), "b": torch.randn(7, 3, generator=generator).bfloat16()}
        for _ in range(3)
    ]
    for number, model in enumerate(models):
        save(model, tmp_path / str(number), max_shard_bytes=1000)

    def cohort(source):
        return Cohort(source(0), tuple(Update(str(i), 1.0, source(i)) for i in (1, 2)))

    sink = SafetensorsSink(tmp_path / "merged", max_shard_bytes=1000)
    execute(
        weighted_average(),
        cohort(lambda i: SafetensorsSource(tmp_path / str(i))),
        sink,
        threads=2,
        slice_elements=16384,
    )
    memory = store.MemorySink()
    execute(weighted_average(), cohort(lambda i: MemorySource(models[i])), memory)
    assert same(load(tmp_path / "merged"), memory.tensors)


# --- failures leave the old model ------------------------------------------------------------------------------------


class InterruptedMergeError(Exception):
    pass


def interrupted_merge(folder, after, mapped=False):
    """A merge into the folder that fails once so many tensors have been written, or asked for to be written to."""
    sink = SafetensorsSink(folder, max_shard_bytes=80)
    if mapped:
        sink.whole_bytes = 0
    asked = []

    def counted(real):
        def call(*arguments):
            if len(asked) == after:
                raise InterruptedMergeError
            asked.append(arguments)
            return real(*arguments)

        return call

    sink.place, sink.write = counted(sink.place), counted(sink.write)
    source = MemorySource({name: tensor + 1 for name, tensor in MODEL.items()})
    with pytest.raises(InterruptedMergeError):
        execute(weighted_average(), Cohort(source, (Update("0", 1.0, source),)), sink, threads=1)


@pytest.mark.parametrize("after", [0, 3, 5])
@pytest.mark.parametrize("old_shard_bytes", [80, 10**9])
@pytest.mark.parametrize("mapped", [False, True])
def test_a_failure_half_way_leaves_the_old_model_and_no_temporary_file(tmp_path, after, old_shard_bytes, mapped):
    save(MODEL, tmp_path, max_shard_bytes=old_shard_bytes)
    before = names_in(tmp_path)
    interrupted_merge(tmp_path, after, mapped)
    assert names_in(tmp_path) == before
    assert same(load(tmp_path), MODEL)


def test_the_new_model_is_not_seen_before_it_is_whole(tmp_path):
    save(MODEL, tmp_path)
    sink = SafetensorsSink(tmp_path)
    sink.begin({"w": TensorSpec((1000,), torch.float32)})
    sink.write("w", 0, torch.ones(500))
    assert same(load(tmp_path), MODEL)
    sink.write("w", 500, torch.full((500,), 2.0))
    assert same(load(tmp_path), MODEL)
    sink.finish()
    assert same(load(tmp_path), {"w": torch.cat([torch.ones(500), torch.full((500,), 2.0)])})


def test_a_full_disk_is_one_error_and_no_file(tmp_path, monkeypatch):
    save({"w": torch.ones(1)}, tmp_path)

    def fallocate(file, offset, length):
        claimed.append(length)
        if len(claimed) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(file, offset, length)

    real, claimed = os.posix_fallocate, []
    monkeypatch.setattr(os, "posix_fallocate", fallocate)
    with pytest.raises(MergeError) as caught:
        save(MODEL, tmp_path, max_shard_bytes=80)
    third = tmp_path / "model-00003-of-00004.safetensors"
    assert str(caught.value) == (
        f"cannot write '{third}' (40 bytes): No space left on device; make room on that disk or write to another"
    )
    assert len(claimed) == 3
    assert names_in(tmp_path) == ["model.safetensors"]


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MergeError) as caught:
        save({"w": torch.ones(1)}, tmp_path / "file")
    assert str(caught.value) == f"cannot make the folder '{tmp_path / 'file'}': File exists"


def test_a_folder_that_has_vanished_meanwhile(tmp_path):
    sink = SafetensorsSink(tmp_path / "model")
    sink.begin({"w": TensorSpec((4,), torch.float32)})
    sink.write("w", 0, torch.ones(4))
    shutil.rmtree(tmp_path / "model")
    with pytest.raises(MergeError, match=r"^cannot write '.*model' \(16 bytes\): No such file or directory$"):
        sink.finish()
    sink.abort()
    assert names_in(tmp_path) == []


def test_a_dtype_that_the_format_does_not_have(tmp_path):
    with pytest.raises(MergeError, match=r"^tensor 'z': a safetensors file has no dtype for \(2,\) complex64$"):
        save({"w": torch.ones(1), "z": torch.ones(2, dtype=torch.complex64)}, tmp_path / "new")
    assert not (tmp_path / "new").exists()


# --- what cannot be read ---------------------------------------------------------------------------------------------


def test_no_such_model(tmp_path):
    with pytest.raises(RecipeError) as caught:
        load(tmp_path / "missing")
    assert str(caught.value) == (
        f"no such model: '{tmp_path / 'missing'}' (wanted a .safetensors file, or a folder with one)"
    )
    with pytest.raises(RecipeError) as caught:
        load(tmp_path)
    assert str(caught.value) == f"folder '{tmp_path}' holds no model.safetensors and no {INDEX_FILE}"


def broken(tmp_path, change):
    """A model file after `change` was applied to its bytes."""
    save({"w": torch.arange(100.0)}, tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(change(path.read_bytes()))
    return path


@pytest.mark.parametrize(
    "change",
    [
        lambda data: b"",
        lambda data: data[:7],
        lambda data: data[:40],
        lambda data: data[:-1],
        lambda data: data + b"\0",
        lambda data: struct.pack("<Q", 2**60) + data[8:],
        lambda data: data[:8] + b"[" + data[9:],
        lambda data: data.replace(b"[0,400]", b"[0,399]"),
        lambda data: data.replace(b"[0,400]", b"[8,408]"),
        lambda data: data.replace(b'"F32"', b'"F99"'),
        lambda data: b"not a model at all, but text",
    ],
)
def test_a_broken_file_is_said_to_be_so(tmp_path, change):
    path = broken(tmp_path, change)
    with pytest.raises(DecodeError) as caught:
        SafetensorsSource(path)
    assert str(caught.value).startswith(f"'{path}' is not a readable safetensors file: ")


def test_a_missing_shard(tmp_path):
    save(MODEL, tmp_path, max_shard_bytes=80)
    (tmp_path / "model-00002-of-00004.safetensors").unlink()
    with pytest.raises(RecipeError) as caught:
        load(tmp_path)
    index = tmp_path / INDEX_FILE
    assert str(caught.value) == f"'{index}' names shard 'model-00002-of-00004.safetensors', which is not there"


def test_a_tensor_that_is_not_where_the_index_has_it(tmp_path):
    save(MODEL, tmp_path, max_shard_bytes=80)
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    index["weight_map"]["lost"] = "model-00001-of-00004.safetensors"
    (tmp_path / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(
        DecodeError, match=r"tensor 'lost' is not in 'model-00001-of-00004.safetensors', where the index has it$"
    ):
        SafetensorsSource(tmp_path)


def test_one_tensor_in_two_shards(tmp_path):
    save(MODEL, tmp_path, max_shard_bytes=80)
    save_file({"big": torch.ones(1)}, tmp_path / "model-00001-of-00004.safetensors")
    with pytest.raises(DecodeError, match=r"tensor 'big' stands in two files of this model$"):
        SafetensorsSource(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", "{}", '{"weight_map": 3}', '{"weight_map": []}', '{"weight_map": null}']
)
def test_an_index_that_is_none(tmp_path, text):
    (tmp_path / INDEX_FILE).write_text(text)
    with pytest.raises(DecodeError) as caught:
        SafetensorsSource(tmp_path)
    assert str(caught.value).startswith(f"'{tmp_path / INDEX_FILE}' is not an index of safetensors shards: ")


def test_a_dtype_that_we_do_not_read(tmp_path):
    save_file({"w": torch.ones(2, dtype=torch.uint16)}, tmp_path / "model.safetensors")
    with pytest.raises(DecodeError, match=r"^tensor 'w': dtype U16 is not supported \(BF16, BOOL, F16"):
        SafetensorsSource(tmp_path).specs()


def test_a_sharded_model_stays_readable_until_the_index_names_the_new_shards(tmp_path, monkeypatch):
    """Between any two steps of the replacement a reader has the old model or the new one, whole."""
    old = {name: torch.zeros(100) for name in "abc"}
    new = {name: torch.ones(100) for name in "abc"}
    save(old, tmp_path, max_shard_bytes=400)
    seen = []
    replace = os.replace

    def replace_and_look(source, target):
        replace(source, target)
        seen.append({float(tensor[0]) for tensor in load(tmp_path).values()})

    monkeypatch.setattr(os, "replace", replace_and_look)
    save(new, tmp_path, max_shard_bytes=400)
    assert seen == [{0.0}, {0.0}, {0.0}, {1.0}]
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    assert not list(tmp_path.glob(".*"))


def test_a_failure_between_two_shards_leaves_the_old_model_and_nothing_else(tmp_path, monkeypatch):
    save({name: torch.zeros(100) for name in "abc"}, tmp_path, max_shard_bytes=400)
    before = sorted(path.name for path in tmp_path.iterdir())
    replace = os.replace
    left = iter([1, 1])

    def replace_twice(source, target):
        if next(left, None) is None:
            raise OSError(errno.EIO, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace_twice)
    with pytest.raises(MergeError, match=r"^cannot write '.*' \(1,200 bytes\): Input/output error$"):
        save({name: torch.ones(100) for name in "abc"}, tmp_path, max_shard_bytes=400)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert all(not tensor.any() for tensor in load(tmp_path).values())


def test_files_of_others_in_the_folder_are_left_alone(tmp_path):
    theirs = tmp_path / "model-of-theirs-00001-of-00002.safetensors"
    theirs.write_bytes(b"theirs")
    save({"a": torch.zeros(3)}, tmp_path)
    assert theirs.read_bytes() == b"theirs"
