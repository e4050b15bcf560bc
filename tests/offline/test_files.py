"""`fl-merge merge` on folders and files: the examples' models load and generate, and each tensor is right."""

from __future__ import annotations

import json
import re

import pytest
import torch
from llamas import llama

from fl_merge import merge
from fl_merge.methods import ties, weighted_average
from fl_merge.store import load, save
from recipes import EXAMPLES, LINEAR, PASSTHROUGH, SLERP, TIES

Q = "model.layers.{}.self_attn.q_proj.weight"


@pytest.fixture
def models(zoo):
    """The tensors of the models, by name."""
    return {folder.name: load(folder) for folder in zoo.iterdir()}


def close(found, wanted, tolerance=1e-6):
    assert float((found.double() - wanted.double()).norm()) <= tolerance * float(wanted.double().norm())


# --- the examples ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_merged_folder_loads_in_transformers_and_generates(name, merged, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = merged(EXAMPLES[name], "--shard-size", "50KB")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True, dtype="auto")
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    dtype = {"dare_ties": torch.bfloat16, "passthrough": torch.float16}.get(name, torch.float32)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert all(torch.equal(found[key], tensor) for key, tensor in model.state_dict().items())
    tokens = model.generate(**tokenizer("w1 w2 w3", return_tensors="pt"), max_new_tokens=4, do_sample=False)
    assert 3 < tokens.shape[1] <= 7


def test_linear_is_the_weighted_mean(merged, models):
    found = merged(LINEAR)
    for name, tensor in found.items():
        a, b, c = (models[model][name].double() for model in ("math", "code", "chat"))
        close(tensor, (1.0 * a + 0.3 * b + 0.5 * c) / 1.8)


def test_slerp_takes_its_fraction_by_filter_and_layer(merged, models):
    """Four layers on five numbers: layer 1 is at 4/3 of the way, 2/3 of the second number and 1/3 of the third."""
    found = merged(SLERP)
    a, b = models["math"], models["code"]
    fractions = {
        Q.format(0): 0.0,
        Q.format(1): 2 / 3 * 0.5 + 1 / 3 * 0.3,
        Q.format(3): 1.0,
        "model.layers.1.mlp.up_proj.weight": 2 / 3 * 0.5 + 1 / 3 * 0.7,
        "model.layers.0.mlp.up_proj.weight": 1.0,
        "model.layers.2.input_layernorm.weight": 0.5,
        "model.embed_tokens.weight": 0.5,
    }
    for name, t in fractions.items():
        x, y = a[name].double(), b[name].double()
        angle = torch.acos((x * y).sum() / x.norm() / y.norm())
        line = (1 - t) * x + t * y
        arc = (torch.sin((1 - t) * angle) * x + torch.sin(t * angle) * y) / torch.sin(angle)
        close(found[name], line if torch.cos(angle) > 0.9995 else arc)


def test_ties_has_the_settings_of_each_layer_and_filter(merged, models):
    found = merged(TIES)
    deltas = ("math", "code", "chat")
    for name, density, weights in (
        (Q.format(0), 1.0, (1.0, 0.1, 0.2)),
        (Q.format(3), 0.1, (1.0, 1.0, 0.2)),
        ("model.layers.3.mlp.down_proj.weight", 0.1, (1.0, 1.0, 0.5)),
        ("lm_head.weight", 1.0, (1.0, 0.1, 0.2)),
    ):
        by_client = {"0": density, "1": 0.5, "2": 0.33}
        clients = [{"w": models[model][name]} for model in deltas]
        wanted = merge(ties(density=by_client), {"w": models["base"][name]}, clients, list(weights))["w"]
        close(found[name], wanted)


def test_passthrough_stacks_layers_and_writes_the_depth(merged, models, tmp_path):
    found = merged(PASSTHROUGH)
    source = [("math", 0), ("math", 1), ("math", 2), ("code", 1), ("code", 2), ("math", 2), ("math", 3)]
    for layer, (model, number) in enumerate(source):
        assert torch.equal(found[Q.format(layer)], models[model][Q.format(number)].half())
    assert Q.format(len(source)) not in found
    assert torch.equal(found["lm_head.weight"], models["math"]["lm_head.weight"].half())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == 7
    assert config.get("torch_dtype", config.get("dtype")) == "float16"


