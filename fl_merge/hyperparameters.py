"""Hyperparameters: what values they may take, said in annotations and checked before a method is made."""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import sys
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fl_merge.errors import RecipeError


@dataclass(frozen=True)
class Range:
    """The numbers that a parameter may take; stands in the parameter's annotation, `Annotated[float, Range(0, 1)]`.

    Args:
        low, high: the bounds.
        open_low: whether `low` itself is left out.
    """

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False

    def __contains__(self, value: float) -> bool:
        return (self.low < value if self.open_low else self.low <= value) and value <= self.high

    def __str__(self) -> str:
        if self.low == -math.inf and self.high == math.inf:
            return "that is finite"
        sign = ">" if self.open_low else ">="
        if self.low == -math.inf:
            return f"<= {self.high:g}"
        if self.high == math.inf:
            return f"{sign} {self.low:g}"
        return f"in {'(' if self.open_low else '['}{self.low:g}, {self.high:g}]"


Density = Annotated[float, Range(0.0, 1.0, open_low=True)]
"""Fraction of the elements that is kept."""

Scale = Annotated[float, Range()]
"""Multiplies the merged delta; negative to move away from what the clients learned."""


def in_range(
    name: str, value: float, low: float = -math.inf, high: float = math.inf, *, open_low: bool = False
) -> None:
    """Refuse a hyperparameter that is out of range, for checks that an annotation cannot express.

    Raises:
        RecipeError: naming the parameter, its value and what was wanted.
    """
    allowed = Range(low, high, open_low)
    if not _is_number(value) or value not in allowed:
        raise RecipeError(f"parameter '{name}': found {value!r}, wanted a number {allowed}")


def whole_number(name: str, value: object, low: int) -> None:
    """Refuse a setting that is not a whole number from `low` on.

    Raises:
        RecipeError: naming the setting, its value and what was wanted.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise RecipeError(f"parameter '{name}': found {value!r}, wanted a whole number >= {low}")


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """The end of an error message: the nearest known name, and all of them."""
    options = sorted(known)
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    hint = f"; did you mean '{close[0]}'?" if close else ""
    return f"{hint} (known: {', '.join(options) or 'none'})"


def known_keys(where: str, content: object, known: typing.Sequence[str]) -> Mapping[str, Any]:
    """The content of a table, checked to be one and to have no other keys.

    Raises:
        RecipeError: for anything else, or for an unknown key, with the nearest known one.
    """
    if not isinstance(content, Mapping):
        raise RecipeError(f"{where}: found {content!r}, wanted keys: {', '.join(known)}")
    for key in content:
        if key not in known:
            raise RecipeError(f"unknown key '{key}' in {where}{nearest(str(key), known)}")
    return content


@functools.cache
def signature_of(factory: Callable[..., Any]) -> inspect.Signature:
    plain = inspect.unwrap(factory)
    hints = typing.get_type_hints(plain, include_extras=True)
    signature = inspect.signature(plain)
    resolved = [p.replace(annotation=hints.get(name, Any)) for name, p in signature.parameters.items()]
    return signature.replace(parameters=resolved)


def example(factory: Callable[..., Any]) -> str:
    parameters = signature_of(factory).parameters.values()
    return ", ".join(f"{p.name}={p.default!r}" for p in list(parameters)[:2])


def checked(method: str, factory: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Every parameter's value, defaults filled in.

    Raises:
        RecipeError: for a parameter that does not exist, is missing, or has a value of the wrong type or range.
    """
    parameters = signature_of(factory).parameters
    for name in given:
        if name not in parameters:
            raise RecipeError(f"{method} has no parameter '{name}'{nearest(name, parameters)}")
    settings = {}
    for name, parameter in parameters.items():
        if name not in given and parameter.default is inspect.Parameter.empty:
            raise RecipeError(f"{method} needs the parameter '{name}' ({describe(parameter.annotation)})")
        value = given.get(name, parameter.default)
        settings[name] = _accept(f"parameter '{name}' of {method}", value, parameter.annotation)
    return settings


def describe(annotation: Any) -> str:
    """What a parameter may be, in words: the range, the choices, or the type."""
    if typing.get_origin(annotation) is Annotated:
        inner, *notes = typing.get_args(annotation)
        ranges = [str(note) for note in notes if isinstance(note, Range)]
        return f"{describe(inner)} {' and '.join(ranges)}" if ranges else describe(inner)
    if typing.get_origin(annotation) is Literal:
        return " or ".join(repr(choice) for choice in typing.get_args(annotation))
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return " or ".join(describe(option) for option in typing.get_args(annotation))
    if annotation is type(None):
        return "none"
    if typing.get_origin(annotation) is not None and issubclass(typing.get_origin(annotation), Mapping):
        key, value = typing.get_args(annotation)
        return f"a mapping from {describe(key)} to {describe(value)}"
    names = {float: "a number", int: "a whole number", bool: "true or false", str: "text", Any: "anything"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _is_number(value: object) -> bool:
    """Whether a value is a number that float64 has: no bool, no text, not NaN, not infinite, not 10**400."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _as_key(key: Any, wanted: Any) -> Any:
    """A whole number stands for its digits where text is wanted: YAML reads a client's id as a number."""
    return str(key) if wanted is str and isinstance(key, int) and not isinstance(key, bool) else key


def _accept(where: str, value: Any, annotation: Any) -> Any:
    """The value in the annotated type, or a RecipeError that says what was wanted."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    wrong = RecipeError(f"{where}: found {value!r}, wanted {describe(annotation)}")
    if annotation is Any:
        return value
    if origin is Annotated:
        ranges = [note for note in arguments[1:] if isinstance(note, Range)]
        try:
            accepted = _accept(where, value, arguments[0])
        except RecipeError:
            raise wrong from None
        if isinstance(accepted, int | float) and not all(accepted in allowed for allowed in ranges):
            raise wrong
        return accepted
    if origin is Literal:
        if not any(value == choice and type(value) is type(choice) for choice in arguments):
            raise wrong
        return value
    if origin in (typing.Union, types.UnionType):
        if value == {} and type(None) not in arguments:
            raise wrong  # values by name, and not one of them
        for option in arguments:
            try:
                return _accept(where, value, option)
            except RecipeError:
                continue
        raise wrong
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise wrong
        key_type, value_type = arguments
        return types.MappingProxyType(
            {
                _accept(f"{where}, key {key!r}", _as_key(key, key_type), key_type): _accept(
                    f"{where}, '{key}'", item, value_type
                )
                for key, item in value.items()
            }
        )
    if annotation is float:
        if not _is_number(value):
            raise wrong
        return float(value)
    if annotation is int and isinstance(value, bool):
        raise wrong
    if inspect.isclass(annotation) and not isinstance(value, annotation):
        raise wrong
    return value
