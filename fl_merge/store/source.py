"""Models in safetensors files, mapped into memory and read lazily."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import mmap
import os
import platform
import struct
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fl_merge.errors import DecodeError, RecipeError
from fl_merge.store.format import INDEX_FILE, SAFETENSORS_DTYPES, SINGLE_FILE
from fl_merge.types import TensorSpec

DTYPES = {label: dtype for dtype, label in SAFETENSORS_DTYPES.items()}

_COMMON = sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64")
NO_RESERVE: int = getattr(mmap, "MAP_NORESERVE", 0x4000 if _COMMON else 0)  # Python names it from 3.13 on

ATTEMPTS = 100
"""How often a model that is replaced while it is being opened is opened again."""

RETRIES = 3
"""How often one is opened again of which something was missing or wrong, though it does not seem to be another."""


class SafetensorsSource:
    """A safetensors file, or a folder with one or with shards and their index, mapped into memory and read lazily.

    A model that another process replaces meanwhile (with new files, as `SafetensorsSink` does) is read as it was, or
    as it is then, never as a mixture.

    Args:
        path: the file, the index, or the folder.

    Raises:
        RecipeError: if there is no such file, with what was looked for.
        DecodeError: if a file is not what its header says.
    """

    def __init__(self, path: str | Path) -> None:
        wanted = Path(path)
        for attempt in range(ATTEMPTS):
            before = _state(wanted)
            with contextlib.ExitStack() as held:
                try:
                    self._where = _opened(wanted, held)
                except (RecipeError, DecodeError):
                    if attempt < RETRIES or (attempt + 1 < ATTEMPTS and _state(wanted) != before):
                        continue
                    raise
                if _state(wanted) == before:  # while the files are held, no other can have got their inode numbers
                    break
        else:
            raise DecodeError(f"'{path}' was replaced each of the {ATTEMPTS} times that it was opened")
        self._specs = {name: self._where[name].specs[name] for name in sorted(self._where)}

    def specs(self) -> Mapping[str, TensorSpec]:
        """Names, shapes and dtypes, from the headers alone."""
        return self._specs

    def read(self, name: str) -> Tensor:
        """A view of the mapped file; a copy if the file has it where elements of its size cannot be computed with.

        Raises:
            DecodeError: if the file was cut off since it was opened: to touch what is gone would end the process.
        """
        return self._where[name].read(name)

    def release(self, names: Iterable[str]) -> None:
        """Say that tensors will not be read for now: what is mapped of them need not stay in this process. Those that
        have been read stay valid, and come from the file again when they are touched."""
        by_file: dict[_File, list[str]] = {}
        for name in names:
            by_file.setdefault(self._where[name], []).append(name)
        for file, members in by_file.items():
            file.release(members)

    def aliases(self) -> Mapping[str, str]:
        """None: the format stores each tensor once."""
        return {}


class _File:
    """One mapped file. The format's own library checks its header: sizes, no overlap, no hole, nothing behind."""

    def __init__(self, path: Path, held: contextlib.ExitStack) -> None:
        self._path = path
        try:
            file = held.enter_context(open(path, "rb"))  # noqa: SIM115
            found = os.fstat(file.fileno())
            self._identity, self._size = (found.st_dev, found.st_ino), found.st_size
            handle: Any = safe_open(path, framework="numpy")
            self.specs = {name: _spec(handle, name) for name in handle.keys()}  # noqa: SIM118 (not a dict)
            (length,) = struct.unpack("<Q", file.read(8))
            self._start, at = {}, 8 + length
            for name in handle.offset_keys():  # in the order of their places, without holes: the library checks that
                self._start[name] = at
                at += self.specs[name].nbytes
            self._map = _mapped(path, self._size)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise DecodeError(f"'{path}' is not a readable safetensors file: {error}") from error

    def read(self, name: str) -> Tensor:
        with contextlib.suppress(FileNotFoundError):  # one that was removed stays readable, and so does one replaced
            now = self._path.stat()
            if (now.st_dev, now.st_ino) == self._identity and now.st_size < self._size:
                raise DecodeError(f"'{self._path}' has {now.st_size:,} bytes, had {self._size:,} when it was opened")
        spec, start = self.specs[name], self._start[name]
        if not spec.numel:
            return torch.empty(spec.shape, dtype=spec.dtype)
        if (self._map.address + start) % spec.dtype.itemsize:
            as_bytes = torch.frombuffer(self._map.buffer, dtype=torch.uint8, count=spec.nbytes, offset=start)
            return as_bytes.clone().view(spec.dtype).view(spec.shape)
        return torch.frombuffer(self._map.buffer, dtype=spec.dtype, count=spec.numel, offset=start).view(spec.shape)

    def release(self, names: Iterable[str]) -> None:
        if _DROP is None:
            return
        ranges: list[tuple[int, int]] = []
        for start, end in sorted((self._start[name], self._start[name] + self.specs[name].nbytes) for name in names):
            if ranges and ranges[-1][1] == start:  # neighbours go together: each time, all cores have to hear of it
                start = ranges.pop()[0]
            ranges.append((start, end))
        for start, end in ranges:
            first, last = -(-start // mmap.PAGESIZE), end // mmap.PAGESIZE
            if first < last:  # whole pages: others stand on the rest of the first and the last
                _DROP(self._map.address + first * mmap.PAGESIZE, (last - first) * mmap.PAGESIZE, mmap.MADV_DONTNEED)


def _spec(handle: Any, name: str) -> TensorSpec:
    piece = handle.get_slice(name)
    found = piece.get_dtype()
    if found not in DTYPES:
        raise DecodeError(f"dtype {found} is not supported ({', '.join(sorted(DTYPES))})", tensor=name)
    return TensorSpec(tuple(piece.get_shape()), DTYPES[found])


def _drop() -> Any:
    """Linux's `madvise`, which a mapping that torch has made does not offer."""
    if sys.platform != "linux":
        return None
    call = ctypes.CDLL(None).madvise
    call.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    return call


_DROP = _drop()


class _Map(NamedTuple):
    """A mapped file: what torch takes views of, and where it begins."""

    buffer: Any
    address: int


def _mapped(path: Path, size: int) -> _Map:
    try:
        storage = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=size)
    except RuntimeError as error:
        if os.strerror(errno.ENOMEM) not in str(error) or not NO_RESERVE:
            raise
        # torch maps files so that they could be written to, for which Linux wants as much memory as they are long. This
        # does without; for other files it would do too, but that each keeps a file descriptor, of which a process may
        # have only some 1000.
        with open(path, "rb") as file:
            mapping = mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE | NO_RESERVE)
        return _Map(mapping, ctypes.addressof(ctypes.c_char.from_buffer(mapping)))
    buffer = (ctypes.c_char * size).from_address(storage.data_ptr())
    buffer.storage = storage  # type: ignore[attr-defined]  # lives as long as a tensor that looks into it
    return _Map(buffer, storage.data_ptr())


