"""The benchmarks start, print what they promise and clean up; their numbers are nobody's to test, their sums are."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import targets
from benchmarks.data import TINY, make_models, parameters_of
from benchmarks.engine import parsed
from benchmarks.measure import Floor, Measured, Run, Worker, WorkFailedError
from benchmarks.report import BEGIN, END, Report, Sheet, exponent, flower_sheet, markdown, ratios, side_by_side
from benchmarks.rows import Bench, Row, merge_rows
from benchmarks.scaling import Slopes, measure_scaling
from benchmarks.work_flower import flower
from benchmarks.work_merge import difference
from benchmarks.work_server import server

REPOSITORY = Path(__file__).parents[1]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks.engine", *arguments]


def environment(folder: Path) -> dict[str, str]:
    return os.environ | {"TMPDIR": str(folder), "PYTHONPATH": str(REPOSITORY)}


def engine(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), env=environment(folder), capture_output=True, text=True, timeout=120)


def took(wall: float, cpu: float = 1.0, extra: int | None = None, **more: float) -> Measured:
    return Measured(wall, cpu, wall, 0.0, extra, 1, more)


# --- the command -----------------------------------------------------------------------------------------------------


def test_a_tiny_run_prints_tables_writes_markdown_and_leaves_no_file(tmp_path):
    (tmp_path / "temporary").mkdir()
    file = tmp_path / "tables.md"
    arguments = ["--size", "10000", "--models", "2", "--repeats", "2", "--no-mergekit"]
    arguments += ["--methods", "weighted_average", "--parts", "files", "--markdown", str(file)]
    done = engine(*arguments, folder=tmp_path / "temporary")
    assert done.returncode == 0, done.stderr
    assert "2 models of 10,256 parameters, bfloat16" in done.stdout
    row = next(line for line in done.stdout.splitlines() if line.startswith("files: weighted_average"))
    assert len(row.split()) == 2 + 9  # six of time and memory, the floor's time and two ratios to it
    wall, floor, ratio = (float(row.split()[at]) for at in (2, 8, 9))
    assert (ratio - 0.05) * (floor - 0.0005) <= wall + 0.0005  # all three are rounded
    assert (ratio + 0.05) * (floor + 0.0005) >= wall - 0.0005
    assert row.split()[5] == "2"  # runs
    text = file.read_text()
    assert "| files: weighted_average |" in text
    assert "| bfloat16, files, weighted_average: <= 2.5 x floor |" in text
    assert not list((tmp_path / "temporary").iterdir())


def test_ctrl_c_leaves_no_process_and_no_file(tmp_path):
    arguments = ["--size", "10000", "--parts", "files", "--no-mergekit"]
    process = subprocess.Popen(
        command(*arguments), env=environment(tmp_path), stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stderr is not None
    assert process.stderr.readline().startswith("1 of ")
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert not list(tmp_path.iterdir())
    # A worker that was just being started ends by itself, and init may be slow to reap it.
    for _ in range(400):
        if not group_is_there(process.pid):
            return
        time.sleep(0.05)
    pytest.fail("a process is left")


def group_is_there(leader: int) -> bool:
    try:
        os.killpg(leader, 0)
    except ProcessLookupError:
        return False
    return True


def test_an_unknown_method_is_refused(capsys):
    with pytest.raises(SystemExit):
        parsed(["--methods", "weihgted_average"])
    assert "no such method: weihgted_average" in capsys.readouterr().err


def test_full_is_the_issues_sizes():
    full = parsed(["--full"])
    assert (full.size, full.flower_size, full.server_size) == (250_000_000, 100_000_000, 50_000_000)
    assert (full.models, full.repeats, full.dtypes) == (8, 5, ["bfloat16", "float32"])


# --- the work --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    make_models(folder, 4, TINY, "float32")
    return folder


@pytest.mark.parametrize(
    ("strategy", "settings", "method"),
    [
        ("FedMerge", {}, "weighted_average"),
        ("FedAvg", {}, None),
        ("FedMedian", {}, None),
        ("MultiKrum", {"num_malicious_nodes": 1, "num_nodes_to_select": 2}, None),
    ],
)
def test_strategies_can_be_repeated_and_errors_are_those_of_rounding(strategy, settings, method, tiny, tmp_path):
    mean = strategy in ("FedMerge", "FedAvg")
    job = {"models": 4, "dtype": "float16", "strategy": strategy, "settings": settings, "method": method, "mean": mean}
    fresh = flower(job, tiny, tmp_path)
    for _ in range(2):
        work, examine = fresh()
        found = examine(work())
        assert found["bytes"] == 4 * found["model_bytes"] >= 4 * 2 * parameters_of(TINY)
        if mean:
            assert found["error_mean"] >= 0.99
    if strategy == "FedMerge":
        assert found["error_mean"] <= 1.05


@pytest.mark.parametrize("strategy", ["FedMerge", "FedAvg"])
def test_servers_make_a_model(strategy, tiny, tmp_path):
    job = {"models": 1, "strategy": strategy, "clients": 3, "rounds": 2, "spill": True}
    assert server(job, tiny, tmp_path)()().arrays
    assert not list(tmp_path.iterdir())


def test_difference_of_two_results(tiny):
    def apart(first, second):
        job = {"base": tiny / "base", "first": tiny / first, "second": tiny / second}
        work, examine = difference(job, tiny, tiny)()
        return examine(work())

    assert apart("client-0", "client-0") == {"of_model": 0.0, "of_change": 0.0, "unequal": 0.0}
    found = apart("client-0", "client-1")
    assert found["of_change"] == pytest.approx(2**0.5, rel=0.05)  # two independent changes of one size
    assert found["of_model"] == pytest.approx(0.1 * 2**0.5, rel=0.05)


def test_a_worker_that_fails_says_its_last_line(tiny, tmp_path):
    job = {"kind": "merge", "method": "no_such", "memory": True, "models": 2, "dtype": "float32"}
    with Worker() as worker, pytest.raises(WorkFailedError, match="no_such"):
        worker.run(job | {"folder": str(tiny), "tiny": str(tiny), "out": str(tmp_path / "out")})


def test_kernels_are_loaded_once_in_a_process(tiny):
    job = {"kind": "kernels", "folder": str(tiny), "folders": [str(tiny)], "models": 2, "out": str(tiny / "none")}
    with Worker() as worker:
        assert worker.run(job).wall > 0.01  # an import of numba


def test_scaling_has_a_row_for_the_floor_and_each_method(tmp_path, capsys):
    told: list[str] = []
    bench = Bench(tmp_path, 1, 1.0, told.append)
    report = Report("test", None)
    slopes = measure_scaling(bench, report, "bfloat16", ["ties"], (2, 3), TINY, (TINY, 10_000), 2)
    assert not bench.failed, told
    assert list(slopes) == ["floor", "ties"]
    assert all(found.moved is not None and found.size is not None for found in slopes.values())
    assert sorted(slopes["ties"].by_count) == [2, 3]


def test_peers_are_compared_with_the_row_that_does_the_same(tmp_path):
    bench = Bench(tmp_path, 1, 1.0, lambda text: None)
    rows = merge_rows(bench, 3, TINY, "bfloat16", ["ties", "slerp"], ["files", "memory"], "python-of-mergekit")
    against = {row.label: row.against for row in rows if row.against}
    assert against == {
        "mergekit, files: ties": "files: ties",
        "mergekit, files: slerp, 2 models": "files: slerp, 2 models",
        "mergekit, memory: ties": "memory: ties",
        "mergekit, memory: slerp, 2 models": "memory: slerp, 2 models",
    }
    labels = {row.label for row in rows}
    assert all(row.floor in labels for row in rows if not row.label.startswith("floor"))


# --- sums ------------------------------------------------------------------------------------------------------------


def test_repetitions_become_medians_and_the_first_ones_memory():
    runs = [Run(3.0, 5.0, 70, {}), Run(1.0, 4.0, 90, {}), Run(2.0, 6.0, 80, {"bytes": 1})]
    assert Measured.of(runs) == Measured(1.5, 5.0, 1.0, 2 / 3, 70, 2, {"bytes": 1})
    floors = [Floor(9.0, 9.0), Floor(1.0, 2.0), Floor(2.0, 3.0)]
    with_floors = [replace(run, floor=floor) for run, floor in zip(runs, floors, strict=True)]
    assert Measured.of(with_floors).floor == (1.5, 2.5)


@pytest.mark.parametrize(
    ("points", "slope"),
    [
        ([(2, 6.0), (4, 12.0), (32, 96.0)], 1.0),
        ([(1, 1.0), (10, 100.0)], 2.0),
        ([(1, 5.0), (2, 5.0)], 0.0),
        ([(1, 1.0)], None),
        ([(2, 1.0), (2, 3.0)], None),
        ([(1, 0.0), (2, 1.0)], None),
    ],
)
def test_exponents(points, slope):
    assert exponent(points) == (None if slope is None else pytest.approx(slope))


def test_ratios_are_to_the_other_row():
    assert ratios(took(3.0, 4.0), took(2.0, 8.0)) == ("1.5", "0.5")
    assert ratios(took(3.0), None) == ("", "")
    rows = [Row("floor", {}), Row("ours", {}, floor="floor"), Row("theirs", {}, floor="floor", against="ours")]
    sheet = side_by_side("t", [*rows, Row("gone", {})], {"floor": took(1), "ours": took(2), "theirs": took(8)})
    assert [row[-4::2] for row in sheet.rows[:3]] == [("", ""), ("2.0", ""), ("8.0", "4.0")]
    assert sheet.rows[3] == ("gone", "failed")


def test_ratios_are_to_the_floor_just_before():
    mine = replace(took(6.0, 4.0), floor=Floor(3.0, 1.0))
    sheet = side_by_side("t", [Row("files: ties", {}, floor="floor")], {"floor": took(1), "files: ties": mine})
    assert sheet.rows[0][-5:] == ("3.000", "2.0", "4.0", "", "")
    limits = targets.of_files({"floor, files, 8 models": took(1), "files: ties": mine}, 8, "float32")
    assert next(limit.value for limit in limits if "ties" in limit.text and limit.value) == 2.0


def test_a_refusal_is_no_failure():
    more = {"bytes": 8e9, "model_bytes": 1e9, "error_mean": 1.0, "error_max": 1.25}
    rows = [Row("ours", {}), Row("theirs", {}, against="ours")]
    sheet = flower_sheet("t", rows, {"ours": took(2.0, extra=1_500_000_000, **more)}, {"theirs": "no such type"})
    assert sheet.rows[0][-5:] == ("1.50", "4.00", "", "1.00", "1.25")
    assert sheet.rows[1] == ("theirs", "refuses")
    assert "theirs refuses: no such type" in sheet.notes


def test_markdown_fills_short_rows_and_escapes():
    sheet = Sheet("a title", ("work", "wall"), [("a|b", "1"), ("c",)], ["a note"])
    assert markdown(sheet) == "**a title**\n\n| work | wall |\n|---|---:|\n| a\\|b | 1 |\n| c |  |\n\na note"


def test_a_document_keeps_what_stands_around_the_tables(tmp_path):
    file = tmp_path / "made" / "page.md"
    for first in ("one", "two"):
        report = Report("the command", file)
        report.line(first)
        report.save()
        assert file.read_text() == f"`the command`\n\n{first}\n"
    file.write_text(f"# Title\n{BEGIN}\nold\n{END}\nthe end\n")
    report.save()
    assert file.read_text() == f"# Title\n{BEGIN}\n`the command`\n\ntwo\n{END}\nthe end\n"


def met(limits):
    return {limit.text: limit.met for limit in limits if limit.value is not None}


def test_targets_of_files():
    results = {
        "floor, files, 8 models": took(2.0),
        "files: weighted_average": took(5.0, extra=400 * 10**6),
        "files: ties": took(8.2, extra=100),
    }
    assert met(targets.of_files(results, 8, "bfloat16")) == {
        "bfloat16, files, weighted_average: <= 2.5 x floor": True,
        "bfloat16, files, ties: <= 4.0 x floor": False,
        "bfloat16, files, any method: extra memory <= 400 MB": True,
    }


def test_targets_of_flower():
    of_models = {"bytes": 8e9, "model_bytes": 1e9, "error_mean": 1.0, "error_max": 1.06}
    results = {
        "FedMerge(weighted_average()), float32": took(1.0, extra=1_200_000_000, **of_models),
        "FedAvg, float32": took(4.0),
        "FedMerge(weighted_average()), float16": took(0.5, **of_models | {"bytes": 4e9}),
    }
    assert list(met(targets.of_flower(results)).values()) == [True, False, True, True, False]


def test_targets_of_a_server():
    peaks = {(8, 1): 500, (64, 1): 520, (8, 2): 600, (64, 2): 601}
    names = {(8, 1): "8 clients, 1 round", (64, 1): "64 clients, 1 round"}
    names |= {(8, 2): "8 clients, 2 rounds", (64, 2): "64 clients, 2 rounds"}
    results = {f"FedMerge, {names[case]}": took(1.0, extra=peak * 10**6) for case, peak in peaks.items()}
    limits = targets.of_server(results, 200 * 10**6)
    assert (limits[0].value, limits[0].most) == (601, 600)
    assert [limit.value for limit in limits[1:]] == [20, 1, 100, 81]
    assert [limit.met for limit in limits] == [False, True, True, False, False]  # 601 > 600; a tenth is 60


def test_targets_of_scaling_and_memory():
    limits = targets.of_scaling({"floor": Slopes(moved=3.0), "ties": Slopes(clients=0.8, moved=0.95, size=1.2)})
    assert [limit.met for limit in limits] == [True, False]
    results = {
        "files: ties, 8 models": took(1.0, extra=100 * 10**6),
        "files: ties, 32 models": took(4.0, extra=141 * 10**6),
    }
    limits = targets.of_memory(results, "ties", (8, 32))
    assert [(limit.value, limit.met) for limit in limits] == [(141, True), (41, False)]
    assert targets.of_memory(results, "dare_ties", (8, 32)) == []
    assert [row[1:] for row in targets.sheet(limits, "here").rows] == [("141 MB", "yes"), ("41 MB", "NO")]


def test_each_compiled_pass_is_timed_alone():
    from benchmarks.matrices import seconds
    from benchmarks.passes import works

    found = works(1 << 16, torch.bfloat16, 64)
    assert next(iter(found)) == "read"
    assert all(seconds(work, 1) > 0 for work in found.values())
