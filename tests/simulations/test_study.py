"""Intervals with numbers that can be worked out, and work that goes on where it was stopped."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

import study

QUIET = Console(quiet=True)


# --- intervals -------------------------------------------------------------------------------------------------------


def test_the_tails_of_ten_seeds_on_paper():
    # t(0.975; 9) = 2.2622, sqrt(10 / 9) = 1.0541, Phi(-2.3845) = 0.00855
    assert study.expanded_tail(0.95, 10) == pytest.approx(0.00855, abs=2e-5)
    # t(0.975; 4) = 2.7764, sqrt(5 / 4) = 1.1180, Phi(-3.1042) = 0.00095
    assert study.expanded_tail(0.95, 5) == pytest.approx(0.000954, abs=5e-6)
    assert study.expanded_tail(0.95, 10**6) == pytest.approx(0.025, abs=1e-5)


def test_two_seeds_span_their_values():
    # A resample of two has the mean 0, 1/2 or 1 with chance 1/4, 1/2, 1/4; the tail of two seeds is below 1/4.
    assert study.bootstrap([0.0, 1.0]) == study.Interval(0.5, 0.0, 1.0)


def test_quantiles_of_a_distribution_that_can_be_counted():
    # 8 seeds of which 2 are 8 and the others 0: the mean of a resample is a Binomial(8, 1/4) number.
    # P(at least 5) = 0.0273 and P(at least 6) = 0.0042, the tail is 0.0057: the upper bound is 5.
    counted, total = [], 0.0
    for k in range(9):
        total += math.comb(8, k) * 0.25**k * 0.75 ** (8 - k)
        counted.append(total)
    tail = study.expanded_tail(0.95, 8)
    low = next(k for k in range(9) if counted[k] >= tail)
    high = next(k for k in range(9) if counted[k] >= 1 - tail)
    found = study.bootstrap([8.0, 8.0, 0, 0, 0, 0, 0, 0])
    assert (found.mean, found.low, found.high) == (2.0, low, high) == (2.0, 0, 5)


def test_equal_values_have_no_width_and_one_value_has_no_interval():
    assert study.bootstrap([0.5] * 10) == study.Interval(0.5, 0.5, 0.5)
    alone = study.bootstrap([0.5])
    assert alone.mean == 0.5
    assert math.isnan(alone.low)
    assert not alone.excludes_zero
    assert str(alone) == "0.5 [one seed]"


def test_ten_normal_values_are_covered_as_often_as_claimed():
    draws = np.random.default_rng(5).normal(3.0, 2.0, size=(600, 10))
    hits = sum(found.low <= 3.0 <= found.high for found in (study.bootstrap(row, resamples=1500) for row in draws))
    assert 0.925 <= hits / 600 <= 0.975  # the plain percentile interval covers 0.90


def test_pairing_leaves_out_what_seeds_share():
    difficulty = {seed: 100.0 * seed for seed in range(10)}
    ours = {seed: value + 2 + (-1) ** seed for seed, value in difficulty.items()}
    found = study.paired(ours, difficulty)
    assert found.mean == pytest.approx(2.0)
    assert 1 < found.low < 2 < found.high < 3
    assert found.excludes_zero
    assert study.paired(difficulty, ours).mean == pytest.approx(-2.0)


def test_pairs_need_the_same_seeds():
    with pytest.raises(ValueError, match=r"found seeds \[0, 1\] and \[1\], wanted the same"):
        study.paired({0: 1.0, 1: 1.0}, {1: 1.0})


@pytest.mark.parametrize("values", [[], [1.0, math.nan]])
def test_values_without_a_mean_are_refused(values):
    with pytest.raises(ValueError, match="wanted one finite number a seed"):
        study.bootstrap(values)


def test_how_intervals_are_written():
    found = study.Interval(3.14, -1.26, 5.0)
    assert str(found) == "3.1 [-1.3, 5.0]"
    assert found.signed() == "+3.1 [-1.3, +5.0]"


def test_a_seed_counts_once():
    rows = [{"seed": 0, "mean": 0.5}, {"seed": 1, "mean": 0.25}]
    assert study.by_seed(rows, "mean", 100) == {0: 50.0, 1: 25.0}
    with pytest.raises(ValueError, match="seed 0 comes twice"):
        study.by_seed([rows[0], rows[0]], "mean")


# --- doing it --------------------------------------------------------------------------------------------------------


def counted(name: str, ledger: str, fails: str = "") -> list[study.Row]:
    """A task that leaves a line in a ledger each time that it is done."""
    if name == fails:
        raise RuntimeError("no luck")
    with open(ledger, "a", encoding="utf-8") as file:
        file.write(f"{name}\n")
    return [{"seed": 0, "name": name, "value": 0.1}]


def test_what_is_finished_is_kept_and_only_the_rest_is_done(tmp_path):
    ledger = str(tmp_path / "ledger")
    tasks = {name: (name, ledger, "c") for name in "abc"}
    with pytest.raises(study.StudyError, match="c: RuntimeError: no luck"):
        study.perform(tasks, counted, tmp_path / "out", {"size": 1}, workers=1, console=QUIET)
    tasks = {name: (name, ledger) for name in "abcd"}
    rows = study.perform(tasks, counted, tmp_path / "out", {"size": 1}, workers=1, console=QUIET)
    assert [row["name"] for row in rows] == list("abcd")  # in the order of the tasks
    assert sorted(Path(ledger).read_text().split()) == list("abcd")  # nothing was done twice


def test_rows_of_other_settings_are_not_mixed_in(tmp_path):
    study.perform({}, counted, tmp_path / "out", {"epochs": 5}, console=QUIET)
    with pytest.raises(study.StudyError, match=r"made with epochs = 5, wanted 20: give another --out"):
        study.perform({}, counted, tmp_path / "out", {"epochs": 20}, console=QUIET)


def nested(folder):
    return study.perform({}, counted, folder, {}, console=QUIET)


def test_two_runs_do_not_work_in_one_folder(tmp_path):
    with pytest.raises(study.StudyError, match="another run is at work in"):
        study.perform({"outer": (tmp_path,)}, nested, tmp_path, {}, workers=0, console=QUIET)
    assert nested(tmp_path) == []


SLOW_STUDY = """
import sys, time
from pathlib import Path
import study