def test_passthrough_scales_by_filter(merged, models):
    """As for a copied block that is to add nothing at first: what it adds to the residual stream is scaled."""
    found = merged("""
slices:
  - sources: [{model: math, layer_range: [0, 3]}]
  - sources:
      - model: code
        layer_range: [1, 4]
        parameters:
          scale:
            - {filter: o_proj, value: 0.0}
            - {filter: down_proj, value: [0.0, 0.5]}
            - value: 1.0
merge_method: passthrough
""")
    for number in range(3):
        ours, theirs = f"model.layers.{3 + number}.", f"model.layers.{1 + number}."
        scales = {"self_attn.o_proj": 0.0, "mlp.down_proj": number / 4, "self_attn.q_proj": 1.0, "mlp.up_proj": 1.0}
        for part, scale in scales.items():
            assert torch.equal(found[f"{ours}{part}.weight"], scale * models["code"][f"{theirs}{part}.weight"])
        assert torch.equal(found[Q.format(number)], models["math"][Q.format(number)])


def test_dare_ties_takes_normalize_and_lambda(merged, models):
    """At density 1 nothing is drawn: elected signs, and the mean or the sum of those that agree, times lambda."""
    text = """
models:
  - {model: base}
  - {model: math, parameters: {density: 1.0, weight: 0.4}}
  - {model: chat, parameters: {density: 1.0, weight: 0.6}}
merge_method: dare_ties
base_model: base
parameters: {int8_mask: true, normalize: %s, lambda: 1.1}
"""
    clients = [models["math"], models["chat"]]
    for normalize in (True, False):
        found = merged(text % str(normalize).lower(), out=f"out-{normalize}")
        wanted = merge(ties(density=1.0, normalize=normalize, scale=1.1), models["base"], clients, [0.4, 0.6])
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.items())


def test_a_models_own_layers_in_order_give_it_back_bit_for_bit(merged, models):
    text = """
slices:
  - sources: [{model: math, layer_range: [0, 1]}]
  - sources: [{model: math, layer_range: [1, 4]}]
merge_method: passthrough
"""
    found = merged(text)
    assert found.keys() == models["math"].keys()
    assert all(torch.equal(tensor, models["math"][name]) for name, tensor in found.items())


def test_lists_of_one_entry_a_layer_follow_the_layers(merged, tmp_path, zoo, run):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, use_sliding_window=True, sliding_window=8, max_window_layers=2,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "qwen")
    kinds = json.loads((tmp_path / "qwen" / "config.json").read_text())["layer_types"]
    assert len(set(kinds)) == 2
    merged("slices:\n  - sources: [{model: qwen, layer_range: [3, 4]}]\n"
           "  - sources: [{model: qwen, layer_range: [0, 3]}]\nmerge_method: passthrough\n")  # fmt: skip
    found = json.loads((tmp_path / "out" / "config.json").read_text())
    assert found["layer_types"] == [kinds[3], *kinds[:3]]


# --- what may come in ------------------------------------------------------------------------------------------------


def test_plain_files_and_their_layers_by_name_alone(merged, tmp_path):
    for number in range(2):
        tensors = {"stem.weight": torch.full((2,), 1.0 + number), "norm": torch.ones(2), "step": torch.tensor(number)}
        tensors |= {f"blocks.{layer}.w": torch.full((3,), 10.0 * layer + number) for layer in range(3)}
        save(tensors, tmp_path / f"plain{number}")
        (tmp_path / f"plain{number}" / "model.safetensors").rename(tmp_path / f"plain{number}.safetensors")
    found = merged("""
models:
  - {model: plain0.safetensors, parameters: {weight: 1}}
  - {model: plain1.safetensors, parameters: {weight: [0, 1]}}
merge_method: linear
parameters: {normalize: false}
""")
    assert found["blocks.1.w"].tolist() == [10.0 + 0.5 * 11.0] * 3
    assert found["blocks.2.w"].tolist() == [41.0] * 3
    assert found["stem.weight"].tolist() == [1.0, 1.0]
    assert found["step"] == 0
    assert not (tmp_path / "out" / "config.json").exists()


