"""fl-merge lora, as a user types it."""

import json

import pytest
import torch
from random_adapters import config, tensors
from safetensors.torch import load_file, save_file


@pytest.fixture
def folders(tmp_path):
    for number, rank in enumerate((4, 8)):
        folder = tmp_path / f"client{number}"
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps(config(rank, 8)))
        save_file(tensors(number, rank), folder / "adapter_model.safetensors")
    return tmp_path


def test_stack_svd_inspect(folders, run):
    code, text = run("lora", "stack", "client0", "client1", "--out", "stacked")
    assert (code, text) == (0, "2 adapters, 3 modules, rank 12, relative error 0: stacked\n")
    code, text = run("lora", "svd", "client0", "client1", "-w", "3,1", "--rank", "2", "-o", "cut")
    assert code == 0
    assert "rank 2, relative error 0." in text
    assert "note: what was cut off is 0." in text
    manifest = json.loads((folders / "cut/fl_merge_manifest.json").read_text())
    assert [entry["weight"] for entry in manifest["inputs"]] == [0.75, 0.25]
    code, text = run("lora", "inspect", "cut")
    assert code == 0
    assert "base_model.model.layers.0.up" in text
    assert "64 x 30" in text


def test_the_adapter_of_a_federation_is_written_for_peft(folders, run):
    plain = tensors(5, 6)
    save_file(plain, folders / "model.safetensors")
    arguments = ["export", "model.safetensors", "--config", "client0/adapter_config.json", "--out", "final"]
    code, text = run("lora", *arguments)
    assert (code, text) == (0, "3 modules: final\n")
    written = json.loads((folders / "final/adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"], written["target_modules"]) == (6, 6, ["down", "q", "up"])
    found = load_file(folders / "final/adapter_model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in plain.items())
    save_file({"w": torch.ones(2)}, folders / "other.safetensors")
    code, text = run("lora", "export", "other.safetensors", *arguments[2:-1], "none")
    assert (code, "wanted an adapter" in text) == (2, True)


def test_fold(folders, run):
    base = {"layers.0.q.weight": torch.ones(40, 30), "layers.0.up.weight": torch.ones(64, 30)}
    base |= {"layers.1.down.weight": torch.ones(30, 64), "norm": torch.ones(3)}
    (folders / "base").mkdir()
    save_file(base, folders / "base/model.safetensors")
    code, text = run("lora", "fold", "client0", "--base", "base", "--out", "folded")
    assert (code, text) == (0, "4 tensors in folded\n")
    given = tensors(0, 4)
    wanted = (
        1
        + 2.0 * given["base_model.model.layers.0.q.lora_B.weight"] @ given["base_model.model.layers.0.q.lora_A.weight"]
    )
    found = load_file(folders / "folded/model.safetensors")
    torch.testing.assert_close(found["layers.0.q.weight"], wanted)
    assert torch.equal(found["norm"], base["norm"])


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_a_quantised_base_is_refused_and_nothing_is_written(folders, run, dtype):
    (folders / "base").mkdir()
    weights = {"layers.0.q.weight": torch.ones(40, 30).to(dtype)}
    if dtype == torch.uint8:
        weights["layers.0.q.weight.absmax"] = torch.ones(3)
    save_file(weights, folders / "base/model.safetensors")
    code, text = run("lora", "fold", "client0", "--base", "base", "-o", "folded")
    assert code == 2
    assert "'base' is quantised" in text
    assert not (folders / "folded").exists()


def test_a_quantisation_in_the_configuration_is_refused(folders, run):
    (folders / "base").mkdir()
    save_file({"layers.0.q.weight": torch.ones(40, 30)}, folders / "base/model.safetensors")
    (folders / "base/config.json").write_text('{"quantization_config": {"load_in_4bit": true}}')
    code, text = run("lora", "fold", "client0", "--base", "base", "-o", "folded")
    assert (code, "quantization_config" in text) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["svd", "client0", "client1", "-w", "1", "-o", "x"], "weights: found 1 of them, wanted one for each of the 2"),
        (["svd", "client0", "client1", "-w", "1,b", "-o", "x"], "--weights: found '1,b', wanted numbers such as 3,1,1"),
        (["stack", "nothing", "-o", "x"], "no adapter in 'nothing'"),
        (["svd", "client0", "--dtype", "int8", "-o", "x"], "--dtype: found 'int8', wanted one of float64"),
        (["svd", "client0", "--energy", "2", "-o", "x"], "parameter 'energy' of lora_svd: found 2.0"),
        (["fold", "client0", "--base", "client1", "-o", "x"], "holds no model.safetensors"),
    ],
)
def test_wrong_input_is_one_line_and_code_2(folders, run, arguments, message):
    code, text = run("lora", *arguments)
    assert code == 2
    assert message in text
    assert len(text.splitlines()) == 1
    assert not (folders / "x").exists()


def test_what_is_there_is_not_written_over(folders, run):
    (folders / "base").mkdir()
    save_file({"layers.0.q.weight": torch.ones(40, 30)}, folders / "base/model.safetensors")
    save_file(tensors(5, 6), folders / "model.safetensors")
    (folders / "file").touch()
    before = {path: path.read_bytes() for path in folders.rglob("*") if path.is_file()}
    taken = "'{}' is where the input '{}' is; write to another folder"
    for arguments, message in (
        (["stack", "client0", "client1", "-o", "client1", "--force"], taken.format("client1", "client1")),
        (["svd", "client0", "client1", "-o", "client0/../client1"], taken.format("client0/../client1", "client1")),
        (["fold", "client0", "--base", "base", "-o", "base", "--force"], taken.format("base", "base")),
        (["fold", "client0", "--base", "base/model.safetensors", "-o", "base"], "where the input 'base/model.safet"),
        (["svd", "client0", "-o", "file"], "'file' is a file, wanted a folder to write"),
        (["svd", "client0", "-o", "base"], "folder 'base' is not empty; give another one, or --force to replace"),
        (["export", "model.safetensors", "--config", "client0/adapter_config.json", "-o", "."], "where the input"),
    ):
        code, text = run("lora", *arguments)
        assert (code, message in text, len(text.splitlines())) == (2, True, 1), text
    assert {path: path.read_bytes() for path in folders.rglob("*") if path.is_file()} == before
    assert run("lora", "svd", "client0", "-o", "new")[0] == 0
    assert run("lora", "svd", "client0", "-o", "new")[0] == 2
    assert run("lora", "svd", "client1", "-o", "new", "--force")[0] == 0
