"""Wrong recipes and models: one line that says where, what was found and what was wanted, and exit code 2."""

from __future__ import annotations

import json

import pytest
import torch
from llamas import llama, save_tokenizer

from fl_merge.store import load, save

TWO = "models: [{model: math}, {model: code}]\n"
TIES = TWO + "merge_method: ties\nbase_model: base\n"


def sliced(first="[0, 2]", second="[0, 2]"):
    sources = f"{{model: math, layer_range: {first}}}, {{model: code, layer_range: {second}}}"
    return f"slices: [{{sources: [{sources}]}}]\nmerge_method: linear\nparameters: {{weight: 1}}\n"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        # what the form does not have
        (TIES + "merge_metod: ties", "unknown key 'merge_metod' in the recipe; did you mean 'merge_method'?"),
        (TIES + "parameters: {densty: 0.2}", "ties has no parameter 'densty'; did you mean 'density'?"),
        (
            "models: [{model: math, parameters: {wieght: 1}}]\nmerge_method: linear",
            "model 'math': linear has no parameter 'wieght'; did you mean 'weight'?",
        ),
        (
            "models: [{model: math, parameters: {normalize: true}}]\nmerge_method: linear",
            "model 'math': 'normalize' is one value for all models; it stands at the recipe's parameters",
        ),
        (TWO + "merge_method: tyes", "unknown merge method 'tyes'"),
        (TWO + "merge_method: liner", "unknown merge method 'liner'; did you mean 'linear'?"),
        (
            TIES + "parameters: {weight: [{filter: self_atn, value: 1}, {value: 0}]}",
            "parameter 'weight': filter 'self_atn' matches no tensor; did you mean 'self_attn'?",
        ),
        (TIES + "chat_template: auto", "'chat_template' is not supported"),
        (TIES + "tokenizer: {source: union}", "'tokenizer' is not supported"),
        (TIES + "tokenizer_source: union", "tokenizer_source: found 'union', wanted base"),
        (
            "modules: {vision: {models: [{model: math}]}}\nmerge_method: linear",
            "modules: found vision, wanted one module",
        ),
        (
            "models: [{model: math+lora}]\nmerge_method: linear\nparameters: {weight: 1}",
            "no such model: 'lora'",
        ),
        # values
        (
            TWO + "slices: [1]\nmerge_method: linear",
            "found models and slices, wanted exactly one of models, slices, modules",
        ),
        ("base_model: base\nmerge_method: ties", "found none of them, wanted exactly one of models, slices, modules"),
        ("models: []\nmerge_method: linear", "found none of them"),
        (TWO + "dtype: int4\nmerge_method: linear", "dtype: found 'int4', wanted bfloat16, float16, float32, float64"),
        (TIES + "parameters: {weight: yes please}", "found 'yes please', wanted a number that is finite"),
        (TIES + "parameters: {weight: 1, density: 2}", "found 2, wanted a number in [0, 1]"),
        (TIES + "parameters: {weight: 1, density: []}", "density: found an empty list, wanted at least one value"),
        (TIES + "parameters: {weight: {filter: mlp}}", "weight: found {'filter': 'mlp'}, wanted {value, filter}"),
        (TIES + "parameters: {weight: {valu: 1}}", "unknown key 'valu' in parameters: weight; did you mean 'value'?"),
        (TIES + "parameters: {weight: {filter: mlp, value: 1}}", "parameter 'weight' of model 'math' is not given for"),
        (TIES + "compat: sometimes", "compat: found 'sometimes', wanted true or false"),
        (TIES + f"parameters: {{weight: {'9' * 400}}}", "weight: found a number of 400 digits, wanted a number"),
        (
            TIES + "rules: [{match: '*norm*', merge_method: weighted_average}]\nparameters: {density: {}}",
            "parameter 'density' of ties: found {}, wanted a number in (0, 1]",
        ),
        (
            TIES + "parameters: {weight: [{value: 1}, {filter: mlp, value: 2}]}",
            "parameters: weight, number 1: it is for all tensors and comes first; wanted it last",
        ),
        (TIES + "parameters: {density: {}, weight: 1}", "density: found {}, wanted {value, filter}"),
        # models
        (TWO + "merge_method: ties\nparameters: {weight: 1}", "ties needs a base_model, from which deltas are taken"),
        (TIES.replace("ties", "slerp") + "parameters: {t: 0.5}", "slerp: found 3 models, the base included, wanted 2"),
        (
            "models: [{model: math}]\nmerge_method: slerp\nparameters: {t: 0.5}",
            "slerp needs a base_model, which is what t = 0 gives",
        ),
        (
            "models: [{model: math}]\nbase_model: math\nmerge_method: slerp\nparameters: {t: 0.5}",
            "slerp: found 1 model, the base included, wanted 2",
        ),
        (TWO + "merge_method: passthrough", "passthrough: found 2 models, wanted 1"),
        # models that the method does not take
        (
            TWO + "base_model: base\nmerge_method: krum",
            "krum(f=1): found 2 models, wanted at least 5 (N >= 2 f + 3 with f = 1)",
        ),
        (
            TWO + "merge_method: weighted_average\nrules: [{match: '*norm*', merge_method: bulyan}]\nbase_model: base",
            "found 2 models, wanted at least 7 (N >= 4 f + 3 with f = 1)",
        ),
        (
            "models: [{model: math}]\nbase_model: base\nmerge_method: trimmed_mean",
            "trimmed_mean(beta=0.2): found 1 model, wanted at least 5",
        ),
        (
            TIES + "rules: [{match: '*norm*', merge_method: weighted_average}]\nparameters: {density: {math: 0.5}}",
            "density names no client 'code' (it names 'math')",
        ),
        (
            TWO + "merge_method: task_arithmetic\nbase_model: base\nparameters: {coefficients: {maths: 1}}\n"
            "rules: [{match: '*norm*', merge_method: weighted_average}]",
            "coefficients name client 'maths', which has no usable update here (clients: math, code)",
        ),
        ("models: [{model: math}, {model: math}]\nmerge_method: linear", "models: model 'math' stands twice"),
        ("models: [{model: math}, {model: ./math/}]\nmerge_method: linear", "models: model 'math' stands twice"),
        (f"models: [{{model: {'m' * 5000}}}]\nmerge_method: passthrough", "no such model: 'mmm"),
        (TWO + "merge_method: linear\nparameters: {weight: 0}", "sum to 0, by which they are divided"),
        ("models: [{model: nowhere}]\nmerge_method: passthrough", "no such model: 'nowhere'"),
        ("models: [{model: math@main}]\nmerge_method: passthrough", "is on this machine, where there are no revisions"),
        (
            "models: [{model: math}, {model: deep}]\nmerge_method: linear\nparameters: {weight: 1}",
            "has 6 layers, 'math' has 4",
        ),
        # slices
        (sliced("[0, 2]", "[0, 3]"), "slice 1: its sources have 2, 3 layers, wanted equally many"),
        (sliced("[2, 6]", "[0, 4]"), "slice 1: layer_range [2, 6]: model 'math' has 4 layers"),
        (sliced("[2, 2]"), "slice 1, source 1: layer_range: found [2, 2], wanted [first, last + 1]"),
        (sliced("3"), "layer_range: found 3, wanted [first, last + 1]"),
        (sliced().replace("linear", "ties") + "base_model: base", "base_model 'base' is not among the sources"),
        # ours
        (TWO + "merge_method: weighted_average\ncompat: true", "compat: found True, wanted false"),
        (sliced() + "rules: [{match: '*', merge_method: ties}]", "'slices' cannot be used with rules; wanted models"),
        (
            TIES + "rules: [{match: '*nrom*', merge_method: slerp}]",
            "rule '*nrom*' matches no tensor",
        ),
        (
            "models: [{model: math, parameters: {weight: -1}}]\nmerge_method: weighted_average",
            "model 'math': weight: found -1, wanted a number > 0",
        ),
        (
            "models: [{model: math, parameters: {weight: [{value: 1, filter: a}, {value: 2}]}}]\nmerge_method: median",
            "model 'math': weight: found a filter, wanted a number > 0 for all tensors",
        ),
        (
            TWO + "merge_method: depth_upscale",
            "depth_upscale is a method for structures, wanted one for models, or slices",
        ),
        (
            TWO + "merge_method: median\nrules: [{match: '*', merge_method: lora_svd}]",
            "lora_svd is a method for adapters, wanted one for models",
        ),
        (TWO + "merge_method: iso_c", "iso_c needs a base_model, from which deltas are taken"),
        (
            TWO + "merge_method: iso_c\nbase_model: math",
            "'math' is the base_model, whose delta is 0; leave it out",
        ),
        # no recipe of this kind at all
        ("merge_method: ties", "it names no models; wanted models or slices"),
        ("- a list", "found a list, wanted keys with values"),
        ("models: [", "not valid YAML"),
        (
            TIES + "base_model: math",
            "not valid YAML: key 'base_model' stands twice, line 4, column 1: base_model: math",
        ),
    ],
)
def test_a_wrong_recipe(run, tmp_path, text, line):
    (tmp_path / "recipe.yaml").write_text(text + "\n")
    before = {path.name for path in tmp_path.iterdir()}
    names_none = "it names no models" in line or "found a list" in line
    for command in (["merge", "recipe.yaml", "out"], ["plan", "recipe.yaml"], ["check", "recipe.yaml"]):
        if command[0] == "check" and names_none:
            continue  # it may be a federation's
        code, _, complaint = run(*command)
        errors = [each for each in complaint.splitlines() if not each.startswith("note: ")]
        assert code == 2, complaint
        assert len(errors) == 1
        assert errors[0].startswith("error: recipe 'recipe.yaml': ")
        assert line in errors[0]
    assert {path.name for path in tmp_path.iterdir()} == before


