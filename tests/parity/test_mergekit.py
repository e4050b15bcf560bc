"""Our methods give mergekit's numbers, where both define the same thing. `TABLE` says how mergekit's words are ours."""

import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fl_merge import METHODS, build, merge

GOLDEN = Path(__file__).parent / "golden"
TENSORS = load_file(GOLDEN / "mergekit.safetensors")
CASES = json.loads((GOLDEN / "mergekit.json").read_text())["cases"]


@dataclass(frozen=True)
class Ours:
    """What a method of mergekit is here.

    Args:
        method: its name here.
        options: by mergekit's name of a parameter: our name; or a function from its value to our settings; or None
            where it says nothing here, for the reason that is written beside it.
        settings: of ours, beside those.
        weights: whether mergekit's `weight` is our number of examples; if not, all count the same.
        tolerance: of the error, relative to what `relative_to` says.
        relative_to: "delta", the merged model less the base. Or "model": where the result is near a whole model and the
            delta small, rounding the exact result to float32 is by itself an error of 1e-6 of the delta; ours must then
            be within three times that rounding, and mergekit's within `roundings` times.
        roundings: see there; more where mergekit rounds more of its steps.
        alike: where the two define the same: from the case to a mask of elements, or None for everywhere. Elsewhere
            ours leaves the base as it is.
    """

    method: str
    options: Mapping[str, str | Callable[[object], dict] | None] = field(default_factory=dict)
    settings: Mapping[str, object] = field(default_factory=dict)
    weights: bool = True
    tolerance: float = 1e-6
    relative_to: str = "delta"
    roundings: int = 3
    alike: Callable[[Mapping], torch.Tensor] | None = None


# mergekit's `normalize` divides by the sum of the weights; ours always sum to 1, and so do the cases'.
SUMS = {"normalize": None, "lambda": "scale"}


def by_client(density):
    """One density, or one for each client: the clients of a list are called "0", "1", ..."""
    return {"density": {str(n): each for n, each in enumerate(density)} if isinstance(density, list) else density}


def deltas_agree(case):
    """Where Model Stock's mean cosine is positive: below 0 we leave the base, and mergekit steps away from it."""
    base = TENSORS[f"{case['shape']}.base"]
    by_row = case["mergekit_parameters"].get("filter_wise", False) and base.ndim > 1
    deltas = [(TENSORS[f"{case['shape']}.client{i}"] - base).double() for i in range(case["clients"])]
    pairs = itertools.combinations([delta if by_row else delta.flatten() for delta in deltas], 2)
    mean = torch.stack([torch.nn.functional.cosine_similarity(a, b, dim=-1) for a, b in pairs]).mean(dim=0)
    return (mean > 0)[..., None].expand_as(base) if by_row else (mean > 0).expand_as(base)


TABLE = {
    "linear": Ours("weighted_average", SUMS),
    "task_arithmetic": Ours("task_arithmetic", SUMS),
    # The base is the first model and client0 the second, which has the share t: see `inputs`.
    "slerp": Ours("slerp", {"t": None}, relative_to="model"),
    # What mergekit calls row-wise are columns: vectors along dimension 0.
    "nuslerp": Ours(
        "nuslerp",
        {
            "nuslerp_flatten": lambda flat: {"vectors": "tensors" if flat else "rows"},
            "nuslerp_row_wise": lambda turned: {"vectors": "columns"} if turned else {},
        },
    ),
    "multislerp": Ours("multislerp", settings={"on": "weights"}, relative_to="model", roundings=5),
    "karcher": Ours("karcher", {"max_iter": "max_iterations", "tol": "tolerance"}, weights=False, tolerance=2e-5),
    "model_stock": Ours(
        "model_stock", {"filter_wise": "filter_wise"}, weights=False, tolerance=2e-5, alike=deltas_agree
    ),
    # The base is the first model and client0 the second, here too.
    "nearswap": Ours("nearswap", {"t": "t"}, relative_to="model"),
    "arcee_fusion": Ours("arcee_fusion"),
    "passthrough": Ours("passthrough", {"scale": "scale"}),
    "ties": Ours("ties", {"density": by_client, "normalize": "normalize", "lambda": "scale"}),
    "breadcrumbs": Ours("breadcrumbs", {"density": by_client, "gamma": "gamma"}),
    # mergekit's `normalize` is false by default here, and true in its ties.
    "breadcrumbs_ties": Ours(
        "breadcrumbs_ties", {"density": by_client, "gamma": "gamma"}, settings={"normalize": False}
    ),
    "sce": Ours("sce", {"select_topk": "density"}, weights=False),
}
"""mergekit's methods in our words. A method of mergekit that is not here is one that we do not have."""