def test_models_of_several_dtypes_are_widened_and_rounded_once(merged, models):
    found = merged("models: [{model: half}, {model: math}]\nmerge_method: linear\n"
                   "parameters: {weight: 1.0}\ndtype: float16\nout_dtype: float64\n")  # fmt: skip
    name = Q.format(1)
    wanted = (models["half"][name].double() + models["math"][name].double()) / 2
    assert torch.equal(found[name], wanted)


def test_a_tied_head_is_read_from_the_embedding_where_others_store_one(merged, tmp_path):
    base = llama(0, tied=True)
    base.save_pretrained(tmp_path / "tied")
    own = llama(7, start=base, tied=True)
    own.save_pretrained(tmp_path / "stored")
    tensors = load(tmp_path / "stored")
    save(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, tmp_path / "stored")
    text = "models: [{model: %s}, {model: %s}]\nmerge_method: linear\nparameters: {weight: 1}\n"
    found = merged(text % ("stored", "tied"))
    assert torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"])
    assert "lm_head.weight" not in merged(text % ("tied", "stored"), out="second")


def test_constants_that_old_versions_stored_are_left_out(run, tmp_path):
    tensors = load(tmp_path / "math")
    old = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(4) for layer in range(4)}
    save(tensors | old, tmp_path / "old")
    (tmp_path / "old" / "config.json").write_text((tmp_path / "math" / "config.json").read_text())
    text = "models: [{model: %s}, {model: %s}]\nmerge_method: linear\nparameters: {weight: 1}\n"
    for number, order in enumerate([("old", "math"), ("math", "old")]):
        (tmp_path / "recipe.yaml").write_text(text % order)
        code, _, told = run("merge", "recipe.yaml", f"out{number}")
        assert code == 0
        assert "note: left out, as they are constants: self_attn.rotary_emb.inv_freq of each layer" in told
        assert load(tmp_path / f"out{number}").keys() == tensors.keys()


def test_paths_are_looked_for_beside_the_recipe_too(run, tmp_path, models):
    (tmp_path / "elsewhere").mkdir()
    recipe = tmp_path / "elsewhere" / "recipe.yaml"
    save({"w": torch.ones(2)}, tmp_path / "elsewhere" / "one")
    recipe.write_text("models: [{model: one}]\nmerge_method: passthrough\nparameters: {scale: 3}\n")
    assert run("merge", recipe, "out")[0] == 0
    assert load(tmp_path / "out")["w"].tolist() == [3.0, 3.0]


def test_modules_default_is_what_it_holds(merged):
    plain = merged(LINEAR)
    body, rest = LINEAR.split("merge_method")
    inside = "modules:\n  default:\n" + re.sub("^", "    ", body, flags=re.MULTILINE).rstrip(" ")
    found = merged(inside + "merge_method" + rest, out="second")
    assert all(torch.equal(tensor, found[name]) for name, tensor in plain.items())


# --- our own form ----------------------------------------------------------------------------------------------------


OURS = """
merge_method: ties
base_model: base
models:
  - {model: math, parameters: {weight: 3}}
  - {model: code}
parameters: {density: 0.4}
rules:
  - {match: "*norm*", merge_method: weighted_average}
  - {match: "lm_head*", merge_method: task_arithmetic, parameters: {coefficients: {code: -1.0, math: 0.0}}}
"""


def test_a_recipe_with_rules_is_ours(merged, models):
    found = merged(OURS)
    clients = [models["math"], models["code"]]
    wanted = merge(ties(density=0.4), models["base"], clients, [3, 1])
    average = merge(weighted_average(), models["base"], clients, [3, 1])
    assert torch.equal(found[Q.format(2)], wanted[Q.format(2)])
    assert torch.equal(found["model.norm.weight"], average["model.norm.weight"])
    head = "lm_head.weight"
    close(found[head], 2 * models["base"][head].double() - models["code"][head].double())