def work(name):
    if name == "endless":
        Path(sys.argv[1], "started").touch()
        time.sleep(600)
    return [{"seed": 0, "name": name}]

def main():
    study.perform({"first": ("first",), "endless": ("endless",)}, work, Path(sys.argv[1]), {}, workers=1)

if __name__ == "__main__":
    study.command(main)
"""


def test_control_c_leaves_finished_parts_and_no_process(tmp_path):
    script = tmp_path / "slow_study.py"
    script.write_text(SLOW_STUDY)
    paths = os.pathsep.join([str(Path(study.__file__).parent), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": paths},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while not ((tmp_path / "parts" / "first.json").exists() and (tmp_path / "started").exists()):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=30) == 1
    assert "what is finished is kept" in process.stderr.read()
    assert json.loads((tmp_path / "parts" / "first.json").read_text()) == [{"seed": 0, "name": "first"}]
    assert not (tmp_path / "parts" / "endless.json").exists()
    while alive(process.pid):  # no worker is left in its session
        assert time.monotonic() < deadline + 30
        time.sleep(0.05)


def alive(group: int) -> bool:
    """Whether a process group has a process."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


# --- what comes out --------------------------------------------------------------------------------------------------


def test_the_csv_has_every_value_unrounded_and_the_table_is_printed_as_written(tmp_path, capsys):
    rows = [{"seed": 0, "mean": 1 / 3}, {"seed": 1, "mean": None, "note": "refused, by rule"}]
    text = study.markdown(["model", "mean"], [["a", "0.3"]])
    study.report(tmp_path, rows, text, Console(width=40))
    assert text == "| model | mean |\n|---|---:|\n| a | 0.3 |"
    assert (tmp_path / "table.md").read_text() == text + "\n"
    assert text in capsys.readouterr().out
    with (tmp_path / "raw.csv").open(newline="") as file:
        written = list(csv.DictReader(file))
    assert float(written[0]["mean"]) == 1 / 3
    assert written[1] == {"seed": "1", "mean": "", "note": "refused, by rule"}
