"""mergekit's methods in ours: one row a method, with its parameters, their defaults there and here, and how it is made.

The rows say what mergekit 0.1.5 does with a recipe; a parameter that is left out is mergekit's default, or ours where
the recipe says `compat: false`.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fl_merge.errors import RecipeError
from fl_merge.hyperparameters import Range
from fl_merge.method import METHODS
from fl_merge.offline.rows import Choice, Combination, Parameter, Row, Settings, Unchanged, normalized, ours


def _linear(s: Settings) -> Choice:
    weights = tuple(each["weight"] for each in s.each)
    if s.shared["normalize"]:
        if abs(math.fsum(weights)) < 1e-8:
            raise RecipeError(f"linear: the weights {', '.join(map(str, weights))} sum to 0, by which they are divided")
        weights = normalized(weights)
    return Choice(Combination(), tuple(range(len(weights))), weights)


def _slerp(s: Settings) -> Choice:
    assert s.base is not None
    t = s.shared["t"]
    return Choice(ours("slerp"), (s.base, *s.others), (1.0 - t, t), s.base)


def _passthrough(s: Settings) -> Choice:
    scale = s.each[0]["scale"]
    return Choice(Unchanged(), (), ()) if scale in (None, 1.0) else Choice(Combination(), (0,), (scale,))


def _nearswap(s: Settings) -> Choice:
    assert s.base is not None
    return Choice(ours("nearswap", t=s.shared["t"]), s.others, (1.0,), s.base)


def _fusion(s: Settings) -> Choice:
    assert s.base is not None
    return Choice(ours("arcee_fusion"), s.others, (1.0,), s.base)


def _karcher(s: Settings) -> Choice:
    everyone = tuple(range(len(s.each)))
    method = ours("karcher", max_iterations=s.shared["max_iter"], tolerance=s.shared["tol"])
    return Choice(method, everyone, _equal(len(everyone)))


def _arc(method: str, s: Settings, weights: tuple[float, ...], **settings: Any) -> Choice:
    """On deltas where there is a base, else on weights."""
    on = "weights" if s.base is None else "deltas"
    return Choice(ours(method, on=on, **settings), s.others, weights, s.others[0] if s.base is None else s.base)


def _nuslerp(s: Settings) -> Choice:
    vectors = "columns" if s.shared["nuslerp_row_wise"] else "rows"
    weights = s.of_others("weight")
    if abs(math.fsum(weights)) < 1e-6:
        weights = (0.5, 0.5)
    flat = s.shared["nuslerp_flatten"]
    return _arc("nuslerp", s, normalized(weights), vectors="tensors" if flat else vectors)


def _multislerp(s: Settings) -> Choice:
    weights = s.of_others("weight")
    return _arc("multislerp", s, normalized(weights) if s.shared["normalize_weights"] else weights)


def _model_stock(s: Settings) -> Choice:
    assert s.base is not None
    method = ours("model_stock", filter_wise=s.shared["filter_wise"])
    return Choice(method, s.others, _equal(len(s.others)), s.base)


def _ram(s: Settings) -> Choice:
    assert s.base is not None
    if not s.others:
        return Choice(Unchanged(), (), (), s.base)
    return Choice(ours("ram", epsilon=s.shared["epsilon"]), s.others, _equal(len(s.others)), s.base)


def _sce(s: Settings) -> Choice:
    assert s.base is not None
    density = s.shared["select_topk"]
    if not s.others or density == 0:
        return Choice(Unchanged(), (), (), s.base)
    return Choice(ours("sce", density=density), s.others, _equal(len(s.others)), s.base)


def _equal(count: int) -> tuple[float, ...]:
    return (1.0 / count,) * count


def _task_vectors(method: str, *, election: bool = False, spread: str | None = None) -> Callable[[Settings], Choice]:
    """mergekit's general task arithmetic: prune each delta, weight it, elect signs perhaps, add, divide perhaps.

    Args:
        method: its name, here and in mergekit.
        election: whether signs are elected; then the last step is a mean or a sum, and our method does both.
        spread: gamma or epsilon, of methods that have one.
    """
    prunes = method != "task_arithmetic"

    def make(s: Settings) -> Choice:
        assert s.base is not None
        settings: dict[str, Any] = {"scale": s.shared["lambda"]}
        weights = s.of_others("weight")
        if election:
            settings["normalize"] = s.shared["normalize"]
        elif s.shared["normalize"]:
            weights = normalized(weights)
        densities = s.of_others("density") if prunes else (1.0,) * len(weights)
        # Nothing is kept at density 0, which mergekit's gradients may reach: the model plays no part.
        kept = [number for number, density in enumerate(densities) if density > 0]
        if not kept:
            return Choice(Unchanged(), (), (), s.base)
        clients = tuple(s.others[number] for number in kept)
        if prunes:
            by_client = {s.ids[client]: densities[number] for client, number in zip(clients, kept, strict=True)}
            alike = len(set(by_client.values())) == 1
            settings["density"] = densities[kept[0]] if alike else types.MappingProxyType(by_client)
        if spread is not None:
            value = _one_for_all(method, spread, s.of_others(spread))
            settings[spread] = 2.0 * value if spread == "epsilon" else value
        if method in METHODS and "rescale" in METHODS[method].parameters:
            settings["rescale"] = s.shared["rescale"] and ("l1" if s.compat else True)
        elif prunes and s.shared["rescale"]:
            raise RecipeError(f"{method}: rescale: true is not supported; what is kept stays as it is")
        return Choice(ours(method, **settings), clients, tuple(weights[number] for number in kept), s.base)

    return make


def _one_for_all(method: str, name: str, values: tuple[float, ...]) -> float:
    if len(set(values)) > 1:
        raise RecipeError(f"{method}: {name} is {values[0]:g} and {values[1]:g}; one for all models is supported")
    return values[0]


_WEIGHT = Parameter(float, each="others", ours=1.0)
_FRACTION = Range(0.0, 1.0)
_L1 = (
    "rescale: what is kept of a delta is rescaled to the whole one's L1 norm, as in mergekit; ours divides by the "
    "chance with which it was kept, which is unbiased (compat: false)"
)
_DRAWS = "draws are not mergekit's: here they are the same for a seed whatever else is merged, there they are not"


def _family(
    *, normalize: bool = False, rescale: bool = False, density: float = 1.0, **more: float
) -> dict[str, Parameter]:
    """The parameters of task arithmetic and of what is made of it.

    Args:
        normalize, rescale: mergekit's defaults.
        density: our default; mergekit's is 1.
        more: gamma or epsilon, mergekit's default.
    """
    return {
        "weight": _WEIGHT,
        "density": Parameter(float, 1.0, density, _FRACTION, "others"),
        "lambda": Parameter(float, 1.0),
        "normalize": Parameter(bool, normalize),
        "rescale": Parameter(bool, rescale),
        "int8_mask": Parameter(bool, False, idle=True),
        **{name: Parameter(float, value, allowed=_FRACTION, each="others") for name, value in more.items()},
    }


_SUM = _family() | {"density": replace(_family()["density"], idle=True), "rescale": Parameter(bool, False, idle=True)}

ROWS: dict[str, Row] = {
    "linear": Row(
        "weighted_average",
        _linear,
        {"weight": Parameter(float, ours=1.0, each="all"), "normalize": Parameter(bool, True)},
    ),
    "slerp": Row("slerp", _slerp, {"t": Parameter(float)}, "required", (2, 2)),
    "nuslerp": Row(
        "nuslerp",
        _nuslerp,
        {
            "weight": _WEIGHT,
            "nuslerp_row_wise": Parameter(bool, False),
            "nuslerp_flatten": Parameter(bool, True),
        },
        "optional",
        others=(2, 2),
    ),
    "multislerp": Row(
        "multislerp",
        _multislerp,
        {
            "weight": _WEIGHT,
            "normalize_weights": Parameter(bool, True),
            "eps": Parameter(float, 1e-8, idle=True),
        },
        "optional",
        others=(1, None),
    ),
    "karcher": Row(
        "karcher",
        _karcher,
        {"max_iter": Parameter(int, 10, allowed=Range(1)), "tol": Parameter(float, 1e-5, allowed=Range(0.0))},
    ),
    "task_arithmetic": Row("task_arithmetic", _task_vectors("task_arithmetic"), _SUM, "required"),
    "ties": Row(
        "ties",
        _task_vectors("ties", election=True),
        _family(normalize=True, density=0.2),
        "required",
        notes=("in bfloat16 mergekit's TIES depends on the order in which elements stand; here it does not",),
    ),
    "dare_linear": Row(
        "dare_linear",
        _task_vectors("dare_linear"),
        _family(rescale=True, density=0.5),
        "required",
        notes=(_L1, _DRAWS),
    ),
    "dare_ties": Row(
        "dare_ties",
        _task_vectors("dare_ties", election=True),
        _family(rescale=True, density=0.5),
        "required",
        notes=(_L1, _DRAWS),
    ),
    "della": Row(
        "della",
        _task_vectors("della", election=True, spread="epsilon"),
        _family(normalize=True, rescale=True, density=0.5, epsilon=0.15),
        "required",
        notes=(_L1, _DRAWS, "rows of one element are kept; mergekit's DELLA divides 0 by 0 there"),
    ),
    "della_linear": Row(
        "della_linear",
        _task_vectors("della_linear", spread="epsilon"),
        _family(rescale=True, density=0.5, epsilon=0.15),
        "required",
        notes=(_L1, _DRAWS, "rows of one element are kept; mergekit's DELLA divides 0 by 0 there"),
    ),
    "breadcrumbs": Row(
        "breadcrumbs", _task_vectors("breadcrumbs", spread="gamma"), _family(density=0.143, gamma=0.01), "required"
    ),
    "breadcrumbs_ties": Row(
        "breadcrumbs_ties",
        _task_vectors("breadcrumbs_ties", election=True, spread="gamma"),
        _family(density=0.143, gamma=0.01),
        "required",
    ),
    "sce": Row(
        "sce",
        _sce,
        {"select_topk": Parameter(float, 1.0, 0.1, _FRACTION), "int8_mask": Parameter(bool, False, idle=True)},
        "required",
        notes=(
            "mergekit's SCE weighs models equally where their mean squared change is below 1e-6; here it never does",
        ),
    ),
    "model_stock": Row(
        "model_stock",
        _model_stock,
        {"filter_wise": Parameter(bool, False)},
        "required",
        (3, None),
        notes=(
            "Model Stock: where deltas conflict the base stays, and the lengths of deltas do not matter; mergekit goes "
            "away from the models there, and it takes short deltas for less parallel",
        ),
    ),
    "nearswap": Row(
        "nearswap", _nearswap, {"t": Parameter(float, allowed=Range(0.0, open_low=True))}, "required", (2, 2)
    ),
    "arcee_fusion": Row("arcee_fusion", _fusion, {}, "required", (2, 2)),
    "ram": Row("ram", _ram, {"epsilon": Parameter(float, 1e-5, allowed=Range(0.0))}, "required"),
    "passthrough": Row(
        "passthrough", _passthrough, {"scale": Parameter(float, each="all", optional=True)}, models=(1, 1)
    ),
}
"""mergekit's methods by name."""
