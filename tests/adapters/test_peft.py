"""Adapters in and out, against the real PEFT: what it computes of our files and of its own must be one thing."""

import json

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft_models import ATTENTION, KINDS, deltas, llama, make_adapter
from random_adapters import distance, weighted
from safetensors.torch import load_file, save_file

from fl_merge import UpdateError, build
from fl_merge.adapters import fold, load_adapter, merge_adapters

WEIGHTS = [3.0, 1.0]
SHARES = [0.75, 0.25]


def made(tmp_path, kind, count=2, **settings):
    construct, targets = KINDS[kind]
    folders = [make_adapter(tmp_path / f"client{i}", construct, 10 + i, **(targets | settings)) for i in range(count)]
    return construct, folders


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["lora_stack", "lora_svd"])
def test_the_merged_product_is_the_weighted_sum_of_products(tmp_path, kind, method):
    construct, folders = made(tmp_path, kind)
    settings = {"rank": 64} if method == "lora_svd" else {}
    merged = merge_adapters(build(method, **settings), [load_adapter(f) for f in folders], WEIGHTS)
    merged.save(tmp_path / "merged")
    wanted = weighted([deltas(construct, f) for f in folders], SHARES)
    assert distance(deltas(construct, tmp_path / "merged"), wanted) < 1e-6
    if kind == "experts":
        assert [name for name in wanted if wanted[name].dim() == 3], "the fused experts are adapted"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 1e-3), (torch.bfloat16, 5e-3)])
def test_it_reloads_in_half_precision(tmp_path, kind, dtype, tolerance):
    construct, folders = made(tmp_path, kind)
    merge_adapters("lora_svd", [load_adapter(f) for f in folders], WEIGHTS).save(tmp_path / "exact")
    merge_adapters("lora_svd", [load_adapter(f) for f in folders], WEIGHTS).save(tmp_path / "half", dtype)
    exact = deltas(construct, tmp_path / "exact")
    assert 0 < distance(deltas(construct, tmp_path / "half"), exact) < tolerance


@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True},
        {"use_rslora": True, "alpha_pattern": {"k_proj": 3}, "rank_pattern": {r"layers\.\d\.mlp\.down_proj": 2}},
        {"alpha_pattern": {"model.layers.0.self_attn.q_proj": 1, "q_proj": 24}},
        {"rank_pattern": {"^model.layers.1.self_attn.v_proj": 9}},
    ],
)
def test_scalings_follow_pefts_rules(tmp_path, settings):
    folders = [make_adapter(tmp_path / f"{i}", llama, i, target_modules=ATTENTION, **settings) for i in range(2)]
    merge_adapters("lora_stack", [load_adapter(f) for f in folders], WEIGHTS).save(tmp_path / "merged")
    wanted = weighted([deltas(llama, f) for f in folders], SHARES)
    assert distance(deltas(llama, tmp_path / "merged"), wanted) < 1e-6


