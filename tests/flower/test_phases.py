"""A federation that changes its model between rounds: dense, mixture of experts, its router trained, all of it."""

import json
import subprocess
import sys
from pathlib import Path

import phases_app as toy
import pytest
import torch
from safetensors.torch import load_file

from fl_merge import Recipe, RecipeError, clip_norm, merge, momentum, phase, schedule, server_optimizer
from fl_merge.flower import FedMerge
from fl_merge.flower.strategy import RunFailedError
from fl_merge.flower.watch import Watcher
from fl_merge.methods import depth_upscale, moe_upcycle, ties, weighted_average
from fl_merge.optimizers import STEPS
from fl_merge.runs import Checkpoint
from fl_merge.tuning import Tuner
from fl_merge.types import TensorSpec


def bits(tensors):
    return {name: (tensor.dtype, tensor.reshape(-1).view(torch.uint8).tolist()) for name, tensor in tensors.items()}


def everything(model):
    return bits(model.master()), bits(model.sent), bits(model.optimizer_state), dict(model.architecture)


def journal(folder, event):
    lines = [json.loads(line) for line in (Path(folder) / "journal.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


class Models(Watcher):
    """Keeps the model after each round."""

    def __init__(self):
        self.after = {}

    def round_ended(self, report, model):
        self.after[report.round_number] = model


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The seven rounds in one go: the strategy, the models after each round, the folder."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    models = Models()
    strategy, _ = toy.run(folder, watchers=[models])
    return strategy, models.after, folder


def test_the_model_becomes_a_mixture_and_the_clients_are_told(whole):
    _, after, folder = whole
    assert "router.weight" not in after[2].sent
    assert after[3].sent["router.weight"].shape == (4, toy.WIDTH)
    wanted = {"model_type": "mlp_moe", "width": toy.WIDTH, "num_experts": 4, "num_experts_per_tok": 2}
    assert after[3].architecture == wanted
    assert json.loads((folder / "architecture.json").read_text()) == wanted
    assert bits(load_file(folder / "model.safetensors")) == bits(after[7].tensors())
    assert [(line["round"], line["phase"]) for line in journal(folder, "phase_started")] == [
        (1, 1),
        (3, 2),
        (4, 3),
        (6, 4),
    ]
    reports = [line["report"] for line in journal(folder, "round_ended")]
    metrics = [each["accepted"][0]["metrics"] for each in reports]
    assert [each["sparse"] for each in metrics] == [0, 0, 0, 1, 1, 1, 1]
    assert [each["steps"] for each in metrics] == [1, 1, 1, 9, 9, 1, 1]


def test_in_a_round_of_the_router_only_the_router_travels_and_moves(whole):
    _, after, folder = whole
    sizes = [line["report"]["accepted"][0]["num_bytes"] for line in journal(folder, "round_ended")]
    assert sizes[3] == sizes[4] == 4 * 4 * toy.WIDTH
    moved = [name for name in after[3].sent if not torch.equal(after[3].sent[name], after[5].sent[name])]
    assert moved == ["router.weight"]
    assert all(not torch.equal(after[5].sent[name], after[6].sent[name]) for name in after[5].sent)


def test_the_optimizer_begins_anew_in_each_phase(whole):
    _, after, _ = whole
    assert not after[2].optimizer_state
    steps = {number: int(model.optimizer_state.get(STEPS, 0)) for number, model in after.items()}
    assert steps == {1: 0, 2: 0, 3: 0, 4: 1, 5: 2, 6: 1, 7: 2}
    assert sorted(after[5].optimizer_state) == sorted(["m/router.weight", "v/router.weight", STEPS])


@pytest.mark.parametrize("at", [2, 3, 4, 5, 7])
def test_a_run_that_stops_in_or_between_phases_goes_on_bit_for_bit(whole, tmp_path, at):
    class Stops(Watcher):
        def round_started(self, round_number, sampled):
            if round_number == at:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        toy.run(tmp_path / "run", watchers=[Stops()])
    resumed, _ = toy.run(tmp_path / "run", resume=True)
    assert everything(resumed.model) == everything(whole[0].model)


def test_a_run_that_is_killed_after_the_change_goes_on(whole, tmp_path):
    command = [sys.executable, toy.__file__, str(tmp_path / "run"), "4"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "begun 4\n"
        process.kill()
    assert Checkpoint.read(tmp_path / "run").model.architecture["num_experts"] == 4
    resumed, _ = toy.run(tmp_path / "run", resume=True)
    assert everything(resumed.model) == everything(whole[0].model)


def test_a_client_on_the_old_architecture_is_refused_by_name_and_the_round_goes_on(tmp_path):
    plan = schedule([phase(moe_upcycle(top_k=2)), phase(weighted_average(), rounds=2)])
    strategy, _ = toy.run(tmp_path / "run", merge=plan, num_rounds=3, run_config={"stays": 1})
    assert strategy.model.sent["router.weight"].shape[0] == 4
    for line in journal(tmp_path / "run", "round_ended")[1:]:
        assert [each["client_id"] for each in line["report"]["accepted"]] == ["1000", "1002", "1003"]
        (refused,) = line["report"]["refused"]
        assert refused["client_id"] == "1001"
        assert "asks for a model of family 'mlp_moe' (fl-merge.architecture)" in refused["reason"]
        assert "is missing" in refused["reason"] or "not in the base" in refused["reason"]


def test_who_sends_more_than_was_asked_is_refused(tmp_path):
    """Client 1 trains and sends all of the dense model where the output layer alone is asked for."""
    plan = schedule([phase(weighted_average(), rounds=1, train="output.*")])
    toy.run(tmp_path / "run", merge=plan, num_rounds=1, run_config={"stays": 1})
    (refused,) = journal(tmp_path / "run", "round_ended")[0]["report"]["refused"]
    assert refused["client_id"] == "1001"
    assert "the message's config asks for output.* alone (fl-merge.train)" in refused["reason"]


def test_a_change_that_fails_ends_the_run_and_can_be_tried_again(whole, tmp_path):
    plan = schedule([phase(weighted_average(), rounds=1), phase(moe_upcycle(top_k=5)), phase(weighted_average(), 1)])
    with pytest.raises(
        RunFailedError, match=r"phase 2 \(moe_.*made no model in round 2: .*top_k is 5, above the 4 .*Resume"
    ):
        toy.run(tmp_path / "run", merge=plan, num_rounds=3)
    assert Checkpoint.read(tmp_path / "run").round_number == 1
    again = schedule([plan.phases[0], phase(moe_upcycle(top_k=4)), plan.phases[2]])
    resumed, _ = toy.run(tmp_path / "run", merge=again, num_rounds=3, resume=True, force=True)
    assert resumed.model.architecture["num_experts"] == 4


def test_the_same_numbers_as_the_method_by_itself(tmp_path):
    """A schedule of one method is that method."""
    plan = schedule([phase(ties(), rounds=1), phase(ties())])
    one, _ = toy.run(tmp_path / "one", merge=ties(), num_rounds=3)
    two, _ = toy.run(tmp_path / "two", merge=plan, num_rounds=3)
    assert everything(one.model) == everything(two.model)


def test_bfloat16_on_the_wire_keeps_the_master(tmp_path):
    models = Models()
    strategy, _ = toy.run(tmp_path / "run", wire_dtype="bfloat16", watchers=[models])
    assert models.after[3].sent["router.weight"].dtype == torch.bfloat16
    assert strategy.model.kept["router.weight"].dtype == torch.float32
    assert strategy.model.tensors()["experts.0.hidden1.weight"].dtype == torch.float32


# What is refused before a run ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: phase(moe_upcycle(), rounds=2), "wanted 1: a structure is changed in one round"),
        (lambda: phase(moe_upcycle(), train="router"), "which needs all of the clients' models"),
        (lambda: phase(server_optimizer(moe_upcycle(), momentum())), "by itself: a change of structure has no delta"),
        (lambda: phase(clip_norm(moe_upcycle(), max_norm=1.0)), "by itself: a change of structure has no delta"),
        (lambda: phase(weighted_average(), rounds=0), "parameter 'rounds': found 0"),
        (lambda: phase(weighted_average(), train=[]), "train: found"),
        (lambda: phase(weighted_average(), train=["all", "x"]), "wanted 'all' alone"),
        (lambda: phase(weighted_average(), config={"server-round": 2}), "config: 'server-round' is the server's own"),
        (lambda: phase(weighted_average(), config={"x": [1]}), "config: found 'x'"),
        (lambda: schedule([]), "phases: found none"),
        (lambda: schedule([phase(ties()), phase(ties())]), "phase 1: found no number of rounds"),
        (lambda: schedule([ties()]), "phase 1: found ties"),
        (lambda: phase(schedule([phase(ties())])), "found a schedule"),
        (lambda: server_optimizer(schedule([phase(ties())]), momentum()).plan(None), "a schedule of phases is for"),
        (lambda: FedMerge(toy.phases(), tune=Tuner(lambda model: 0.0, examples=5)), "tune: it is for whole models"),
        (lambda: merge(schedule([phase(ties())]), {"a": torch.ones(2)}, [{"a": torch.ones(2)}]), "for a federation"),
    ],
)
def test_phases_that_make_no_sense(make, message):
    with pytest.raises(RecipeError, match=message.replace("(", r"\(")):
        make()


@pytest.mark.parametrize("rounds", [6, 8])
def test_a_run_has_as_many_rounds_as_its_phases(tmp_path, rounds):
    with pytest.raises(
        RecipeError, match=rf"they have 7 rounds, and the run is to have {rounds} \(num-server-rounds\)"
    ):
        toy.run(tmp_path / "run", num_rounds=rounds)


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ([phase(weighted_average(), 1, train="router")], "phase 1: train: found 'router' for a model which has no rou"),
        ([phase(weighted_average(), 1, train="layers.*")], "phase 1: train: found 'layers.*' for a model which has no"),
        (
            [phase(moe_upcycle()), phase(moe_upcycle())],
            "phase 2: moe_upcycle: tensor 'experts.0.hidden1.weight' has no place",
        ),
        ([phase(moe_upcycle()), phase(ties(), 1, train="hidden1.*")], "phase 2: train: found 'hidden1.*' for a model"),
        ([phase(depth_upscale())], "phase 1: depth_upscale: found no numbered layers"),
    ],
)
def test_phases_are_planned_on_what_those_before_them_make(tmp_path, phases, message):
    with pytest.raises(RecipeError) as caught:
        toy.run(tmp_path / "run", merge=schedule(phases), num_rounds=len(phases))
    assert str(caught.value).startswith(message)


