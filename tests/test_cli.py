"""The command line: what it prints, and one clear line with exit code 2 for wrong input."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fl_merge import METHODS
from fl_merge.cli import main
from fl_merge.store import load, save

DIGITS = Path(__file__).resolve().parents[1] / "clients" / "digits"
TOY = Path(__file__).resolve().parent / "flower" / "toy_app"

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run `fl-merge` with these arguments in an empty folder: exit code, what it printed, what it complained of."""
    monkeypatch.chdir(tmp_path)

    def command(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fl-merge", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    return command


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_every_method_is_listed(run: Run) -> None:
    code, printed, _ = run("methods", "--markdown")
    assert code == 0
    assert [line.split("`")[1] for line in printed.splitlines()[2:]] == list(METHODS)
    assert run("methods")[0] == 0


@pytest.mark.parametrize("name", list(METHODS))
def test_a_method_is_explained_with_its_paper_and_its_parameters(run: Run, name: str) -> None:
    code, printed, _ = run("methods", name)
    assert code == 0
    assert "".join(METHODS[name].paper.split()) in "".join(printed.split())
    for parameter in METHODS[name].parameters:
        assert parameter in printed


def test_a_good_recipe_is_shown_with_all_its_settings(run: Run, tmp_path: Path) -> None:
    recipe = written(tmp_path / "recipe.yaml", "merge_method: ties\nparameters: {density: 0.3}\n")
    code, printed, _ = run("check", recipe)
    assert code == 0
    assert "ties(density=0.3, scale=1.0" in printed


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("merge_method: tyes\n", "unknown merge method 'tyes'; did you mean 'ties'?"),
        (
            "merge_method: ties\nparameters: {density: 2}\n",
            "parameter 'density' of ties: found 2, wanted a number in (0, 1] "
            "or a mapping from text to a number in (0, 1]",
        ),
        ("merge_method: ties\nparameters: {densty: 0.2}\n", "ties has no parameter 'densty'; did you mean 'density'?"),
        ("merge_metod: ties\n", "unknown key 'merge_metod' in the recipe; did you mean 'merge_method'?"),
        ("merge_method: no_such_module:method\n", "cannot import 'no_such_module'"),
        ("merge_method: [ties\n", "not valid YAML"),
        ("", "found None, wanted keys: merge_method, parameters, rules, clip_norm, server_optimizer"),
    ],
)
def test_a_wrong_recipe_is_one_line_and_exit_code_2(run: Run, tmp_path: Path, text: str, line: str) -> None:
    recipe = written(tmp_path / "recipe.yaml", text)
    for command in (["check", recipe], ["simulate", DIGITS, "--recipe", recipe]):
        code, _, complaint = run(*command)
        assert code == 2
        assert complaint.count("\n") == 1
        assert complaint.startswith(f"error: recipe '{recipe}': ")
        assert line in complaint


def test_a_rule_that_matches_no_tensor(run: Run, tmp_path: Path) -> None:
    save({"hidden.weight": torch.zeros(2, 2)}, tmp_path / "base")
    recipe = written(
        tmp_path / "recipe.yaml",
        "merge_method: ties\nrules: [{match: '*norm*', merge_method: weighted_average}]\n",
    )
    wanted = "error: rule '*norm*' matches no tensor of the base, which has 1 tensor: hidden.weight\n"
    assert run("check", recipe)[0] == 0  # nothing to hold it against
    assert run("check", recipe, "--base", tmp_path / "base")[::2] == (2, wanted)
    code, printed, complaint = run("simulate", DIGITS, "--recipe", recipe)
    assert code == 2
    assert complaint.startswith(
        "error: rule '*norm*' matches no tensor of the base, which has 6 tensors: hidden1.weight"
    )
    assert "round" not in printed


