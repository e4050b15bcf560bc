"""Language models: adapters of several ranks, folded into the base, a mixture of that, its router trained."""

import json

import pytest
import torch
from tiny_language import APP, TINY, journal

from fl_merge import RecipeError
from fl_merge.flower.simulate import simulate
from fl_merge.flower.watch import Watcher, watching
from fl_merge.runs import Checkpoint
from fl_merge.store import load
from language_clients import corpus

RECIPE = """
phases:
  - {rounds: 1, merge_method: lora_svd, config: {learning-rate: 0.02}}
  - {merge_method: moe_upcycle, parameters: {router: hidden, top_k: 2}, config: {local-steps: 3}}
  - {rounds: 1, train: router, merge_method: weighted_average}
"""

RANKS = {"adapter-rank": "'2,4'", "adapter-alpha": "'4,8'"}


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    folder = tmp_path_factory.mktemp("folding")
    (folder / "recipe.yaml").write_text(RECIPE)
    config = TINY | RANKS | {"cache-folder": f'"{folder / "cache"}"'}
    return {
        "overrides": [f"{key}={value}" for key, value in config.items()],
        "recipe": folder / "recipe.yaml",
        "workers": 0,
        "nodes": 3,
    }


class Folded(Watcher):
    """Keeps the folded model."""

    def adapter_folded(self, round_number, modules, model):
        self.model = model


@pytest.fixture(scope="module")
def ran(options, tmp_path_factory):
    """The folder of a run of three rounds, and the model into which the adapter was folded."""
    folder, kept = tmp_path_factory.mktemp("whole") / "run", Folded()
    with watching(kept):
        simulate(APP, run_folder=folder, **options)
    return folder, kept.model


@pytest.fixture
def whole(ran):
    return ran[0]


@pytest.fixture
def folded(ran):
    return ran[1]


def test_adapters_then_a_mixture_then_its_router_in_one_command(whole):
    reports = [line["report"] for line in journal(whole, "round_ended")]
    assert [len(report["accepted"]) for report in reports] == [3, 3, 3]
    ranks = [accepted["num_bytes"] for accepted in reports[0]["accepted"]]
    assert ranks[1] == 2 * ranks[0] == 2 * ranks[2], "adapters of ranks 2, 4, 2"
    assert reports[1]["accepted"][0]["num_bytes"] > 4 * ranks[1], "all weights"
    assert reports[2]["accepted"][0]["num_bytes"] == 2 * 3 * 32 * 2, "two layers' routers of three experts in bfloat16"
    assert all(len(accepted["metrics"]["expert-load"]) == 3 for accepted in reports[2]["accepted"])
    assert [(line["round"], line["modules"]) for line in journal(whole, "adapter_folded")] == [(2, 14)]
    scores = [line["metrics"] for line in journal(whole, "server_evaluated")]
    assert all({f"bits-per-byte/{domain}" for domain in corpus.DOMAINS} <= set(each) for each in scores)
    assert scores[1]["bits-per-byte"] < scores[0]["bits-per-byte"] - 0.01
    assert json.loads((whole / "architecture.json").read_text())["model_type"] == "mixtral"
    assert json.loads((whole / "adapter" / "fl_merge_manifest.json").read_text())["round"] == 1


def test_the_model_that_goes_on_is_what_peft_makes_of_base_and_adapter(whole, folded):
    import peft
    from transformers import AutoModelForCausalLM

    about = json.loads((whole / "adapter" / "adapter_config.json").read_text())
    base = AutoModelForCausalLM.from_pretrained(about["base_model_name_or_path"], dtype=torch.float32)
    start = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    wanted = peft.PeftModel.from_pretrained(base, whole / "adapter").merge_and_unload().state_dict()
    found = folded.master()
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)
        assert torch.equal(tensor, start[name]) == (".layers." not in name or "norm" in name)
    assert folded.sent["lm_head.weight"].dtype == torch.bfloat16


def test_a_restart_at_the_switch_changes_no_bit(whole, options, tmp_path):
    class Stops(Watcher):
        def round_started(self, round_number, sampled):
            if round_number == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), watching(Stops()):
        simulate(APP, run_folder=tmp_path / "run", **options)
    assert Checkpoint.read(tmp_path / "run").model.architecture == {}, "an adapter"
    simulate(APP, resume=tmp_path / "run", overrides=[], workers=0)
    ours, theirs = load(tmp_path / "run"), load(whole)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_clients_without_a_rank_are_told_so_before_the_first_round(options, tmp_path):
    without = [each for each in options["overrides"] if not each.startswith("adapter-rank")]
    with pytest.raises(RecipeError, match="adapter-rank: 0, and the first phase merges adapters; wanted a rank >= 1"):
        simulate(APP, run_folder=tmp_path / "run", **{**options, "overrides": without})
