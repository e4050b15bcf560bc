"""Tables in the run config of a Flower app, which knows keys and values only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fl_merge.errors import RecipeError
from fl_merge.yaml_text import from_yaml


def table_of(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """A table of the run config: Flower has flattened it to `name.key`, or it is YAML in one string."""
    found = {key.removeprefix(f"{name}."): value for key, value in config.items() if key.startswith(f"{name}.")}
    text = config.get(name)
    if text:
        parsed = from_yaml(text)
        if not isinstance(parsed, Mapping):
            raise RecipeError(f"{name}: found {text!r}, wanted YAML such as '{{key: value}}'")
        found |= dict(parsed)
    return found


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """`coefficients.7 = -1`, as Flower flattens it, back to a table in a table."""
    found: dict[str, Any] = {}
    for key, value in flat.items():
        name, dot, rest = str(key).partition(".")
        if dot and isinstance(found.setdefault(name, {}), dict):
            found[name][rest] = value
        else:
            found[name] = value
    return found
