"""`fl-merge plan`, `check` and `inspect`: what is shown before a merge, and of models that are to be merged."""

from __future__ import annotations

import io
import json
import time

import pytest
import torch

from fl_merge.offline.commands import _bytes
from fl_merge.offline.models import Model
from fl_merge.store import load, save
from recipes import EXAMPLES, PASSTHROUGH, TIES


def printed(run, *arguments):
    code, out, complaint = run(*arguments)
    assert code == 0, complaint
    return " ".join(out.split())


def test_the_plan_says_what_is_read_done_and_written(run, tmp_path):
    (tmp_path / "recipe.yaml").write_text(TIES)
    found = printed(run, "plan", "recipe.yaml")
    size = (tmp_path / "math" / "model.safetensors").stat().st_size
    assert "base 4 39" in found
    assert "base, config and tokenizer" in found
    assert f"reads {4 * size / 1e3:.3g} kB of 4 models" in found or "reads 56" in found
    assert "density={'1': 1.0, '2': 0.5, '3': 0.33}" in found
    assert "math x 1, code x 0.1, chat x 0.2" in found
    assert "note: 'int8_mask' changes nothing in the result" in found


def test_every_tensor_is_listed_on_demand(run, tmp_path):
    (tmp_path / "recipe.yaml").write_text(PASSTHROUGH)
    found = printed(run, "plan", "recipe.yaml", "--tensors")
    name = "self_attn.q_proj.weight"
    assert f"model.layers.3.{name} (32, 32) float16 unchanged: code of code:model.layers.1.{name}" in found
    assert f"model.layers.6.{name} (32, 32) float16 unchanged: math of math:model.layers.3.{name}" in found
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", EXAMPLES)
def test_check_takes_recipes_that_name_their_models(run, tmp_path, name):
    (tmp_path / "recipe.yaml").write_text(EXAMPLES[name])
    assert "39 tensors" in printed(run, "check", "recipe.yaml") or name != "linear"
    code, _, complaint = run("check", "recipe.yaml", "--base", "base")
    assert (code, complaint) == (2, "error: --base: recipe 'recipe.yaml' names its own models\n")


def test_inspect_gives_norms_cosines_conflicts_and_sparsity_by_layer(run, tmp_path):
    """By hand: deltas (3, 4, 0) and (0, -4, 0) in layer 0; (1, 0) and none in layer 1."""
    base = {"blocks.0.w": torch.ones(3), "blocks.1.w": torch.zeros(2), "embed.weight": torch.zeros(2)}
    save(base, tmp_path / "start")
    save(base | {"blocks.0.w": torch.tensor([4.0, 5.0, 1.0]), "blocks.1.w": torch.tensor([1.0, 0.0])}, tmp_path / "a")
    save(base | {"blocks.0.w": torch.tensor([1.0, -3.0, 1.0])}, tmp_path / "b")
    code, out, _ = run("inspect", "a", "b", "--base", "start", "--json")
    assert code == 0
    groups = {group.pop("name"): group for group in json.loads(out)["groups"]}
    assert list(groups) == ["embeddings", "0", "1", "all"]
    assert groups["0"] == {
        "elements": 3,
        "base_norm": pytest.approx(3**0.5),
        "delta_norms": [5.0, 4.0],
        "cosines": [[1.0, pytest.approx(-0.8)], [pytest.approx(-0.8), 1.0]],
        "sign_conflicts": 0.5,
        "sparsity": [pytest.approx(1 / 3), pytest.approx(2 / 3)],
    }
    assert groups["1"]["cosines"] == [[1.0, None], [None, None]]
    assert groups["all"]["delta_norms"] == [pytest.approx(26**0.5), 4.0]
    table = printed(run, "inspect", "a", "b", "--base", "start")
    assert "0 3 1.732 5 4 -0.800 -0.800 50.0% 33.3% 66.7%" in table


