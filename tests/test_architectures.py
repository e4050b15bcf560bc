"""Which tensor is what: the table of model families against what transformers writes, and names without a family."""

from __future__ import annotations

import json

import pytest

from fl_merge.architectures import ARCHITECTURES, architecture_of, depth_of, restacked
from fl_merge.store import SafetensorsSource

SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0,
}  # fmt: skip
MOE = {"moe_intermediate_size": 16, "num_experts": 2, "num_experts_per_tok": 1}
OTHERS = {
    "gpt2": {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16},
    "gpt_neox": {key: value for key, value in SMALL.items() if "head" not in key or key == "num_attention_heads"},
    "mixtral": SMALL | {"num_local_experts": 2, "num_experts_per_tok": 1},
    "qwen2_moe": SMALL | MOE | {"shared_expert_intermediate_size": 16},
    "qwen3_moe": SMALL | MOE,
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """From a family to a small model of it: its config and its tensors' names, as transformers writes them."""
    from transformers import AutoConfig, AutoModelForCausalLM

    found = {}

    def model(family):
        if family not in found:
            folder = tmp_path_factory.mktemp(family)
            config = AutoConfig.for_model(family, tie_word_embeddings=False, **OTHERS.get(family, SMALL))
            AutoModelForCausalLM.from_config(config).save_pretrained(folder)
            found[family] = (json.loads((folder / "config.json").read_text()), set(SafetensorsSource(folder).specs()))
        return found[family]

    return model


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_a_row_names_what_a_model_of_its_family_has(family, written):
    config, names = written(family)
    row = architecture_of(config, names)
    assert row is ARCHITECTURES[family]
    assert depth_of(row, names) == config[row.depth] == 2
    assert config[row.width] == 32
    outside = {name for name in names if row.place(name)[0] != "layer"}
    assert outside == {*row.embeddings, *row.final, row.head}
    assert {name for name in outside if row.place(name)[0] == "before"} == set(row.embeddings)
    in_layer = {row.rest(name) for name in names if row.place(name) == ("layer", 1)}
    parts = [*row.attention, *row.mlp, *row.outputs, *row.norms, *([row.router] if row.router else [])]
    missing = [part for part in parts if f"{part.replace('{e}', '0')}.weight" not in in_layer]
    assert not missing, sorted(in_layer)
    assert not row.experts or 2 in [config.get(key) for key in row.experts]
    assert {row.named(1, rest) for rest in in_layer} <= names


def test_a_bare_backbone_has_its_familys_row_with_the_pattern_of_its_names():
    row = architecture_of(
        {"model_type": "llama"}, ["layers.0.mlp.up_proj.weight", "embed_tokens.weight", "norm.weight"]
    )
    assert (row.family, row.layer) == ("llama", "layers.{i}.")
    assert row.place("layers.10.mlp.up_proj.weight") == ("layer", 10)
    assert row.place("embed_tokens.weight") == ("before", 0)
    assert row.place("norm.weight") == ("after", 0)


def test_a_model_without_a_row_is_read_by_its_names():
    names = [f"encoder.block.{layer}.experts.{e}.w" for layer in range(3) for e in range(4)]
    names += ["encoder.wte.weight", "head.0.weight", "head.1.weight"]
    row = architecture_of({"model_type": "new", "n_layer": 3}, names)
    assert (row.layer, row.depth, depth_of(row, names)) == ("encoder.block.{i}.", "n_layer", 3)
    assert row.place("encoder.block.2.experts.3.w") == ("layer", 2)
    assert row.rest("encoder.block.2.experts.3.w") == "experts.3.w"
    assert row.place("encoder.wte.weight") == ("before", 0)
    assert row.place("head.1.weight") == ("after", 0)


def test_tensors_without_numbers_are_all_outside_of_layers():
    row = architecture_of(None, ["w", "b"])
    assert depth_of(row, ["w", "b"]) == 0
    assert row.place("w") == ("after", 0)


def test_lists_by_layer_and_lists_of_layers_are_restacked():
    row = ARCHITECTURES["qwen2_moe"]
    a = {"num_hidden_layers": 3, "layer_types": ["x", "y", "z"], "mlp_only_layers": [0, 2]}
    b = {"num_hidden_layers": 2, "layer_types": ["p", "q"], "mlp_only_layers": [1]}
    found = dict(restacked(a, row, [(a, 2), (b, 0), (b, 1), (a, 1)]))
    assert found == {"num_hidden_layers": 4, "layer_types": ["z", "p", "q", "y"], "mlp_only_layers": [0, 2]}
