"""Merge methods by name: the decorator that registers one, the checks on its settings, and rules per tensor name."""

from __future__ import annotations

import difflib
import fnmatch
import functools
import importlib
import inspect
import math
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, ParamSpec

from fl_merge.errors import RecipeError
from fl_merge.types import CohortSpec, MergeMethod, Output

P = ParamSpec("P")


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


@dataclass(frozen=True)
class Method:
    """A merge method with its settings: what `ties(density=0.2)` gives.

    Args:
        name: under which it is registered.
        parameters: every setting, defaults filled in.
        shape: what plans the merge.
    """

    name: str
    parameters: Mapping[str, Any]
    shape: MergeMethod = field(repr=False)

    def plan(self, spec: CohortSpec) -> Iterator[Output]:
        """One output a tensor of the merged model."""
        return self.shape.plan(spec)

    def __str__(self) -> str:
        return f"{self.name}({', '.join(f'{key}={value!r}' for key, value in self.parameters.items())})"


@dataclass(frozen=True)
class MethodEntry:
    """A registered method: its factory and what is known of it.

    Args:
        name: in recipes and on the command line.
        factory: from keyword arguments to a `Method`.
        paper: author, year and where.
        identity: settings under which a single client's model comes back unchanged; None if there are none.
    """

    name: str
    factory: Callable[..., Method]
    paper: str
    identity: Mapping[str, Any] | None

    @property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        """The keyword parameters of the factory, annotations resolved."""
        return _signature(self.factory).parameters

    @property
    def summary(self) -> str:
        """The first line of the docstring."""
        return (inspect.getdoc(self.factory) or "").partition("\n")[0]

    @property
    def description(self) -> str:
        """The whole docstring."""
        return inspect.getdoc(self.factory) or ""


class Registry(Mapping[str, MethodEntry]):
    """The methods by name."""

    def __init__(self) -> None:
        self._entries: dict[str, MethodEntry] = {}

    def __getitem__(self, name: str) -> MethodEntry:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, entry: MethodEntry) -> None:
        """Register a method; a name belongs to one function (which may be loaded again)."""
        known = self._entries.get(entry.name)
        if known is not None and _where(known.factory) != _where(entry.factory):
            raise RecipeError(
                f"merge method '{entry.name}' is defined twice: in {_where(known.factory)} and in "
                f"{_where(entry.factory)}; give one of them another name"
            )
        self._entries[entry.name] = entry


METHODS = Registry()
"""Every registered merge method by name."""


def merge_method(
    *, paper: str, identity: Mapping[str, Any] | None = types.MappingProxyType({})
) -> Callable[[Callable[P, MergeMethod]], Callable[P, Method]]:
    """Register a function as a merge method under its own name.

    The function's keyword-only arguments are the hyperparameters; their annotations (with `Range` for bounds, `Literal`
    for choices) are checked before it is called. It returns a shape: `Span`, `Coordinate`, `Matrix`, or anything with
    a `plan`.

    Args:
        paper: where the method comes from.
        identity: settings under which one client's model comes back unchanged (such as density=1); None if no
            settings do so, which the docstring must then explain.
    """

    def register(factory: Callable[P, MergeMethod]) -> Callable[P, Method]:
        name = factory.__name__

        @functools.wraps(factory)
        def build_method(*args: P.args, **kwargs: P.kwargs) -> Method:
            if args:
                raise RecipeError(f"{name} takes its settings by name, such as {name}({_example(factory)})")
            settings = _checked(name, factory, kwargs)
            shape = typing.cast("Callable[..., MergeMethod]", factory)(**settings)
            return Method(name, types.MappingProxyType(settings), shape)

        METHODS.add(MethodEntry(name, build_method, paper, identity))
        return build_method

    return register


def build(name: str, /, **parameters: Any) -> Method:
    """The method of that name with these settings.

    Args:
        name: a registered name, or "module:function" for a method of the user's own.
        parameters: its hyperparameters; the rest take their defaults.

    Raises:
        RecipeError: for an unknown name (with the nearest one), an unknown parameter, or a value out of range.
    """
    return find(name).factory(**parameters)


def as_method(method: object) -> MergeMethod:
    """The method itself, or the one of that name at its defaults.

    Raises:
        RecipeError: for anything else, such as `ties` without its parentheses.
    """
    if isinstance(method, str):
        return build(method)
    plan = getattr(method, "plan", None)
    if not callable(plan):
        name = getattr(method, "__name__", None)
        hint = f"; did you mean {name}()?" if name in METHODS else ""
        raise RecipeError(f"found {method!r}, wanted a merge method such as ties(density=0.2), or its name{hint}")
    return typing.cast(MergeMethod, method)