def test_nothing_of_the_table_is_cut_on_a_narrow_terminal(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = run("inspect", "math", "code", "chat", "half", "--base", "base")
    assert code == 0
    assert "\u2026" not in out
    heading, first, *_ = out.splitlines()
    wanted = "layer elements base math code chat half cosine least conflicts 0 math 0 code 0 chat 0 half"
    assert " ".join(heading.split()) == wanted
    assert first.split()[:2] == ["embeddings", "2,048"]
    assert len(first.split()) == 14


def test_one_is_not_several(run, tmp_path):
    save({"w": torch.ones(2)}, tmp_path / "one")
    (tmp_path / "recipe.yaml").write_text("models: [{model: one}]\nmerge_method: passthrough\n")
    found = printed(run, "plan", "recipe.yaml")
    assert "1 tensor, w" in found
    assert "reads 8 bytes of 1 model, writes 1 tensor, 8 bytes; about" in found
    found = printed(run, "merge", "recipe.yaml", "out")
    assert found.startswith("1 model: reading 8 bytes, writing 1 tensor, 8 bytes; about")
    assert "out: 1 tensor in " in found


def test_slices_give_what_whole_tensors_give(run, tmp_path, monkeypatch):
    from fl_merge.offline import inspection

    _, whole, _ = run("inspect", "math", "code", "--base", "base", "--json")
    monkeypatch.setattr(inspection, "STEP", 100)
    _, sliced, _ = run("inspect", "math", "code", "--base", "base", "--json")
    for a, b in zip(json.loads(whole)["groups"], json.loads(sliced)["groups"], strict=True):
        assert a["delta_norms"] == pytest.approx(b["delta_norms"], rel=1e-12)
        assert a["sign_conflicts"] == b["sign_conflicts"]


def test_without_a_base_the_weights_themselves_are_looked_at(run, tmp_path):
    _, out, _ = run("inspect", "math", "--json")
    [total] = [group for group in json.loads(out)["groups"] if group["name"] == "all"]
    wanted = torch.cat([tensor.flatten().double() for tensor in load(tmp_path / "math").values()]).norm()
    assert total["delta_norms"] == [pytest.approx(float(wanted))]
    assert total["base_norm"] == 0.0


def test_the_plot_is_a_picture(run, tmp_path):
    pytest.importorskip("matplotlib")
    code, _, told = run("inspect", "math", "code", "--base", "base", "--plot", "layers.png")
    assert (code, told) == (0, "plot: layers.png\n")
    assert (tmp_path / "layers.png").read_bytes().startswith(b"\x89PNG")
    code, _, complaint = run("inspect", "math", "--plot", "layers.doc")
    assert code == 2
    assert complaint.startswith("error: --plot: cannot write 'layers.doc'")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["nowhere"], "error: no such model: 'nowhere'"),
        (["math", "deep"], "is not in the base (and 17 more tensors do not fit) (model 'deep', held against 'math')"),
        (["."], "holds no model.safetensors and no model.safetensors.index.json"),
    ],
)
def test_models_that_cannot_be_inspected(run, arguments, line):
    code, _, complaint = run("inspect", *arguments)
    assert code == 2
    assert complaint.count("\n") == 1
    assert line in complaint


def test_the_progress_bar_is_kept_off_pipes_and_quick_merges(run, tmp_path, monkeypatch):
    (tmp_path / "recipe.yaml").write_text(PASSTHROUGH)
    code, out, told = run("merge", "recipe.yaml", "out")
    assert code == 0
    assert "merging" not in out + told.replace("note:", "")


def test_each_step_of_a_long_merge_has_a_bar(run, tmp_path, monkeypatch):
    """With every step taken for a long one, on a terminal: what is read, what is merged, what is hashed."""
    from rich.console import Console

    from fl_merge.offline import commands
    from fl_merge.offline import run as running

    printed = io.StringIO()
    monkeypatch.setattr(commands, "err", Console(file=printed, force_terminal=True, width=100))
    monkeypatch.setattr(commands, "AFTER_SECONDS", 0.0)
    monkeypatch.setattr(running, "CHUNK_BYTES", 20_000)
    for name in ("execute", "check_values"):
        slow = getattr(running, name)
        monkeypatch.setattr(running, name, lambda *a, slow=slow, **k: (time.sleep(0.12), slow(*a, **k))[1])
    hashes = Model.hashes
    monkeypatch.setattr(Model, "hashes", lambda self: (time.sleep(0.12), hashes(self))[1])
    (tmp_path / "recipe.yaml").write_text(PASSTHROUGH)
    code, _, _ = run("merge", "recipe.yaml", "out")
    assert code == 0
    for what, total in (("checking", 2 * 39), ("merging", 3 + 7 * 9), ("hashing", 2)):
        assert what in printed.getvalue()
        assert f"/{total}" in printed.getvalue()


def test_a_check_in_chunks_sees_every_tensor():
    from fl_merge.offline.run import _chunks
    from fl_merge.types import TensorSpec

    specs = {str(n): TensorSpec((2**24,), torch.float32) for n in range(9)} | {"small": TensorSpec((), torch.float32)}
    chunks = list(_chunks(specs))
    assert [list(chunk) for chunk in chunks] == [["0", "1", "2", "3"], ["4", "5", "6", "7"], ["8", "small"]]
    assert list(_chunks({})) == []


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5 * 10**9),
        ("1.5gb", 1_500_000_000),
        ("2GiB", 2**31),
        ("300", 300),
        ("10 MB", 10**7),
        ("7B", 7),
        ("2K", 2000),
    ],
)
def test_sizes(text, size):
    assert _bytes(text) == size
