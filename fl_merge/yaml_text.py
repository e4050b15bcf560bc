"""YAML as people write it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from fl_merge.errors import RecipeError, one_line


def read_yaml(path: str | Path) -> object:
    """What a recipe's file holds, as plain data.

    Raises:
        RecipeError: naming the file, if it cannot be read or is not YAML.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"recipe '{path}': {error.strerror}") from None
    except UnicodeDecodeError:
        raise RecipeError(f"recipe '{path}': not a text file in UTF-8") from None
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise RecipeError(f"recipe '{path}': not valid YAML: nested too deeply") from None
    except yaml.YAMLError as error:
        told = " ".join(str(error).split()).replace(' in "<unicode string>",', ",")
        raise RecipeError(f"recipe '{path}': not valid YAML: {told}") from None
    except ValueError as error:  # Python's own, of a date that there is not or a number of thousands of digits
        raise RecipeError(f"recipe '{path}': not valid YAML: {one_line(str(error))}") from None


_LONGEST = 14_000
"""Bits of the integers that are taken, some 4200 digits: Python reads longer ones in base 16 only, and prints none."""


class _Loader(yaml.SafeLoader):
    """YAML as people write it: 1e-5 is a number, the key `on` is text, and a key that stands twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:bool":
                key.tag = "tag:yaml.org,2002:str"
        keys: list[Any] = []
        for key, _ in node.value:
            keys.append(self.construct_object(key, deep=deep))
            if keys.count(keys[-1]) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key '{keys[-1]}' stands twice", key.start_mark)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        found: int = super().construct_yaml_int(node)
        if found.bit_length() > _LONGEST:
            raise yaml.constructor.ConstructorError(None, None, "a number of thousands of digits", node.start_mark)
        return found


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads back: the text '1e5' in quotes."""


for _yaml in (_Loader, _Dumper):
    _yaml.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
        list("-+0123456789"),
    )


def from_yaml(text: object) -> object:
    """What a string of YAML holds; None if there is none or it is not YAML."""
    try:
        return yaml.load(str(text), Loader=_Loader) if text else None
    except (yaml.YAMLError, ValueError, RecursionError):
        return None


def to_yaml(content: object) -> str:
    """Plain data as YAML that `read_yaml` reads back."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False)
