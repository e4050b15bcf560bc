"""Bytes on the wire: every dtype there and back, and bytes that lie."""

import io
import pickle

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from fl_merge.codecs import CODECS, DTYPES, Numpy, Raw, blank, codec_for
from fl_merge.errors import DecodeError
from fl_merge.store import SAFETENSORS_DTYPES
from fl_merge.types import TensorSpec

THREE = TensorSpec((3,), torch.float32)


def tensors(dtype):
    ones = torch.tensor([[1, 0, 1], [0, 0, 1]]).to(dtype)
    return [ones, ones.T, ones[:, ::2], ones[0, 0], ones[:0], torch.empty(0).to(dtype), ones.reshape(1, 2, 3, 1)]


def npy(array, **options):
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, **options)
    return buffer.getvalue()


def npy_with_header(header, elements=b"\0" * 12, version=b"\x01\x00"):
    """A .npy file with a header of our own making."""
    text = header.encode("latin1") if isinstance(header, str) else header
    length = len(text).to_bytes(2 if version == b"\x01\x00" else 4, "little")
    return b"\x93NUMPY" + version + length + text + elements


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_every_dtype_and_shape_there_and_back(dtype):
    codec = codec_for(dtype)
    for tensor in tensors(dtype):
        back = codec.decode(codec.encode(tensor), TensorSpec.of(tensor))
        assert (back.dtype, back.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(back.to(torch.float64), tensor.to(torch.float64))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_raw_bytes_hold_any_dtype(dtype):
    for tensor in tensors(dtype):
        data = Raw().encode(tensor)
        assert len(data) == tensor.nbytes
        assert torch.equal(Raw().decode(data, TensorSpec.of(tensor)).double(), tensor.double())


def test_what_travels_is_what_files_hold():
    """The two tables are written down apart, for neither module imports the other."""
    assert set(DTYPES.values()) == set(SAFETENSORS_DTYPES)


def test_what_numpy_has_travels_as_numpys_and_the_rest_raw():
    raw = {label for label, dtype in DTYPES.items() if codec_for(dtype).tag == "fl_merge.raw"}
    assert raw == {"bfloat16", "float8_e4m3fn", "float8_e5m2"}
    assert {codec.tag for codec in CODECS.values()} == {"fl_merge.raw", "numpy.ndarray"} == set(CODECS)


def test_our_npy_is_numpys():
    tensor = torch.arange(6.0).reshape(2, 3)
    np.testing.assert_array_equal(np.load(io.BytesIO(Numpy().encode(tensor))), tensor.numpy())
    assert Numpy().encode(tensor) == npy(tensor.numpy())


def test_bfloat16_raw_is_the_upper_half_of_float32():
    assert Raw().encode(torch.tensor([1.0, -2.0], dtype=torch.bfloat16)) == bytes.fromhex("803f 00c0")


@pytest.mark.parametrize(
    "array",
    [
        np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
        np.arange(6, dtype=">f4").reshape(2, 3),
        np.asfortranarray(np.arange(6, dtype=">f4").reshape(2, 3)),
    ],
)
def test_other_orders_and_endianness_are_read(array):
    tensor = Numpy().decode(npy(array), TensorSpec((2, 3), torch.float32))
    assert tensor.tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    assert tensor.is_contiguous()


def test_the_second_version_of_the_format_is_read():
    assert Numpy().decode(npy(np.ones(3, np.float32), version=(2, 0)), THREE).tolist() == [1.0, 1.0, 1.0]


def test_decoding_copies_nothing():
    data = Raw().encode(torch.ones(3))
    assert Raw().decode(data, THREE).data_ptr() == np.frombuffer(data, np.uint8).ctypes.data


GOOD = npy(np.ones(3, np.float32))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "not a .npy array: "),
        (b"PK\x03\x04 a zip file", "not a .npy array: "),
        (GOOD[:9], "not a .npy array: "),
        (GOOD[:60], "not a .npy array: "),
        (GOOD[:-1], "11 bytes of elements, wanted 12 for (3,) float32"),
        (GOOD[:-12], "0 bytes of elements, wanted 12 for (3,) float32"),
        (GOOD + b"\0", "13 bytes of elements, wanted 12 for (3,) float32"),
        (npy(np.ones(4, np.float32)), "the array inside is (4,) float32, announced as (3,) float32"),
        (npy(np.ones((3, 1), np.float32)), "the array inside is (3, 1) float32, announced as (3,) float32"),
        (npy(np.ones(3)), "the array inside is (3,) float64, announced as (3,) float32"),
        (npy(np.ones(3, np.int32)), "the array inside is (3,) int32, announced as (3,) float32"),
        (npy(np.ones(3, [("x", "<f4")])), "the array inside is (3,) [('x', '<f4')], announced as (3,) float32"),
        (
            npy_with_header("{'descr': '<f4', 'fortran_order': False, 'shape': (3000000000,)}"),
            "the array inside is (3000000000,)",
        ),
        (
            npy_with_header("{'descr': '<f4', 'fortran_order': False, 'shape': (-3,)}"),
            "the array inside is (-3,) float32",
        ),
        (npy_with_header("{'descr': '<f4', 'fortran_order': False}"), "not a .npy array: "),
        (npy_with_header("{'descr': '<f4', "), "not a .npy array: "),  # numpy raises tokenize.TokenError
        (npy_with_header("-" * 9000 + "1"), "not a .npy array: "),  # MemoryError
        (npy_with_header("(" * 300), "not a .npy array: "),
        (npy_with_header("__import__('os').abort()"), "not a .npy array: "),
        (npy_with_header(" " * 20_000, version=b"\x02\x00"), "not a .npy array: Header info length (20000) is large"),
        (npy_with_header("{}", version=b"\x09\x00"), "not a .npy array: "),
    ],
)
def test_bytes_that_are_no_such_array(data, words):
    with pytest.raises(DecodeError) as caught:
        Numpy().decode(data, THREE)
    assert str(caught.value).startswith(words)
    assert "\n" not in str(caught.value)


