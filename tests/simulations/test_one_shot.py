"""The one-shot study: scales are chosen on what is given, a line stands for many merges, the table says who refused."""

import pytest
import torch

import baselines
import one_shot
import study
from digits_clients import data, model
from fl_merge import MergeError

SCALES = (0.5, 1.0, 2.0)


@pytest.fixture(scope="module")
def federation():
    return one_shot.Federation(baselines.population(epochs=1))


def test_the_scale_is_chosen_on_the_examples_that_are_given(federation):
    shown = federation.people.clients[3].test
    by_scale = {scale: federation.merged("task_arithmetic", scale=scale) for scale in SCALES}
    wanted = max(by_scale, key=lambda scale: model.accuracy(by_scale[scale], shown))
    found, state = federation.tuned("task_arithmetic", SCALES, [shown])
    assert found == wanted
    assert all(torch.allclose(state[name], by_scale[wanted][name], rtol=0, atol=1e-6) for name in state)


def test_a_method_that_is_linear_in_its_scale_is_merged_twice_and_another_each_time():
    base, calls = {"w": torch.tensor([1.0, 2.0])}, []

    def linear(scale):
        calls.append(scale)
        return {"w": base["w"] + scale * torch.tensor([0.5, -1.0])}

    at = one_shot.along_scales(linear, base)
    assert at(8.0)["w"].tolist() == [5.0, -6.0]
    assert calls == [1.0, 2.0]

    def square(scale):
        return {"w": base["w"] + scale**2}

    assert one_shot.along_scales(square, base)(8.0)["w"].tolist() == [65.0, 66.0]


def rows_of(model_name, setting, means, **more):
    return [
        {"seed": seed, "model": model_name, "setting": setting, "mean": m, "worst": m / 2, "normalised": m, **more}
        for seed, m in enumerate(means)
    ]


def test_the_tables_pair_by_seed_and_say_what_was_refused_and_which_scales_are_at_an_end():
    rows = [
        *rows_of("joint", "baseline", [0.9, 0.8]),
        *rows_of("weighted_average", "default", [0.4, 0.6]),
        *rows_of("task_arithmetic", "default", [0.4, 0.6]),
        *rows_of("task_arithmetic", "tuned", [0.5, 0.6], scale=1.0),
        *rows_of("ties", "tuned", [0.5, 0.8], scale=2.0),
        {"seed": 0, "model": "nearswap", "setting": "refused", "note": "nearswap: found 8 clients, wanted 1"},
    ]
    text = one_shot.tables(rows, SCALES)
    assert "| joint | 85.0 [80.0, 90.0] | 42.5 | 85.0 | +35.0 [+20.0, +50.0] |" in text
    assert "| ties, scale 2 | 65.0 [50.0, 80.0] | 32.5 | 65.0 | +15.0 [+10.0, +20.0] | +10.0 [+0.0, +20.0] |" in text
    assert "| weighted_average | 50.0 [40.0, 60.0] | 25.0 | 50.0 | +0.0 [+0.0, +0.0] |  |" in text
    assert text.index("| ties, scale 2") < text.index("| weighted_average")  # the best comes first
    assert "- nearswap: nearswap: found 8 clients, wanted 1" in text
    assert "at an end of the grid, 0.5 or 2: ties." in text


def test_one_seed_has_every_baseline_and_a_method_at_its_defaults_and_tuned():
    rows = one_shot.work(one_shot.BASELINES, 0, 1)
    assert {"pretrained", "sequential", "joint", "ensemble, mean logits"} <= {row["model"] for row in rows}
    default, tuned = one_shot.work("ties", 0, 1, [1.0])
    assert (default["setting"], tuned["setting"], tuned["scale"]) == ("default", "tuned", 1.0)
    assert default["mean"] == tuned["mean"]  # at the scale that is the default
    for row in [*rows, default]:
        assert row["mean"] == pytest.approx(sum(row[name] for name in data.DOMAINS) / 8)
        assert row["worst"] == min(row[name] for name in data.DOMAINS)


def test_a_method_that_cannot_merge_eight_models_leaves_its_reason(monkeypatch):
    def refuse(self, name):
        raise MergeError("nearswap: found 8 clients, wanted 2")

    monkeypatch.setattr(one_shot.Federation, "merged", refuse)
    (row,) = one_shot.work("ties", 0, 1, [1.0])
    assert (row["setting"], row["note"]) == ("refused", "nearswap: found 8 clients, wanted 2")


def test_the_command_writes_its_files(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["one_shot.py", "--quick", "--workers", "0", "--out", str(tmp_path)])
    one_shot.main()
    printed = capsys.readouterr().out
    text = (tmp_path / "table.md").read_text()
    assert text in printed
    assert "| weighted_average |" in text
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    rows = (tmp_path / "raw.csv").read_text().splitlines()
    assert rows[0].startswith("seed,model,setting,mean,worst,normalised,clean")
    assert len(study.where([{"seed": int(line.split(",")[0])} for line in rows[1:]], seed=1)) == (len(rows) - 1) / 2
