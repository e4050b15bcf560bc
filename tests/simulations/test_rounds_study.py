"""The study of rounds: settings are chosen on validation data, differences are paired, the command writes its files."""

import pytest

import rounds
from fl_merge.optimizers import ServerOptimized


def test_every_method_named_is_registered_and_every_setting_can_be_built():
    found = rounds.aggregators(rounds.model_methods())
    assert {*rounds.DEFAULTS, *rounds.TUNED, *rounds.OPTIMIZED} <= set(rounds.model_methods())
    assert set(rounds.DEFAULTS) < set(found)
    tried = [setting for settings in found.values() for setting in settings]
    assert all(isinstance(s.build(), ServerOptimized) == bool(s.optimizer) for s in tried)
    assert len(found[rounds.FEDAVGM]) == 9
    assert len(found[rounds.FEDADAM]) == 10


def test_the_setting_with_the_best_validation_accuracy_is_chosen_whatever_the_test_says(monkeypatch):
    scores = {"a=1": (0.7, 0.9), "a=2": (0.8, 0.1), "a=3": (0.8, 1.0)}

    def run(setting, alpha, seed, number):
        validation, test = scores[str(setting)]
        return {"validation": validation, "test": test}

    monkeypatch.setattr(rounds, "run", run)
    settings = [rounds.Setting("ties", {"a": a}) for a in (1, 2, 3)]
    rows = rounds.one_aggregator("ties", settings, 0.1, 0, 2)
    assert [row["chosen"] for row in rows] == [0, 1, 0]


def test_the_last_rounds_are_averaged(monkeypatch):
    found = {"validation": [0.0, 1.0, 0.5, 0.5, 0.5, 0.5], "test": [0.2, 0.4, 0.2, 0.4, 0.2, 0.4]}
    monkeypatch.setattr(rounds, "accuracies", lambda states, sets: found)
    row = rounds.judged(iter([]), 0, 5)
    assert row["validation"] == pytest.approx(0.6)
    assert row["test"] == pytest.approx(0.32)
    assert [row[f"round {number}"] for number in range(1, 7)] == found["test"]


def test_a_method_that_the_cohort_is_too_small_for_is_listed_as_refused():
    def rows(name, values, **more):
        return [
            {"seed": s, "alpha": 0.1, "aggregator": name, "setting": "", "chosen": 1, "test": v, "round 2": v} | more
            for s, v in enumerate(values)
        ]

    few = rows("bulyan", [0, 0], chosen=0, refused="bulyan: found 5 clients, wanted at least 7")
    baselines = [*rows(rounds.FEDAVG, [0.5, 0.7]), *rows(rounds.FEDAVGM, [0.6, 0.7]), *rows(rounds.FEDADAM, [0.7, 0.8])]
    all_rows = [*baselines, *rows("iso_c", [0.9, 0.9]), *rows(rounds.CENTRALISED, [0.95, 0.99]), *few]
    text = rounds.tables(all_rows, 2)
    line = "| iso_c | 90.0 [90.0, 90.0] | 90.0 | 90.0 | +30.0 [+20.0, +40.0] | +25.0 [+20.0, +30.0] | "
    line += "+15.0 [+10.0, +20.0] | -7.0 [-9.0, -5.0] |"
    assert line in text
    assert " | against FedAvg | against tuned FedAvgM | against tuned FedAdam | against centralised |" in text
    assert text.index("| iso_c") < text.index("| FedAvgM, tuned") < text.index("| FedAvg |")
    assert "- bulyan: bulyan: found 5 clients, wanted at least 7" in text


def test_what_was_chosen_at_an_end_of_its_grid_is_counted():
    def rows(name, chosen, *settings):
        return [{"aggregator": name, "setting": each, "chosen": int(each == chosen)} for each in settings]

    momenta = [
        f"scale=1.0 momentum lr={lr} beta={beta}" for beta, lr in ((0.5, 1.0), (0.5, 2.0), (0.9, 0.1), (0.9, 1.0))
    ]
    all_rows = [
        *rows("FedAvg", "", ""),
        *rows("a", "scale=0.5", "scale=0.25", "scale=0.5", "scale=1.0"),
        *rows("b", "scale=1.0", "scale=0.25", "scale=0.5", "scale=1.0"),
        *rows("b", "scale=0.25", "scale=0.25", "scale=0.5", "scale=1.0"),
        *rows("ridge", "ridge=0.0", "ridge=0.0", "ridge=0.1", "ridge=1.0"),
        *rows("in momentum", momenta[1], *momenta, "scale=1.0 momentum lr=4.0 beta=0.5"),
        *rows("in momentum", momenta[3], *momenta, "scale=1.0 momentum lr=4.0 beta=0.5"),
    ]
    assert rounds.edges(all_rows) == {"b": 2, "in momentum": 1}


def test_the_command_writes_its_files(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["rounds.py", "--quick", "--workers", "0", "--out", str(tmp_path)])
    rounds.main()
    printed = capsys.readouterr().out
    assert (tmp_path / "table.md").read_text() in printed
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    header = (tmp_path / "raw.csv").read_text().splitlines()[0]
    assert header.startswith("seed,alpha,aggregator,setting,chosen,validation,test,round 1,round 2")
