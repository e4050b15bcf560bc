"""The benchmarks start and print what they promise; their numbers are nobody's to test."""

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]


def engine(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "engine.py"), *arguments]
    environment = os.environ | {"TMPDIR": str(folder), "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_help(tmp_path):
    done = engine("--help", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "--no-mergekit" in done.stdout


def test_a_tiny_run_prints_the_table_and_leaves_no_file(tmp_path):
    arguments = ["--size", "10000", "--models", "2", "--repeats", "1"]
    arguments += ["--no-mergekit", "--methods", "weighted_average", "--parts", "files"]
    done = engine(*arguments, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2 models of 10,256 parameters, bfloat16" in done.stdout
    assert "floor, files, 2 models" in done.stdout
    row = next(line for line in done.stdout.splitlines() if line.startswith("files: weighted_average"))
    assert len(row.split()) == 2 + 7  # wall, best, spread, CPU, extra memory, two ratios to the floor
    assert not list(tmp_path.iterdir())


def test_an_unknown_method_is_refused_before_anything_runs(tmp_path):
    done = engine("--methods", "weihgted_average", folder=tmp_path)
    assert done.returncode == 2
    assert "no such method: weihgted_average" in done.stderr
