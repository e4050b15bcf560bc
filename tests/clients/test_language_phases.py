"""A federation of language models that becomes a mixture of experts, whose router is trained, in one command."""

import json

import pytest
import torch
from tiny_language import APP, TINY, journal

from fl_merge.flower.simulate import simulate
from fl_merge.flower.watch import Watcher, watching
from fl_merge.runs import Checkpoint
from fl_merge.store import load
from language_clients import base, corpus, local, weights
from language_clients.settings import Settings
from language_clients.tokens import Bytes

RECIPE = """
phases:
  - {rounds: 1, merge_method: weighted_average}
  - {merge_method: moe_upcycle, parameters: {router: hidden, top_k: 2}, config: {local-steps: 4}}
  - {rounds: 1, train: router, merge_method: weighted_average, config: {learning-rate: 0.02}}
  - {rounds: 1, merge_method: weighted_average}
"""


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phases")
    (folder / "recipe.yaml").write_text(RECIPE)
    config = TINY | {"cache-folder": f'"{folder / "cache"}"'}
    return {
        "overrides": [f"{key}={value}" for key, value in config.items()],
        "recipe": folder / "recipe.yaml",
        "workers": 0,
        "nodes": 4,
    }


@pytest.fixture(scope="module")
def whole(options, tmp_path_factory):
    """The folder of a run of four rounds."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    simulate(APP, run_folder=folder, **options)
    return folder


def test_dense_to_mixture_to_trained_router_in_one_command(whole):
    reports = [line["report"] for line in journal(whole, "round_ended")]
    assert [len(report["accepted"]) for report in reports] == [4, 4, 4, 4]
    sizes = [report["accepted"][0]["num_bytes"] for report in reports]
    assert sizes[2] == 2 * 4 * 32 * 2, "two layers' routers of four experts in bfloat16"
    assert sizes[1] == sizes[0] + 4 * 2 * 32 + 4, "the hidden means and the count beside the model"
    assert sizes[3] > 2 * sizes[0]
    for report in reports[2:]:
        for accepted in report["accepted"]:
            load_E = accepted["metrics"]["expert-load"]
            assert len(load_E) == 4
            assert sum(load_E) == pytest.approx(1)
    assert "expert-load" not in reports[0]["accepted"][0]["metrics"]
    evaluated = journal(whole, "clients_evaluated")[-1]["evaluation"]["by_client"]
    assert {int(metrics["partition-id"]) for _, metrics in evaluated.values()} == {0, 1, 2, 3}
    assert all(len(metrics["expert-load"]) == 4 for _, metrics in evaluated.values())
    scores = journal(whole, "server_evaluated")[-1]["metrics"]
    assert {f"bits-per-byte/{domain}" for domain in corpus.DOMAINS} <= set(scores)
    assert all(sum(scores[f"expert-load/{domain}"]) == pytest.approx(1) for domain in corpus.DOMAINS)
    assert not any(name.startswith("expert-load") for name in journal(whole, "server_evaluated")[0]["metrics"])


def test_what_the_run_leaves_loads_in_transformers_and_generates(whole):
    from transformers import AutoConfig, AutoModelForCausalLM

    described = json.loads((whole / "architecture.json").read_text())
    assert described["model_type"] == "mixtral"
    model = AutoModelForCausalLM.from_pretrained(whole, config=AutoConfig.for_model(**described), dtype=torch.float32)
    assert model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (1, 6)
    settings = Settings.read(TINY | {"cache-folder": str(whole)})
    scores = journal(whole, "server_evaluated")[-1]["metrics"]
    here = local.Local(model.eval(), Bytes(), settings)
    documents = corpus.validation_documents(0)["python"]
    assert here.bits_per_byte(documents)[0] == pytest.approx(scores["bits-per-byte/python"], rel=1e-3)


@pytest.mark.parametrize("at", [3, 4])
def test_a_restart_between_the_phases_changes_no_bit(whole, options, tmp_path, at):
    class Stops(Watcher):
        def round_started(self, round_number, sampled):
            if round_number == at:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), watching(Stops()):
        simulate(APP, run_folder=tmp_path / "run", **options)
    assert Checkpoint.read(tmp_path / "run").model.architecture["model_type"] == "mixtral"
    simulate(APP, resume=tmp_path / "run", overrides=[], workers=0)
    ours, theirs = load(tmp_path / "run"), load(whole)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_only_the_router_is_trained_where_it_alone_is_asked_for(whole):
    config = weights.config_of(json.loads((whole / "architecture.json").read_text()))
    model = weights.model_of(config, load(whole))
    names = weights.tensors_of(model)
    weights.train_only(model, [name for name in names if name.endswith(".gate.weight")])
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert trained == [f"model.layers.{number}.mlp.gate.weight" for number in range(2)]
    weights.train_only(model, names)
    assert all(weight.requires_grad for weight in model.parameters())
    with pytest.raises(
        ValueError, match=r"asked to train '.*experts.0.w1.weight' without '.*': they are one tensor here"
    ):
        weights.train_only(model, ["model.layers.0.block_sparse_moe.experts.0.w1.weight"])


def test_the_load_balancing_loss_evens_the_load(whole):
    """Expert 0 is made to be chosen by nearly all tokens; with the loss others get their share back."""
    settings = Settings.read(TINY | {"local-steps": 40, "learning-rate": 0.02, "cache-folder": str(whole)})
    tensors, own = load(whole), corpus.client(0, 4, train_bytes=10_000)
    described = json.loads((whole / "architecture.json").read_text())
    skewed = {name: tensor.float().clone() for name, tensor in tensors.items()}
    routers = [name for name in tensors if name.endswith(".gate.weight")]
    gates, reads = weights.model_of(weights.config_of(described), skewed), []
    for layer in gates.model.layers:
        layer.mlp.register_forward_pre_hook(lambda module, inputs: reads.append(inputs[0].flatten(0, -2).mean(0)))
    gates(next(local.Local(gates, Bytes(), settings).inputs(own.train)))
    for name, mean in zip(routers, reads, strict=True):
        skewed[name] = torch.cat(
            [skewed[name][:1] + 2 * mean.detach() / mean.detach().square().sum(), skewed[name][1:]]
        )
    share = {}
    for coefficient in (0.0, 1.0):
        config = weights.config_of({**described, "router_aux_loss_coef": coefficient})
        here = local.Local(weights.model_of(config, skewed), Bytes(), settings)
        weights.train_only(here.model, routers)
        before = max(here.expert_load(own.train)["expert-load"])
        here.finetune(own.train, "load")
        share[coefficient] = max(here.expert_load(own.train)["expert-load"])
    assert before > 0.45, "a half is all that one of the two chosen experts can have"
    assert share[1.0] < before - 0.1
    assert share[1.0] < share[0.0]


def test_a_family_that_transformers_does_not_know_is_said_to_be_that():
    with pytest.raises(ValueError, match="a model of family 'mamba9', which transformers cannot build"):
        weights.config_of({"model_type": "mamba9"})


def test_the_architecture_is_plain_data(tmp_path):
    settings = Settings.read(TINY | {"cache-folder": str(tmp_path)})
    described = weights.plain(base.config(settings))
    assert described["model_type"] == "llama"
    assert str(tmp_path) not in json.dumps(described)
    assert weights.config_of(json.loads(json.dumps(described))).hidden_size == 32
