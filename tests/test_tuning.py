"""auto_scale: it finds the best of what it tries, never below scale 1, merges once, and says what it used."""

import json
import math

import pytest
import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from hypothesis import given
from hypothesis import strategies as st

import fl_merge.tuning
from fl_merge import RecipeError, Tuner, auto_scale, merge, momentum, server_optimizer
from fl_merge.flower import FedMerge
from fl_merge.flower.client import receive, reply
from fl_merge.flower.inprocess import InProcessGrid
from fl_merge.flower.journal import Journal
from fl_merge.flower.records import to_record, to_tensors
from fl_merge.methods import ties, weighted_average
from fl_merge.model import GlobalModel
from fl_merge.store import MemorySource
from fl_merge.tuning import layer_of
from fl_merge.types import Update

BASE = {"layers.0.w": torch.zeros(3), "layers.1.w": torch.zeros(2), "head": torch.zeros(1), "n": torch.tensor(3)}
CLIENT = {"layers.0.w": torch.ones(3), "layers.1.w": torch.ones(2), "head": torch.ones(1), "n": torch.tensor(4)}


def near(*wanted):
    """A score with its peak where each layer's elements have these values."""

    def score(model):
        values = (model["layers.0.w"], model["layers.1.w"], model["head"])
        return -sum(float((v.double() - w).square().sum()) for v, w in zip(values, wanted, strict=True))

    return score


def test_the_best_scale_of_the_grid():
    model, report = auto_scale("weighted_average", BASE, [CLIENT], near(1.5, 1.5, 1.5), examples=40)
    assert report.scale == 1.5
    assert [model[name].tolist() for name in ("layers.0.w", "layers.1.w", "head")] == [[1.5] * 3, [1.5] * 2, [1.5]]
    assert torch.equal(model["n"], BASE["n"])
    assert (report.examples, report.score, report.score_at_1) == (40, 0.0, -1.5)
    assert [scale for scale, _ in report.trials] == [1.0, 0.25, 0.5, 0.75, 1.25, 1.5, 2.0, 3.0]


def test_golden_section_comes_near_in_few_trials():
    wanted = 1.3371
    _, report = auto_scale(
        "weighted_average", BASE, [CLIENT], near(wanted, wanted, wanted), examples=1, search="golden", budget=20
    )
    assert len(report.trials) == 20
    assert abs(report.scale - wanted) < 2.75 * 0.618**16


def test_one_coefficient_a_layer():
    score = near(0.5, 2.0, 1.0)
    flat, _ = auto_scale("weighted_average", BASE, [CLIENT], score, examples=1)
    layered, report = auto_scale("weighted_average", BASE, [CLIENT], score, examples=1, per_layer=True, budget=200)
    assert score(layered) > score(flat) + 1
    assert layered["layers.0.w"][0] == pytest.approx(0.5, abs=0.1)
    assert layered["layers.1.w"][0] == pytest.approx(2.0, abs=0.2)
    assert set(report.by_layer) == {"layers.0", "layers.1", "head"}
    assert report.score == score(layered)
    again, second = auto_scale("weighted_average", BASE, [CLIENT], score, examples=1, per_layer=True, budget=200)
    assert second == report
    assert all(torch.equal(again[name], layered[name]) for name in layered)
    _, third = auto_scale("weighted_average", BASE, [CLIENT], score, examples=1, per_layer=True, budget=200, seed=1)
    assert third.trials != report.trials


@given(
    numbers=st.lists(st.floats(-1e3, 1e3) | st.just(math.nan), min_size=30, max_size=30),
    search=st.sampled_from(["grid", "golden"]),
    per_layer=st.booleans(),
    budget=st.integers(1, 30),
)
def test_never_below_scale_1_and_the_model_is_the_one_that_was_scored(numbers, search, per_layer, budget):
    """Whatever the scores are."""
    scored = []

    def score(model):
        scored.append({name: tensor.clone() for name, tensor in model.items()})
        return numbers[len(scored) - 1]

    model, report = auto_scale(
        "weighted_average", BASE, [CLIENT], score, examples=1, search=search, per_layer=per_layer, budget=budget
    )
    assert len(scored) == len(report.trials) <= budget
    assert report.score >= report.score_at_1
    finite = [-math.inf if math.isnan(number) else number for number in numbers[: len(scored)]]
    assert report.score == max(finite)
    if report.score > -math.inf:
        best = [scored[place] for place, number in enumerate(finite) if number == report.score]
        assert any(all(torch.equal(model[name], each[name]) for name in model) for each in best)
    if report.score == report.score_at_1 and not per_layer:
        assert report.scale == 1.0


def test_scale_1_is_the_merge_bit_for_bit():
    draw = torch.Generator().manual_seed(2)
    base = {"w": torch.randn(200, 30, generator=draw).bfloat16(), "v": torch.randn(30, generator=draw)}
    clients = [
        {name: t + 0.1 * torch.randn(t.shape, generator=draw).to(t.dtype) for name, t in base.items()} for _ in "ab"
    ]
    model, report = auto_scale(ties(), base, clients, lambda model: 1.0, examples=1)
    wanted = merge(ties(), base, clients)
    assert report.scale == 1.0
    assert all(torch.equal(model[name], wanted[name]) for name in wanted)


