"""Where tensors are read from and written to: memory, and safetensors files in one piece or in shards."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fl_merge.store.format import (
    INDEX_FILE,
    SAFETENSORS_DTYPES,
    SINGLE_FILE,
    check_storable,
    claim,
    fill,
    layout,
    tensor_file,
    write_text,
)
from fl_merge.store.lock import Held, lock_folder
from fl_merge.store.memory import MemorySink, MemorySource, tied_names
from fl_merge.store.sink import SafetensorsSink
from fl_merge.store.source import SafetensorsSource
from fl_merge.types import TensorSource

__all__ = [
    "INDEX_FILE",
    "SAFETENSORS_DTYPES",
    "SINGLE_FILE",
    "Held",
    "MemorySink",
    "MemorySource",
    "SafetensorsSink",
    "SafetensorsSource",
    "check_storable",
    "claim",
    "fill",
    "layout",
    "load",
    "lock_folder",
    "save",
    "tensor_file",
    "tied_names",
    "write_text",
]


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
