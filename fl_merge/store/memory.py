"""Tensors that are at hand, read and written in memory."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fl_merge.types import TensorSpec


class MemorySource:
    """Tensors that are at hand, such as a state dict.

    Args:
        tensors: by name.
        tied: names that are another name's tensor and are merged once with it; by default found by their storage.
    """

    def __init__(self, tensors: Mapping[str, Tensor], tied: Mapping[str, str] | None = None) -> None:
        self._tensors = {name: tensor.detach() for name, tensor in tensors.items()}
        self._aliases = tied_names(self._tensors) if tied is None else dict(tied)
        self._specs = {name: TensorSpec.of(tensor) for name, tensor in self._tensors.items()}

    def specs(self) -> Mapping[str, TensorSpec]:
        """Names, shapes and dtypes."""
        return self._specs

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
