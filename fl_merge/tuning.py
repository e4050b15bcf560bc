"""How far to go along what was merged: a scale, or one coefficient a layer, chosen on the server's validation data.

    merged, report = auto_scale(ties(), base, [client_a, client_b], accuracy, examples=200)
    strategy = FedMerge(ties(), tune=Tuner(accuracy, examples=200))

The merge is done once; every trial scores theta_0 + s Delta for another s. Scale 1 is always tried, so the model that
is chosen never scores worse than it on these data. What it scores there is no estimate of what it scores elsewhere.

Suffix: S elements.
"""

from __future__ import annotations

import fnmatch
import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fl_merge.errors import RecipeError
from fl_merge.execute import execute
from fl_merge.hyperparameters import in_range, whole_number
from fl_merge.merging import cohort_of
from fl_merge.method import as_method
from fl_merge.optimizers import STATISTICS
from fl_merge.store import MemorySink
from fl_merge.types import MergeMethod

SCALES = (1.0, 0.25, 0.5, 0.75, 1.25, 1.5, 2.0, 3.0)

Score = Callable[[dict[str, Tensor]], float]
"""From a state dict in the model's dtypes, which is lent for the call, to a number: larger is better."""

_PIECE = 1 << 19
_GOLDEN = (math.sqrt(5) - 1) / 2
_FACTORS = (0.5, 0.7, 0.85, 1.2, 1.4, 2.0)
_NUMBERED = re.compile(r"(?:.*?\.)?\d+(?=\.)")


@dataclass(frozen=True)
class Tuner:
    """How the scale is chosen.

    Args:
        score: judges a model on data of the server's.
        examples: how many labelled examples it uses; only reported.
        scales: those of the grid, or whose smallest and largest are the ends of the golden section.
        search: "grid" tries all scales; "golden" narrows down, for scores with one peak.
        per_layer: then search one coefficient a layer, starting at the best scale.
        budget: calls of `score` at most, each of which is a pass over the validation data.
        seed: of the search by layers.

    Raises:
        RecipeError: for a value that is out of range.
    """

    score: Score
    examples: int
    scales: Sequence[float] = SCALES
    search: Literal["grid", "golden"] = "grid"
    per_layer: bool = False
    budget: int = 40
    seed: int = 0

    def __post_init__(self) -> None:
        whole_number("examples", self.examples, 1)
        whole_number("budget", self.budget, 1)
        if not callable(self.score):
            raise RecipeError(f"tune: found {self.score!r}, wanted a function from a state dict to a number")
        if self.search not in ("grid", "golden"):
            raise RecipeError(f"tune: search: found {self.search!r}, wanted 'grid' or 'golden'")
        if not self.scales:
            raise RecipeError("tune: scales: found none, wanted some numbers")
        for scale in self.scales:
            in_range("scales", scale)


@dataclass(frozen=True)
class Tuned:
    """What was chosen, and on what.

    Args:
        examples: labelled examples that every trial used.
        trials: (scale, score) in order; of the search by layers (layer, its coefficient, score) too.
        scale: the best one.
        by_layer: the coefficient of each layer; empty unless they were searched.
        score, score_at_1: of the model that was chosen, and of the merge as it was.
    """

    examples: int
    trials: tuple[tuple[float | str, ...], ...]
    scale: float
    by_layer: Mapping[str, float]
    score: float
    score_at_1: float


def layer_of(name: str) -> str:
    """The layer of a tensor: its name up to the first number, or its first part."""
    numbered = _NUMBERED.match(name)
    return numbered[0] if numbered else name.partition(".")[0]


def tune(
    tuner: Tuner,
    merged: Mapping[str, Tensor],
    base: Mapping[str, Tensor],
    dtypes: Mapping[str, torch.dtype],
    kept: Mapping[str, Tensor] | None = None,
    tied: Mapping[str, str] | None = None,
) -> Tuned:
    """Move merged values to base + s (merged - base), in place, for the s that scores best.

    It takes one more model in memory, in which the trials are made. Integers and BatchNorm's statistics stay merged.

    Args:
        merged: in the dtype of the arithmetic.
        base: what the clients started from.
        dtypes: in which models are scored.
        kept: the master of tensors that were sent rounded: what it has beyond `base` is in every trial.
        tied: names that are another name's tensor.
    """
    trial = _Trials(tuner, merged, base, dtypes, kept or {}, tied or {})
    at_1 = best = trial.score(1.0)
    scale = 1.0
    tried: list[tuple[float | str, ...]] = [(1.0, at_1)]

    def attempt(number: float) -> float:
        nonlocal best, scale
        found = trial.score(number)
        tried.append((number, found))
        if found > best or (found == best and abs(number - 1) < abs(scale - 1)):
            best, scale = found, number
        return found

    room = tuner.budget - 1
    if tuner.search == "grid":
        for number in [float(number) for number in dict.fromkeys(tuner.scales) if number != 1][:room]:
            attempt(number)
    else:
        _golden(attempt, float(min(tuner.scales)), float(max(tuner.scales)), room // 2 if tuner.per_layer else room)
    by_layer: dict[str, float] = {}
    if tuner.per_layer:
        by_layer = dict.fromkeys(trial.layers, scale)
        draw = random.Random(f"{tuner.seed}/layers")
        for _ in range(tuner.budget - len(tried)):
            layer = draw.choice(trial.layers)
            number = by_layer[layer] * draw.choice(_FACTORS)
            found = trial.score({**by_layer, layer: number})
            tried.append((layer, number, found))
            if found > best:
                best, by_layer[layer] = found, number
    trial.settle(by_layer or scale)
    return Tuned(tuner.examples, tuple(tried), scale, by_layer, best, at_1)


def _golden(attempt: Callable[[float], float], low: float, high: float, room: int) -> None:
    """Golden section: each call narrows the interval that holds the peak by 0.618."""
    points = [high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)]
    if room < 2 or low == high:
        return
    scores = [attempt(points[0]), attempt(points[1])]
    for _ in range(room - 2):
        if scores[0] >= scores[1]:
            high, points[1], scores[1] = points[1], points[0], scores[0]
            points[0] = high - _GOLDEN * (high - low)
            scores[0] = attempt(points[0])
        else:
            low, points[0], scores[0] = points[0], points[1], scores[1]
            points[1] = low + _GOLDEN * (high - low)
            scores[1] = attempt(points[1])