def _opened(path: Path, held: contextlib.ExitStack) -> dict[str, _File]:
    """In which file each tensor is; `held` keeps the files open."""
    files, index = _model_files(path)
    where: dict[str, _File] = {}
    for file in files:
        opened = _File(file, held)
        for name in opened.specs:
            if name in where:
                raise DecodeError(f"'{file}': tensor '{name}' stands in two files of this model")
            where[name] = opened
    for name, shard in index.items():
        if name not in where:
            raise DecodeError(f"'{path}': tensor '{name}' is not in '{shard}', where the index has it")
    return where


def _state(path: Path) -> object:
    """What changes when the model is replaced: which files it has, and which these are."""
    try:
        files, index = _model_files(path)
        found = [(file.name, stat.st_dev, stat.st_ino, stat.st_size) for file in files if (stat := file.stat())]
        return found, index
    except (DecodeError, RecipeError, OSError) as error:
        return str(error)


def _model_files(path: Path) -> tuple[list[Path], dict[str, str]]:
    """The files of a model, and which tensors its index promises in which of them."""
    if path.is_dir():
        if (path / INDEX_FILE).is_file():
            path = path / INDEX_FILE
        elif (path / SINGLE_FILE).is_file():
            path = path / SINGLE_FILE
        else:
            raise RecipeError(f"folder '{path}' holds no {SINGLE_FILE} and no {INDEX_FILE}")
    if not path.is_file():
        raise RecipeError(f"no such model: '{path}' (wanted a .safetensors file, or a folder with one)")
    if path.suffix != ".json":
        return [path], {}
    try:
        weight_map = {str(name): str(shard) for name, shard in json.loads(path.read_text())["weight_map"].items()}
    except OSError as error:  # a writer has removed it since it was looked for, say
        raise RecipeError(f"cannot read the index '{path}': {error.strerror}") from error
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise DecodeError(f"'{path}' is not an index of safetensors shards: {error!r}") from error
    shards = sorted(set(weight_map.values()))
    missing = [shard for shard in shards if not (path.parent / shard).is_file()]
    if missing:
        raise RecipeError(f"'{path}' names shard '{missing[0]}', which is not there")
    return [path.parent / shard for shard in shards], weight_map
