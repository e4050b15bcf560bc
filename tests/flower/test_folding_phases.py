"""A federation that begins with adapters of several ranks and goes on with the model that they were folded into."""

import json
import subprocess
import sys

import folding_app as toy
import phases_app as dense
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_phases import Models, bits, everything, journal

from fl_merge import MergeError, Recipe, RecipeError, momentum, phase, schedule, server_optimizer
from fl_merge.adapters import BaseModel, fold, load_adapter
from fl_merge.flower import FedMerge
from fl_merge.flower.phasing import Phasing
from fl_merge.flower.watch import Watcher
from fl_merge.methods import lora_factor_mean, lora_residual, lora_svd, weighted_average
from fl_merge.runs import Checkpoint
from fl_merge.store import load
from fl_merge.tuning import Tuner
from fl_merge.types import TensorSpec

AFTER = [phase(weighted_average(), rounds=1)]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of the network."""
    return toy.save_base(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    """The six rounds in one go: the strategy, the models after each round, the folder."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    models = Models()
    strategy, _ = toy.run(folder, base, watchers=[models])
    return strategy, models.after, folder


def test_adapters_then_the_mixture_of_what_they_were_folded_into(whole):
    _, after, folder = whole
    assert all(".lora_" in name for number in (1, 2) for name in after[number].sent)
    assert after[2].architecture == {}
    assert after[3].sent["router.weight"].shape == (4, dense.WIDTH)
    assert after[3].architecture == {**toy.ARCHITECTURE, "model_type": "mlp_moe"} | {
        "num_experts": 4,
        "num_experts_per_tok": 2,
    }
    assert [(line["round"], line["phase"]) for line in journal(folder, "phase_started")] == [
        (1, 1),
        (3, 2),
        (4, 3),
        (6, 4),
    ]
    assert [(line["round"], line["modules"]) for line in journal(folder, "adapter_folded")] == [(3, 2)]
    reports = [line["report"] for line in journal(folder, "round_ended")]
    assert [len(report["accepted"]) for report in reports] == [4] * 6
    assert [report["accepted"][0]["metrics"]["sparse"] for report in reports] == [-1, -1, 0, 1, 1, 1]
    factors = toy.RANKS[0] * sum(outputs + inputs for outputs, inputs in toy.MODULES.values())
    assert [report["accepted"][0]["num_bytes"] for report in reports[:2]] == [4 * factors] * 2
    assert reports[3]["accepted"][0]["num_bytes"] == 4 * 4 * dense.WIDTH
    told = [line["evaluation"]["metrics"]["adapter"] for line in journal(folder, "clients_evaluated")]
    assert told == [1, 1, 0, 0, 0, 0]


def test_watchers_do_not_hear_of_a_phase_whose_model_could_not_be_made():
    class Carried:
        holds_adapter = True

        def begin_phase(self):
            pass

        def fold(self):
            raise MergeError("tensor 'w' is not finite")

    told = []
    phasing = Phasing(schedule([phase(lora_svd(), rounds=1), *AFTER]), lambda method: None)
    with pytest.raises(MergeError, match="'w' is not finite"):
        phasing.enter(2, Carried(), told.append)
    assert told == []
    phasing.enter(1, Carried(), told.append)
    assert len(told) == 1


class Folded(Watcher):
    """Keeps the folded model."""

    def adapter_folded(self, round_number, modules, model):
        self.model = model


def test_the_model_that_goes_on_is_the_base_with_the_merged_adapter_in_it(base, tmp_path):
    """By the product on paper, and by `fl-merge lora fold` of the adapter that the run's folder keeps."""
    models, kept = Models(), Folded()
    toy.run(
        tmp_path / "run",
        base,
        merge=schedule([phase(lora_svd(), rounds=2), *AFTER]),
        num_rounds=3,
        watchers=[models, kept],
    )
    folded, start = kept.model.sent, dense.initial()
    assert list(folded) == sorted(start)
    for module in toy.MODULES:
        a, b = (models.after[2].sent[f"base_model.model.{module}.lora_{part}.weight"].double() for part in "AB")
        assert float((b @ a).abs().max()) > 0.01
        assert torch.equal(folded[f"{module}.weight"], (start[f"{module}.weight"].double() + b @ a).float())
    for name in ("hidden1.bias", "hidden2.bias", "output.weight", "output.bias"):
        assert torch.equal(folded[name], start[name])
    fold(load_adapter(tmp_path / "run" / "adapter"), base, tmp_path / "by-hand")
    assert bits(load(tmp_path / "by-hand")) == bits(folded)


