"""The digits clients become a mixture of experts and train its router alone."""

import json
import math

import pytest
import torch

from digits_clients import client_app, data, mixture, model, server_app
from fl_merge import merge, phase, schedule
from fl_merge.flower.apps import LoadedApp, run_app
from fl_merge.methods import moe_upcycle, weighted_average
from fl_merge.recipe import Recipe
from fl_merge.store import load


def run(plan, folder, *, nodes, epochs):
    """A federation of the digits' apps by a recipe; its journal and model are in the folder `run`."""
    recipe = Recipe.of(plan)
    assert recipe is not None
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    config = {
        "recipe": str(folder / "recipe.yaml"),
        "run-folder": str(folder / "run"),
        "num-server-rounds": 0,
        "local-epochs": epochs,
    }
    run_app(LoadedApp(server_app.app, client_app.app, run_config=config), nodes=nodes, workers=0)


def test_a_mixture_out_of_eight_domains(tmp_path):
    plan = schedule(
        [
            phase(moe_upcycle(router="hidden", top_k=2)),
            phase(weighted_average(), rounds=1, train="router"),
            phase(weighted_average(), rounds=1),
        ]
    )
    run(plan, tmp_path, nodes=8, epochs=2)
    found = load(tmp_path / "run")
    assert found["router.weight"].shape == (8, 64)
    lines = [json.loads(line) for line in (tmp_path / "run" / "journal.jsonl").read_text().splitlines()]
    scores = [line["metrics"] for line in lines if line["event"] == "server_evaluated"]
    reports = [line["report"] for line in lines if line["event"] == "round_ended"]
    assert [len(report["accepted"]) for report in reports] == [8, 8, 8]
    assert reports[1]["accepted"][0]["num_bytes"] == 4 * 8 * 64
    assert scores[-1]["accuracy"] > scores[0]["accuracy"] + 0.1
    assert not any(name.startswith("expert-load") for name in scores[0])
    for domain in data.DOMAINS:
        assert len(scores[-1][f"expert-load/{domain}"]) == 8
        assert sum(scores[-1][f"expert-load/{domain}"]) == pytest.approx(1)
    assert "expert-load" not in reports[0]["accepted"][0]["metrics"]
    assert all(sum(each["metrics"]["expert-load"]) == pytest.approx(1) for each in reports[2]["accepted"])
    by_client = [line["evaluation"] for line in lines if line["event"] == "clients_evaluated"][-1]["by_client"]
    assert all(len(metrics["expert-load"]) == 8 for _, metrics in by_client.values())


def test_the_load_balancing_loss_by_hand():
    """Probabilities 3/4 and 1/4: chosen by all, expert 0 has f = 1 and P = 3/4; by one image each, both have a half."""
    most, least = math.log(3.0), 0.0
    alike, even = torch.tensor([[most, least], [most, least]]), torch.tensor([[most, least], [least, most]])
    assert float(mixture.balance(alike, 1)) == pytest.approx(2 * (1 * 0.75 + 0 * 0.25))
    assert float(mixture.balance(even, 1)) == pytest.approx(1.0)
    assert float(mixture.balance(alike, 2)) == pytest.approx(1.0), "both are chosen by all"


def test_the_load_balancing_loss_evens_the_load():
    """Expert 0 is made to be chosen by all images; with the loss others get their share, without it fewer do."""
    dense = model.initial(0)
    clients = {str(at): model.random_state(at + 1) for at in range(4)}
    state = merge(moe_upcycle(top_k=2), dense, clients)
    own = data.client(0, 8).train
    mean_P = (own.images_BHW.flatten(1) * 2 - 1).mean(dim=0)
    state["router.weight"][0] += 0.5 * mean_P / mean_P.square().sum()
    before = model.expert_load(state, own)["expert-load"]
    share = {}
    for balance in (0.0, 1.0):
        trained = model.train(
            state, own, epochs=10, learning_rate=0.05, seed="load", only=["router.weight"], balance=balance
        )
        share[balance] = max(model.expert_load(trained, own)["expert-load"])
    assert before[0] > 0.45, "a half is all that one of the two chosen experts can have"
    assert share[0.0] > 0.45
    assert share[1.0] < 0.35
    assert model.expert_load(dense, own) == {}


def test_clients_and_server_take_as_many_experts_as_the_recipe_says(tmp_path):
    plan = schedule([phase(moe_upcycle(top_k=1)), phase(weighted_average(), rounds=1)])
    run(plan, tmp_path, nodes=2, epochs=1)
    found, told = load(tmp_path / "run"), json.loads((tmp_path / "run" / "architecture.json").read_text())
    assert (told["model_type"], told["num_experts_per_tok"]) == ("mlp_moe", 1)
    lines = [json.loads(line) for line in (tmp_path / "run" / "journal.jsonl").read_text().splitlines()]
    score = [line["metrics"] for line in lines if line["event"] == "server_evaluated"][-1]
    clean = data.validation_examples("domains", 0)["clean"]
    assert score["accuracy/clean"] == model.accuracy(found, clean, top_k=1)
    assert score["expert-load/clean"] == model.expert_load(found, clean, top_k=1)["expert-load"]
    assert score["expert-load/clean"] != model.expert_load(found, clean, top_k=2)["expert-load"]
