"""The digits clients become a mixture of experts and train its router alone."""

import json

from digits_clients import client_app, server_app
from fl_merge import phase, schedule
from fl_merge.flower.apps import LoadedApp, run_app
from fl_merge.methods import moe_upcycle, weighted_average
from fl_merge.recipe import Recipe
from fl_merge.store import load


def test_a_mixture_out_of_eight_domains(tmp_path):
    plan = schedule(
        [
            phase(moe_upcycle(router="hidden", top_k=2)),
            phase(weighted_average(), rounds=1, train="router"),
            phase(weighted_average(), rounds=1),
        ]
    )
    recipe = Recipe.of(plan)
    assert recipe is not None
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    config = {
        "recipe": str(tmp_path / "recipe.yaml"),
        "run-folder": str(tmp_path / "run"),
        "num-server-rounds": 0,
        "local-epochs": 2,
    }
    run_app(LoadedApp(server_app.app, client_app.app, run_config=config), nodes=8, workers=0)
    model = load(tmp_path / "run")
    assert model["router.weight"].shape == (8, 64)
    lines = [json.loads(line) for line in (tmp_path / "run" / "journal.jsonl").read_text().splitlines()]
    scores = [line["metrics"] for line in lines if line["event"] == "server_evaluated"]
    reports = [line["report"] for line in lines if line["event"] == "round_ended"]
    assert [len(report["accepted"]) for report in reports] == [8, 8, 8]
    assert reports[1]["accepted"][0]["num_bytes"] == 4 * 8 * 64
    assert scores[-1]["accuracy"] > scores[0]["accuracy"] + 0.1