def find(name: str) -> MethodEntry:
    """The registered method of that name; "module:function" imports the user's module first.

    Raises:
        RecipeError: if there is no such method.
    """
    if ":" in name:
        module, _, name = name.partition(":")
        try:
            found = getattr(importlib.import_module(module), name, None)
        except RecipeError:
            raise
        except Exception as error:  # whatever is wrong with the user's module
            raise RecipeError(f"merge method '{module}:{name}': cannot import '{module}': {error}") from error
        for entry in METHODS.values():
            if entry.factory is found:
                return entry
        theirs = [entry.name for entry in METHODS.values() if entry.factory.__module__ == module]
        raise RecipeError(f"'{module}' has no merge method '{name}'{nearest(name, theirs)}")
    if name not in METHODS:
        raise RecipeError(f"unknown merge method '{name}'{nearest(name, METHODS)}")
    return METHODS[name]


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """The end of an error message: the nearest known name, and all of them."""
    options = sorted(known)
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    hint = f"; did you mean '{close[0]}'?" if close else ""
    return f"{hint} (known: {', '.join(options) or 'none'})"


@dataclass(frozen=True)
class Partition:
    """Different methods for different tensors; made by `partition`."""

    rules: tuple[tuple[str, MergeMethod], ...]
    otherwise: MergeMethod

    def plan(self, spec: CohortSpec) -> Iterator[Output]:
        """Each tensor's output, by the first rule that matches its name, in the order of the base."""
        taken: dict[int, list[str]] = {index: [] for index in range(len(self.rules) + 1)}
        for name in spec.tensors:
            matches = (index for index, (glob, _) in enumerate(self.rules) if fnmatch.fnmatchcase(name, glob))
            taken[next(matches, len(self.rules))].append(name)
        for index, (glob, _) in enumerate(self.rules):
            if not taken[index]:
                raise RecipeError(_unmatched(glob, self.rules[:index], list(spec.tensors)))
        methods = [*(method for _, method in self.rules), self.otherwise]
        for index, method in enumerate(methods):
            if taken[index]:
                yield from method.plan(spec.only(taken[index]))

    def __str__(self) -> str:
        rules = ", ".join(f"{glob}: {method}" for glob, method in self.rules)
        return f"partition({rules}, otherwise {self.otherwise})"


def partition(rules: Sequence[tuple[str, MergeMethod]], otherwise: MergeMethod) -> Partition:
    """Merge some tensors by other methods than the rest.

    Args:
        rules: (glob on the tensor's name, method); the first match wins. `*` matches dots too.
        otherwise: the method of every tensor that no rule matches.

    Raises:
        RecipeError: when planned, for a rule that gets no tensor.
    """
    return Partition(tuple(rules), otherwise)


def _unmatched(glob: str, earlier: Sequence[tuple[str, MergeMethod]], names: list[str]) -> str:
    if any(fnmatch.fnmatchcase(name, glob) for name in names):
        first = ", ".join(f"'{other}'" for other, _ in earlier)
        return f"rule '{glob}' gets no tensor: every one that it matches is taken by an earlier rule ({first})"
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    return f"rule '{glob}' matches no tensor of the base; its {len(names)} tensors are {shown}"


# --- checks of hyperparameters -------------------------------------------------------------------------------------


def _where(factory: Callable[..., Any]) -> str:
    return f"{factory.__module__}.{factory.__qualname__}"


@functools.cache
def _signature(factory: Callable[..., Any]) -> inspect.Signature:
    plain = inspect.unwrap(factory)
    hints = typing.get_type_hints(plain, include_extras=True)
    signature = inspect.signature(plain)
    resolved = [p.replace(annotation=hints.get(name, Any)) for name, p in signature.parameters.items()]
    return signature.replace(parameters=resolved)


def _example(factory: Callable[..., Any]) -> str:
    parameters = _signature(factory).parameters.values()
    return ", ".join(f"{p.name}={p.default!r}" for p in list(parameters)[:2])


def _checked(method: str, factory: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Every parameter's value, defaults filled in.

    Raises:
        RecipeError: for a parameter that does not exist, is missing, or has a value of the wrong type or range.
    """
    parameters = _signature(factory).parameters
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
    names = {float: "a number", int: "a whole number", bool: "true or false", str: "text"}
    return names.get(annotation, re.sub(r"^.*\.", "", str(annotation)))


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