# In a recipe --------------------------------------------------------------------------------------------------------

RECIPE = """
phases:
  - {rounds: 1-2, merge_method: weighted_average}
  - {merge_method: moe_upcycle, parameters: {router: hidden, top_k: 2}}
  - {rounds: 2, train: router, merge_method: weighted_average, server_optimizer: {name: adam, lr: 0.02},
     config: {local-steps: 9}}
  - {rounds: 6-7, train: all, merge_method: weighted_average, server_optimizer: {name: adam, lr: 0.02}}
"""


def test_a_recipe_says_the_same(tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    recipe = Recipe.load(tmp_path / "recipe.yaml")
    assert str(recipe.build()) == str(toy.phases())
    (tmp_path / "again.yaml").write_text(Recipe.of(toy.phases()).to_yaml())
    assert str(Recipe.load(tmp_path / "again.yaml").build()) == str(toy.phases())
    assert Recipe.from_config({"recipe": str(tmp_path / "recipe.yaml")}) == recipe


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("phases: []", "phases: found []"),
        ("phases: [{merge_method: ties}]\nmerge_method: ties", "unknown key 'merge_method' in a recipe of phases"),
        ("phases: [{merge_method: ties, round: 3}]", "unknown key 'round' in phase 1; did you mean 'rounds'?"),
        ("phases: [{merge_method: ties, rounds: 3-1}]", "phase 1: rounds: found '3-1', wanted how many"),
        ("phases: [{merge_method: ties, rounds: many}]", "phase 1: rounds: found 'many', wanted how many"),
        (
            "phases: [{merge_method: ties, rounds: 2}, {merge_method: ties, rounds: 2-4}]",
            "phase 2: it begins with round ",
        ),
        (
            "phases: [{merge_method: ties, rounds: 2}, {merge_method: ties, rounds: 4-5}]",
            "phase 2: it begins with round ",
        ),
        ("phases: [{merge_method: ties, rounds: 2}, {merge_method: tees}]", "phase 2: unknown merge method 'tees'"),
        ("phases: [{merge_method: ties}, {merge_method: ties}]", "phase 1: found no number of rounds, which only"),
        ("phases: [{merge_method: ties, train: 3}]", "phase 1: train: found 3"),
        ("phases: [{merge_method: ties, config: 3}]", "phase 1: config: found 3"),
    ],
)
def test_wrong_recipes_are_refused_by_the_number_of_the_phase(tmp_path, text, message):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(RecipeError) as caught:
        Recipe.load(tmp_path / "recipe.yaml")
    assert message in str(caught.value)


def test_a_recipe_is_planned_on_a_base(tmp_path):
    base = {name: TensorSpec.of(tensor) for name, tensor in toy.initial().items()}
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    Recipe.load(tmp_path / "recipe.yaml").build(base)
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("train: router", "train: gate"))
    with pytest.raises(RecipeError, match="phase 3: train: found 'gate' for a model which has no tensor of that name"):
        Recipe.load(tmp_path / "recipe.yaml").build(base)
