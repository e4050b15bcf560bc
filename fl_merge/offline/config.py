"""A recipe that names the models to merge: mergekit's YAML and our own form with `models`, as plain data.

Nothing is read here but what the file says. Every key is known or refused by name.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fl_merge.errors import RecipeError
from fl_merge.hyperparameters import known_keys
from fl_merge.recipe import Recipe

Scalar = bool | int | float | str

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "float64": torch.float64}

_KEYS = (
    "merge_method",
    "base_model",
    "models",
    "slices",
    "modules",
    "parameters",
    "dtype",
    "out_dtype",
    "tokenizer_source",
    "compat",
    "rules",
)
_REFUSED = {
    "tokenizer": "is not supported; leave it out or write tokenizer_source: base",
    "chat_template": "is not supported; change the chat template in the merged folder's tokenizer files",
}
_OURS_REFUSED = ("slices", "modules")


@dataclass(frozen=True)
class Ref:
    """A model: a folder, a safetensors file or a name on the Hugging Face hub, perhaps with an adapter on it."""

    path: str
    revision: str | None = None
    lora: Ref | None = None

    def __str__(self) -> str:
        text = self.path + (f"@{self.revision}" if self.revision else "")
        return f"{text}+{self.lora}" if self.lora else text


@dataclass(frozen=True)
class Clause:
    """One value of a parameter: a scalar, or a gradient over the layers, for the tensors that a filter lets through."""

    value: Scalar | tuple[Scalar, ...]
    filter: str | None = None

    def matches(self, tensor: str) -> bool:
        """Whether it is for this tensor: without a filter, or with one that its name contains."""
        return self.filter is None or self.filter == "*" or self.filter in tensor

    def at(self, t: float) -> Scalar:
        """The value at a fraction t of the way through the layers."""
        if not isinstance(self.value, tuple):
            return self.value
        place = t * (len(self.value) - 1)
        if any(isinstance(value, bool | str) for value in self.value):
            return self.value[int(place)]
        first = int(place)
        low, high = float(self.value[first]), float(self.value[min(first + 1, len(self.value) - 1)])
        return low if low == high else (1 - (place - first)) * low + (place - first) * high


Setting = tuple[Clause, ...]
Parameters = Mapping[str, Setting]


@dataclass(frozen=True)
class Source:
    """A model, or a range of its layers, with its own parameters."""

    model: Ref
    layers: tuple[int, int] | None = None
    parameters: Parameters = field(default_factory=dict)


@dataclass(frozen=True)
class Slice:
    """Layers of the merged model, made of as many layers of each source."""

    sources: tuple[Source, ...]
    base_model: Ref | None = None
    parameters: Parameters = field(default_factory=dict)


@dataclass(frozen=True)
class OfflineRecipe:
    """A recipe that names its models.

    Args:
        merge_method: as the file has it.
        slices: what the merged model is made of, in order; a recipe with `models` has one slice without ranges.
        stacked: whether the recipe has `slices`, so that the depth may change.
        base_model: where deltas are taken from and the config comes from; None for the first model.
        parameters: for all slices.
        module_parameters: those of the module `default`, which stand between a slice's and the recipe's.
        dtype: of the result; None for each tensor's own.
        cast: what the file says as `dtype`, in which mergekit would compute.
        tokenizer_base: whether the file asks for the base's tokenizer, for all models to have its vocabulary.
        compat: whether parameters that are left out are mergekit's, or ours.
        ours: the method and its rules, for a recipe in our own form.
    """

    merge_method: str
    slices: tuple[Slice, ...]
    stacked: bool
    base_model: Ref | None
    parameters: Parameters
    module_parameters: Parameters
    dtype: torch.dtype | None
    cast: torch.dtype | None
    tokenizer_base: bool
    compat: bool
    ours: Recipe | None = None

    @property
    def models(self) -> tuple[Ref, ...]:
        """Every model that is read, in the order in which the file names them, the base first."""
        listed = [source.model for part in self.slices for source in part.sources]
        bases = [self.base_model, *(part.base_model for part in self.slices)]
        return tuple(dict.fromkeys([*(base for base in bases if base is not None), *listed]))

    @property
    def donor(self) -> Ref:
        """The model whose config and tokenizer the merged one gets."""
        return self.base_model or self.slices[0].sources[0].model


def names_models(content: object) -> bool:
    """Whether a parsed recipe is one for files: it says which models."""
    return isinstance(content, Mapping) and any(key in content for key in ("models", "slices", "modules", "base_model"))


def parse(content: object, mergekit_methods: Sequence[str]) -> OfflineRecipe:
    """The recipe that a parsed YAML file holds.

    Args:
        content: of the file.
        mergekit_methods: names of methods that mean mergekit's form; others are ours.

    Raises:
        RecipeError: for a key that is unknown, missing or not supported, or a value of the wrong kind.
    """
    if isinstance(content, Mapping):
        for key, why in _REFUSED.items():
            if key in content:
                raise RecipeError(f"'{key}' {why}")
    keys = known_keys("the recipe", content, _KEYS)
    given = [key for key in ("models", "slices", "modules") if keys.get(key)]
    if len(given) != 1:
        found = " and ".join(given) or "none of them"
        raise RecipeError(f"found {found}, wanted exactly one of models, slices, modules")
    method = keys.get("merge_method")
    if not isinstance(method, str):
        raise RecipeError(f"merge_method: found {method!r}, wanted the name of a method")
    base = _ref("base_model", keys["base_model"]) if keys.get("base_model") is not None else None
    part, where = keys, ""
    module_parameters: Parameters = {}
    if given == ["modules"]:
        part, where = _only_module(keys["modules"]), "modules: default: "
        module_parameters = _parameters(f"{where}parameters", part.get("parameters"))
    ours = "rules" in keys or method not in mergekit_methods
    if ours:
        _refuse_mergekit_keys(method, keys)
    slices = _slices(where, part["slices"]) if part.get("slices") else (_models(where, part["models"]),)
    cast, out = _dtype("dtype", keys), _dtype("out_dtype", keys)
    compat = keys.get("compat", not ours)
    if not isinstance(compat, bool) or (ours and compat):
        wanted = "false: it is not a recipe of mergekit's form" if ours else "true or false"
        raise RecipeError(f"compat: found {compat!r}, wanted {wanted}")
    return OfflineRecipe(
        method,
        slices,
        bool(part.get("slices")),
        base,
        {} if ours else _parameters("parameters", keys.get("parameters")),
        module_parameters,
        out or cast,
        cast,
        _tokenizer_base(keys, base or slices[0].sources[0].model),
        compat,
        Recipe.from_dict({k: keys[k] for k in ("merge_method", "parameters", "rules") if k in keys}) if ours else None,
    )


def _refuse_mergekit_keys(method: str, keys: Mapping[str, Any]) -> None:
    why = "with rules" if "rules" in keys else f"with merge_method '{method}', which mergekit does not have"
    for key in _OURS_REFUSED:
        if keys.get(key):
            raise RecipeError(f"'{key}' cannot be used {why}; wanted models")


def _only_module(content: object) -> Mapping[str, Any]:
    if not isinstance(content, Mapping) or list(content) != ["default"]:
        names = ", ".join(map(str, content)) if isinstance(content, Mapping) else repr(content)
        raise RecipeError(f"modules: found {names}, wanted one module, default: models of several are not supported")
    part = known_keys("modules: default", content["default"], ("models", "slices", "parameters"))
    if bool(part.get("models")) == bool(part.get("slices")):
        raise RecipeError("modules: default: wanted exactly one of models, slices")
    return part


def _models(where: str, content: object) -> Slice:
    if not isinstance(content, list) or not content:
        raise RecipeError(f"{where}models: found {content!r}, wanted a list of {{model, parameters}}")
    sources = []
    for number, item in enumerate(content, start=1):
        at = f"{where}models: number {number}"
        keys = known_keys(at, item, ("model", "parameters"))
        sources.append(
            Source(_ref(at, keys.get("model")), None, _parameters(f"{at}: parameters", keys.get("parameters")))
        )
    _require_distinct(f"{where}models", sources)
    return Slice(tuple(sources))


def _slices(where: str, content: object) -> tuple[Slice, ...]:
    if not isinstance(content, list) or not content:
        raise RecipeError(f"{where}slices: found {content!r}, wanted a list of {{sources, parameters}}")
    slices = []
    for number, item in enumerate(content, start=1):
        at = f"{where}slice {number}"
        keys = known_keys(at, item, ("sources", "base_model", "parameters"))
        if not isinstance(keys.get("sources"), list) or not keys["sources"]:
            raise RecipeError(f"{at}: sources: found {keys.get('sources')!r}, wanted a list of {{model, layer_range}}")
        sources = tuple(_source(f"{at}, source {n}", source) for n, source in enumerate(keys["sources"], start=1))
        _require_distinct(at, sources)
        lengths = [stop - start for source in sources if source.layers for start, stop in [source.layers]]
        if len(set(lengths)) > 1:
            raise RecipeError(f"{at}: its sources have {', '.join(map(str, lengths))} layers, wanted equally many")
        base = _ref(f"{at}: base_model", keys["base_model"]) if keys.get("base_model") is not None else None
        slices.append(Slice(sources, base, _parameters(f"{at}: parameters", keys.get("parameters"))))
    return tuple(slices)


def _source(where: str, content: object) -> Source:
    keys = known_keys(where, content, ("model", "layer_range", "parameters"))
    found = keys.get("layer_range")
    whole = isinstance(found, list) and len(found) == 2 and all(type(end) is int for end in found)
    if not isinstance(found, list) or not whole or not 0 <= found[0] < found[1]:
        raise RecipeError(f"{where}: layer_range: found {found!r}, wanted [first, last + 1], such as [0, 16]")
    model = _ref(where, keys.get("model"))
    return Source(model, (found[0], found[1]), _parameters(f"{where}: parameters", keys.get("parameters")))


def _require_distinct(where: str, sources: Sequence[Source]) -> None:
    models = [_same_place(source.model) for source in sources]
    for source in sources:
        if models.count(_same_place(source.model)) > 1:
            raise RecipeError(f"{where}: model '{source.model}' stands twice; give it one weight instead")


def _same_place(ref: Ref) -> Ref:
    """The model under one name: a folder may be written as models/a, ./models/a or models/a/."""
    path = os.path.realpath(ref.path) if os.path.exists(ref.path) else ref.path
    return Ref(path, ref.revision, None if ref.lora is None else _same_place(ref.lora))


def _ref(where: str, content: object) -> Ref:
    if isinstance(content, str) and content.strip():
        return _ref_of_text(where, content.strip())
    if isinstance(content, Mapping):
        keys = known_keys(where, content, ("model", "lora"))
        model = _path(f"{where}: model", keys.get("model"))
        lora = _path(f"{where}: lora", keys["lora"]) if keys.get("lora") is not None else None
        return Ref(model.path, model.revision, lora)
    raise RecipeError(f"{where}: found {content!r}, wanted a model: a path, or a name on the Hugging Face hub")


def _path(where: str, content: object) -> Ref:
    if isinstance(content, str):
        return _ref_of_text(where, content)
    keys = known_keys(where, content, ("path", "revision"))
    if not isinstance(keys.get("path"), str):
        raise RecipeError(f"{where}: path: found {keys.get('path')!r}, wanted text")
    return Ref(keys["path"], str(keys["revision"]) if keys.get("revision") is not None else None)


def _ref_of_text(where: str, text: str) -> Ref:
    """path[@revision][+lora[@revision]]; a path that is there may have these characters in its name."""
    if os.path.exists(text):
        return Ref(text)
    parts = [re.fullmatch(r"([^@]+)(?:@([^@]+))?", part) for part in text.split("+")]
    if len(parts) > 2 or not all(parts):
        raise RecipeError(f"{where}: found '{text}', wanted path[@revision][+lora[@revision]]")
    refs = [Ref(part[1], part[2]) for part in parts if part]
    return Ref(refs[0].path, refs[0].revision, refs[1] if len(refs) > 1 else None)


def _parameters(where: str, content: object) -> Parameters:
    if content is None:
        return {}
    if not isinstance(content, Mapping) or not all(isinstance(name, str) for name in content):
        raise RecipeError(f"{where}: found {content!r}, wanted a mapping from parameter names to values")
    return {name: _setting(f"{where}: {name}", value) for name, value in content.items()}


def _setting(where: str, content: object) -> Setting:
    if isinstance(content, Mapping):
        return (_clause(where, content),)
    if isinstance(content, list) and content and all(isinstance(item, Mapping) for item in content):
        clauses = tuple(_clause(f"{where}, number {number}", item) for number, item in enumerate(content, start=1))
        for number, clause in enumerate(clauses[:-1], start=1):
            if clause.filter in (None, "*"):
                raise RecipeError(f"{where}, number {number}: it is for all tensors and comes first; wanted it last")
        return clauses
    return (Clause(_value(where, content)),)


def _clause(where: str, content: object) -> Clause:
    keys = known_keys(where, content, ("value", "filter"))
    if "value" not in keys:
        raise RecipeError(f"{where}: found {dict(keys)!r}, wanted {{value, filter}}")
    chosen = keys.get("filter")
    if chosen is not None and (not isinstance(chosen, str) or not chosen):
        raise RecipeError(f"{where}: filter: found {chosen!r}, wanted a part of a tensor's name")
    return Clause(_value(where, keys["value"]), chosen)


def _value(where: str, content: object) -> Scalar | tuple[Scalar, ...]:
    listed: list[Any] = content if isinstance(content, list) else [content]
    for value in listed:
        finite = not isinstance(value, int | float) or abs(value) <= sys.float_info.max
        if not isinstance(value, int | float | str) or not finite:
            shown = f"a number of {len(str(value))} digits" if isinstance(value, int) else repr(value)
            raise RecipeError(f"{where}: found {shown}, wanted a number, true, false or text, or a list of them")
    if not listed:
        raise RecipeError(f"{where}: found an empty list, wanted at least one value")
    found: Scalar | tuple[Scalar, ...] = tuple(listed) if isinstance(content, list) else listed[0]
    return found


def _dtype(key: str, keys: Mapping[str, Any]) -> torch.dtype | None:
    found = keys.get(key)
    if found is None:
        return None
    dtype = DTYPES.get(str(found).removeprefix("torch."))
    if dtype is None:
        raise RecipeError(f"{key}: found {found!r}, wanted {', '.join(DTYPES)}")
    return dtype


def _tokenizer_base(keys: Mapping[str, Any], donor: Ref) -> bool:
    source = keys.get("tokenizer_source")
    if source is None:
        return False
    if source == "base" or (source != "union" and _ref("tokenizer_source", source) == donor):
        return True
    raise RecipeError(f"tokenizer_source: found {source!r}, wanted base: other vocabularies are not supported")
