"""The safetensors format: names of dtypes, the layout of a file, and how its room on the disk is claimed."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fl_merge.errors import MergeError
from fl_merge.types import TensorSpec

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

SAFETENSORS_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""The names that the file format has for dtypes."""

METADATA = "__metadata__"
"""The key of the header under which no tensor can stand."""

_NO_CLAIM = {errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS}
"""What a file system says that cannot claim room ahead."""

ZEROS = 1 << 20


def check_storable(specs: Mapping[str, TensorSpec]) -> None:
    """Refuse what a safetensors file cannot hold.

    Raises:
        MergeError: with the tensor and what is wrong with it.
    """
    for name, spec in specs.items():
        if spec.dtype not in SAFETENSORS_DTYPES:
            raise MergeError(f"tensor '{name}': a safetensors file has no dtype for {spec}")
        if name == METADATA:
            raise MergeError(f"tensor '{name}': the name is taken in a safetensors file; wanted any other")
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise MergeError(f"tensor {name!a}: the name is not text that UTF-8 can hold ({error.reason})") from None


def layout(specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int], int]:
    """How a safetensors file of these tensors is laid out.

    Returns:
        The bytes that it begins with, where in the file each tensor's begin (in the order in which they stand there),
        and how many bytes of tensors there are.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset, places = 0, {}
    # The widest elements first, so that every tensor is aligned to its element size.
    for name in sorted(specs, key=lambda name: -specs[name].dtype.itemsize):
        spec = specs[name]
        header[name] = {
            "dtype": SAFETENSORS_DTYPES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.nbytes],
        }
        places[name] = offset
        offset += spec.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, {name: 8 + len(text) + at for name, at in places.items()}, offset


def claim(descriptor: int, start: int, count: int) -> bool:
    """Make room in a file now, and the file so long: a full disk is then an error here.

    Args:
        descriptor: of a file open for writing.
        start: the first byte.
        count: of bytes.

    Returns:
        Whether there is room; False where none can be claimed ahead (macOS, some network disks).

    Raises:
        OSError: if there is too little.
    """
    if not count:
        return True
    if not hasattr(os, "posix_fallocate"):
        return False
    try:
        os.posix_fallocate(descriptor, start, count)
    except OSError as error:
        if error.errno not in _NO_CLAIM:
            raise
        return False
    return True


def fill(descriptor: int, start: int, count: int) -> None:
    """Write zeros, for room in a file that is to be mapped where `claim` has none to give.

    A file that is only made longer has no room, and to write through its mapping when the disk has filled up is a
    SIGBUS, which ends the process without an error. So a second pass of writes is the lesser evil. (A file system that
    copies what is overwritten, btrfs or ZFS, may run out of room in spite of it; that cannot be had by any means.)
    """
    block = bytes(min(ZEROS, count))
    at, end = start, start + count
    while at < end:
        at += os.pwrite(descriptor, block[: end - at], at)


def tensor_file(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """A safetensors file of these tensors, for small ones (adapters).

    Raises:
        MergeError: if one cannot be stored.
    """
    specs = {name: TensorSpec.of(tensor) for name, tensor in tensors.items()}
    check_storable(specs)
    head, places, size = layout(specs, {"format": "pt"})
    data = bytearray(head) + bytearray(size)
    for name, at in places.items():
        raw = tensors[name].detach().contiguous().reshape(-1).view(torch.uint8)
        data[at : at + raw.numel()] = raw.numpy().tobytes()
    return bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write a small file so that a reader sees the old text or the new, never half of it."""
    temporary = temporary_name(path)
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def temporary_name(final: Path) -> Path:
    """A name beside the final one that nobody else has."""
    return final.with_name(f".{final.name}.{secrets.token_hex(4)}.tmp")
