"""Recipes: a YAML file, or the run config of a Flower app, that says how to merge.

    merge_method: ties
    parameters: {density: 0.2, scale: 1.0}
    rules:                                  # first match wins; glob on tensor names
      - {match: "*norm*", merge_method: weighted_average}

`merge_method: my_module:my_method` names a method of the user's own.

    phases:                                 # of a federation, one after the other (`fl_merge.phases`)
      - {rounds: 1-3, merge_method: weighted_average}
      - {merge_method: moe_upcycle, parameters: {router: hidden}}
      - {rounds: 4, train: router, merge_method: weighted_average}
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fl_merge.clipping import Clipped, clip_norm
from fl_merge.errors import RecipeError
from fl_merge.execute import merged_specs
from fl_merge.hyperparameters import known_keys
from fl_merge.method import METHODS, Method, Partition, build, partition, require_for_models
from fl_merge.optimizers import STATISTICS, ServerOptimized, build_optimizer, server_optimizer
from fl_merge.phases import Phase, Schedule, parse_rounds, phase, schedule
from fl_merge.run_config import nested, table_of
from fl_merge.types import MergeMethod, TensorSpec
from fl_merge.yaml_text import from_yaml, read_yaml, to_yaml

_KEYS = ("merge_method", "parameters", "rules", "clip_norm", "server_optimizer")
_PHASE_KEYS = ("rounds", "train", "config", *_KEYS)
_RULE_KEYS = ("match", "merge_method", "parameters")


@dataclass(frozen=True)
class Rule:
    """A method for the tensors whose name matches a glob."""

    match: str
    merge_method: str
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PhaseRecipe:
    """Rounds of a federation that do the same.

    Args:
        recipe: how they merge.
        rounds: how many; None for all that are left.
        first: the number of the first round, where the recipe says it.
        train: what clients train and send.
        config: what else clients are told.
    """

    recipe: Recipe
    rounds: int | None = None
    first: int | None = None
    train: tuple[str, ...] = ("all",)
    config: Mapping[str, Any] = field(default_factory=dict)

    def build(self) -> Phase:
        """The phase that this describes.

        Raises:
            RecipeError: as `Recipe.build` and `phase`.
        """
        return phase(self.recipe.build(), self.rounds, train=self.train, config=self.config)


@dataclass(frozen=True)
class Recipe:
    """How to merge, as data.

    Args:
        merge_method: a registered name, or "module:function".
        parameters: its settings; the rest take their defaults.
        rules: other methods for some tensors; the first match wins.
        clip_norm: `max_norm` or `quantile`; empty for none.
        server_optimizer: `name`, its settings, and `skip`; empty for none.
        phases: of a federation; all else is then empty.
    """

    merge_method: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    rules: Sequence[Rule] = ()
    server_optimizer: Mapping[str, Any] = field(default_factory=dict)
    clip_norm: Mapping[str, Any] = field(default_factory=dict)
    phases: Sequence[PhaseRecipe] = ()

    def build(self, base: Mapping[str, TensorSpec] | None = None) -> MergeMethod:
        """The method that the recipe describes.

        Args:
            base: where given, the whole merge is planned on these tensors too, so that a rule that matches none of
                them is refused now.

        Raises:
            RecipeError: for an unknown method or parameter, a value out of range, a rule that matches nothing.
        """
        if self.phases:
            planned = _schedule(self.phases)
            if base is not None:
                planned.check(base)
            return planned
        method: MergeMethod = build(self.merge_method, **self.parameters)
        if self.rules:
            rules = []
            for number, rule in enumerate(self.rules, start=1):
                try:
                    rules.append((rule.match, build(rule.merge_method, **rule.parameters)))
                except RecipeError as error:
                    raise RecipeError(f"rule {number} ('{rule.match}'): {error}") from None
            method = partition(rules, otherwise=method)
        for wrapper in ("clip_norm", "server_optimizer"):
            if getattr(self, wrapper):
                require_for_models(wrapper, method)
        if self.clip_norm:
            bounds = known_keys("clip_norm", self.clip_norm, ("max_norm", "quantile"))
            method = clip_norm(method, max_norm=bounds.get("max_norm"), quantile=bounds.get("quantile"))
        if self.server_optimizer:
            settings = dict(self.server_optimizer)
            skip = settings.pop("skip", STATISTICS)
            method = server_optimizer(method, build_optimizer(settings), skip=skip)
        if base is not None:
            merged_specs(method, base)
        return method

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a YAML file and check all of it.

        Raises:
            RecipeError: naming the file, the key, what was found and what is allowed.
        """
        content = read_yaml(path)
        try:
            recipe = cls.from_dict(content)
            recipe.build()
        except RecipeError as error:
            raise RecipeError(f"recipe '{path}': {error}") from None
        return recipe

    @classmethod
    def from_dict(cls, content: object) -> Recipe:
        """The recipe that a parsed YAML file holds.

        Raises:
            RecipeError: for a key that is unknown or missing, or a value of the wrong kind.
        """
        if isinstance(content, Mapping) and "phases" in content:
            known_keys("a recipe of phases", content, ("phases",))
            if not isinstance(content["phases"], list) or not content["phases"]:
                raise RecipeError(
                    f"phases: found {content['phases']!r}, wanted a list of {{rounds, merge_method, ...}}"
                )
            return cls("", phases=tuple(_phase(number, each) for number, each in enumerate(content["phases"], start=1)))
        keys = known_keys("the recipe", content, _KEYS)
        rules = keys.get("rules")
        rules = [] if rules is None else rules
        if not isinstance(rules, list):
            raise RecipeError(f"rules: found {rules!r}, wanted a list of {{match, merge_method, parameters}}")
        return cls(
            _text("merge_method", keys),
            _parameters("parameters", keys),
            tuple(_rule(number, rule) for number, rule in enumerate(rules, start=1)),
            _wrapper("server_optimizer", keys, "name", "{name: adam, lr: 0.01}"),
            _wrapper("clip_norm", keys, "max_norm", "{quantile: 0.5}"),
        )

    @classmethod
    def from_config(cls, config: Mapping[str, bool | int | float | str]) -> Recipe:
        """The recipe in a Flower app's run config (`[tool.flwr.app.config]`, keys in kebab-case).

            merge-method = "ties"
            parameters.density = 0.2
            rules."*norm*" = "weighted_average"
            clip-norm = "{quantile: 0.5}"
            server-optimizer = "{name: adam, lr: 0.01}"

        `parameters` and `rules` may also be text in YAML, `parameters = "{density: 0.2}"`, which `flwr run
        --run-config` can override; rules as a list can then have parameters, as in a recipe file. `recipe =
        "recipe.yaml"` names a file that takes the place of all of them. Other keys are left alone: they are the app's.

        Raises:
            RecipeError: as `load`.
        """
        if config.get("recipe"):
            return cls.load(str(config["recipe"]))
        if "merge_method" in config:
            raise RecipeError("run config: unknown key 'merge_method'; did you mean 'merge-method'?")
        for key in config:
            table, dot, _ = key.partition(".")
            close = difflib.get_close_matches(table, ("parameters", "rules"), n=1, cutoff=0.85)
            if dot and close and table not in ("parameters", "rules"):
                raise RecipeError(f"run config: unknown key '{key}'; did you mean '{close[0]}{key[len(table) :]}'?")
        try:
            parameters = nested(table_of("parameters", config))
            listed = from_yaml(config.get("rules"))
            rules = (
                listed
                if isinstance(listed, list)
                else [{"match": glob, "merge_method": method} for glob, method in table_of("rules", config).items()]
            )
            recipe = cls.from_dict(
                {
                    "merge_method": config.get("merge-method", "weighted_average"),
                    "parameters": {str(key).replace("-", "_"): value for key, value in parameters.items()},
                    "rules": rules,
                    "clip_norm": config.get("clip-norm") or None,
                    "server_optimizer": config.get("server-optimizer") or None,
                }
            )
            recipe.build()
        except RecipeError as error:
            raise RecipeError(f"run config: {error}") from None
        return recipe

    @classmethod
    def of(cls, method: MergeMethod) -> Recipe | None:
        """The recipe that builds this method; None for one that no recipe can name (an object of the user's own)."""
        if isinstance(method, Schedule):
            inside = [(each, cls.of(each.method)) for each in method.phases]
            phases = [PhaseRecipe(r, e.rounds, None, e.train, dict(e.config)) for e, r in inside if r is not None]
            return cls("", phases=tuple(phases)) if len(phases) == len(inside) else None
        if isinstance(method, ServerOptimized):
            inner = cls.of(method.method)
            settings: dict[str, Any] = {"name": method.optimizer.name, **method.optimizer.settings}
            if method.skip != STATISTICS:
                settings["skip"] = list(method.skip)
            return None if inner is None else replace(inner, server_optimizer=settings)
        if isinstance(method, Clipped):
            inner = cls.of(method.method)
            bounds = {"max_norm": method.max_norm, "quantile": method.quantile}
            bounds = {name: bound for name, bound in bounds.items() if bound is not None}
            return None if inner is None else replace(inner, clip_norm=bounds)
        if isinstance(method, Method):
            return cls(_name(method), _settings(method))
        if isinstance(method, Partition) and isinstance(method.otherwise, Method):
            rules = [(glob, rule) for glob, rule in method.rules if isinstance(rule, Method)]
            if len(rules) == len(method.rules):
                listed = tuple(Rule(glob, _name(rule), _settings(rule)) for glob, rule in rules)
                return cls(_name(method.otherwise), _settings(method.otherwise), listed)
        return None

    def to_yaml(self) -> str:
        """The recipe as a YAML file that `load` reads back."""
        return to_yaml(self._content())

    def _content(self) -> dict[str, Any]:
        if self.phases:
            return {"phases": [_phase_content(each) for each in self.phases]}
        content: dict[str, Any] = {"merge_method": self.merge_method}
        if self.parameters:
            content["parameters"] = _plain(self.parameters)
        if self.rules:
            content["rules"] = [
                {"match": rule.match, "merge_method": rule.merge_method}
                | ({"parameters": _plain(rule.parameters)} if rule.parameters else {})
                for rule in self.rules
            ]
        if self.clip_norm:
            content["clip_norm"] = _plain(self.clip_norm)
        if self.server_optimizer:
            content["server_optimizer"] = _plain(self.server_optimizer)
        return content


