"""Merge methods by name: the decorator that registers one, the checks on its settings, and rules per tensor name."""

from __future__ import annotations

import fnmatch
import functools
import importlib
import inspect
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, ParamSpec

from fl_merge.errors import MergeError, RecipeError, counted
from fl_merge.hyperparameters import checked, example, nearest, signature_of
from fl_merge.types import CohortSpec, MergeMethod, Output

P = ParamSpec("P")


@dataclass(frozen=True)
class Clients:
    """How many clients a method takes.

    Args:
        fewest: below this the method has no meaning, or loses what it promises.
        most: None for any number.
        why: where the bounds come from, in a few words; for the error.
    """

    fewest: int = 1
    most: int | None = None
    why: str = ""

    def nearest(self, count: int) -> int:
        """The number of clients that is nearest to `count` of those that the method takes."""
        return min(max(count, self.fewest), max(count, self.fewest) if self.most is None else self.most)

    def __contains__(self, count: int) -> bool:
        return self.fewest <= count and (self.most is None or count <= self.most)

    def __str__(self) -> str:
        bound = f"at least {self.fewest}" if self.most is None else f"{self.fewest} to {self.most}"
        exactly = str(self.fewest) if self.fewest == self.most else bound
        return f"{exactly} ({self.why})" if self.why else exactly


@dataclass(frozen=True)
class Method:
    """A merge method with its settings: what `ties(density=0.2)` gives.

    Args:
        name: under which it is registered.
        parameters: every setting, defaults filled in.
        shape: what plans the merge.
        clients: how many it takes, with these settings.
    """

    name: str
    parameters: Mapping[str, Any]
    shape: MergeMethod = field(repr=False)
    clients: Clients = Clients()

    def plan(self, spec: CohortSpec) -> Iterator[Output]:
        """One output a tensor of the merged model.

        Raises:
            MergeError: if the cohort is larger or smaller than the method takes.
        """
        self.require_cohort(len(spec.client_ids))
        return self.shape.plan(spec)

    def require_cohort(self, count: int) -> None:
        """Refuse a cohort that is larger or smaller than the method takes.

        Raises:
            MergeError: saying how many it takes and why.
        """
        if count not in self.clients:
            raise MergeError(f"{self}: found {counted(count, 'client')}, wanted {self.clients}")

    def __str__(self) -> str:
        shown = {key: dict(value) if isinstance(value, Mapping) else value for key, value in self.parameters.items()}
        return f"{self.name}({', '.join(f'{key}={value!r}' for key, value in shown.items())})"


@dataclass(frozen=True)
class MethodEntry:
    """A registered method: its factory and what is known of it.

    Args:
        name: in recipes and on the command line.
        factory: from keyword arguments to a `Method`.
        paper: author, year and where.
        identity: settings under which a single client's model comes back unchanged; None if there are none.
        base: whether the result depends on the base, and not on the clients' weights alone.
        sends: what clients must send beyond their models ("fisher", "gram", "steps"); empty for a data-free method.
        additive: whether the result is a function of sums over the clients (of what each sends), so that it can be
            had from secure aggregation.
        passes: how often each client's model is read.
        merges: "models"; "adapters" for a method that works on pairs of LoRA factors and on nothing else; "structures"
            for one whose result has other names or shapes.
    """

    name: str
    factory: Callable[..., Method]
    paper: str
    identity: Mapping[str, Any] | None
    base: bool = True
    sends: tuple[str, ...] = ()
    additive: bool = False
    passes: str = ""
    merges: Literal["models", "adapters", "structures"] = "models"

    @property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        """The keyword parameters of the factory, annotations resolved."""
        return signature_of(self.factory).parameters

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
    *,
    paper: str,
    identity: Mapping[str, Any] | None = types.MappingProxyType({}),
    base: bool = True,
    sends: Sequence[str] = (),
    additive: bool = False,
    passes: str = "1",
    merges: Literal["models", "adapters", "structures"] = "models",
    clients: Clients | Callable[..., Clients] = Clients(),
) -> Callable[[Callable[P, MergeMethod]], Callable[P, Method]]:
    """Register a function as a merge method under its own name.

    The function's keyword-only arguments are the hyperparameters; their annotations (with `Range` for bounds, `Literal`
    for choices) are checked before it is called. It returns a shape: `Span`, `Coordinate`, `Matrix`, or anything with
    a `plan`.

    Args:
        paper: where the method comes from.
        identity: settings under which one client's model comes back unchanged (such as density=1); None if no
            settings do so, which the docstring must then explain.
        base, sends, additive, passes, merges: what the table of methods says of it, see `MethodEntry`.
        clients: how many clients the method takes, or a function that tells from all of its settings.
    """

    def register(factory: Callable[P, MergeMethod]) -> Callable[P, Method]:
        name = factory.__name__

        @functools.wraps(factory)
        def build_method(*args: P.args, **kwargs: P.kwargs) -> Method:
            if args:
                raise RecipeError(f"{name} takes its settings by name, such as {name}({example(factory)})")
            settings = checked(name, factory, kwargs)
            shape = typing.cast("Callable[..., MergeMethod]", factory)(**settings)
            count = clients(**settings) if callable(clients) else clients
            return Method(name, types.MappingProxyType(settings), shape, count)

        entry = MethodEntry(name, build_method, paper, identity, base, tuple(sends), additive, passes, merges)
        METHODS.add(entry)
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


