"""What a row of the table of mergekit's methods says, and the few methods that are made of nothing else.

Suffix: N models that are merged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from fl_merge.errors import RecipeError
from fl_merge.hyperparameters import Range
from fl_merge.method import METHODS, build
from fl_merge.shapes import Copy, Span
from fl_merge.types import BASE, CohortSpec, MergeMethod, Output, Read


class _Same:
    """Stands for: as in mergekit."""


@dataclass(frozen=True)
class Parameter:
    """One parameter of a mergekit method.

    Args:
        kind: float, int or bool.
        default: mergekit's; None where it has none and asks for a value.
        ours: our default, where it is another.
        allowed: the values that it may take.
        each: "all" for one value a model, "others" for one a model but the base, "shared" for one in all.
        idle: it changes nothing in the result.
        optional: whether None is a value of its own: nothing is done.
    """

    kind: type
    default: Any = None
    ours: Any = _Same
    allowed: Range = Range()  # noqa: RUF009 (it cannot be changed)
    each: Literal["all", "others", "shared"] = "shared"
    idle: bool = False
    optional: bool = False

    def left_out(self, *, compat: bool) -> Any:
        """The value of a parameter that the recipe does not give."""
        return self.default if compat or self.ours is _Same else self.ours

    def accept(self, where: str, value: object) -> Any:
        """The value in the parameter's type.

        Raises:
            RecipeError: if it is none of those that are allowed.
        """
        if self.kind is bool and (isinstance(value, bool) or (type(value) is int and value in (0, 1))):
            return bool(value)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        whole = self.kind is float or isinstance(value, int)
        if self.kind is not bool and number and whole and value in self.allowed:  # type: ignore[operator]
            return self.kind(value)
        wanted = (
            "true or false" if self.kind is bool else f"a {'whole ' if self.kind is int else ''}number {self.allowed}"
        )
        raise RecipeError(f"{where}: found {value!r}, wanted {wanted}")


@dataclass(frozen=True)
class Settings:
    """The parameters of one tensor.

    Args:
        shared: one value each.
        each: by model, in the recipe's order; of the base only those that it has too.
        ids: what the models are called among the clients.
        base: the base's place among the models; None without one.
        compat: whether mergekit's ways are followed where ours are other ones.
    """

    shared: Mapping[str, Any]
    each: tuple[Mapping[str, Any], ...]
    ids: tuple[str, ...]
    base: int | None
    compat: bool

    @property
    def others(self) -> tuple[int, ...]:
        """The places of the models that are not the base."""
        return tuple(place for place in range(len(self.each)) if place != self.base)

    def of_others(self, name: str) -> tuple[Any, ...]:
        """A parameter's values for the models that are not the base."""
        return tuple(self.each[place][name] for place in self.others)


@dataclass(frozen=True)
class Choice:
    """How tensors with the same settings are merged.

    Args:
        method: what plans it.
        clients: the places of the models that are merged, in that order.
        weights_N: their weights, as they are.
        base: the place of the model from which deltas are taken.
    """

    method: MergeMethod
    clients: tuple[int, ...]
    weights_N: tuple[float, ...]
    base: int = 0

    def __str__(self) -> str:
        weights = ", ".join(f"{weight:g}" for weight in self.weights_N)
        return f"{self.method}" + (f" with weights {weights}" if weights else "")


@dataclass(frozen=True)
class Row:
    """One of mergekit's methods.

    Args:
        ours: the name of our method, for the list.
        make: from a tensor's settings to how it is merged.
        parameters: by mergekit's names.
        base: whether the recipe must name a base model, may, or whether the method has no use for one.
        models: the fewest and the most models, the base among them.
        others: the same without the base.
        notes: what a recipe's author should know: where mergekit gives another result.
    """

    ours: str
    make: Callable[[Settings], Choice]
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    base: Literal["required", "optional", "ignored"] = "ignored"
    models: tuple[int, int | None] = (1, None)
    others: tuple[int, int | None] = (0, None)
    notes: tuple[str, ...] = ()


# --- what some of them are made of -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Unchanged:
    """The one model's tensor."""

    def plan(self, spec: CohortSpec) -> Iterator[Output]:
        for name, tensor in spec.tensors.items():
            yield Output(name, tensor, (Read(BASE, name),), Copy())

    def __str__(self) -> str:
        return "unchanged"


@dataclass(frozen=True)
class Combination:
    """sum w_i theta_i, with weights as they are."""

    def plan(self, spec: CohortSpec) -> Iterator[Output]:
        return _COMBINATION.plan(spec)

    def __str__(self) -> str:
        return "sum of the models"


def _as_they_are(spec: CohortSpec, gram_NN: Tensor | None) -> Sequence[float]:
    return spec.weights_N


_COMBINATION = Span(_as_they_are, on="weights")


def ours(method: str, **settings: Any) -> MergeMethod:
    """Our method with these settings."""
    if method not in METHODS:
        raise RecipeError(f"there is no method '{method}' here yet")
    return build(method, **settings)


def normalized(weights: Sequence[float]) -> tuple[float, ...]:
    """The weights divided by their sum; as they are where that is nothing, as in mergekit."""
    total = math.fsum(weights)
    return tuple(weight / total for weight in weights) if abs(total) >= 1e-8 else tuple(weights)