def _settings(method: Method) -> dict[str, Any]:
    """A method's settings; one that is a method itself (`lora_merge`'s) by its name and its settings."""
    settings = dict(method.parameters)
    inner = settings.get("method")
    if isinstance(inner, Method):
        settings |= {"method": _name(inner), "settings": dict(inner.parameters)}
    return settings


def _name(method: Method) -> str:
    """A method's name in a recipe: with its module, if it is not one of ours."""
    module = METHODS[method.name].factory.__module__
    return method.name if module.startswith("fl_merge.") else f"{module}:{method.name}"


def _text(key: str, content: Mapping[str, Any]) -> str:
    if not isinstance(content.get(key), str):
        raise RecipeError(f"{key}: found {content.get(key)!r}, wanted the name of a method")
    return str(content[key])


def _parameters(key: str, content: Mapping[str, Any]) -> Mapping[str, Any]:
    value = content.get(key)
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise RecipeError(f"{key}: found {value!r}, wanted a mapping from parameter names to values")
    return dict(value)


def _wrapper(key: str, content: Mapping[str, Any], short: str, example: str) -> Mapping[str, Any]:
    """A mapping as it is; text is such a mapping in YAML (in a run config); anything else the setting `short` alone."""
    value = content.get(key)
    if value is None:
        return {}
    parsed = from_yaml(value) if isinstance(value, str) else value
    if isinstance(parsed, str | int | float) and not isinstance(parsed, bool):
        parsed = {short: parsed}
    if not isinstance(parsed, Mapping) or not parsed or not all(isinstance(name, str) for name in parsed):
        raise RecipeError(f"{key}: found {value!r}, wanted {example}")
    return dict(parsed)