def test_pickled_objects_are_refused_and_never_unpickled(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "unpickled"), "w"))

    objects = np.array([Evil(), Evil(), Evil()], dtype=object)
    data = npy(objects, allow_pickle=True)
    with pytest.raises(DecodeError, match=r"^the array inside is \(3,\) object, announced as \(3,\) float32$"):
        Numpy().decode(data, THREE)
    assert not (tmp_path / "unpickled").exists()
    with pytest.raises(DecodeError, match=r"^not a \.npy array: "):
        Numpy().decode(pickle.dumps(objects), THREE)
    assert not (tmp_path / "unpickled").exists()


@pytest.mark.parametrize("length", [0, 11, 13, 24])
def test_raw_bytes_of_another_length(length):
    with pytest.raises(DecodeError, match=rf"^{length} bytes, wanted 12 for \(3,\) float32$"):
        Raw().decode(b"\0" * length, THREE)


header_text = st.text(alphabet="{}[]()'\":,<>f48O TrueFalsdhapconx\\\n#-0123456789.", max_size=60)


@given(header_text | st.binary(max_size=60).map(lambda b: b.decode("latin1")))
@example("'''")
@example("\\")
@example("{'descr': [('a', '<f4', 5, 6, 7)], 'fortran_order': False, 'shape': (3,)}")
@example("{'descr': ('<f4', (1000000000,)), 'fortran_order': False, 'shape': (3,)}")
@example("{'descr': {}, 'fortran_order': False, 'shape': (3,)}")
@example("{1: 2, 'a': 3}")
@pytest.mark.filterwarnings("ignore")
def test_whatever_the_header_says_it_is_refused_or_the_announced_array(text):
    try:
        tensor = Numpy().decode(npy_with_header(text), THREE)
    except DecodeError:
        return
    assert TensorSpec.of(tensor) == THREE


@given(st.binary(max_size=200), st.sampled_from(list(CODECS)))
def test_any_bytes_are_refused_or_the_announced_array(data, tag):
    try:
        tensor = CODECS[tag].decode(data, THREE)
    except DecodeError:
        return
    assert TensorSpec.of(tensor) == THREE


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_what_is_filled_in_place_is_what_is_encoded(dtype):
    for tensor in [torch.arange(100).reshape(20, 5).to(dtype), torch.arange(70).to(dtype)]:
        data, flat_S = blank(TensorSpec.of(tensor))
        flat_S.copy_(tensor.view(-1))
        assert data == codec_for(dtype).encode(tensor)


def test_bytes_that_python_may_share_are_not_filled():
    assert blank(TensorSpec((0,), torch.float32)) is None
    assert blank(TensorSpec((1,), torch.bfloat16)) is None
    assert bytes(1) == b"\0"


def test_without_the_c_api_there_is_nothing_to_fill(monkeypatch):
    monkeypatch.setattr("fl_merge.codecs._new_bytes", None)
    assert blank(TensorSpec((100,), torch.float32)) is None
