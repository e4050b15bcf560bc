"""Tensors to Flower's records and back, bfloat16 included, and the client's two helpers."""

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict

from fl_merge import RecipeError
from fl_merge.codecs import DTYPES
from fl_merge.errors import DecodeError
from fl_merge.flower.client import receive, reply
from fl_merge.flower.inprocess import InProcessGrid
from fl_merge.flower.records import RecordSource, to_record, to_tensors, wire_dtype
from fl_merge.types import TensorSpec


def state():
    return {
        "w": torch.tensor([[1.0, 2.5], [-3.0, 0.1]]),
        "turned": torch.arange(6.0).reshape(2, 3).T,
        "half": torch.tensor([1.0, 65504.0]).half(),
        "brain": torch.tensor([1.0, -3e38]).bfloat16(),
        "wide": torch.tensor(0.1, dtype=torch.float64),
        "steps": torch.tensor(7),
        "mask": torch.tensor([True, False]),
        "none": torch.empty(0, 3),
    }


def test_there_and_back():
    back = to_tensors(to_record(state()))
    assert list(back) == list(state())
    for name, tensor in state().items():
        assert (back[name].dtype, back[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(back[name], tensor), name


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_every_dtype_travels(dtype):
    tensor = torch.tensor([1, 0, 1]).to(dtype)
    assert torch.equal(to_tensors(to_record({"t": tensor}))["t"].double(), tensor.double())


def test_what_is_read_may_be_trained_on():
    record = to_record(state())
    tensors = to_tensors(record)
    for tensor in tensors.values():
        tensor.zero_()
    assert torch.equal(to_tensors(record)["w"], state()["w"])


def test_what_numpy_has_is_flowers_own_array():
    """Byte for byte, so that plain Flower clients read it, and theirs are read here."""
    tensors = {name: tensor for name, tensor in state().items() if name != "brain"}
    record = to_record(tensors)
    for name, tensor in tensors.items():
        theirs = Array(np.ascontiguousarray(tensor.numpy()).reshape(tensor.shape))
        assert (record[name].dtype, record[name].shape, record[name].stype) == (
            theirs.dtype,
            theirs.shape,
            theirs.stype,
        )
        np.testing.assert_array_equal(record[name].numpy(), tensor.numpy())
    assert record.to_torch_state_dict().keys() == tensors.keys()
    assert torch.equal(to_tensors(ArrayRecord(tensors))["w"], tensors["w"])


def test_bfloat16_is_refused_loudly_by_who_does_not_know_it():
    array = to_record(state())["brain"]
    assert (array.dtype, array.stype, len(array.data)) == ("bfloat16", "fl_merge.raw", 4)
    with pytest.raises(TypeError, match=r"fl_merge\.raw"):
        array.numpy()


def test_floats_can_be_narrowed_on_the_way():
    record = to_record(state(), "bfloat16")
    assert {name for name, array in record.items() if array.dtype == "bfloat16"} == {
        "w",
        "turned",
        "half",
        "brain",
        "wide",
        "none",
    }
    assert torch.equal(to_tensors(record)["w"], state()["w"].bfloat16())
    assert to_tensors(record)["steps"] == 7
    assert len(record["w"].data) == 8


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (None, None),
        ("", None),
        ("bfloat16", torch.bfloat16),
        ("torch.float16", torch.float16),
        (torch.float64, torch.float64),
    ],
)
def test_names_of_wire_dtypes(given, found):
    assert wire_dtype(given) is found


@pytest.mark.parametrize("given", ["bf16", "int8", "float", torch.int64, "bool"])
def test_what_is_no_wire_dtype(given):
    with pytest.raises(RecipeError) as caught:
        wire_dtype(given)
    floats = "float64, float32, float16, bfloat16, float8_e4m3fn, float8_e5m2"
    assert str(caught.value) == f"wire dtype: found '{given}', wanted one of {floats}"


def test_a_dtype_that_does_not_travel():
    with pytest.raises(RecipeError, match=r"^tensor 'z': dtype complex64 does not travel \(known: float64, "):
        to_record({"z": torch.ones(2, dtype=torch.complex64)})


def test_a_source_checks_headers_before_bytes():
    record = to_record(state())
    source = RecordSource(record)
    assert source.specs() == {name: TensorSpec.of(tensor) for name, tensor in state().items()}
    assert source.aliases() == {}
    assert source.read("w") is source.read("w")
    lying = Array(dtype="float32", shape=(3,), stype="numpy.ndarray", data=record["w"].data)
    broken = RecordSource(ArrayRecord({"w": lying}))
    assert broken.specs() == {"w": TensorSpec((3,), torch.float32)}
    with pytest.raises(
        DecodeError, match=r"^tensor 'w': the array inside is \(2, 2\) float32, announced as \(3,\) float32$"
    ):
        broken.read("w")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"stype": "pickle"}, "tensor 'w': encoded as 'pickle', known are fl_merge.raw, numpy.ndarray"),
        ({"dtype": "object"}, "tensor 'w': dtype 'object' is not supported (float64, float32, "),
        ({"shape": (-1,)}, "tensor 'w': shape (-1,) is no shape"),
        ({"shape": (True,)}, "tensor 'w': shape (True,) is no shape"),
    ],
)
def test_headers_that_make_no_sense(fields, words):
    array = Array(**{"dtype": "float32", "shape": (1,), "stype": "numpy.ndarray", "data": b""} | fields)
    with pytest.raises(DecodeError) as caught:
        to_tensors(ArrayRecord({"w": array}))
    assert str(caught.value).startswith(words)


# --- the client's helpers --------------------------------------------------------------------------------------------


@pytest.fixture
def request_message():
    """A message to a node, as a ClientApp gets it."""
    from flwr.clientapp import ClientApp

    InProcessGrid(ClientApp(), 1, workers=0)  # without a run there are no messages
    message = Message(RecordDict({"arrays": to_record(state())}), dst_node_id=1000, message_type="train")
    message.metadata.__dict__["_message_id"] = "asked"
    return message


def test_receive_gives_the_model(request_message):
    assert torch.equal(receive(request_message)["brain"], state()["brain"])


def test_receive_wants_one_model(request_message):
    request_message.content["more"] = ArrayRecord({})
    with pytest.raises(DecodeError, match=r"^message with 2 ArrayRecords, wanted one$"):
        receive(request_message)


def test_reply_carries_model_examples_and_metrics(request_message):
    answer = reply(request_message, state(), num_examples=12, metrics={"loss": 0.5}, dtype="bfloat16")
    assert answer.metadata.reply_to_message_id == "asked"
    assert dict(answer.content["metrics"]) == {"loss": 0.5, "num-examples": 12}
    assert answer.content["arrays"]["w"].dtype == "bfloat16"
    assert list(answer.content) == ["metrics", "arrays"]


def test_reply_to_an_evaluation_has_no_arrays(request_message):
    answer = reply(request_message, None, 3, {"accuracy": 0.9}, weighted_by_key="n")
    assert dict(answer.content.array_records) == {}
    assert answer.content["metrics"] == MetricRecord({"accuracy": 0.9, "n": 3})
