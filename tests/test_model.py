"""The global model as one set of bytes: what is merged is what is given out and sent."""

import pytest
import torch

from fl_merge.codecs import codec_for
from fl_merge.errors import MergeError
from fl_merge.methods import weighted_average
from fl_merge.model import GlobalModel
from fl_merge.store import MemorySource
from fl_merge.types import Update

KINDS = {
    "float32": (torch.float32, None),
    "bfloat16": (torch.bfloat16, None),
    "float16": (torch.float16, None),
    "float64": (torch.float64, None),
    "float32 sent as bfloat16": (torch.float32, torch.bfloat16),
    "bfloat16 sent as float32": (torch.bfloat16, torch.float32),
    "float64 sent as float16": (torch.float64, torch.float16),
}


def merged(dtype, wire, rounds=2):
    draw = torch.Generator().manual_seed(3)
    tensors = {"w": torch.randn(40, 30, generator=draw), "b": torch.randn(3, generator=draw), "none": torch.empty(0)}
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()} | {"steps": torch.tensor([7] * 20)}
    model = GlobalModel.of(tensors, wire=wire)
    for number in range(rounds):
        updates = tuple(
            Update(str(client), client + 1.0, MemorySource({name: moved(t, draw) for name, t in model.sent.items()}))
            for client in range(3)
        )
        model, _ = model.merged(weighted_average(), updates, seed=0, round_number=number, wire=wire)
    return model


def moved(tensor, draw):
    if not tensor.is_floating_point():
        return tensor.clone()
    return tensor + 0.01 * torch.randn(tensor.shape, generator=draw).to(tensor.dtype)


@pytest.mark.parametrize(("dtype", "wire"), KINDS.values(), ids=KINDS)
def test_the_bytes_are_those_of_the_tensors(dtype, wire):
    model = merged(dtype, wire)
    assert {name for name, _ in model.encoded} >= {"w"}
    for (name, kind), data in model.encoded.items():
        holder = model.sent if model.sent[name].dtype == kind else model.kept
        assert data == codec_for(kind).encode(holder[name])
        elements = torch.frombuffer(data, dtype=torch.uint8)
        start = holder[name].data_ptr() - elements.data_ptr()
        assert 0 <= start < len(data)  # not a copy: the tensor looks into them


@pytest.mark.parametrize(("dtype", "wire"), KINDS.values(), ids=KINDS)
def test_what_has_no_bytes_to_be_made_in_is_the_same(dtype, wire, monkeypatch):
    model = merged(dtype, wire)
    monkeypatch.setattr("fl_merge.codecs._new_bytes", None)
    copied = merged(dtype, wire)
    assert not copied.encoded
    for one, other in ((model.sent, copied.sent), (model.kept, copied.kept), (model.tensors(), copied.tensors())):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one)


def test_a_model_of_one_dtype_is_kept_once():
    model = merged(torch.float32, None)
    assert not model.kept
    assert model.tensors()["w"] is model.sent["w"] is model.master()["w"]


def test_a_large_model_that_does_not_fit_is_found_in_any_piece(monkeypatch):
    monkeypatch.setattr("fl_merge.model._PIECE", 16)
    values = torch.zeros(100)
    values[99] = 70000.0
    with pytest.raises(MergeError, match="tensor 'w': the model does not fit float16"):
        GlobalModel.of({"w": values}, wire=torch.float16)
    values[99] = 1.5
    assert torch.equal(GlobalModel.of({"w": values}, wire=torch.float16).sent["w"], values.half())