def test_what_is_written_loads_without_the_clients_settings(tmp_path):
    _, folders = made(tmp_path, "llama", use_rslora=True, init_lora_weights="gaussian", lora_dropout=0.1)
    merge_adapters("lora_svd", [load_adapter(f) for f in folders]).save(tmp_path / "merged")
    config = json.loads((tmp_path / "merged/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (4, 4, False)
    assert config["init_lora_weights"] is True
    assert sorted(config["target_modules"]) == sorted(ATTENTION)
    manifest = json.loads((tmp_path / "merged/fl_merge_manifest.json").read_text())
    assert [entry["weight"] for entry in manifest["inputs"]] == [0.5, 0.5]
    assert all(len(entry["sha256"]) == 64 for entry in [*manifest["inputs"], manifest])
    assert 0 < manifest["relative_error"] < 1


def both_in_peft(construct, folders):
    model = PeftModel.from_pretrained(construct(), folders[0], adapter_name="0")
    for number, folder in enumerate(folders[1:], 1):
        model.load_adapter(folder, adapter_name=str(number))
    return model


def of_peft(model, name):
    return {
        key: module.get_delta_weight(name).double()
        for key, module in model.named_modules()
        if isinstance(module, LoraLayer) and name in module.scaling
    }


@pytest.mark.parametrize("kind", ["llama", "gpt2", "conv"])
@pytest.mark.parametrize(("ours", "settings", "theirs"), [("lora_stack", {}, "cat"), ("lora_svd", {"rank": 3}, "svd")])
def test_it_equals_pefts_own(tmp_path, kind, ours, settings, theirs):
    construct, folders = made(tmp_path, kind, count=3, modules_to_save=None)  # of which PEFT merges none
    model = both_in_peft(construct, folders)
    more = {"svd_rank": 3} if theirs == "svd" else {}
    model.add_weighted_adapter(["0", "1", "2"], [0.5, 0.3, 0.2], "combined", combination_type=theirs, **more)
    merged = merge_adapters(build(ours, **settings), [load_adapter(f) for f in folders], [5, 3, 2])
    merged.save(tmp_path / "merged")
    model.load_adapter(tmp_path / "merged", adapter_name="ours")
    assert distance(of_peft(model, "ours"), of_peft(model, "combined")) < 1e-5


def test_mixed_ranks_alphas_and_modules(tmp_path):
    """Ranks 4, 8, 16 with different alphas, and a module that only one client has."""
    folders = [
        make_adapter(tmp_path / "a", llama, 1, rank=4, alpha=16, target_modules=["q_proj", "v_proj"]),
        make_adapter(tmp_path / "b", llama, 2, rank=8, alpha=8, target_modules=["q_proj", "v_proj"]),
        make_adapter(tmp_path / "c", llama, 3, rank=16, alpha=4, target_modules=["q_proj", "v_proj", "o_proj"]),
    ]
    merged = merge_adapters("lora_stack", [load_adapter(f) for f in folders], [1, 2, 5])
    merged.save(tmp_path / "merged")
    parts = [deltas(llama, f) for f in folders]
    assert distance(deltas(llama, tmp_path / "merged"), weighted(parts, [0.125, 0.25, 0.625])) < 1e-6
    assert any("o_proj" in note and "counts as zero" in note for note in merged.notes)
    again = merge_adapters(build("lora_stack", missing="renormalise"), [load_adapter(f) for f in folders], [1, 2, 5])
    again.save(tmp_path / "again")
    name = "model.layers.0.self_attn.o_proj.weight"
    found = deltas(llama, tmp_path / "again")[name]
    torch.testing.assert_close(found, parts[2][name], rtol=1e-6, atol=1e-7)
    assert any("o_proj" in note and "left out" in note for note in again.notes)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "conv", "embedding", "each expert"])
def test_folding_gives_the_model_that_peft_merges(tmp_path, kind):
    construct, folders = made(tmp_path, kind)
    merged = merge_adapters("lora_svd", [load_adapter(f) for f in folders])
    merged.save(tmp_path / "merged")
    model = construct()
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(tmp_path / "base")
    else:
        (tmp_path / "base").mkdir()
        save_file(model.state_dict(), tmp_path / "base/model.safetensors")
    fold(load_adapter(tmp_path / "merged"), tmp_path / "base", tmp_path / "folded")
    found = load_file(tmp_path / "folded/model.safetensors")
    wanted = PeftModel.from_pretrained(construct(), tmp_path / "merged").merge_and_unload().state_dict()
    assert len(found) >= 6
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-6, atol=1e-6)
    if kind == "llama":
        from transformers import LlamaForCausalLM

        assert LlamaForCausalLM.from_pretrained(tmp_path / "folded").generate(
            torch.tensor([[1, 2]]), max_new_tokens=2
        ).shape == (1, 4)


def test_the_residual_is_a_second_adapter(tmp_path):
    _, folders = made(tmp_path, "llama", count=3)
    merged = merge_adapters("lora_residual", [load_adapter(f) for f in folders])
    merged.save(tmp_path / "merged")
    wanted = weighted([deltas(llama, f) for f in folders], [1 / 3] * 3)
    main, rest = deltas(llama, tmp_path / "merged"), deltas(llama, tmp_path / "merged/residual")
    assert distance(main, wanted) > 0.1
    assert distance(weighted([main, rest], [1, 1]), wanted) < 1e-6
    assert json.loads((tmp_path / "merged/residual/adapter_config.json").read_text())["r"] <= 2 * 4
    model = llama()
    model.save_pretrained(tmp_path / "base")
    fold(
        [load_adapter(tmp_path / "merged"), load_adapter(tmp_path / "merged/residual")],
        tmp_path / "base",
        tmp_path / "f",
    )
    folded, base = load_file(tmp_path / "f/model.safetensors"), model.state_dict()
    assert distance({name: folded[name].double() - base[name].double() for name in wanted}, wanted) < 1e-5


def test_a_rank_for_one_of_the_adapted_parameters_is_refused(tmp_path):
    """Its factors would be taken for those of more experts of a smaller rank."""
    construct, targets = KINDS["experts"]
    settings = {**targets, "rank_pattern": {"experts.gate_up_proj": 8}}
    folder = make_adapter(tmp_path / "client", construct, 1, **settings)
    with pytest.raises(UpdateError, match=r"a pattern for an adapted parameter \(experts.gate_up_proj\)"):
        load_adapter(folder)
