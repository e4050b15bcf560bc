"""From a recipe's parameters to the settings of each tensor: levels, filters, gradients, defaults."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from fl_merge.errors import RecipeError
from fl_merge.hyperparameters import nearest
from fl_merge.offline.config import OfflineRecipe, Parameters, Ref, Scalar, Slice
from fl_merge.offline.layout import Layout, Target
from fl_merge.offline.rows import Parameter, Row, Settings


@dataclass
class Resolver:
    """Looks up parameters.

    Args:
        recipe, layout: whose.
        row: the method.
        ids: what the models are called among the clients.
        left_out: the parameters that no level gives, filled in as tensors are resolved.
    """

    recipe: OfflineRecipe
    layout: Layout
    row: Row
    ids: Mapping[Ref, str]
    left_out: dict[str, None] = field(default_factory=dict)

    def settings(self, target: Target) -> Settings:
        """The settings of one tensor.

        Raises:
            RecipeError: for a value that is not allowed, or a parameter that is needed and not given.
        """
        part = self.layout.slices[target.slice]
        base = base_place(self.recipe, part, self.row)
        shared = {}
        for name, parameter in self.row.parameters.items():
            if parameter.each == "shared":
                shared[name] = self._value(name, parameter, self._levels(part, None), target.name, target.t, "")
        each = []
        for place, source in enumerate(part.sources):
            levels, whose = self._levels(part, place), f" of model '{source.model}'"
            each.append(
                {
                    name: self._value(name, parameter, levels, target.names[place], target.t, whose)
                    for name, parameter in self.row.parameters.items()
                    if parameter.each == "all" or (parameter.each == "others" and place != base)
                }
            )
        return Settings(
            shared, tuple(each), tuple(self.ids[source.model] for source in part.sources), base, self.recipe.compat
        )

    def _levels(self, part: Slice, place: int | None) -> Sequence[Parameters]:
        own = [part.sources[place].parameters] if place is not None else []
        return [*own, part.parameters, self.recipe.module_parameters, self.recipe.parameters]

    def _value(
        self, name: str, parameter: Parameter, levels: Sequence[Parameters], tensor: str, t: float, whose: str
    ) -> Scalar | None:
        for level in levels:
            for clause in level.get(name, ()):
                if clause.matches(tensor):
                    where = f"{self.recipe.merge_method}: parameter '{name}'{whose} for '{tensor}'"
                    accepted: Scalar = parameter.accept(where, clause.at(t))
                    return accepted
        self.left_out[name] = None
        value: Scalar | None = parameter.left_out(compat=self.recipe.compat)
        if value is None and not parameter.optional:
            raise RecipeError(f"{self.recipe.merge_method}: parameter '{name}'{whose} is not given for '{tensor}'")
        return value


def base_place(recipe: OfflineRecipe, part: Slice, row: Row) -> int | None:
    """The base's place among a slice's sources; None where the method has no use for one."""
    base = part.base_model or recipe.base_model
    models = [source.model for source in part.sources]
    return models.index(base) if base in models and row.base != "ignored" else None


def check_parameters(recipe: OfflineRecipe, row: Row) -> list[str]:
    """Refuse what the method does not know, before any model is looked at.

    Returns:
        Notices of parameters that do nothing.

    Raises:
        RecipeError: for an unknown parameter (with the nearest one), one for all models that stands at a single one.
    """
    notices = dict.fromkeys(
        f"'{name}' changes nothing in the result"
        for _, _, given in _everywhere(recipe)
        for name in given
        if name in row.parameters and row.parameters[name].idle
    )
    for where, of_model, given in _everywhere(recipe):
        for name in given:
            at = f"{where}: " if where else ""
            if name not in row.parameters:
                raise RecipeError(f"{at}{recipe.merge_method} has no parameter '{name}'{nearest(name, row.parameters)}")
            if of_model and row.parameters[name].each == "shared":
                raise RecipeError(f"{at}'{name}' is one value for all models; it stands at the recipe's parameters")
    return list(notices)


def check_filters(recipe: OfflineRecipe, layout: Layout) -> None:
    """Refuse filters that match no tensor.

    Raises:
        RecipeError: naming the filter, with the nearest part of a name.
    """
    names = {target.name for target in layout.targets} | {name for target in layout.targets for name in target.names}
    parts = {part for name in names for part in name.split(".") if not part.isdigit()}
    for where, _, given in _everywhere(recipe):
        for name, setting in given.items():
            for clause in setting:
                if not any(clause.matches(tensor) for tensor in names):
                    at = f"{where}: " if where else ""
                    raise RecipeError(
                        f"{at}parameter '{name}': filter '{clause.filter}' matches no tensor"
                        f"{nearest(str(clause.filter), parts)}"
                    )


def _everywhere(recipe: OfflineRecipe) -> Iterator[tuple[str, bool, Parameters]]:
    """Every place with parameters: where it is, whether it is a model's, and what stands there."""
    yield "", False, recipe.parameters
    yield "modules: default", False, recipe.module_parameters
    for number, part in enumerate(recipe.slices, start=1):
        yield f"slice {number}", False, part.parameters
        for source in part.sources:
            yield f"model '{source.model}'", True, source.parameters