@pytest.mark.parametrize("at", [2, 3, 4, 5, 6])
def test_a_run_that_stops_before_at_or_after_the_switch_goes_on_bit_for_bit(base, whole, tmp_path, at):
    class Stops(Watcher):
        def round_started(self, round_number, sampled):
            if round_number == at:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        toy.run(tmp_path / "run", base, watchers=[Stops()])
    assert Checkpoint.read(tmp_path / "run").round_number == at - 1
    resumed, _ = toy.run(tmp_path / "run", base, resume=True)
    assert everything(resumed.model) == everything(whole[0].model)
    folded = [line["round"] for line in journal(tmp_path / "run", "adapter_folded")]
    assert folded == ([3, 3] if at == 3 else [3])


def test_a_run_that_is_killed_in_the_round_of_the_switch_goes_on(whole, tmp_path):
    toy.save_base(tmp_path / "base")
    command = [sys.executable, toy.__file__, str(tmp_path / "run"), "3"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "begun 3\n"
        process.kill()
    assert Checkpoint.read(tmp_path / "run").model.architecture == {}
    resumed, _ = toy.run(tmp_path / "run", tmp_path / "base", resume=True)
    assert everything(resumed.model) == everything(whole[0].model)


def test_a_residual_is_folded_in_too(base, tmp_path):
    """`lora_residual`: the product of the mean factors and the residual's are the mean of the products."""
    models, kept = Models(), Folded()
    merge = schedule([phase(lora_residual(), rounds=1), *AFTER])
    one_rank = {"ranks": "2"}
    toy.run(
        tmp_path / "run",
        base,
        merge=merge,
        num_rounds=2,
        watchers=[models, kept],
        run_config=one_rank,
        initial=toy.adapter(2),
    )
    adapter, start = models.after[1].sent, dense.initial()
    for module in toy.MODULES:
        a, b = (adapter[f"base_model.model.{module}.lora_{part}.weight"].double() for part in "AB")
        c, d = (adapter[f"residual.base_model.model.{module}.lora_{part}.weight"].double() for part in "AB")
        assert float((d @ c).abs().max()) > 1e-4
        wanted = start[f"{module}.weight"].double() + b @ a + d @ c
        torch.testing.assert_close(kept.model.sent[f"{module}.weight"].double(), wanted, rtol=0, atol=1e-6)


def test_a_base_in_bfloat16_keeps_what_was_folded_in_in_its_master(base, tmp_path):
    """A sum in bfloat16 would lose most of a small adapter; what clients are sent is the rounded sum."""
    half, kept, models = toy.save_base(tmp_path / "half", torch.bfloat16), Folded(), Models()
    toy.run(
        tmp_path / "run",
        half,
        merge=schedule([phase(lora_svd(), rounds=1), *AFTER]),
        num_rounds=2,
        watchers=[kept, models],
    )
    sent, master, start = kept.model.sent, kept.model.master(), load(half)
    for module in toy.MODULES:
        a, b = (models.after[1].master()[f"base_model.model.{module}.lora_{part}.weight"].double() for part in "AB")
        name = f"{module}.weight"
        assert (sent[name].dtype, master[name].dtype) == (torch.bfloat16, torch.float32)
        assert torch.equal(master[name], (start[name].double() + b @ a).float())
        assert torch.equal(sent[name], master[name].bfloat16())
    assert load_file(tmp_path / "run" / "model.safetensors")["hidden1.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("form", ["tensors", "function", "file"])
def test_the_base_may_be_at_hand_or_in_a_file(base, whole, tmp_path, form):
    tensors = dict(sorted(dense.initial().items()))  # the toy clients draw in the order of names, a file's is sorted
    given = {
        "tensors": tensors,
        "function": BaseModel(lambda: tensors, toy.ARCHITECTURE),
        "file": base / "model.safetensors",
    }[form]
    about = {} if form == "function" else {"architecture": toy.ARCHITECTURE}
    strategy, _ = toy.run(tmp_path / "run", given, **about)
    assert everything(strategy.model) == everything(whole[0].model)


def test_tied_weights_stay_tied(tmp_path):
    """Two names of one tensor: found by their storage, merged once, sent under both."""
    tensors = dense.initial()
    tensors["again"] = tensors["output.weight"]
    merge = schedule([phase(lora_svd(), rounds=1), phase(weighted_average(), rounds=1)])
    kept = Folded()
    toy.run(tmp_path / "run", tensors, merge=merge, num_rounds=1 + 1, watchers=[kept], architecture=toy.ARCHITECTURE)
    assert dict(kept.model.tied) == {"again": "output.weight"}
    assert list(kept.model.sent) == list(tensors)
    assert kept.model.sent["again"] is kept.model.sent["output.weight"]


def test_a_running_sum_of_adapters_and_then_of_models(base, tmp_path):
    merge = schedule([phase(lora_svd(rank=4), rounds=1), *AFTER])
    one, _ = toy.run(tmp_path / "one", base, merge=merge, num_rounds=2)
    two, _ = toy.run(
        tmp_path / "two", base, merge=merge, num_rounds=2, running_sum=True, spill_folder=tmp_path / "spill"
    )
    for name, tensor in one.model.sent.items():
        torch.testing.assert_close(two.model.sent[name], tensor, rtol=1e-5, atol=1e-6)


# Clients that do not follow ----------------------------------------------------------------------------------------


def test_a_client_that_stays_with_its_adapter_is_refused_by_name_and_the_round_goes_on(base, tmp_path):
    merge = schedule([phase(lora_svd(), rounds=1), phase(weighted_average(), rounds=1)])
    toy.run(tmp_path / "run", base, merge=merge, num_rounds=2, run_config={"stays": 1})
    first, second = (line["report"] for line in journal(tmp_path / "run", "round_ended"))
    assert len(first["accepted"]) == 4
    assert [each["client_id"] for each in second["accepted"]] == ["1000", "1002", "1003"]
    (refused,) = second["refused"]
    assert refused["client_id"] == "1001"
    assert refused["reason"].endswith(
        "the message's config asks for all weights (fl-merge.exchange) of a model of family 'mlp' "
        "(fl-merge.architecture)"
    )


def test_a_client_that_sends_weights_where_adapters_are_exchanged_is_refused_by_name(base, tmp_path):
    merge = schedule([phase(lora_svd(), rounds=1), phase(weighted_average(), rounds=1)])
    toy.run(tmp_path / "run", base, merge=merge, num_rounds=2, run_config={"whole": 1})
    (refused,) = journal(tmp_path / "run", "round_ended")[0]["report"]["refused"]
    assert refused["client_id"] == "1001"
    assert refused["reason"].endswith("the message's config asks for an adapter (fl-merge.exchange)")


# What is refused before a client is asked ---------------------------------------------------------------------------


def test_no_base():
    with pytest.raises(
        RecipeError, match=r"phase 1: lora_svd.* wanted FedMerge\(base=...\) or 'base-model' in the run"
    ):
        FedMerge(toy.phases())


@pytest.mark.parametrize("method", [weighted_average(), lora_svd(), schedule([phase(weighted_average())])])
def test_a_base_that_nothing_is_folded_into(base, method):
    with pytest.raises(RecipeError, match=r"base: found one for .*, wanted it for phases that begin with adapters"):
        FedMerge(method, base=base)


def test_a_base_that_is_not_there(tmp_path):
    with pytest.raises(RecipeError, match="nowhere"):
        FedMerge(toy.phases(), base=tmp_path / "nowhere")


def test_a_quantised_base(tmp_path):
    toy.save_base(tmp_path / "base")
    about = toy.ARCHITECTURE | {"quantization_config": {"quant_method": "gptq"}}
    (tmp_path / "base" / "config.json").write_text(json.dumps(about))
    with pytest.raises(RecipeError, match=r"phase 1: base '.*' is quantised \(quantization_config in its"):
        toy.run(tmp_path / "run", tmp_path / "base")
    tensors = dense.initial() | {"hidden2.weight": torch.zeros(dense.HIDDEN, dense.HIDDEN, dtype=torch.int8)}
    save_file(tensors, tmp_path / "base" / "model.safetensors")
    with pytest.raises(
        RecipeError, match=r"is quantised \(tensor 'hidden2.weight', .*an adapter cannot be folded into"
    ):
        toy.run(tmp_path / "run", tmp_path / "base" / "model.safetensors")
    assert not (tmp_path / "run" / "journal.jsonl").exists() or not journal(tmp_path / "run", "round_started")


def test_an_adapter_of_another_model(base, tmp_path):
    other = {name.replace("hidden2", "hidden9"): tensor for name, tensor in toy.adapter().items()}
    with pytest.raises(
        RecipeError,
        match=r"phase 1: base '.*': module 'base_model.model.hidden9': the base has no tensor 'hidden9.weight'",
    ):
        toy.run(tmp_path / "one", base, initial=other)
    narrow = {name: t[:, :4] if "hidden1.lora_A" in name else t for name, t in toy.adapter().items()}
    with pytest.raises(
        RecipeError, match=r"phase 1: base '.*': tensor 'hidden1.weight': shape \(8, 5\), the adapter's pr"
    ):
        toy.run(tmp_path / "two", base, initial=narrow)


def test_an_initial_model_that_is_no_adapter(base, tmp_path):
    with pytest.raises(RecipeError, match="phase 1: a method for LoRA adapters: found no 'lora_A' and 'lora_B' among"):
        toy.run(tmp_path / "run", base, initial=dense.initial())


def test_what_comes_after_is_planned_on_the_base(base, tmp_path):
    merge = schedule([phase(lora_svd(), rounds=1), phase(weighted_average(), rounds=1, train="router")])
    with pytest.raises(RecipeError, match="phase 2: train: found 'router' for a model which has no router"):
        toy.run(tmp_path / "run", base, merge=merge, num_rounds=2)


def test_resumed_on_another_base(base, tmp_path):
    """After the switch the model is the run's own; a base of other tensors is not what it came of."""
    merge = schedule([phase(lora_svd(), rounds=1), phase(weighted_average(), rounds=2)])

    class Stops(Watcher):
        def round_started(self, round_number, sampled):
            if round_number == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        toy.run(tmp_path / "run", base, merge=merge, num_rounds=3, watchers=[Stops()])
    other = dense.initial() | {"more": torch.ones(3)}
    with pytest.raises(RecipeError, match=r"tensor 'more' is not in the run's model, .* in the initial one"):
        toy.run(tmp_path / "run", other, merge=merge, num_rounds=3, resume=True, architecture=toy.ARCHITECTURE)
    toy.run(tmp_path / "run", base, merge=merge, num_rounds=3, resume=True)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: schedule([*AFTER, phase(lora_svd())]), "phase 2: found lora_svd.*wanted it as the first phase"),
        (lambda: schedule([phase(lora_svd(), 1), phase(lora_svd(), 1)]), "phase 2: found lora_svd.*as the first phase"),
        (lambda: schedule([phase(lora_svd(), 1)]), "phases: found lora_svd.* alone, .*or the method without phases"),
        (lambda: schedule([phase(lora_svd()), *AFTER]), "phase 1: found no number of rounds"),
        (lambda: phase(lora_svd(), 1, train="router"), "in whose rounds clients train their adapters"),
        (
            lambda: phase(lora_factor_mean(share="A"), 1),
            "each client keeps a B of its own: there is no adapter to fold",
        ),
        (lambda: phase(server_optimizer(lora_svd(), momentum()), 1), "a server optimizer steps along tensors"),
        (lambda: FedMerge(toy.phases(), base="x", tune=Tuner(lambda model: 0.0, examples=5)), "for whole models"),
    ],
)
def test_phases_of_adapters_that_make_no_sense(make, message):
    with pytest.raises(RecipeError, match=message):
        make()


# In a recipe --------------------------------------------------------------------------------------------------------

RECIPE = """
phases:
  - {rounds: 1-2, merge_method: lora_svd}
  - {merge_method: moe_upcycle, parameters: {router: hidden, top_k: 2}}
  - {rounds: 4-5, train: router, merge_method: weighted_average}
  - {rounds: 1, train: all, merge_method: weighted_average}
"""


def test_a_recipe_says_the_same_and_is_planned_on_the_base(tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    assert str(Recipe.load(tmp_path / "recipe.yaml").build()) == str(toy.phases())
    assert str(Recipe.from_dict(Recipe.of(toy.phases())._content()).build()) == str(toy.phases())
    specs = {name: TensorSpec.of(tensor) for name, tensor in dense.initial().items()}
    Recipe.load(tmp_path / "recipe.yaml").build(specs)
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("router,", "gate,"))
    with pytest.raises(RecipeError, match="phase 3: train: found 'gate'"):
        Recipe.load(tmp_path / "recipe.yaml").build(specs)