def test_compat_false_takes_our_defaults(run, tmp_path, models):
    text = "merge_method: ties\nbase_model: base\nmodels: [{model: math}, {model: code}]\n"
    (tmp_path / "recipe.yaml").write_text(text + "compat: false\n")
    assert run("merge", "recipe.yaml", "out")[0] == 0
    wanted = merge(ties(), models["base"], [models["math"], models["code"]])
    assert torch.equal(load(tmp_path / "out")[Q.format(0)], wanted[Q.format(0)])
    (tmp_path / "recipe.yaml").write_text(text + "parameters: {weight: 1}\n")
    code, _, notes = run("merge", "recipe.yaml", "out", "--force")
    assert code == 0
    assert "note: 'density' is left out: 1.0 as in mergekit; ours is 0.2 (compat: false)\n" in notes
    wanted = merge(ties(density=1.0), models["base"], [models["math"], models["code"]])
    assert torch.equal(load(tmp_path / "out")[Q.format(0)], wanted[Q.format(0)])


def test_draws_go_by_the_seed_and_not_by_threads_or_place(merged, tmp_path, zoo):
    text = EXAMPLES["dare_ties"]
    first = merged(text, "--seed", "5", out="first")
    again = merged(text, "--seed", "5", "--threads", "1", out="again")
    other = merged(text, "--seed", "6", out="other")
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    assert not torch.equal(first[Q.format(0)], other[Q.format(0)])


def test_dare_keeps_the_l1_norm_of_each_delta_as_mergekit_does(merged, models):
    found = merged("merge_method: dare_linear\nbase_model: base\nmodels: [{model: math}]\n"
                   "parameters: {weight: 1, density: 0.3}\n")  # fmt: skip
    for name in (Q.format(0), "lm_head.weight"):
        kept = found[name].double() - models["base"][name].double()
        delta = models["math"][name].double() - models["base"][name].double()
        assert 0.1 < float((kept != 0).double().mean()) < 0.5
        assert float(kept.abs().sum()) == pytest.approx(float(delta.abs().sum()), rel=1e-4)


# --- what comes out --------------------------------------------------------------------------------------------------


def test_the_readme_has_the_recipe_the_hashes_and_the_notes(merged, tmp_path):
    import hashlib

    merged(TIES)
    text = (tmp_path / "out" / "README.md").read_text()
    assert f"```yaml\n{TIES.strip()}\n```" in text
    digest = hashlib.sha256((tmp_path / "base" / "model.safetensors").read_bytes()).hexdigest()
    assert f"| base | model.safetensors | `{digest}` |" in text
    assert "- 'int8_mask' changes nothing in the result" in text


def test_a_model_is_replaced_only_if_it_is_asked_for(run, tmp_path):
    (tmp_path / "recipe.yaml").write_text(LINEAR)
    assert run("merge", "recipe.yaml", "out")[0] == 0
    code, _, complaint = run("merge", "recipe.yaml", "out")
    assert (code, complaint) == (
        2,
        "error: folder 'out' is not empty; give another one, or --force to replace the model in it\n",
    )
    (tmp_path / "out" / "model.safetensors").write_bytes(b"old")
    assert run("merge", "recipe.yaml", "out", "--force")[0] == 0
    assert load(tmp_path / "out")
    (tmp_path / "out" / "thesis.docx").write_bytes(b"precious")
    code, _, complaint = run("merge", "recipe.yaml", "out", "--force")
    assert (code, complaint) == (
        2,
        "error: folder 'out' holds 'thesis.docx', which is not a model's: --force does not remove it\n",
    )
    code, _, complaint = run("merge", "recipe.yaml", "math", "--force")
    assert code == 2
    assert "is, or holds, the input" in complaint
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError])
def test_a_merge_that_is_stopped_leaves_nothing(failure, run, tmp_path, monkeypatch):
    from fl_merge.offline import run as running

    def stop(plan, folder):
        assert (folder / "model.safetensors").exists()
        raise failure

    monkeypatch.setattr(running, "write_config", stop)
    (tmp_path / "recipe.yaml").write_text(LINEAR)
    before = {path.name for path in tmp_path.iterdir()}
    if failure is KeyboardInterrupt:
        assert run("merge", "recipe.yaml", "out")[0] == 130
    else:
        with pytest.raises(RuntimeError):
            run("merge", "recipe.yaml", "out")
    assert {path.name for path in tmp_path.iterdir()} == before


def test_what_a_killed_merge_left_is_removed_by_the_next(run, tmp_path):
    left = tmp_path / ".out.0badcafe.partial"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    (tmp_path / "recipe.yaml").write_text(LINEAR)
    assert run("merge", "recipe.yaml", "out")[0] == 0
    assert not left.exists()
