"""The model that the adapters of a federation belong to, and the model that comes of folding the global one in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fl_merge.adapters.config import AdapterConfig
from fl_merge.adapters.federated import described
from fl_merge.adapters.folding import config_of, fold_into, refuse_quantised, require_places
from fl_merge.errors import RecipeError
from fl_merge.pairs import RESIDUAL
from fl_merge.store import MemorySource, SafetensorsSource
from fl_merge.types import TensorSource, TensorSpec


@dataclass(frozen=True)
class BaseModel:
    """The model that the adapters of a run belong to, for a schedule that begins with adapters.

    Args:
        read: gives its tensors. It is called before the run, for what they are, and when the adapter is folded in: the
            server need not hold the model in the rounds between.
        architecture: its config (of Hugging Face's, say), which clients are sent with the model; empty where they know
            it themselves.
        where: what it is called in messages.
    """

    read: Callable[[], Mapping[str, Tensor] | TensorSource]
    architecture: Mapping[str, Any] = field(default_factory=dict)
    where: str = "the base"

    @classmethod
    def of(cls, base: BaseModel | Mapping[str, Tensor] | str | Path) -> BaseModel:
        """A model that is at hand, in a safetensors file, or in a folder, whose config.json is then its architecture.

        Raises:
            RecipeError: if there is no such file.
        """
        if isinstance(base, BaseModel):
            return base
        if isinstance(base, Mapping):
            return cls(lambda: base)
        path = Path(base)
        SafetensorsSource(path)  # which says now if there is no such model
        config = config_of(path) if path.is_dir() else None
        return cls(lambda: SafetensorsSource(path), config or {}, f"base '{path}'")

    def tensors(self) -> TensorSource:
        """Its tensors, tied ones under both names where that is how they are at hand."""
        found = self.read()
        return MemorySource(found) if isinstance(found, Mapping) else found

    def check(self, adapter: Mapping[str, TensorSpec], about: Mapping[str, Any]) -> TensorSource:
        """Its tensors, if the adapter can be folded into them.

        Args:
            adapter: the global adapter's.
            about: what its adapter_config.json says beside ranks and scalings.

        Raises:
            RecipeError: if the model is quantised, or does not have a module's weight, or has it in another shape.
        """
        source = self.tensors()
        specs = {name: spec for name, spec in source.specs().items() if name not in source.aliases()}
        refuse_quantised(specs, self.where, self.architecture)
        try:
            require_places(specs, adapter, _config(about), self.architecture or None)
        except RecipeError as error:
            raise RecipeError(f"{self.where}: {error}") from None
        return source

    def folded(self, adapter: Mapping[str, Tensor], about: Mapping[str, Any]) -> FoldedModel:
        """The model with the adapter in it: theta_0 + B A, with a residual's product beside it.

        Args:
            adapter: plain factors (scaling 1).
            about: as for `check`.

        Raises:
            MergeError: if a value is not finite.
        """
        source = self.tensors()
        parts = [
            {name: tensor for name, tensor in adapter.items() if not name.startswith(RESIDUAL)},
            {name.removeprefix(RESIDUAL): t for name, t in adapter.items() if name.startswith(RESIDUAL)},
        ]
        tensors = fold_into(
            source, [MemorySource(part) for part in parts if part], _config(about), self.architecture or None
        )
        tied = dict(source.aliases())
        return FoldedModel(
            {name: tensors[tied.get(name, name)] for name in source.specs()},
            {name: spec.dtype for name, spec in source.specs().items()},
            tied,
        )


@dataclass(frozen=True)
class FoldedModel:
    """A model with an adapter in it.

    Args:
        tensors: floating ones in float32 (float64 of a base in that), whatever the base's dtype.
        dtypes: the base's.
        tied: names that are another name's tensor.
    """

    tensors: Mapping[str, Tensor]
    dtypes: Mapping[str, torch.dtype]
    tied: Mapping[str, str]


def _config(about: Mapping[str, Any]) -> AdapterConfig:
    return AdapterConfig.read(described(about), "adapter_config")
