"""How a tensor becomes bytes on the wire, by tag.

A codec's tag stands beside the bytes (Flower calls it `stype`), so that a reader knows what it has, and a reader that
does not know the tag refuses instead of misreading.
"""

from __future__ import annotations

import ctypes
import io
import warnings
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fl_merge.errors import DecodeError
from fl_merge.types import TensorSpec

with warnings.catch_warnings():
    # torch warns once that bytes are read-only. They are meant to be: what is decoded is never written to.
    warnings.simplefilter("ignore")
    torch.frombuffer(b"\0", dtype=torch.uint8)

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    )
}
"""The dtypes that travel, by name."""


class Codec(Protocol):
    """Two functions and a tag."""

    tag: str

    def encode(self, tensor: Tensor) -> bytes:
        """The tensor as bytes."""
        ...

    def head(self, spec: TensorSpec) -> bytes:
        """What stands before the elements, which follow in row order."""
        ...

    def decode(self, data: bytes, spec: TensorSpec) -> Tensor:
        """The tensor of that shape and dtype, as a read-only view of the bytes where that is possible.

        Raises:
            DecodeError: if the bytes are not such a tensor.
        """
        ...


class Raw:
    """The elements in row order, little-endian, and nothing else: for every dtype, numpy's and bfloat16."""

    tag = "fl_merge.raw"

    def encode(self, tensor: Tensor) -> bytes:
        """The tensor as bytes."""
        return _encoded(self, tensor)

    def head(self, spec: TensorSpec) -> bytes:
        """Nothing."""
        return b""

    def decode(self, data: bytes, spec: TensorSpec) -> Tensor:
        """A view of the bytes."""
        if len(data) != spec.nbytes:
            raise DecodeError(f"{len(data)} bytes, wanted {spec.nbytes} for {spec}")
        return _view(data, spec, 0)


class Numpy:
    """A .npy file, as Flower's own arrays are; object arrays are refused, so nothing is unpickled."""

    tag = "numpy.ndarray"

    def encode(self, tensor: Tensor) -> bytes:
        """The tensor as bytes."""
        return _encoded(self, tensor)

    def head(self, spec: TensorSpec) -> bytes:
        """The header of a .npy file, as np.save writes it."""
        label = str(spec.dtype).removeprefix("torch.")
        buffer = io.BytesIO()
        description = {"descr": np.dtype(label).str, "fortran_order": False, "shape": spec.shape}
        np.lib.format.write_array_header_1_0(buffer, description)
        return buffer.getvalue()

    def decode(self, data: bytes, spec: TensorSpec) -> Tensor:
        """A view of the bytes; a copy for arrays in Fortran order or of the other endianness."""
        shape, fortran_order, dtype, start = npy_header(data)
        if dtype.newbyteorder("=").name != str(spec.dtype).removeprefix("torch.") or shape != spec.shape:
            raise DecodeError(f"the array inside is {shape} {dtype}, announced as {spec}")
        if len(data) - start != spec.nbytes:
            raise DecodeError(f"{len(data) - start} bytes of elements, wanted {spec.nbytes} for {spec}")
        if fortran_order or not dtype.isnative:
            array = np.ndarray(spec.shape, dtype, data, start, order="F" if fortran_order else "C")
            return torch.from_numpy(np.array(array, dtype=dtype.newbyteorder("="), order="C"))
        return _view(data, spec, start)


def npy_header(data: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """What a .npy file says of itself: shape, whether in Fortran order, dtype, and where its elements begin.

    Raises:
        DecodeError: if it has no such header.
    """
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, fortran_order, dtype = read_header(stream)
    except Exception as error:  # what hostile bytes make numpy's parser raise is not only ValueError
        raise DecodeError(f"not a .npy array: {str(error).partition(chr(10))[0] or type(error).__name__}") from None
    return tuple(shape), fortran_order, dtype, stream.tell()


def blank(spec: TensorSpec) -> tuple[bytes, Tensor] | None:
    """Bytes for a tensor as it travels, with its header in place, and the flat tensor of the elements in them.

    Whoever asked for them fills the tensor before anyone else sees the bytes, and never writes to it afterwards: what
    is merged is then what is sent, and the model stands in memory once.

    Returns:
        None where there is no such thing: for a tensor without elements, and on another Python than CPython.
    """
    head = codec_for(spec.dtype).head(spec)
    data = _unfilled(len(head) + spec.nbytes) if spec.numel else None
    if data is None:
        return None
    if head:
        torch.frombuffer(data, dtype=torch.uint8, count=len(head)).copy_(torch.frombuffer(head, dtype=torch.uint8))
    return data, torch.frombuffer(data, dtype=spec.dtype, count=spec.numel, offset=len(head))


def _unfilled(count: int) -> bytes | None:
    """A bytes object that nobody else has and whose content is still to be written.

    Python's C API allows that of bytes made by `PyBytes_FromStringAndSize(NULL, n)`: they "may be mutated" until they
    are handed on. None where there is no C API, and for so few bytes that Python may share the object.
    """
    if _new_bytes is None or count < 64:
        return None
    data: bytes = _new_bytes(None, count)
    return data


try:
    _new_bytes: Any = ctypes.pythonapi["PyBytes_FromStringAndSize"]
    _new_bytes.restype, _new_bytes.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_ssize_t)
except (AttributeError, OSError):  # not CPython
    _new_bytes = None


def _encoded(codec: Codec, tensor: Tensor) -> bytes:
    """Header and elements, in one copy."""
    flat_S = tensor.detach().cpu().contiguous().view(-1)
    elements = flat_S.view(torch.uint8).numpy().data if flat_S.numel() else b""
    return b"".join((codec.head(TensorSpec.of(tensor)), elements))


def _view(data: bytes, spec: TensorSpec, start: int) -> Tensor:
    if spec.numel == 0:
        return torch.empty(spec.shape, dtype=spec.dtype)
    return torch.frombuffer(data, dtype=spec.dtype, count=spec.numel, offset=start).reshape(spec.shape)


CODECS: dict[str, Codec] = {codec.tag: codec for codec in (Raw(), Numpy())}
"""Every codec by its tag."""


def codec_for(dtype: torch.dtype) -> Codec:
    """numpy's format for what numpy has, so that plain Flower clients read it; raw bytes for the rest (bfloat16)."""
    return CODECS[Numpy.tag if str(dtype).removeprefix("torch.") in np.sctypeDict else Raw.tag]