def _rule(number: int, content: object) -> Rule:
    where = f"rule {number}"
    keys = known_keys(where, content, _RULE_KEYS)
    if not isinstance(keys.get("match"), str) or not keys["match"]:
        raise RecipeError(f"{where}: match: found {keys.get('match')!r}, wanted a glob on tensor names")
    try:
        return Rule(keys["match"], _text("merge_method", keys), _parameters("parameters", keys))
    except RecipeError as error:
        raise RecipeError(f"{where} ('{keys['match']}'): {error}") from None


def _phase(number: int, content: object) -> PhaseRecipe:
    where = f"phase {number}"
    keys = dict(known_keys(where, content, _PHASE_KEYS))
    first, count = parse_rounds(where, keys.pop("rounds", None))
    train, config = keys.pop("train", "all"), keys.pop("config", None) or {}
    globs = tuple(train) if isinstance(train, list) else (train,)
    if not all(isinstance(glob, str) for glob in globs):
        raise RecipeError(f"{where}: train: found {train!r}, wanted all, router, or globs on names of tensors")
    if not isinstance(config, Mapping):
        raise RecipeError(f"{where}: config: found {config!r}, wanted a mapping such as {{local-steps: 100}}")
    try:
        return PhaseRecipe(Recipe.from_dict(keys), count, first, globs, dict(config))
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from None


def _schedule(phases: Sequence[PhaseRecipe]) -> Schedule:
    """The phases with their methods, each where its rounds are said to be.

    Raises:
        RecipeError: naming the phase that overlaps the one before it, leaves a gap, or makes no sense by itself.
    """
    built: list[Phase] = []
    last: int | None = 0
    for number, each in enumerate(phases, start=1):
        try:
            built.append(each.build())
        except RecipeError as error:
            raise RecipeError(f"phase {number}: {error}") from None
        if each.first is not None and last is not None and each.first != last + 1:
            what = "overlaps the one before, which ends with" if each.first <= last else "leaves a gap after"
            raise RecipeError(f"phase {number}: it begins with round {each.first} and {what} round {last}")
        last = None if last is None or built[-1].rounds is None else last + (built[-1].rounds or 0)
    return schedule(built)


def _phase_content(each: PhaseRecipe) -> dict[str, Any]:
    content: dict[str, Any] = {}
    if each.rounds is not None:
        content["rounds"] = each.rounds
    if each.train != ("all",):
        content["train"] = list(each.train)
    if each.config:
        content["config"] = dict(each.config)
    return content | each.recipe._content()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value