AVERAGE = "merge_method: weighted_average"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            f"rules: [{{match: '*norm*', {AVERAGE}}}, {{match: 'layers.*.norm?', {AVERAGE}}}]",
            "rule 'layers.*.norm?' gets no tensor: every one that it matches is taken by an earlier rule ('*norm*')",
        ),
        (f"rules: [{{match: '', {AVERAGE}}}]", "rule 1: match: found '', wanted a glob on tensor names"),
        (
            "rules: [{match: '*norm*', merge_method: moe_upcycle}]",
            "a method for structures; wanted one for models",
        ),
        ("rules: [{match: '*norm*', merge_method: lora_svd}]", "a method for adapters; wanted one for models"),
        (
            "rules: [{match: '*norm*', merge_method: median}]\nclip_norm: {max_norm: -1}",
            "parameter 'max_norm': found -1, wanted a number > 0",
        ),
        ("parameters: {density: {}}", "parameter 'density' of ties: found {}, wanted a number in (0, 1]"),
    ],
)
def test_what_is_wrong_without_a_base_is_refused_without_one(run: Run, tmp_path: Path, text: str, line: str) -> None:
    recipe = written(tmp_path / "recipe.yaml", f"merge_method: ties\n{text}\n")
    code, _, complaint = run("check", recipe)
    assert code == 2
    assert complaint.startswith(f"error: recipe '{recipe}': ")
    assert line in complaint


@pytest.mark.parametrize("wrapper", ["clip_norm: {quantile: 0.5}", "server_optimizer: {name: adam}"])
def test_what_acts_on_deltas_goes_round_methods_for_models_only(run: Run, tmp_path: Path, wrapper: str) -> None:
    for method, merges in (("moe_upcycle", "structures"), ("lora_svd", "adapters")):
        recipe = written(tmp_path / "recipe.yaml", f"merge_method: {method}\n{wrapper}\n")
        code, _, complaint = run("check", recipe)
        assert code == 2
        assert f"a method for {merges}; wanted one for models" in complaint


@pytest.mark.parametrize("globs", [("*norm?", "*norm*"), ("*[ab]*", "*a*"), ("*a*", "*[ab]*"), ("*.w", "*.weight")])
def test_rules_that_may_each_get_a_tensor_are_taken(run: Run, tmp_path: Path, globs: tuple[str, str]) -> None:
    rules = ", ".join(f"{{match: '{glob}', {AVERAGE}}}" for glob in globs)
    recipe = written(tmp_path / "recipe.yaml", f"merge_method: ties\nrules: [{rules}]\n")
    assert run("check", recipe)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["check", "missing.yaml"], "error: recipe 'missing.yaml': No such file or directory"),
        (["methods", "tyes"], "error: unknown merge method 'tyes'; did you mean 'ties'?"),
        (["simulate", "nowhere"], "nowhere': not found"),
        (
            ["simulate", DIGITS, "--workers", "many"],
            "error: --workers: found 'many', wanted a number of processes or auto",
        ),
        (["simulate", DIGITS, "-c", 'merge-method="tyes"'], "error: run config: unknown merge method 'tyes'"),
        (["simulate", DIGITS, "-c", "num-rounds=3"], "did you mean 'num-server-rounds'?"),
        (
            ["simulate", DIGITS, "--recipe", "recipe.yaml", "-c", 'merge-method="slerp"'],
            "error: run config 'merge-method': recipe 'recipe.yaml' says how to merge; give one of the two",
        ),
        (["simulate", DIGITS, "-c", 'wire-dtype="int8"'], "error: wire-dtype: 'int8', wanted one of float32, bfloat16"),
        (["simulate", TOY, "--recipe", "recipe.yaml"], "has no key 'recipe' in its run config"),
    ],
)
def test_wrong_arguments_are_one_line_and_exit_code_2(run: Run, arguments: list[str | Path], line: str) -> None:
    written(Path("recipe.yaml"), "merge_method: ties\n")
    code, _, complaint = run(*arguments)
    assert code == 2
    assert complaint.count("\n") == 1
    assert line in complaint


def test_a_missing_base(run: Run, tmp_path: Path) -> None:
    recipe = written(tmp_path / "recipe.yaml", "merge_method: ties\n")
    code, _, complaint = run("check", recipe, "--base", "nowhere")
    assert code == 2
    assert complaint == "error: no such model: 'nowhere' (wanted a .safetensors file, or a folder with one)\n"