def sends(method: object) -> tuple[str, ...]:
    """What a method, and those that it is made of, need of clients: of "fisher", "gram", "hidden" and "steps"."""
    found: set[str] = set()
    for part in methods_in(method):
        found.update(METHODS[part.name].sends if part.name in METHODS else ())
        found.update(getattr(part.shape, "sends", ()))  # where it depends on the settings
    return tuple(sorted(found))


def methods_in(method: object) -> Iterator[Method]:
    """The registered methods that a method is made of: itself, and those inside of wrappers and rules."""
    if isinstance(method, Method):
        yield method
        inside: list[object] = [*method.parameters.values(), method.shape]
    else:
        inside = list(getattr(method, "__dict__", {}).values())
    while inside:
        part = inside.pop()
        if isinstance(part, list | tuple):
            inside += part
        elif callable(getattr(part, "plan", None)):
            yield from methods_in(part)


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
        RecipeError: for a method that acts on a whole round or merges no models, for a rule that an earlier one leaves
            no tensor, or, when planned, for any other that gets none.
    """
    for method in (otherwise, *(method for _, method in rules)):
        require_inner("partition", method)
        require_for_models("partition", method)
    for index, (glob, _) in enumerate(rules):
        for earlier, _ in rules[:index]:
            if _covers(earlier, glob):
                raise RecipeError(_taken(glob, [earlier]))
    return Partition(tuple(rules), otherwise)


def require_inner(wrapper: str, method: MergeMethod) -> None:
    """Refuse a method that acts on a whole round where a part of one is wanted.

    Raises:
        RecipeError: if the method says that it is to be outermost.
    """
    if getattr(method, "outermost", False):
        raise RecipeError(f"{wrapper}: found {method}, which acts on the whole merged model; put it round {wrapper}")


def require_for_models(wrapper: str, method: MergeMethod) -> None:
    """Refuse a method for adapters or structures where one is wanted that merges models tensor by tensor.

    Raises:
        RecipeError: naming it and what it merges.
    """
    entry = METHODS.get(method.name) if isinstance(method, Method) else None
    if entry is not None and entry.merges != "models":
        raise RecipeError(f"{wrapper}: found {method}, a method for {entry.merges}; wanted one for models")


def _covers(earlier: str, glob: str) -> bool:
    """Whether one glob matches every name that another matches, as far as their texts tell."""
    return not set("?[") & set(earlier) and "[" not in glob and fnmatch.fnmatchcase(glob, earlier)


def _taken(glob: str, earlier: Sequence[str]) -> str:
    first = ", ".join(f"'{other}'" for other in earlier)
    return f"rule '{glob}' gets no tensor: every one that it matches is taken by an earlier rule ({first})"


def _unmatched(glob: str, earlier: Sequence[tuple[str, MergeMethod]], names: list[str]) -> str:
    if any(fnmatch.fnmatchcase(name, glob) for name in names):
        return _taken(glob, [other for other, _ in earlier])
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    return f"rule '{glob}' matches no tensor of the base, which has {counted(len(names), 'tensor')}: {shown}"


def _where(factory: Callable[..., Any]) -> str:
    return f"{factory.__module__}.{factory.__qualname__}"
