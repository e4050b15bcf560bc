"""Adapters in recipes for fl-merge merge: on models (path+lora), and by themselves."""

import json

import pytest
import torch
from peft import PeftModel
from peft_models import deltas, gpt2, llama, make_adapter
from random_adapters import distance, weighted
from safetensors.torch import load_file


def two(tmp_path, construct, **settings):
    construct().save_pretrained(tmp_path / "base")
    return [make_adapter(tmp_path / f"client{i}", construct, i, rank=4 + 4 * i, **settings) for i in range(2)]


@pytest.mark.parametrize(
    ("construct", "settings"),
    [(llama, {"target_modules": ["q_proj", "embed_tokens"]}), (gpt2, {"target_modules": ["c_attn"]})],
)
def test_a_model_with_an_adapter_is_what_peft_makes_of_it(tmp_path, run, construct, settings):
    folders = two(tmp_path, construct, **settings)
    (tmp_path / "recipe.yaml").write_text(
        "merge_method: linear\nmodels:\n"
        "  - {model: base+client0, parameters: {weight: 3.0}}\n"
        "  - {model: {model: {path: base}, lora: {path: client1}}, parameters: {weight: 1.0}}\n"
    )
    code, text = run("merge", "recipe.yaml", "merged")
    assert code == 0, text
    found, base = load_file(tmp_path / "merged/model.safetensors"), load_file(tmp_path / "base/model.safetensors")
    wanted = weighted([deltas(construct, folder) for folder in folders], [0.75, 0.25])
    moved = {
        name: found[name].double() - base[name].double() for name in base if not torch.equal(found[name], base[name])
    }
    assert distance({name: moved[name] for name in wanted}, wanted) < 1e-5
    assert moved.keys() == wanted.keys()
    assert "adapter_model.safetensors" in (tmp_path / "merged/README.md").read_text()


def test_adapters_by_themselves(tmp_path, run):
    folders = two(tmp_path, llama, target_modules=["q_proj", "v_proj"])
    (tmp_path / "recipe.yaml").write_text(
        "merge_method: lora_svd\nparameters: {rank: 12}\ndtype: float32\nmodels:\n"
        "  - {model: client0, parameters: {weight: 3}}\n  - client1\n"
    )
    code, text = run("merge", "recipe.yaml", "merged")
    assert code == 0, text
    assert text == "merged: an adapter of 4 modules, relative error 0\n"
    wanted = weighted([deltas(llama, folder) for folder in folders], [0.75, 0.25])
    assert distance(deltas(llama, tmp_path / "merged"), wanted) < 1e-6
    assert json.loads((tmp_path / "merged/adapter_config.json").read_text())["r"] == 12
    assert PeftModel.from_pretrained(llama(), tmp_path / "merged").active_adapter == "default"
    code, text = run("merge", "recipe.yaml", "merged")
    assert (code, "is not empty; give another one, or --force" in text) == (2, True)
    code, text = run("merge", "recipe.yaml", "client0", "--force")
    assert (code, "'client0' is where the input 'client0' is" in text) == (2, True)
    code, text = run("merge", "recipe.yaml", "recipe.yaml")
    assert (code, "'recipe.yaml' is a file, wanted a folder" in text) == (2, True)
    assert run("merge", "recipe.yaml", "merged", "--force")[0] == 0


def test_a_plan_says_what_will_be_read_and_written_and_reads_no_value(tmp_path, run):
    """The sizes are those of the files: of the inputs' tensors, and of the result's."""
    folders = two(tmp_path, llama, target_modules=["q_proj", "v_proj"])
    make_adapter(folders[1], llama, 1, rank=8, alpha=8, target_modules=["q_proj", "v_proj", "o_proj"])
    recipe = "merge_method: lora_svd\nparameters: {rank: 10}\ndtype: bfloat16\nmodels:\n"
    recipe += "  - {model: client0, parameters: {weight: 3}}\n  - client1\n"
    (tmp_path / "recipe.yaml").write_text(recipe)
    code, text = run("plan", "recipe.yaml", "--tensors")
    assert code == 0, text
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert lines[1:3] == ["client0 0.75 4 4 2 float32", "client1 0.25 6 8 1 float32"]
    module = "base_model.model.model.layers.*.self_attn"
    assert f"{module}.q_proj (2): 24 x 24, ranks 4, 8 to at most 10" in lines
    assert f"{module}.o_proj (2): 24 x 24, ranks 0, 8 to at most 8" in lines
    size = sum(t.nbytes for f in folders for t in load_file(f / "adapter_model.safetensors").values())
    assert run("merge", "recipe.yaml", "merged")[0] == 0
    written = load_file(tmp_path / "merged/adapter_model.safetensors")
    made = sum(tensor.nbytes for tensor in written.values())
    told = f"reads {size / 1000:.3g} kB of 2 adapters, writes 12 tensors, at most {made / 1000:.3g} kB; about 3"
    assert [line for line in lines if line.startswith(told)], text
    assert any("o_proj' is not in 'client0': counts as zero there" in line for line in lines)
    assert all(
        any(line.startswith(f"{name} ({', '.join(map(str, t.shape))})") for line in lines)
        for name, t in written.items()
    )
    weights = folders[0] / "adapter_model.safetensors"
    bytes_there = weights.read_bytes()
    weights.write_bytes(bytes_there[:-200] + b"\xff" * 200)  # values that are not finite
    assert run("plan", "recipe.yaml", "--tensors") == (0, text)
    code, checked = run("check", "recipe.yaml")
    assert (code, checked in text) == (0, True)
    assert "is nan, wanted finite numbers" in run("merge", "recipe.yaml", "merged", "--force")[1]


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("merge_method: lora_svd\nmodels: [client0]\nrank: 3\n", "unknown key 'rank' in a recipe for adapters"),
        (
            "merge_method: lora_svd\nparameters: {rnk: 3}\nmodels: [client0]\n",
            "no parameter 'rnk'; did you mean 'rank'",
        ),
        ("merge_method: lora_svd\nmodels: [nothing]\n", "no adapter in"),
        ("merge_method: lora_svd\nmodels: [client0, client0]\n", "named twice"),
        ("merge_method: lora_svd\nmodels: [{model: client0, parameters: {weight: no}}]\n", "weight: found False"),
        ("merge_method: lora_svd\nmodels: [client0]\ndtype: int8\n", "dtype: found 'int8', wanted one of"),
        ("merge_method: lora_factor_mean\nmodels: [client0, client1]\n", "has rank 4 at client"),
        (
            "merge_method: lora_merge\nparameters: {method: trimmed_mean}\nmodels: [client0, client1]\n",
            "found 2 adapters, wanted at least 5",
        ),
        ("merge_method: linear\nmodels: [{model: client0}, {model: base}]\n", "'client0' is an adapter; name it with"),
        ("merge_method: linear\nmodels: [{model: base+base}, {model: base}]\n", "no adapter in 'base'"),
    ],
)
def test_wrong_recipes_are_refused_in_one_line(tmp_path, run, recipe, message):
    two(tmp_path, llama, target_modules=["q_proj"])
    (tmp_path / "recipe.yaml").write_text(recipe)
    for arguments in (["merge", "recipe.yaml", "merged"], ["plan", "recipe.yaml"], ["check", "recipe.yaml"]):
        code, text = run(*arguments)
        assert code == 2
        assert message in text, text
        assert len(text.splitlines()) == 1
    assert not (tmp_path / "merged").exists()
