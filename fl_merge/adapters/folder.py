"""Adapters on disk: a folder with adapter_config.json and adapter_model.safetensors, as PEFT writes and reads it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fl_merge.adapters.config import AdapterConfig
from fl_merge.adapters.source import PlainAdapter
from fl_merge.errors import MergeError, RecipeError
from fl_merge.store import MemorySource, SafetensorsSource, tensor_file, write_text
from fl_merge.types import TensorSource

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
MANIFEST = "fl_merge_manifest.json"


@dataclass(frozen=True)
class Adapter:
    """An adapter that can be merged; made by `load_adapter` or `Adapter.of`.

    Args:
        name: for messages: its folder, or the client's id.
        config: its configuration.
        plain: its tensors, every scaling in B.
        sha256: of its file; None for one that is in memory.
        dtype: of its factors as they are stored.
    """

    name: str
    config: AdapterConfig
    plain: PlainAdapter
    sha256: str | None = None
    dtype: Any = None

    @classmethod
    def of(cls, name: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor] | TensorSource) -> Adapter:
        """An adapter from what PEFT gives: its configuration as a dict, and `get_peft_model_state_dict(model)`.

        Raises:
            RecipeError: for a configuration that cannot be merged.
            TensorMismatchError: for tensors that do not fit it.
        """
        source = MemorySource(tensors) if isinstance(tensors, Mapping) else tensors
        read = AdapterConfig.read(config, f"adapter '{name}'")
        try:
            plain = PlainAdapter(read, source)
        except MergeError as error:
            raise RecipeError(f"adapter '{name}': {error}") from None
        dtype = next(spec.dtype for tensor, spec in source.specs().items() if ".lora_" in tensor)
        return cls(name, read, plain, None, dtype)


def is_adapter(path: str | Path) -> bool:
    """Whether a folder holds an adapter."""
    return (Path(path) / CONFIG).is_file()


def load_adapter(folder: str | Path) -> Adapter:
    """The adapter in a folder; its tensors are read when they are needed.

    Raises:
        RecipeError: if there is none, or one that cannot be merged.
        UpdateError: if its tensors are not what its configuration says.
    """
    path = Path(folder)
    try:
        raw = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"no adapter in '{folder}': {CONFIG}: {error.strerror}") from None
    except ValueError as error:
        raise RecipeError(f"'{path / CONFIG}' is no JSON: {error}") from None
    if not isinstance(raw, dict):
        raise RecipeError(f"'{path / CONFIG}': found a {type(raw).__name__}, wanted an object")
    if not (path / TENSORS).is_file():
        other = (
            " (adapter_model.bin is not read: save it as safetensors)" if (path / "adapter_model.bin").is_file() else ""
        )
        raise RecipeError(f"no {TENSORS} in '{folder}'{other}")
    adapter = Adapter.of(str(folder), raw, SafetensorsSource(path / TENSORS))
    return Adapter(adapter.name, adapter.config, adapter.plain, sha256_of(path / TENSORS), adapter.dtype)


def sha256_of(path: Path) -> str:
    """Of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_free(folder: Path, inputs: Iterable[Path], *, force: bool) -> None:
    """Refuse a folder where writing would cost something that is there.

    Args:
        folder: where the result goes.
        inputs: folders or files that are read.
        force: whether what is in the folder may be replaced; an input never is.

    Raises:
        RecipeError: if the folder is an input's, a file, or not empty (unless `force`).
    """
    for path in inputs:
        if (path if path.is_dir() else path.parent).resolve() == folder.resolve():
            raise RecipeError(f"'{folder}' is where the input '{path}' is; write to another folder")
    if folder.exists() and not folder.is_dir():
        raise RecipeError(f"'{folder}' is a file, wanted a folder to write")
    if folder.exists() and any(folder.iterdir()) and not force:
        raise RecipeError(f"folder '{folder}' is not empty; give another one, or --force to replace what is in it")


def write_adapter(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], manifest: dict[str, Any]
) -> None:
    """Write an adapter with its manifest; each file is replaced whole, the tensors last.

    Raises:
        MergeError: if it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".{TENSORS}.{os.getpid()}.tmp"
        try:
            temporary.write_bytes(tensor_file(tensors))
            manifest = {**manifest, "sha256": sha256_of(temporary)}
            write_text(folder / CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")
            write_text(folder / MANIFEST, json.dumps(manifest, indent=2) + "\n")
            os.replace(temporary, folder / TENSORS)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise MergeError(f"cannot write the adapter '{folder}': {error.strerror}") from error
