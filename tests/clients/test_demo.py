"""The demo's table: its methods are in it, scales chosen on validation data, files that say the same."""

import csv
import io

import pytest
from rich.console import Console

import baselines
import demo
from digits_clients import data, model
from fl_merge import METHODS
from one_shot import Federation


@pytest.fixture(scope="module")
def people():
    return baselines.population(epochs=1)


@pytest.fixture(scope="module")
def validation():
    return list(data.validation_examples().values())


@pytest.fixture(scope="module")
def rows(people, validation):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "SCALES", (0.5, 1.0))
        return demo.merged_rows(people, validation, Console(quiet=True))


def test_the_methods_shown_are_in_the_table_and_tuned_where_they_have_a_scale(rows):
    shown = [name for name in demo.SHOWN if name in METHODS]
    defaults = [row.name for row in rows if ", scale" not in row.name]
    tuned = [row.name.partition(", scale")[0] for row in rows if ", scale" in row.name]
    assert defaults == shown
    assert defaults[0] == "weighted_average"
    assert tuned == [name for name in shown if "scale" in METHODS[name].parameters]
    models = 8 * 4 * 301_066
    assert all(row.forward_passes == 1 for row in rows)
    assert all(row.uplink_bytes == models for row in rows if row.name != "regmean")
    grams = 8 * 4 * (65 * 65 + 2 * 513 * 513 + 1)  # a column of ones for each bias, and the number of examples
    assert [row.uplink_bytes for row in rows if row.name == "regmean"] == [models + grams]


@pytest.mark.parametrize("terminal", [False, True])
def test_it_says_which_method_it_is_at(people, validation, monkeypatch, terminal):
    monkeypatch.setattr(demo, "SCALES", (0.5, 1.0))
    monkeypatch.setattr(demo, "SHOWN", ("weighted_average", "task_arithmetic"))
    printed = io.StringIO()
    demo.merged_rows(people, validation, Console(file=printed, force_terminal=terminal, width=100))
    lines = ["merging: weighted_average, 1 of 2", "merging: task_arithmetic, 2 of 2"]
    assert terminal or printed.getvalue().splitlines() == lines
    assert not terminal or "merging: task_arithmetic, 2 scales" in printed.getvalue()


def test_a_scale_is_chosen_on_the_examples_that_are_given(people, monkeypatch):
    monkeypatch.setattr(demo, "SCALES", (0.25, 1.0))
    shown, federation = people.clients[1].test, Federation(people)
    by_scale = {scale: federation.merged("task_arithmetic", scale=scale) for scale in demo.SCALES}
    wanted = max(by_scale, key=lambda scale: model.accuracy(by_scale[scale], shown))
    assert demo.tuned_row("task_arithmetic", federation, [shown]).name == f"task_arithmetic, scale {wanted:g}"


def test_the_files_hold_every_row(rows, people, tmp_path):
    demo.write_markdown(tmp_path / "table.md", rows, people.individual, "below")
    demo.write_csv(tmp_path / "table.csv", rows, people.individual)
    text = (tmp_path / "table.md").read_text()
    assert all(f"| {row.name} | {100 * row.mean:.1f} |" in text for row in rows)
    with (tmp_path / "table.csv").open(newline="") as file:
        written = list(csv.DictReader(file))
    assert [line["model"] for line in written] == [row.name for row in rows]
    for line, row in zip(written, rows, strict=True):
        assert float(line["mean"]) == row.mean
        assert {name: float(line[name]) for name in data.DOMAINS} == row.accuracies


def test_the_conditions_name_sizes_and_defaults(people, validation):
    text = demo.conditions(people, sum(map(len, validation)))
    for fact in ("8 clients with 144 private images", "360 test images", "680 labelled validation examples", "Seed 0"):
        assert fact in text
    assert "ties: density=0.2" in text


def test_nothing_of_the_table_is_cut_at_80_columns(people):
    printed, accuracies = io.StringIO(), dict.fromkeys(people.individual, 1.0)
    longest = baselines.Row("task_arithmetic, scale 2.828", accuracies, 12_345_678, 12.345)
    Console(file=printed, width=80).print(baselines.table([longest], people.individual, "title"))
    assert "\u2026" not in printed.getvalue()
    assert all(heading in printed.getvalue() for heading in baselines.HEADINGS)
    assert max(map(len, printed.getvalue().splitlines())) <= 80
