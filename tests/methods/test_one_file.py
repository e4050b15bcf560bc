"""A new merge method is one file: nothing else is edited for it to be everywhere."""

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import battery
import pytest
import torch

import fl_merge
from fl_merge import METHODS, Recipe, RecipeError, build, merge
from fl_merge.flower import FedMerge

METHOD = '''
from typing import Annotated

from fl_merge.hyperparameters import Range
from fl_merge.method import merge_method
from fl_merge.ops.combine import weighted_sum
from fl_merge.shapes import Coordinate


@merge_method(paper="Nobody et al., 2024, arXiv:2401.00001", identity={"step": 1.0})
def cautious_mean(*, step: Annotated[float, Range(0.0, 1.0)] = 0.5) -> Coordinate:
    """Go a part of the way to the weighted average.

    Args:
        step: how far, in [0, 1].
    """
    return Coordinate(lambda deltas_NS, weights_N, at: step * weighted_sum(deltas_NS, weights_N))
'''


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """A module of the user's own that defines a method; both are forgotten afterwards."""
    (tmp_path / "my_merges.py").write_text(METHOD)
    monkeypatch.syspath_prepend(tmp_path)
    yield "my_merges"
    METHODS._entries.pop("cautious_mean", None)
    sys.modules.pop("my_merges", None)
    assert "cautious_mean" not in METHODS


BASE = {"w": torch.tensor([1.0, 2.0])}
CLIENTS = [{"w": torch.tensor([3.0, 2.0])}, {"w": torch.tensor([1.0, 6.0])}]
MERGED = torch.tensor([1.5, 3.0])


def test_it_is_built_by_module_and_name(own_module):
    assert "cautious_mean" not in METHODS
    method = build(f"{own_module}:cautious_mean", step=0.25)
    assert str(method) == "cautious_mean(step=0.25)"
    assert METHODS["cautious_mean"].summary == "Go a part of the way to the weighted average."
    assert torch.equal(merge("cautious_mean", BASE, CLIENTS)["w"], MERGED)


def test_it_can_be_named_in_a_recipe(own_module, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"merge_method: {own_module}:cautious_mean\nparameters: {{step: 0.5}}\n")
    assert torch.equal(merge(Recipe.load(path).build(), BASE, CLIENTS)["w"], MERGED)
    path.write_text(f"merge_method: {own_module}:cautious_mean\nparameters: {{step: 2}}\n")
    with pytest.raises(RecipeError, match=r"parameter 'step' of cautious_mean: found 2, wanted a number in \[0, 1\]$"):
        Recipe.load(path)


def test_it_can_be_named_in_the_run_config_and_given_to_the_strategy(own_module):
    config = {"merge-method": f"{own_module}:cautious_mean", "parameters.step": 0.25}
    assert str(FedMerge(Recipe.from_config(config).build()).method) == "cautious_mean(step=0.25)"
    assert str(FedMerge(f"{own_module}:cautious_mean").method) == "cautious_mean(step=0.5)"


def test_it_passes_the_battery(own_module):
    importlib.import_module(own_module)
    cases = battery.cases(METHODS["cautious_mean"])
    identities = {battery.one_client_gives_that_client, battery.identical_clients_give_that_model}
    assert {check for check, *_ in cases} == {*battery.NUMBERS, *identities, *battery.SETTINGS}
    for check, arguments, _ in cases:
        check(*arguments)


def test_the_battery_catches_a_method_that_is_wrong(own_module, tmp_path):
    """The battery can fail: a method that averages halfway but claims to be an identity at every step."""
    (tmp_path / "my_merges.py").write_text(METHOD.replace('identity={"step": 1.0}', "identity={}"))
    importlib.import_module(own_module)
    with pytest.raises(AssertionError, match="ulps"):
        battery.one_client_gives_that_client(METHODS["cautious_mean"], {})


def test_modules_and_names_that_do_not_exist(own_module):
    with pytest.raises(
        RecipeError, match=r"^merge method 'my_merge:x': cannot import 'my_merge': No module named 'my_merge'$"
    ):
        build("my_merge:x")
    with pytest.raises(
        RecipeError,
        match=r"has no merge method 'cautious_men'; did you mean 'cautious_mean'\? \(known: cautious_mean\)$",
    ):
        build(f"{own_module}:cautious_men")


def test_a_name_is_not_taken_twice(tmp_path, monkeypatch):
    (tmp_path / "my_rivals.py").write_text(METHOD.replace("def cautious_mean", "def ties"))
    monkeypatch.syspath_prepend(tmp_path)
    ties = METHODS["ties"]
    with pytest.raises(RecipeError) as caught:
        importlib.import_module("my_rivals")
    assert "merge method 'ties' is defined twice: in fl_merge.methods._ties.ties and in my_rivals.ties" in str(
        caught.value
    )
    assert METHODS["ties"] is ties


def test_a_file_in_the_package_is_found_by_everything(tmp_path):
    """In a copy of the package: the command line lists it, `fl_merge.methods` has it, the battery tries it."""
    package = Path(fl_merge.__file__).parent
    shutil.copytree(package, tmp_path / "fl_merge", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "fl_merge" / "methods" / "_cautious_mean.py").write_text(METHOD)
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "COLUMNS": "200"}

    def python(*arguments):
        command = [sys.executable, *map(str, arguments)]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)

    listed = python("-m", "fl_merge.cli", "methods")
    assert listed.returncode == 0, listed.stderr
    assert "cautious_mean" in listed.stdout
    assert "Go a part of the way to the weighted average." in listed.stdout

    tests = Path(__file__).with_name("test_every_method.py")
    options = [
        "-q",
        "-p",
        "no:cacheprovider",
        "-c",
        os.devnull,
        "--rootdir",
        tests.parent,
        tests,
        "-k",
        "cautious_mean",
    ]
    try_it = (
        "import sys, pytest, fl_merge; from fl_merge.methods import cautious_mean; print(fl_merge.__file__); "
        "sys.exit(pytest.main(sys.argv[1:]))"
    )
    tried = python("-c", try_it, *options)
    assert tried.returncode == 0, tried.stdout + tried.stderr
    assert tried.stdout.startswith(f"{tmp_path / 'fl_merge' / '__init__.py'}\n")
    assert "10 passed" in tried.stdout
