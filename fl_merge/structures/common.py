"""What the methods that change a model's structure share: sources by name, copies, the new config.

A source is "base" (what the round started from), a client's id, or "merged": all clients merged by a method of the
catalogue, tensor by tensor, as it would be without the change of structure.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from fl_merge.errors import MergeError, RecipeError
from fl_merge.method import Method, build, find
from fl_merge.shapes import Copy
from fl_merge.types import BASE, CohortSpec, MergeMethod, Output, Read, TensorSpec, Whole, compute_dtype

BASE_SOURCE, MERGED_SOURCE = "base", "merged"


@runtime_checkable
class Structure(Protocol):
    """The shape of a method that changes names or shapes: a plan, and what the plan means for the model's config."""

    def reconfigure(self, config: Mapping[str, Any], clients: int | None) -> dict[str, Any]:
        """See `reconfigure`."""
        ...


def reconfigure(config: Mapping[str, Any], method: MergeMethod, clients: int | None = None) -> dict[str, Any]:
    """The config.json of what a method makes of models with this one.

    A pure function: whoever writes the merged model writes this beside it, and a federation's clients rebuild the model
    from it.

    Args:
        config: of the inputs, not changed.
        method: any; one that does not change the structure gives the config back.
        clients: how many there are, for methods whose result depends on it.

    Raises:
        RecipeError: if the method cannot be applied to a model of this config.
    """
    shape = method.shape if isinstance(method, Method) else method
    if isinstance(shape, Structure):
        return shape.reconfigure(config, clients)
    return dict(config)


def inner_method(owner: str, method: str | Method, settings: Mapping[str, Any] | None) -> Method:
    """The method by which clients are merged within a structure.

    Raises:
        RecipeError: if it is not one for models, or settings are given beside a method that has its own.
    """
    if isinstance(method, Method) and settings:
        raise RecipeError(
            f"parameter 'settings' of {owner}: found {dict(settings)!r}, wanted none beside the method {method}"
        )
    inner = method if isinstance(method, Method) else build(method, **(settings or {}))
    if find(inner.name).merges != "models":
        raise RecipeError(f"parameter 'method' of {owner}: found '{inner.name}', wanted a method for models")
    return inner


@dataclass(frozen=True)
class Sources:
    """The tensors of a cohort under the names of the base, from each source.

    Args:
        owner: the method's name, for errors.
        spec: the cohort.
        merged: the outputs of the inner method by name, for all tensors that may be asked for.
    """

    owner: str
    spec: CohortSpec
    merged: Mapping[str, Output]

    @classmethod
    def of(cls, owner: str, spec: CohortSpec, method: MergeMethod, merged: Iterable[str]) -> Sources:
        """The sources of a cohort.

        Args:
            owner, spec: as for the class.
            method: by which clients are merged.
            merged: names that are asked for from "merged": statistics over the model run over these.
        """
        names = set(merged)
        wanted = [name for name in spec.tensors if name in names]
        return cls(owner, spec, {o.name: o for o in method.plan(spec.only(wanted))} if wanted else {})

    def take(self, source: str, name: str, as_name: str, scale: float = 1.0) -> Output:
        """One tensor of a source under a new name.

        Args:
            source: "base", "merged" or a client's id.
            name: in the base.
            as_name: in the result.
            scale: multiplies floating tensors.

        Raises:
            MergeError: if there is no such client, or its tensor has another shape than the base's.
            RecipeError: for a scale on what is merged.
        """
        tensor = self.spec.tensors[name]
        if source == MERGED_SOURCE:
            if scale != 1.0:
                raise RecipeError(
                    f"{self.owner}: found a scale on 'merged' layers, wanted one on the base or a client; the inner "
                    "method has a scale of its own"
                )
            output = self.merged[name]
            return replace(output, name=as_name, merged_as=output.merged_as or output.name)
        index = self.index(source)
        self._require_shape(index, source, name, tensor)
        if scale == 1.0 or not tensor.is_floating:
            return Output(as_name, tensor, (Read(index, name),), Copy())
        dtype = compute_dtype(tensor.dtype)
        return Output(as_name, tensor, (Read(index, name),), Whole(lambda values: values.to(dtype) * scale))

    def index(self, source: str) -> int:
        """The place of a source in the cohort.

        Raises:
            MergeError: if there is no such client.
        """
        if source == BASE_SOURCE:
            return BASE
        if source not in self.spec.client_ids:
            known = ", ".join(self.spec.client_ids)
            raise MergeError(f"{self.owner}: found the source '{source}', wanted base, merged or a client ({known})")
        return self.spec.client_ids.index(source)

    def _require_shape(self, index: int, source: str, name: str, tensor: TensorSpec) -> None:
        if index == BASE or not self.spec.clients_N:
            return
        theirs = self.spec.clients_N[index].get(name)
        if theirs is None or theirs.shape != tensor.shape:
            found = "is missing" if theirs is None else f"shape {theirs.shape}"
            raise MergeError(
                f"{self.owner}: client '{source}', tensor '{name}': {found}, base has {tensor.shape}; models of "
                "different sizes cannot be put together"
            )


def made(name: str, spec: TensorSpec, values: Tensor | None = None) -> Output:
    """An output that is read from nowhere: these values, or zeros."""
    if values is not None:
        return Output(name, spec, (), Whole(lambda: values))
    return Output(name, spec, (), Whole(lambda: torch.zeros(spec.shape, dtype=compute_dtype(spec.dtype))))


def shown(names: Iterable[str]) -> str:
    """The first few of some tensors' names, for an error."""
    listed = list(names)
    return ", ".join(listed[:4]) + (", ..." if len(listed) > 4 else "")