def settings_of(case):
    """The case's parameters in our words."""
    ours = TABLE[case["mergekit_method"]]
    settings = dict(ours.settings)
    for name, value in case["mergekit_parameters"].items():
        option = ours.options[name]
        if name == "normalize" and (option is None or value is False):
            assert sum(case["weights"]) == 1.0
        if callable(option):
            settings |= option(value)
        elif option is not None:
            settings[option] = value
    return settings


def inputs(case):
    """The base, the clients, their weights, and mergekit's result."""
    shape, parameters = case["shape"], case["mergekit_parameters"]
    base, wanted = TENSORS[f"{shape}.base"], TENSORS[case["output"]]
    clients = [TENSORS[f"{shape}.client{i}"] for i in range(case["clients"])]
    weights = case["weights"] if TABLE[case["mergekit_method"]].weights else [1.0] * len(clients)
    if case["mergekit_method"] == "slerp":
        return base, [base, *clients], [1 - parameters["t"], parameters["t"]], wanted
    return base, clients, weights, wanted


def merged(case, dtype=torch.float32):
    base, clients, weights, _ = inputs(case)
    method = build(TABLE[case["mergekit_method"]].method, **settings_of(case))
    return merge(method, {"w": base.to(dtype)}, [{"w": client.to(dtype)} for client in clients], weights)["w"]


def error(found, wanted, scale):
    return float((found.double() - wanted.double()).norm() / scale.double().norm())


def cases(relative_to):
    return [
        pytest.param(case, id=case["output"])
        for case in CASES
        if (ours := TABLE.get(case["mergekit_method"])) is not None and ours.relative_to == relative_to
    ]


@pytest.mark.parametrize("case", cases("delta"))
def test_it_is_mergekits_result_relative_to_the_delta(case):
    base, _, _, wanted = inputs(case)
    ours, found = TABLE[case["mergekit_method"]], merged(case)
    alike = torch.ones_like(base, dtype=torch.bool) if ours.alike is None else ours.alike(case)
    assert error(found[alike], wanted[alike], (wanted - base)[alike]) < ours.tolerance
    assert torch.equal(found[~alike], base[~alike])
    assert alike.double().mean() > 0.6


@pytest.mark.parametrize("case", cases("model"))
def test_it_is_mergekits_result_relative_to_the_model_and_to_rounding(case):
    base, _, _, wanted = inputs(case)
    found, exact = merged(case), merged(case, torch.float64)
    assert error(found, wanted, wanted) < TABLE[case["mergekit_method"]].tolerance
    rounding = error(exact.float(), exact, exact - base)
    assert 0.3e-6 < rounding < 1.5e-6
    assert error(found, exact, exact - base) < 3 * rounding
    assert error(wanted, exact, exact - base) < TABLE[case["mergekit_method"]].roundings * rounding


def test_the_slerp_cases_are_arcs_or_lines_as_expected():
    """If all were straight lines, the test above would say nothing about arcs."""
    angles = {}
    for case in CASES:
        if case["mergekit_method"] == "slerp":
            first, (_, second), _, _ = inputs(case)
            cosine = float(torch.nn.functional.cosine_similarity(first.flatten(), second.flatten(), dim=0))
            angles[case["shape"]] = cosine
    assert len(angles) == 3
    assert any(abs(cosine) <= 0.9995 for cosine in angles.values()), angles


def test_the_golden_outputs_are_not_the_base_and_not_each_other():
    """A comparison with data that say nothing would always pass."""
    for case in CASES:
        base, client = TENSORS[f"{case['shape']}.base"], TENSORS[f"{case['shape']}.client0"]
        assert error(TENSORS[case["output"]], base, client - base) > 1e-3, case["output"]


def test_the_table_has_every_option_of_the_cases():
    for case in CASES:
        if case["mergekit_method"] in TABLE:
            assert set(case["mergekit_parameters"]) <= set(TABLE[case["mergekit_method"]].options), case["output"]


@pytest.mark.parametrize("case", [pytest.param(case, id=case["output"]) for case in CASES])
def test_every_case_is_covered_or_named_as_not_yet(case):
    ours = TABLE.get(case["mergekit_method"])
    if ours is None:
        assert case["mergekit_method"] not in METHODS, "there is such a method now: put it into the table"
        pytest.skip(f"not covered yet: there is no method '{case['mergekit_method']}'")
    assert ours.relative_to in ("delta", "model")
