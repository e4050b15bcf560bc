"""Where tensors are read from and written to: memory, and safetensors files in one piece or in shards.

A shard is written under a temporary name and renamed when it is whole, the index last: a reader sees a finished model
or none.
"""

from __future__ import annotations

import json
import mmap
import os
import secrets
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fl_merge.errors import DecodeError, MergeError, RecipeError
from fl_merge.types import TensorSource, TensorSpec

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


class MemorySource:
    """Tensors that are at hand, such as a state dict.

    Args:
        tensors: by name.
        tied: names that are another name's tensor and are merged once with it; by default found by their storage.
    """

    def __init__(self, tensors: Mapping[str, Tensor], tied: Mapping[str, str] | None = None) -> None:
        self._tensors = {name: tensor.detach() for name, tensor in tensors.items()}
        self._aliases = tied_names(self._tensors) if tied is None else dict(tied)

    def specs(self) -> Mapping[str, TensorSpec]:
        """Names, shapes and dtypes."""
        return {name: TensorSpec.of(tensor) for name, tensor in self._tensors.items()}

    def read(self, name: str) -> Tensor:
        """The tensor itself."""
        return self._tensors[name]

    def aliases(self) -> Mapping[str, str]:
        """Names that share another name's storage."""
        return self._aliases


def tied_names(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Tied weights: each name that shares the storage of an earlier one, and that one."""
    first: dict[tuple[object, ...], str] = {}
    aliases = {}
    for name, tensor in tensors.items():
        if tensor.numel() == 0:
            continue
        place = (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if first.setdefault(place, name) != name:
            aliases[name] = first[place]
    return aliases


class MemorySink:
    """Collects the merged tensors in `tensors`, in the order in which they were announced."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    def begin(self, specs: Mapping[str, TensorSpec]) -> None:
        """Make room for these tensors."""
        self.tensors = {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in specs.items()}

    def write(self, name: str, start: int, values_S: Tensor) -> None:
        """Elements from `start` on."""
        self.tensors[name].view(-1)[start : start + values_S.numel()] = values_S

    def place(self, name: str) -> Tensor:
        """The tensor itself."""
        return self.tensors[name].view(-1)

    def finish(self) -> None:
        """Nothing is left to do."""

    def abort(self) -> None:
        """Forget what was written."""
        self.tensors = {}


class SafetensorsSource:
    """A safetensors file, or a folder with one or with shards and their index, mapped into memory and read lazily.

    Args:
        path: the file, the index, or the folder.

    Raises:
        RecipeError: if there is no such file, with what was looked for.
        DecodeError: if a file is not what its header says.
    """

    def __init__(self, path: str | Path) -> None:
        self._files: list[Any] = []
        self._where: dict[str, Any] = {}
        files, index = _model_files(Path(path))
        for file in files:
            try:
                handle = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise DecodeError(f"'{file}' is not a readable safetensors file: {error}") from error
            self._files.append(handle)
            for name in _names(handle):
                if name in self._where:
                    raise DecodeError(f"'{file}': tensor '{name}' stands in two files of this model")
                self._where[name] = handle
        for name, shard in index.items():
            if name not in self._where:
                raise DecodeError(f"'{path}': tensor '{name}' is not in '{shard}', where the index has it")

    def specs(self) -> Mapping[str, TensorSpec]:
        """Names, shapes and dtypes, from the headers alone."""
        return {name: self._spec(name) for name in sorted(self._where)}

    def _spec(self, name: str) -> TensorSpec:
        piece = self._where[name].get_slice(name)
        found = piece.get_dtype()
        dtypes = {label: dtype for dtype, label in SAFETENSORS_DTYPES.items()}
        if found not in dtypes:
            raise DecodeError(f"dtype {found} is not supported ({', '.join(sorted(dtypes))})", tensor=name)
        return TensorSpec(tuple(piece.get_shape()), dtypes[found])

    def read(self, name: str) -> Tensor:
        """A view of the mapped file."""
        tensor: Tensor = self._where[name].get_tensor(name)
        return tensor

    def aliases(self) -> Mapping[str, str]:
        """None: the format stores each tensor once."""
        return {}


def _names(handle: Any) -> list[str]:
    return list(handle.keys())


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
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise DecodeError(f"'{path}' is not an index of safetensors shards: {error!r}") from error
    shards = sorted(set(weight_map.values()))
    missing = [shard for shard in shards if not (path.parent / shard).is_file()]
    if missing:
        raise RecipeError(f"'{path}' names shard '{missing[0]}', which is not there")
    return [path.parent / shard for shard in shards], weight_map


class SafetensorsSink:
    """Writes a folder that Hugging Face libraries read: model.safetensors, or shards of a given size and their index.

    Args:
        folder: made if it is not there; a model of the same names in it is replaced when the new one is whole.
        max_shard_bytes: a larger model is cut into shards (a larger tensor still stays in one piece).
        metadata: text to store in the header of each file.
    """

    def __init__(
        self, folder: str | Path, *, max_shard_bytes: int = 5 * 10**9, metadata: Mapping[str, str] | None = None
    ) -> None:
        self._folder = Path(folder)
        self._max_shard_bytes = max_shard_bytes
        self._metadata = {"format": "pt", **(metadata or {})}
        self._shards: list[_Shard] = []
        self._place: dict[str, _Shard] = {}
        self._published: list[Path] = []

    def begin(self, specs: Mapping[str, TensorSpec]) -> None:
        """Make the files at their full size, under temporary names."""
        for name, spec in specs.items():
            if spec.dtype not in SAFETENSORS_DTYPES:
                raise MergeError(f"tensor '{name}': a safetensors file has no dtype for {spec}")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MergeError(f"cannot make the folder '{self._folder}': {error.strerror}") from error
        groups = _shard_groups(specs, self._max_shard_bytes)
        finals = [SINGLE_FILE]
        if len(groups) > 1:
            finals = _shard_names("model", len(groups))
            if any((self._folder / name).exists() for name in finals):
                # The shards of the model that is there stay readable until the index names the new ones.
                finals = _shard_names(f"model-{secrets.token_hex(4)}", len(groups))
        for final, names in zip(finals, groups, strict=True):
            shard = _Shard(self._folder / final, {name: specs[name] for name in names}, self._metadata)
            self._shards.append(shard)
            self._place |= dict.fromkeys(names, shard)

    def write(self, name: str, start: int, values_S: Tensor) -> None:
        """Elements from `start` on, to their place in the file."""
        self._place[name].write(name, start, values_S)

    def place(self, name: str) -> Tensor:
        """A view of the mapped file."""
        return self._place[name].place(name)

    def finish(self) -> None:
        """Give the files their final names, the index last, and remove the model that it replaces."""
        for shard in self._shards:
            shard.close()
        old = {SINGLE_FILE, *_indexed(self._folder / INDEX_FILE)}
        for shard in self._shards:
            os.replace(shard.temporary, shard.final)
            if len(self._shards) > 1:
                self._published.append(shard.final)
        if len(self._shards) > 1:
            total = sum(shard.data_bytes for shard in self._shards)
            weight_map = {name: shard.final.name for name, shard in sorted(self._place.items())}
            text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
            write_text(self._folder / INDEX_FILE, text + "\n")
            self._published.clear()
        else:
            (self._folder / INDEX_FILE).unlink(missing_ok=True)
        for name in old - {shard.final.name for shard in self._shards}:
            (self._folder / name).unlink(missing_ok=True)

    def abort(self) -> None:
        """Remove the temporary files; a model that was there before is untouched."""
        for shard in self._shards:
            shard.close()
            shard.temporary.unlink(missing_ok=True)
        for path in self._published:  # no index names them yet
            path.unlink(missing_ok=True)


def _shard_names(stem: str, count: int) -> list[str]:
    return [f"{stem}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _indexed(index: Path) -> set[str]:
    """The shards that an index in this folder names; none if there is no index."""
    try:
        return {Path(name).name for name in json.loads(index.read_text())["weight_map"].values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return set()


def _shard_groups(specs: Mapping[str, TensorSpec], limit: int) -> list[list[str]]:
    groups: list[list[str]] = [[]]
    filled = 0
    for name, spec in specs.items():
        if groups[-1] and filled + spec.nbytes > limit:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += spec.nbytes
    return groups


class _Shard:
    """One safetensors file that is being written: 8 bytes of header length, a JSON header, the tensors."""

    def __init__(self, final: Path, specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> None:
        self.final = final
        self.temporary = final.with_name(f".{final.name}.{os.getpid()}.tmp")
        self._specs = specs
        head, self._start, self.data_bytes = layout(specs, metadata)
        try:
            with open(self.temporary, "wb") as file:
                file.write(head)
                claim(file.fileno(), len(head), self.data_bytes)
            with open(self.temporary, "r+b") as file:
                self._map: mmap.mmap | None = mmap.mmap(file.fileno(), 0)
        except OSError as error:
            self.temporary.unlink(missing_ok=True)
            raise MergeError(f"cannot write '{final}' ({self.data_bytes:,} bytes): {error.strerror}") from error

    def write(self, name: str, start: int, values_S: Tensor) -> None:
        self.place(name)[start : start + values_S.numel()] = values_S

    def place(self, name: str) -> Tensor:
        spec = self._specs[name]
        if spec.numel == 0:
            return torch.empty(0, dtype=spec.dtype)
        assert self._map is not None
        return torch.frombuffer(self._map, dtype=spec.dtype, count=spec.numel, offset=self._start[name])

    def close(self) -> None:
        """Let go of the mapping, which ends with the last tensor that looks into it."""
        self._map = None


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


def claim(descriptor: int, start: int, count: int) -> None:
    """Make room in a file now: a full disk is then an error here, and not a crash in the mapping of the file."""
    if not count:
        return
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, start, count)
    else:  # macOS: the space is not claimed, but the file is as long as it must be
        os.truncate(descriptor, start + count)


def write_text(path: Path, text: str) -> None:
    """Write a small file so that a reader sees the old text or the new, never half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def save(tensors: Mapping[str, Tensor] | TensorSource, folder: str | Path, **options: Any) -> None:
    """Write tensors as a safetensors folder.

    Args:
        tensors: a state dict or a source; of tied names the first is written.
        folder: as for `SafetensorsSink`, which also takes the options.
    """
    source = MemorySource(tensors) if isinstance(tensors, Mapping) else tensors
    tied = source.aliases()
    sink = SafetensorsSink(folder, **options)
    specs = {name: spec for name, spec in source.specs().items() if name not in tied}
    try:
        sink.begin(specs)
        for name in specs:
            sink.write(name, 0, source.read(name).reshape(-1))
        sink.finish()
    except BaseException:
        sink.abort()
        raise


def load(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file or folder, as copies that outlive the file."""
    source = SafetensorsSource(path)
    return {name: source.read(name).clone() for name in source.specs()}
