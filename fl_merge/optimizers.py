"""Server optimizers (Reddi et al., 2021): what a round merged is taken as a gradient, and a step is made along it.

    server_optimizer(ties(density=0.2), adam(lr=0.01))

The merged delta Delta = merged - sent is the pseudo-gradient, whatever method made it. Their state is plain data,
tensors by name: "m/<tensor>", "v/<tensor>" in the dtype of the arithmetic (float32), and "steps". It lives in
`GlobalModel.optimizer_state` and is saved with the checkpoint. The formulae are those of Flower 1.41's FedAvgM,
FedAdam, FedYogi and FedAdagrad, which start from zero state.

Suffix: S elements.
"""

from __future__ import annotations

import fnmatch
import math
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from fl_merge.errors import MergeError, RecipeError
from fl_merge.hyperparameters import Range, checked, nearest
from fl_merge.method import as_method
from fl_merge.types import CohortSpec, MergeMethod, Output

LearningRate = Annotated[float, Range(0.0, open_low=True)]
Decay = Annotated[float, Range(0.0, math.nextafter(1.0, 0.0))]
Tau = Annotated[float, Range(0.0, open_low=True)]

Slots = dict[str, Tensor]
"""Slices of the state of one tensor, by slot ("m", "v")."""

Step = Callable[[Tensor, Slots, int], Tensor]
"""From a slice of the pseudo-gradient, the state's slices (changed in place) and the step's number (from 1) to the
change of the model."""

STEPS = "steps"
"""The state's name for the number of steps made: one int64."""

STATISTICS = ("*running_mean", "*running_var")
"""BatchNorm's estimates: they are no parameters, and a step of Adam's could make a variance negative."""


@dataclass(frozen=True)
class Optimizer:
    """A server optimizer with its settings: what `adam(lr=0.01)` gives.

    Args:
        name: in `OPTIMIZERS` and in recipes.
        settings: every one, defaults filled in.
        slots: names of its state, a tensor of the model's size each.
        step: the formula, elementwise.
    """

    name: str
    settings: Mapping[str, float | str]
    slots: tuple[str, ...]
    step: Step = field(repr=False, compare=False)

    def __str__(self) -> str:
        return f"{self.name}({', '.join(f'{key}={value!r}' for key, value in self.settings.items())})"


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {}
"""The server optimizers by name."""


def _optimizer(factory: Callable[..., tuple[tuple[str, ...], Step]]) -> Callable[..., Optimizer]:
    """Register a function of settings that gives the slots and the step."""

    def made(**given: Any) -> Optimizer:
        settings = checked(factory.__name__, factory, given)
        slots, step = factory(**settings)
        return Optimizer(factory.__name__, types.MappingProxyType(settings), slots, step)

    made.__name__, made.__qualname__, made.__doc__ = factory.__name__, factory.__qualname__, factory.__doc__
    made.__wrapped__ = factory  # type: ignore[attr-defined]
    OPTIMIZERS[factory.__name__] = made
    return made


@_optimizer
def momentum(*, lr: LearningRate = 1.0, beta: Decay = 0.9) -> tuple[tuple[str, ...], Step]:
    """Go on in the direction of the rounds before (Hsu et al., 2019, arXiv:1909.06335; FedAvgM).

    m = beta m + Delta;   theta = theta + lr m

    Args:
        lr: server learning rate, > 0.
        beta: what is kept of the earlier direction, in [0, 1).

    As in Flower's FedAvgM, whose default of beta is 0 (none); Delta is not damped by 1 - beta, so a direction that
    stays the same is followed up to 1 / (1 - beta) times as far.
    """

    def step(delta_S: Tensor, slots: Slots, number: int) -> Tensor:
        slots["m"].mul_(beta).add_(delta_S)
        return lr * slots["m"]

    return ("m",), step