class _Trials:
    """Models along the merged delta, made in one set of tensors."""

    def __init__(
        self,
        tuner: Tuner,
        merged: Mapping[str, Tensor],
        base: Mapping[str, Tensor],
        dtypes: Mapping[str, torch.dtype],
        kept: Mapping[str, Tensor],
        tied: Mapping[str, str],
    ) -> None:
        self._tuner, self._merged, self._base, self._kept, self._tied = tuner, merged, base, kept, tied
        own = {name: tensor for name, tensor in merged.items() if name not in tied}
        moving = [name for name, tensor in own.items() if tensor.is_floating_point() and tensor.numel()]
        self._moving = [name for name in moving if not any(fnmatch.fnmatchcase(name, glob) for glob in STATISTICS)]
        self._scratch = {
            name: torch.empty(tensor.shape, dtype=dtypes[name]) if tensor.is_floating_point() else tensor
            for name, tensor in own.items()
        }
        self.layers = sorted({layer_of(name) for name in self._moving})

    def score(self, scale: float | Mapping[str, float]) -> float:
        """What a scale, or one a layer, scores; minus infinity for what has no place in a dtype, or no number."""
        for name, into in self._scratch.items():
            if not into.is_floating_point():
                continue
            into_S, finite = into.view(-1), True
            for at in _pieces(into.numel()):
                into_S[at] = self._values(name, at, self._scale_of(name, scale), with_kept=True).to(into.dtype)
                finite &= bool(into_S[at].float().isfinite().all())
            if not finite:
                return -math.inf
        lent = {name: self._scratch[self._tied.get(name, name)] for name in self._merged}
        found = float(self._tuner.score(lent))
        return -math.inf if math.isnan(found) else found

    def settle(self, scale: float | Mapping[str, float]) -> None:
        """Put the values of that scale in place of the merged ones."""
        for name in self._moving:
            number = self._scale_of(name, scale)
            merged_S = self._merged[name].view(-1)
            for at in _pieces(merged_S.numel()) if number != 1.0 else ():
                merged_S[at] = self._values(name, at, number, with_kept=False)
        for name, first in self._tied.items():
            self._merged[name].copy_(self._merged[first])

    def _scale_of(self, name: str, scale: float | Mapping[str, float]) -> float:
        if name not in self._moving:
            return 1.0
        return scale if isinstance(scale, float) else scale[layer_of(name)]

    def _values(self, name: str, at: slice, scale: float, *, with_kept: bool) -> Tensor:
        values_S = self._merged[name].reshape(-1)[at]
        base_S = self._base[name].reshape(-1)[at].to(values_S.dtype)
        if scale != 1.0:
            values_S = base_S + scale * (values_S - base_S)
        if with_kept and name in self._kept:
            values_S = values_S + (self._kept[name].reshape(-1)[at] - base_S)
        return values_S


def _pieces(numel: int) -> list[slice]:
    return [slice(start, min(start + _PIECE, numel)) for start in range(0, numel, _PIECE)]


def auto_scale(
    method: MergeMethod | str,
    base: Mapping[str, Tensor],
    updates: Sequence[Mapping[str, Tensor]] | Mapping[str, Mapping[str, Tensor]],
    score: Score,
    *,
    examples: int,
    weights: Sequence[float] | Mapping[str, float] | None = None,
    scales: Sequence[float] = SCALES,
    search: Literal["grid", "golden"] = "grid",
    per_layer: bool = False,
    budget: int = 40,
    seed: int = 0,
    **options: Any,
) -> tuple[dict[str, Tensor], Tuned]:
    """Merge once, and go as far along the merged delta as scores best.

    Args:
        method, base, updates, weights, seed: as for `merge`.
        score: from a state dict to a number, larger is better.
        examples, scales, search, per_layer, budget: see `Tuner`.
        options: `metrics` and `statistics` of `merge`.

    Returns:
        The model in the base's dtypes, and how it was chosen.

    Raises:
        RecipeError: as `merge`, and for a method that changes the model's tensors.
    """
    tuner = Tuner(score, examples, tuple(scales), search, per_layer, budget, seed)
    chosen = as_method(method)
    cohort = cohort_of(chosen, base, updates, weights, seed, **options)
    sink = MemorySink()
    execute(chosen, cohort, sink, master=True)
    merged = sink.tensors
    if {name: tensor.shape for name, tensor in merged.items()} != {n: tensor.shape for n, tensor in base.items()}:
        raise RecipeError(f"auto_scale: {chosen} changes the model's tensors: there is no delta to scale")
    dtypes = {name: tensor.dtype for name, tensor in base.items()}
    tuned = tune(tuner, merged, base, dtypes, tied=cohort.base.aliases())
    return {name: tensor.to(dtypes[name]) for name, tensor in merged.items()}, tuned
