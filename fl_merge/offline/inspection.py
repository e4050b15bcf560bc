"""How finetuned models differ from their base and from each other, layer by layer, without holding any of them.

Suffixes: N models, S elements.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fl_merge.check import check_specs
from fl_merge.errors import RecipeError, TensorMismatchError
from fl_merge.offline.models import Model

STEP = 1 << 18
"""Elements of each model that are looked at together."""


@dataclass
class Group:
    """Sums over the floating tensors of a layer, or of what stands before or after the layers.

    Args:
        name: the layer's number, "embeddings" or "norm and head".
        elements: how many.
        base_squared: the base's squared norm; 0 without a base.
        gram_NN: (N, N), float64: inner products of the deltas (of the weights without a base).
        zeros_N: how many elements of each delta are 0.
        conflicts: elements for which one delta is positive and another negative.
        moved: elements that at least one delta moves.
    """

    name: str
    elements: int
    base_squared: float
    gram_NN: Tensor
    zeros_N: Tensor
    conflicts: int
    moved: int

    @classmethod
    def empty(cls, name: str, models: int) -> Group:
        """Nothing added yet."""
        gram_NN = torch.zeros(models, models, dtype=torch.float64)
        return cls(name, 0, 0.0, gram_NN, torch.zeros(models, dtype=torch.int64), 0, 0)

    def add(self, deltas_NS: Tensor, base_S: Tensor | None) -> None:
        """A slice of a tensor: (N, S) float64, and the base's (S,)."""
        self.elements += deltas_NS.shape[1]
        self.gram_NN += deltas_NS @ deltas_NS.T
        self.zeros_N += (deltas_NS == 0).sum(dim=1)
        positive_S, negative_S = (deltas_NS > 0).any(dim=0), (deltas_NS < 0).any(dim=0)
        self.conflicts += int((positive_S & negative_S).sum())
        self.moved += int((positive_S | negative_S).sum())
        if base_S is not None:
            self.base_squared += float(base_S @ base_S)

    def __iadd__(self, other: Group) -> Group:
        self.elements += other.elements
        self.base_squared += other.base_squared
        self.gram_NN += other.gram_NN
        self.zeros_N += other.zeros_N
        self.conflicts += other.conflicts
        self.moved += other.moved
        return self

    @property
    def norms_N(self) -> list[float]:
        """The deltas' Euclidean norms."""
        return [math.sqrt(max(float(square), 0.0)) for square in self.gram_NN.diagonal()]

    def cosine(self, a: int, b: int) -> float | None:
        """The cosine between two deltas; None if one is 0."""
        norms_N = self.norms_N
        if norms_N[a] == 0 or norms_N[b] == 0:
            return None
        return float(self.gram_NN[a, b]) / (norms_N[a] * norms_N[b])

    def pairs(self) -> Iterator[tuple[int, int, float]]:
        """The cosines between any two deltas that have one."""
        for a in range(len(self.gram_NN)):
            for b in range(a + 1, len(self.gram_NN)):
                if (cosine := self.cosine(a, b)) is not None:
                    yield a, b, cosine

    @property
    def mean_cosine(self) -> float | None:
        """Over all pairs that have one."""
        found = [cosine for _, _, cosine in self.pairs()]
        return math.fsum(found) / len(found) if found else None

    @property
    def conflict(self) -> float:
        """The share of sign conflicts among the elements that are moved."""
        return self.conflicts / self.moved if self.moved else 0.0

    def sparsity(self, model: int) -> float:
        """The share of a delta's elements that are 0."""
        return float(self.zeros_N[model]) / self.elements if self.elements else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return {
            "name": self.name,
            "elements": self.elements,
            "base_norm": math.sqrt(self.base_squared),
            "delta_norms": self.norms_N,
            "cosines": [[self.cosine(a, b) for b in range(len(self.gram_NN))] for a in range(len(self.gram_NN))],
            "sign_conflicts": self.conflict,
            "sparsity": [self.sparsity(model) for model in range(len(self.gram_NN))],
        }


def inspect(
    models: Sequence[Model], base: Model | None, on_tensor: Callable[[str], None] | None = None
) -> tuple[Group, ...]:
    """Norms, cosines, sign conflicts and sparsity of the models' deltas, by layer, and at the end in all.

    Args:
        models: at least one.
        base: from which deltas are taken; without one the weights themselves are looked at.
        on_tensor: called with the name of each tensor that is done.

    Raises:
        RecipeError: for no model, or one without floating tensors.
        TensorMismatchError: if the models do not fit each other.
    """
    if not models:
        raise RecipeError("found no model, wanted at least one")
    first = base or models[0]
    specs = first.source.specs()
    for model in models:
        try:
            check_specs(model.source.specs(), specs)
        except TensorMismatchError as error:
            problem = f"{error.problem} (model '{model.ref}', held against '{first.ref}')"
            raise TensorMismatchError(problem, tensor=error.tensor) from None
    groups: dict[tuple[int, int], Group] = {}
    names = {"before": "embeddings", "after": "norm and head"}
    for name, spec in specs.items():
        if not spec.is_floating:
            continue
        place, layer = first.architecture.place(name)
        key = ({"before": 0, "layer": 1, "after": 2}[place], layer)
        group = groups.setdefault(key, Group.empty(names.get(place, str(layer)), len(models)))
        _add(group, name, models, base)
        if on_tensor is not None:
            on_tensor(name)
    if not groups:
        raise RecipeError(f"model '{first.ref}' has no floating tensors")
    total = Group.empty("all", len(models))
    for group in groups.values():
        total += group
    return (*(groups[key] for key in sorted(groups)), total)


def _add(group: Group, name: str, models: Sequence[Model], base: Model | None) -> None:
    tensors = [model.source.read(name).reshape(-1) for model in models]
    base_S = base.source.read(name).reshape(-1) if base is not None else None
    for start in range(0, tensors[0].numel(), STEP):
        values_NS = torch.stack([tensor[start : start + STEP].double() for tensor in tensors])
        at_S = base_S[start : start + STEP].double() if base_S is not None else None
        if not torch.isfinite(values_NS).all():
            model = int(torch.nonzero(~torch.isfinite(values_NS))[0][0])
            raise TensorMismatchError(f"values that are not finite in model '{models[model].ref}'", tensor=name)
        group.add(values_NS - at_S if at_S is not None else values_NS, at_S)


def as_json(models: Sequence[Model], base: Model | None, groups: Sequence[Group]) -> Mapping[str, Any]:
    """All of it as plain data."""
    return {
        "models": [str(model.ref) for model in models],
        "base": str(base.ref) if base is not None else None,
        "groups": [group.as_dict() for group in groups],
    }