@_optimizer
def adam(
    *,
    lr: LearningRate = 0.1,
    beta_1: Decay = 0.9,
    beta_2: Decay = 0.99,
    tau: Tau = 1e-3,
    correction: Literal["flower", "adam", "none"] = "flower",
) -> tuple[tuple[str, ...], Step]:
    """Divide the smoothed direction by the root of its smoothed square (FedAdam).

    m = beta_1 m + (1 - beta_1) Delta;   v = beta_2 v + (1 - beta_2) Delta^2
    theta = theta + lr_t m / (sqrt(v) + tau)

    Args:
        lr: server learning rate, > 0: about the size of an element's step once v has settled.
        beta_1, beta_2: of the direction and of its square, in [0, 1).
        tau: keeps the division from exploding; larger is less adaptive, > 0.
        correction: of the zeros that m and v start from: lr_t = lr sqrt(1 - beta_2^k) / (1 - beta_1^k) with k = t for
            "adam" (Kingma and Ba, 2014), k = t + 1 for "flower" (what Flower's FedAdam does), lr_t = lr for "none"
            (Reddi et al.). t counts the steps made, from 1; Flower counts rounds, also those that made no model.
    """

    def step(delta_S: Tensor, slots: Slots, number: int) -> Tensor:
        slots["m"].mul_(beta_1).add_((1 - beta_1) * delta_S)
        slots["v"].mul_(beta_2).add_((1 - beta_2) * delta_S.square())
        power, rate = number + (correction == "flower"), lr
        if correction != "none":
            rate = lr * math.sqrt(1 - beta_2**power) / (1 - beta_1**power)
        return rate * slots["m"] / (slots["v"].sqrt() + tau)

    return ("m", "v"), step


@_optimizer
def yogi(
    *, lr: LearningRate = 0.01, beta_1: Decay = 0.9, beta_2: Decay = 0.99, tau: Tau = 1e-3
) -> tuple[tuple[str, ...], Step]:
    """As adam, with a square that forgets no faster than it learns (FedYogi).

    m = beta_1 m + (1 - beta_1) Delta;   v = v - (1 - beta_2) Delta^2 sign(v - Delta^2)
    theta = theta + lr m / (sqrt(v) + tau)

    Args:
        lr: server learning rate, > 0.
        beta_1, beta_2: of the direction and of its square, in [0, 1).
        tau: keeps the division from exploding, > 0.

    No correction of the zeros, as in Flower and Reddi et al. (who start v at tau^2 or above, Flower and we at 0).
    """

    def step(delta_S: Tensor, slots: Slots, number: int) -> Tensor:
        square_S = delta_S.square()
        slots["m"].mul_(beta_1).add_((1 - beta_1) * delta_S)
        slots["v"].sub_((1 - beta_2) * square_S * torch.sign(slots["v"] - square_S))
        return lr * slots["m"] / (slots["v"].sqrt() + tau)

    return ("m", "v"), step


@_optimizer
def adagrad(*, lr: LearningRate = 0.1, tau: Tau = 1e-3) -> tuple[tuple[str, ...], Step]:
    """Divide the delta by the root of the sum of all squares so far (FedAdagrad).

    v = v + Delta^2;   theta = theta + lr Delta / (sqrt(v) + tau)

    Args:
        lr: server learning rate, > 0.
        tau: keeps the division from exploding, > 0.

    beta_1 = 0, as in Flower and in the experiments of Reddi et al.
    """

    def step(delta_S: Tensor, slots: Slots, number: int) -> Tensor:
        slots["v"].add_(delta_S.square())
        return lr * delta_S / (slots["v"].sqrt() + tau)

    return ("v",), step


@dataclass(frozen=True)
class ServerOptimized:
    """A merge method whose merged delta goes through a server optimizer; made by `server_optimizer`.

    It plans as its method does; the step is made by `GlobalModel`, which has the state.

    Args:
        method: that merges.
        optimizer: that steps.
        skip: globs on names of tensors that take the merged value as it is.
    """

    method: MergeMethod
    optimizer: Optimizer
    skip: tuple[str, ...] = STATISTICS

    outermost = True
    """It acts on the whole merged model: no other wrapper goes round it."""

    def plan(self, spec: CohortSpec) -> Iterator[Output]:
        """The plan of the method inside."""
        return self.method.plan(spec)

    @property
    def prepare(self) -> Any:
        """As the method inside, if it looks at the updates first."""
        return getattr(self.method, "prepare", None)

    @property
    def running(self) -> float | None:
        """As the method inside (`Span.running`)."""
        running: float | None = getattr(getattr(self.method, "shape", self.method), "running", None)
        return running

    def steps_along(self, name: str) -> bool:
        """Whether a floating tensor of that name goes through the optimizer."""
        return not any(fnmatch.fnmatchcase(name, glob) for glob in self.skip)

    def __str__(self) -> str:
        skip = "" if self.skip == STATISTICS else f", skip={list(self.skip)!r}"
        return f"server_optimizer({self.method}, {self.optimizer}{skip})"