def test_simulating_shows_each_round_and_leaves_a_run_folder(run: Run, tmp_path: Path) -> None:
    code, printed, complaint = run(
        "simulate", DIGITS, "-c", "num-server-rounds=2 local-epochs=1", "--workers", "0", "--run-folder", "here"
    )
    assert (code, complaint) == (0, "")
    assert "round 1/2  8 of 8 merged" in printed
    assert "round 2/2  8 of 8 merged" in printed
    assert "clean 0." in printed
    events = [json.loads(line) for line in (tmp_path / "here" / "journal.jsonl").read_text().splitlines()]
    kinds = [event["event"] for event in events]
    assert kinds.count("replied") == 16
    assert kinds.count("round_ended") == 2
    assert kinds.count("clients_evaluated") == 2
    assert set(load(tmp_path / "here")) == {f"{layer}.{part}" for layer in LAYERS for part in ("weight", "bias")}
    again = run("simulate", DIGITS, "--run-folder", "here")
    assert again[::2] == (2, "error: run folder 'here' already holds a run; give another one\n")


def test_a_run_is_resumed_in_its_folder_with_its_config(run: Run, tmp_path: Path) -> None:
    """Two rounds and one more are three rounds at once; what was asked for the first time need not be said again."""
    config = 'local-epochs=1 server-optimizer="{name: adam, lr: 0.01}" num-server-rounds='
    for folder, rounds in (("whole", 3), ("here", 2)):
        arguments = ["-n", "4", "--seed", "3", "-c", f"{config}{rounds}", "--workers", "0", "--run-folder", folder]
        assert run("simulate", DIGITS, *arguments)[0] == 0
    again = ["simulate", DIGITS, "--workers", "0", "--resume", "here"]
    code, _, complaint = run(*again)
    assert (code, complaint[:69]) == (2, "error: resume 'here': round 2 is done and the run is to have 2: wante")
    code, _, complaint = run(*again, "-c", 'num-server-rounds=3 merge-method="ties"')
    assert code == 2
    assert "the run merges with server_optimizer(weighted_average(), adam(" in complaint
    code, printed, complaint = run(*again, "-c", "num-server-rounds=3")
    assert (code, complaint) == (0, "")
    assert "going on after round 2" in printed
    assert "round 3/3  4 of 4 merged" in printed
    assert (tmp_path / "here" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()
    code, _, complaint = run(*again, "-c", 'num-server-rounds=4 merge-method="ties"', "--force")
    assert (code, complaint) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["--resume", "nowhere"],
            "error: 'nowhere' is not the folder of a run, it has no config.json to read: No such f",
        ),
        (
            ["--resume", "a", "--run-folder", "b"],
            "error: a resumed run goes on in its own folder: found run folder 'b'",
        ),
    ],
)
def test_what_cannot_be_resumed(run: Run, arguments: list[str], line: str) -> None:
    code, _, complaint = run("simulate", DIGITS, *arguments)
    assert code == 2
    assert complaint.startswith(line)


LAYERS = ("hidden1", "hidden2", "output")


def test_a_run_that_makes_no_model_ends_with_exit_code_1(run: Run, tmp_path: Path) -> None:
    diverging = "num-server-rounds=2 local-epochs=2 learning-rate=1e30"
    code, printed, complaint = run("simulate", DIGITS, "-c", diverging, "--workers", "0", "--run-folder", "here")
    assert code == 1
    assert complaint == (
        "error: no round of 2 made a model; the last one: round 2: 0 usable replies of 8 clients, wanted at least 4 "
        "(min_replies)\n"
    )
    assert printed.count("failed, the old model stands") == 2
    assert "wanted finite numbers" in printed
    assert not (tmp_path / "here" / "model.safetensors").exists()


def test_more_replies_wanted_than_nodes_there_are(run: Run) -> None:
    code, _, complaint = run("simulate", DIGITS, "-n", "2", "-c", "min-replies=3")
    assert code == 2
    assert complaint == (
        "error: 2 nodes are sampled and a round needs 3 usable replies (min_replies): no round could succeed; sample "
        "more nodes or lower min_replies\n"
    )


def test_one_node_is_no_merge_unless_it_is_asked_for(run: Run) -> None:
    alone = "num-server-rounds=1 local-epochs=1 min-train-nodes=1 min-evaluate-nodes=1 min-available-nodes=1"
    code, _, complaint = run("simulate", DIGITS, "-n", "1", "-c", alone)
    assert code == 2
    assert complaint.startswith("error: 1 node is sampled and a round needs 2 usable replies (min_replies)")
    assert run("simulate", DIGITS, "-n", "1", "-c", f"{alone} min-replies=1")[0] == 0
