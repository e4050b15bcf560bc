"""docs/results.md is put together from what studies printed."""

import pytest

import results


def test_what_is_between_the_markers_is_replaced_and_nothing_else(tmp_path, monkeypatch, capsys):
    docs, run = tmp_path / "docs", tmp_path / "runs" / "rounds"
    docs.mkdir()
    run.mkdir(parents=True)
    (docs / "results.md").write_text("before\n<!-- rounds: as printed -->\nold\n<!-- end of rounds -->\nafter\n")
    (run / "settings.json").write_text('{"rounds": 20}')
    (run / "table.md").write_text("| a \\1 |\n")
    (run / "plot.png").write_bytes(b"png")
    arguments = ["results.py", "--runs", str(run.parent), "--docs", str(docs), "--only", "rounds"]
    monkeypatch.setattr("sys.argv", arguments)
    for _ in range(2):  # again gives the same
        results.main()
        text = (docs / "results.md").read_text()
        assert text.startswith("before\n<!-- rounds: as printed -->\n\n`rounds/settings.json`: rounds 20\n")
        assert text.endswith("| a \\1 |\n\n<!-- end of rounds -->\nafter\n")
    assert (docs / "images" / "rounds.png").read_bytes() == b"png"
    assert "rounds" in capsys.readouterr().out


def test_missing_markers_and_missing_runs_are_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="found 0 pairs of markers for rounds, wanted one"):
        results.filled("nothing here", "rounds", "new")
    (tmp_path / "results.md").write_text("")
    monkeypatch.setattr("sys.argv", ["results.py", "--runs", str(tmp_path), "--docs", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"has no table.md: run python simulations/one_shot.py"):
        results.main()


def test_the_page_has_a_place_for_every_study():
    text = (results.ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    for name in (*results.STUDIES, results.PILOT):
        assert results.filled(text, name, "x") != text


def test_the_pilot_stands_beside_what_was_found(tmp_path):
    rows = [
        {"seed": seed, "model": name, "setting": setting, "mean": 0.5 + 0.1 * seed}
        for name, setting in results.PILOT_ONE_SHOT
        for seed in (0, 1)
    ]
    for name, found in {
        "one_shot": rows,
        "rounds": [
            {"seed": seed, "alpha": alpha, "aggregator": name, "chosen": chosen, "test": alpha * chosen}
            for name in results.PILOT_ROUNDS
            for seed in (0, 1)
            for alpha in (0.1, 0.5)
            for chosen in (0, 1)
        ],
    }.items():
        (tmp_path / name).mkdir()
        results.study.write_csv(tmp_path / name / "raw.csv", found)
    text = results.beside_pilot(tmp_path)
    assert "| one shot | regmean | 82.7 | 55.0 [50.0, 60.0] |" in text
    assert "| one shot | task_arithmetic, scale tuned | 60 | 55.0 [50.0, 60.0] |" in text
    assert "| rounds, Dirichlet 0.1 | FedAvg | 82 | 10.0 [10.0, 10.0] |" in text
