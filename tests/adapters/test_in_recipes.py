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
        ("merge_method: linear\nmodels: [{model: client0}, {model: base}]\n", "'client0' is an adapter; name it with"),
        ("merge_method: linear\nmodels: [{model: base+base}, {model: base}]\n", "no adapter in 'base'"),
    ],
)
def test_wrong_recipes_are_refused_in_one_line(tmp_path, run, recipe, message):
    two(tmp_path, llama, target_modules=["q_proj"])
    (tmp_path / "recipe.yaml").write_text(recipe)
    code, text = run("merge", "recipe.yaml", "merged")
    assert code == 2
    assert message in text, text
    assert len(text.splitlines()) == 1
    assert not (tmp_path / "merged").exists()