LINEAR = "models: [{model: base}, {model: other}]\nmerge_method: linear\nparameters: {weight: 1}\n"


def other_model(tmp_path, **changed):
    """The base with some tensors changed, or left out where they are None."""
    tensors = load(tmp_path / "base") | {name.replace("__", "."): tensor for name, tensor in changed.items()}
    save({name: tensor for name, tensor in tensors.items() if tensor is not None}, tmp_path / "other")
    (tmp_path / "other" / "config.json").write_text((tmp_path / "base" / "config.json").read_text())


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"lm_head__weight": None}, "tensor 'lm_head.weight': is missing in model 'other'"),
        ({"extra": torch.zeros(2)}, "tensor 'extra': is in model 'other' and not in 'base'"),
        (
            {"model__norm__weight": torch.zeros(3)},
            "tensor 'model.norm.weight': shape (3,) in model 'other', 'base' has (32,)",
        ),
        (
            {"lm_head__weight": torch.zeros(70, 32)},
            "shape (70, 32) in model 'other', 'base' has (64, 32); models of different vocabularies cannot be",
        ),
        ({"model__norm__weight": torch.zeros(32, dtype=torch.int64)}, "dtype torch.int64 in model 'other'"),
        ({"model__norm__weight": torch.full((32,), float("nan"))}, "model 'other': element 0 is nan, wanted finite"),
        ({"lm_head__weight": torch.full((64, 32), float("inf"))}, "model 'other': element 0 is inf, wanted finite"),
    ],
)
def test_a_model_that_does_not_fit(run, tmp_path, changed, line):
    other_model(tmp_path, **changed)
    (tmp_path / "recipe.yaml").write_text(LINEAR)
    before = {path.name for path in tmp_path.iterdir()}
    code, _, complaint = run("merge", "recipe.yaml", "out")
    errors = [each for each in complaint.splitlines() if not each.startswith("note: ")]
    assert (code, len(errors)) == (2, 1)
    assert line in errors[0]
    assert {path.name for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("method", ["ties", "breadcrumbs", "dare_ties", "della", "iso_c", "tsv_m"])
def test_nan_is_no_change_to_no_method(run, tmp_path, method):
    other_model(tmp_path, lm_head__weight=torch.full((64, 32), float("nan")))
    (tmp_path / "recipe.yaml").write_text(
        f"merge_method: {method}\nbase_model: base\nmodels:\n  - {{model: other, parameters: {{weight: 1}}}}\n"
    )
    code, _, complaint = run("merge", "recipe.yaml", "out")
    assert (code, "model 'other': element 0 is nan, wanted finite" in complaint) == (2, True)
    assert not (tmp_path / "out").exists()


def test_a_vocabulary_in_another_order_is_refused_where_the_bases_is_asked_for(run, tmp_path):
    llama(3).save_pretrained(tmp_path / "other")
    save_tokenizer(tmp_path / "other")
    path = tmp_path / "other" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"] |= {"w1": 2, "w2": 1}
    path.write_text(json.dumps(content))
    (tmp_path / "recipe.yaml").write_text(LINEAR + "tokenizer_source: base\n")
    code, _, complaint = run("merge", "recipe.yaml", "out")
    assert code == 2
    assert "tokenizer_source: base: the tokens of model 'other' are not those of 'base'" in complaint


def test_a_value_that_has_no_place_in_the_dtype(run, tmp_path):
    save({"w": torch.full((2,), 60000.0)}, tmp_path / "large")
    (tmp_path / "recipe.yaml").write_text(
        "models: [{model: large}]\nmerge_method: passthrough\nparameters: {scale: 2}\ndtype: float16\n"
    )
    code, _, complaint = run("merge", "recipe.yaml", "out")
    assert code == 1
    assert "tensor 'w': a merged value of magnitude 120000 does not fit float16" in complaint
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["owner/model", "owner/model@rev"])
def test_a_name_of_the_hub_that_cannot_be_fetched_says_what_to_do(run, tmp_path, monkeypatch, caplog, name):
    import huggingface_hub

    asked = []

    def refuse(repo, revision, allow_patterns):
        asked.append((repo, revision))
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    (tmp_path / "recipe.yaml").write_text(f"models: [{{model: {name}}}]\nmerge_method: passthrough\n")
    code, _, complaint = run("plan", "recipe.yaml")
    assert code == 2
    assert "(OSError: no network); offline, fetch it elsewhere with 'hf download owner/model'" in complaint
    assert "'owner/model' is no folder here: asking the Hugging Face hub for it" in caplog.text
    assert asked == [("owner/model", "rev" if "@" in name else None)]


def test_a_name_of_the_hub_is_read_from_where_the_hub_puts_it(run, tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path / "math"))
    (tmp_path / "recipe.yaml").write_text("models: [{model: owner/model}]\nmerge_method: passthrough\n")
    assert run("merge", "recipe.yaml", "out")[0] == 0
    assert load(tmp_path / "out").keys() == load(tmp_path / "math").keys()


@pytest.mark.parametrize("size", ["5 parsecs", "0GB", "", "-1MB"])
def test_a_wrong_shard_size(run, tmp_path, size):
    (tmp_path / "recipe.yaml").write_text(LINEAR)
    code, _, complaint = run("merge", "recipe.yaml", "out", "--shard-size", size)
    assert code == 2
    assert complaint.endswith("wanted a size such as 5GB or 500MB\n")