def server_optimizer(
    method: MergeMethod | str, optimizer: Optimizer | str, *, skip: Sequence[str] = STATISTICS
) -> ServerOptimized:
    """A method whose merged delta is the pseudo-gradient of a server optimizer (Reddi et al., 2021, arXiv:2003.00295).

    Integers are merged as without it. It needs rounds: `merge()`, which has one and no state, refuses it.

    Args:
        method: any merge method.
        optimizer: `momentum()`, `adam()`, `yogi()` or `adagrad()` with settings, or the name of one for its defaults.
        skip: globs on names of tensors that take the merged value as it is; by default BatchNorm's running statistics.

    Raises:
        RecipeError: for something else, or a method that already has an optimizer.
    """
    if isinstance(optimizer, str):
        optimizer = build_optimizer({"name": optimizer})
    if not isinstance(optimizer, Optimizer):
        raise RecipeError(f"found {optimizer!r}, wanted a server optimizer such as adam(lr=0.01), or its name")
    if not isinstance(skip, list | tuple) or not all(isinstance(glob, str) for glob in skip):
        raise RecipeError(f"server_optimizer: skip: found {skip!r}, wanted a list of globs on tensor names")
    inner = as_method(method)
    if isinstance(inner, ServerOptimized):
        raise RecipeError(f"server_optimizer: found {inner}, wanted a method without an optimizer of its own")
    return ServerOptimized(inner, optimizer, tuple(skip))


def build_optimizer(settings: Mapping[str, Any]) -> Optimizer:
    """The optimizer that a recipe's mapping describes, such as {name: adam, lr: 0.01}.

    Raises:
        RecipeError: for an unknown name or setting, or a value out of range.
    """
    given = dict(settings)
    name = given.pop("name", None)
    if not isinstance(name, str) or name not in OPTIMIZERS:
        raise RecipeError(f"unknown server optimizer '{name}'{nearest(str(name), OPTIMIZERS)}")
    return OPTIMIZERS[name](**given)


def optimizer_of(method: MergeMethod) -> ServerOptimized | None:
    """The method with its optimizer, if it has one."""
    return method if isinstance(method, ServerOptimized) else None


_PIECE = 1 << 17
"""Elements that are stepped at a time: they and what is made of them fit a core's cache."""


def take_step(
    optimized: ServerOptimized,
    merged: Mapping[str, Tensor],
    sent: Mapping[str, Tensor],
    master: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    dtypes: Mapping[str, torch.dtype],
) -> dict[str, Tensor]:
    """Replace merged values by those that the optimizer steps to from the master, in place.

    The state's tensors are changed in place too, which spares a copy of them, and only after all values were found to
    fit: a step that fails has changed nothing but `merged`. A state of another optimizer is begun anew.

    Args:
        optimized: the method with its optimizer.
        merged: what was made of `sent`, in the dtype of the arithmetic.
        sent: what clients started from.
        master: the model as it is kept.
        state: from the step before; empty before the first.
        dtypes: those that the values must fit, by name.

    Returns:
        The state after the step.

    Raises:
        MergeError: if a value does not fit its dtype.
    """
    optimizer = optimized.optimizer
    names = [name for name, tensor in merged.items() if tensor.is_floating_point() and optimized.steps_along(name)]
    wanted = {f"{slot}/{name}": merged[name] for name in names for slot in optimizer.slots}
    if {name: tensor.shape for name, tensor in state.items() if name != STEPS} != {
        name: tensor.shape for name, tensor in wanted.items()
    }:
        state = {
            name: torch.zeros_like(tensor, memory_format=torch.contiguous_format) for name, tensor in wanted.items()
        }
    number = int(state[STEPS]) + 1 if STEPS in state else 1
    for commit in (False, True):
        for name in names:
            merged_S, sent_S, master_S = (each[name].reshape(-1) for each in (merged, sent, master))
            slots_S = {slot: state[f"{slot}/{name}"].view(-1) for slot in optimizer.slots}
            for start in range(0, merged_S.numel(), _PIECE):
                at = slice(start, start + _PIECE)
                slots = {slot: values_S[at] if commit else values_S[at].clone() for slot, values_S in slots_S.items()}
                delta_S = merged_S[at] - sent_S[at].to(merged_S.dtype)
                stepped_S = master_S[at].to(merged_S.dtype) + optimizer.step(delta_S, slots, number)
                if commit:
                    merged_S[at] = stepped_S
                elif not _fits(stepped_S, dtypes[name]):
                    largest = float(stepped_S.abs().nan_to_num(nan=math.inf).amax())
                    raise MergeError.of_value(name, largest, str(dtypes[name]))
    return {**state, STEPS: torch.tensor(number)}


def _fits(values_S: Tensor, dtype: torch.dtype) -> bool:
    return bool(values_S.to(dtype).to(values_S.dtype).isfinite().all())