def test_a_scale_that_has_no_place_in_the_dtype_is_passed_over():
    base, client = {"w": torch.zeros(2, dtype=torch.float16)}, {"w": torch.full((2,), 4e4, dtype=torch.float16)}
    model, report = auto_scale("weighted_average", base, [client], lambda model: float(model["w"][0]), examples=1)
    assert report.scale == 1.5
    assert dict(report.trials)[3.0] == -math.inf
    assert model["w"].tolist() == [6e4, 6e4]


def test_the_merge_is_done_once(monkeypatch):
    calls = []
    real = fl_merge.tuning.execute
    monkeypatch.setattr(fl_merge.tuning, "execute", lambda *args, **options: calls.append(1) or real(*args, **options))
    auto_scale(ties(), BASE, [CLIENT, CLIENT], lambda model: 0.0, examples=1, per_layer=True)
    assert len(calls) == 1


def test_running_statistics_and_tied_names():
    """BatchNorm's variance stays merged; a tied name stays its first one's, in every trial too."""
    shared = torch.zeros(2)
    model = GlobalModel.of(
        {"layers.0.a": shared, "layers.1.b": shared.clone(), "bn.running_var": torch.ones(1)},
        tied={"layers.1.b": "layers.0.a"},
    )
    moved = {"layers.0.a": torch.ones(2), "layers.1.b": torch.ones(2), "bn.running_var": torch.tensor([2.0])}
    seen = []

    def score(state):
        seen.append(torch.equal(state["layers.0.a"], state["layers.1.b"]) and state["bn.running_var"].item() == 2.0)
        return float(state["layers.0.a"].sum())

    tuner = Tuner(score, examples=3, per_layer=True, budget=30)
    updates = (Update("0", 1.0, MemorySource(moved)),)
    made, report = model.merged(weighted_average(), updates, seed=0, round_number=1, tuner=tuner)
    assert all(seen)
    assert torch.equal(made.sent["layers.0.a"], made.sent["layers.1.b"])
    assert made.sent["layers.0.a"][0] >= 3.0
    assert made.sent["bn.running_var"].item() == 2.0
    assert report.found["auto_scale"].examples == 3


def test_the_master_is_what_is_scored_and_the_optimizer_steps_along_what_was_chosen():
    base = {"w": torch.ones(2, dtype=torch.bfloat16)}
    moved = (Update("0", 1.0, MemorySource({"w": torch.full((2,), 1.5)})),)
    tuner = Tuner(lambda state: -abs(float(state["w"][0]) - 2.0), examples=1)
    model, _ = GlobalModel.of(base).merged(weighted_average(), moved, seed=0, round_number=1, tuner=tuner)
    assert model.master()["w"].tolist() == [2.0, 2.0]
    method = server_optimizer("weighted_average", momentum(lr=0.5))
    model, _ = GlobalModel.of(base).merged(method, moved, seed=0, round_number=1, tuner=tuner)
    assert model.optimizer_state["m/w"].tolist() == [1.0, 1.0]
    assert model.master()["w"].tolist() == [1.5, 1.5]


def test_in_a_federation_every_round_is_tuned_and_the_journal_says_how(tmp_path):
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return reply(message, {name: tensor + 1.0 for name, tensor in receive(message).items()}, 5)

    score = lambda state: -abs(float(state["w"][0]) - 4.0)  # noqa: E731
    tuner = Tuner(score, examples=17)
    strategy = FedMerge("weighted_average", tune=tuner, fraction_evaluate=0.0, watchers=[Journal(tmp_path / "run", {})])
    with InProcessGrid(app, 3, workers=0) as grid:
        result = strategy.start(grid, to_record({"w": torch.zeros(2)}), num_rounds=2)
    assert to_tensors(result.arrays)["w"].tolist() == [4.0, 4.0]  # 3, then 1 more
    lines = [json.loads(line) for line in (tmp_path / "run" / "journal.jsonl").read_text().splitlines()]
    found = [line["report"]["merge"]["found"]["auto_scale"] for line in lines if line["event"] == "round_ended"]
    assert [each["scale"] for each in found] == [3.0, 1.0]
    assert [each["examples"] for each in found] == [17, 17]
    assert len(found[0]["trials"]) == 8


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.12.mlp.up_proj.weight", "model.layers.12"),
        ("h.0.attn.3.bias", "h.0"),
        ("0.weight", "0"),
        ("hidden1.weight", "hidden1"),
        ("embed", "embed"),
        ("lm_head.weight", "lm_head"),
    ],
)
def test_layers_are_known_by_their_names(name, layer):
    assert layer_of(name) == layer


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"examples": 0}, "parameter 'examples': found 0, wanted a whole number >= 1"),
        ({"budget": 0}, "parameter 'budget': found 0, wanted a whole number >= 1"),
        ({"search": "random"}, "tune: search: found 'random', wanted 'grid' or 'golden'"),
        ({"scales": ()}, "tune: scales: found none, wanted some numbers"),
        ({"scales": (math.nan,)}, "parameter 'scales': found nan, wanted a number that is finite"),
        ({"score": 3}, "tune: found 3, wanted a function from a state dict to a number"),
    ],
)
def test_refused_at_construction(options, message):
    with pytest.raises(RecipeError) as caught:
        Tuner(**{"score": len, "examples": 1, **options})
    assert str(caught.value) == message
