"""Adapters of mixtures of experts: fused by transformers and adapted as parameters, or modules of their own."""

import json

import pytest
import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft_models import FUSED, KINDS, deltas, gpt_oss, make_adapter, mixture, qwen3_mixture
from random_adapters import distance, weighted
from safetensors.torch import load_file, save_file

from fl_merge import RecipeError, build
from fl_merge.adapters import (
    FoldedSource,
    experts_apart,
    experts_together,
    fold,
    load_adapter,
    merge_adapters,
)
from fl_merge.adapters.experts import expert_parts
from fl_merge.flower import FedMerge
from fl_merge.flower.client import receive_adapter, reply
from fl_merge.flower.inprocess import InProcessGrid
from fl_merge.flower.records import to_record
from fl_merge.methods import lora_svd
from fl_merge.pairs import pairs_of
from fl_merge.store import SafetensorsSource
from fl_merge.types import TensorSpec


@pytest.mark.parametrize(
    ("construct", "parameters"),
    [
        (mixture, FUSED),
        (mixture, [*FUSED[::-1], "gate.weight"]),
        (mixture, FUSED[1:]),
        (qwen3_mixture, FUSED),
        (gpt_oss, FUSED),
    ],
)
def test_fused_experts_are_folded_into_what_is_on_disk(tmp_path, construct, parameters):
    """One by one for Mixtral and Qwen, in one tensor and turned for gpt-oss; and from a second adapter beside it."""
    model = construct()
    model.save_pretrained(tmp_path / "base")
    settings = {"target_modules": ["q_proj"], "target_parameters": parameters}
    folders = [make_adapter(tmp_path / f"{i}", construct, i, rank=2 + i, **settings) for i in range(2)]
    fold([load_adapter(f) for f in folders], tmp_path / "base", tmp_path / "folded")
    again, base = type(model).from_pretrained(tmp_path / "folded").state_dict(), model.state_dict()
    wanted = weighted([deltas(construct, f) for f in folders], [1, 1])
    assert len(wanted) >= len(parameters) + 1
    moved = {name: again[name].double() - base[name].double() for name in base}
    assert distance({name: moved.pop(name) for name in wanted}, wanted) < 1e-5
    assert not any(tensor.any() for tensor in moved.values())
    fold(load_adapter(folders[0]), tmp_path / "base", tmp_path / "one")
    merged = PeftModel.from_pretrained(construct(), folders[0]).merge_and_unload().state_dict()
    again = type(model).from_pretrained(tmp_path / "one").state_dict()
    assert again.keys() == merged.keys()
    for name, tensor in again.items():
        torch.testing.assert_close(tensor, merged[name], rtol=1e-6, atol=1e-6)
    stored = SafetensorsSource(tmp_path / "one")
    read = FoldedSource(SafetensorsSource(tmp_path / "base"), load_adapter(folders[0]), tmp_path / "base")
    assert all(torch.equal(read.read(name), stored.read(name)) for name in stored.specs())


def test_fused_experts_whose_place_is_not_known_are_refused_by_name(tmp_path):
    gpt_oss().save_pretrained(tmp_path / "base")
    square = make_adapter(tmp_path / "square", gpt_oss, 1, target_modules=["q_proj"], target_parameters=FUSED[1:])
    with pytest.raises(RecipeError, match=r"layers.0.mlp.experts': the experts are square matrices.*which way round"):
        fold(load_adapter(square), tmp_path / "base", tmp_path / "folded")
    other = make_adapter(tmp_path / "other", mixture, 1, **KINDS["experts"][1])
    message = r"fused experts \(3 of \(16, 20\), 3 of \(40, 16\)\) whose place in the base is not known"
    with pytest.raises(RecipeError, match=message):
        fold(load_adapter(other), tmp_path / "base", tmp_path / "folded")
    more = mixture(experts=4)
    more.save_pretrained(tmp_path / "more")
    with pytest.raises(RecipeError, match=message):
        fold(load_adapter(other), tmp_path / "more", tmp_path / "folded")
    assert not (tmp_path / "folded").exists()


def test_an_expert_that_is_missing_is_named():
    name = "base_model.model.layers.0.mlp.experts[{}].lora_{}.weight"
    factors = {
        name.format(number, side): TensorSpec(shape, torch.float32)
        for number in (0, 2)
        for side, shape in (("A", (2, 6)), ("B", (4, 2)))
    }
    tensors = {"layers.0.mlp.experts.down_proj": TensorSpec((2, 4, 6), torch.float32)}
    message = r"layers.0.mlp.experts': found factors of 2 experts up to number 2, .* \(number 1 is not there\)"
    with pytest.raises(RecipeError, match=message):
        expert_parts(list(pairs_of(factors)[0].values()), tensors, ["mlp.experts.down_proj"], None)


def one_by_one(folder, seed, rank):
    """An adapter of Mixtral as it was saved before transformers 5: each expert's w1, w2 and w3 a module."""
    draw = torch.Generator().manual_seed(seed)
    shapes = {"w1": (20, 16), "w2": (16, 20), "w3": (20, 16)}
    modules = {f"block_sparse_moe.experts.{e}.{w}": shape for e in range(3) for w, shape in shapes.items()}
    tensors = {}
    for module, (outputs, inputs) in {**modules, "self_attn.q_proj": (16, 16)}.items():
        name = f"base_model.model.model.layers.0.{module}"
        tensors[f"{name}.lora_A.weight"] = torch.randn(rank, inputs, generator=draw) * 0.2
        tensors[f"{name}.lora_B.weight"] = torch.randn(outputs, rank, generator=draw) * 0.2
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    about = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": ["w1", "w2", "w3", "q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(about))
    return folder


@pytest.mark.parametrize(
    ("method", "settings"),
    [("lora_stack", {}), ("lora_svd", {"rank": 32}), ("lora_svd", {"energy": 0.8}), ("lora_svd", {"tolerance": 0.3})],
)
def test_experts_that_are_modules_reload_where_transformers_fuses_them(tmp_path, method, settings):
    """Ranks of their own (by energy) would not: PEFT gives all experts of such an adapter the rank of its config."""
    folders = [one_by_one(tmp_path / f"{i}", i, rank=2 + i) for i in range(2)]
    merged = merge_adapters(build(method, **settings), [load_adapter(f) for f in folders], [3.0, 1.0])
    merged.save(tmp_path / "merged")
    found = deltas(mixture, tmp_path / "merged")
    wanted = weighted([deltas(mixture, f) for f in folders], [0.75, 0.25])
    assert {tensor.dim() for tensor in found.values()} == {2, 3}
    assert distance(found, wanted) == pytest.approx(merged.error, abs=1e-6)
    mixture().save_pretrained(tmp_path / "base")
    fold(load_adapter(tmp_path / "merged"), tmp_path / "base", tmp_path / "folded")
    folded, base = type(mixture()).from_pretrained(tmp_path / "folded").state_dict(), mixture().state_dict()
    assert distance({name: folded[name].double() - base[name].double() for name in found}, found) < 1e-5


def leading(deltas, rank):
    """The best approximation of each matrix, of each expert for itself."""
    found = {}
    for name, delta in deltas.items():
        u, values, vt = torch.linalg.svd(delta, full_matrices=False)
        found[name] = u[..., :rank] * values[..., None, :rank] @ vt[..., :rank, :]
    return found


def test_fused_experts_in_a_federation(tmp_path):
    """Clients of ranks 2 and 3 send each expert's factors for themselves; what the run leaves loads through PEFT.

    In the second round each is sent the leading part of what was merged in the first, in its own rank.
    """
    targets = {"target_modules": ["q_proj"], "target_parameters": FUSED}
    sent, received = {}, {}
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        number, server_round = int(context.node_config["partition-id"]), int(message.content["config"]["server-round"])
        rank, alpha, name = 2 + number, 8.0, f"{server_round}-{number}"
        folder = make_adapter(tmp_path / f"trained-{name}", mixture, number + 2 * server_round, rank, alpha, **targets)
        model = PeftModel.from_pretrained(mixture(), folder)
        trained = experts_apart(load_file(folder / "adapter_model.safetensors"), model.peft_config["default"].to_dict())
        here = receive_adapter(message, trained, alpha / rank)
        set_peft_model_state_dict(model, experts_together(here))
        model.save_pretrained(tmp_path / f"received-{name}")
        received[server_round, number] = deltas(mixture, tmp_path / f"received-{name}")
        sent[server_round, number] = deltas(mixture, folder)
        return reply(message, trained, 1 + 2 * number, {"lora-scalings": alpha / rank}, dtype="float32")

    first = make_adapter(tmp_path / "first", mixture, 1, rank=2, alpha=2, **targets)
    adapter = load_adapter(first)
    initial = {name: adapter.plain.read(name) for name in adapter.plain.specs()}
    about = {key: adapter.config.raw[key] for key in ("target_parameters", "target_modules", "task_type")}
    strategy = FedMerge(lora_svd(rank=8), fraction_evaluate=0.0, run_folder=tmp_path / "run", adapter_config=about)
    with InProcessGrid(app, nodes=2, workers=0) as grid:
        strategy.start(grid, to_record(initial), num_rounds=2)
    merged = {number: weighted([sent[number, 0], sent[number, 1]], [0.25, 0.75]) for number in (1, 2)}
    for client in range(2):
        assert distance(received[1, client], deltas(mixture, first)) < 1e-6
        assert distance(received[2, client], leading(merged[1], 2 + client)) < 1e-6
    assert distance(deltas(mixture, tmp_path / "run/adapter"), merged[2]) < 1e-6


def test_fused_experts_as_peft_has_them_are_refused_before_anyone_trains(tmp_path):
    folder = make_adapter(tmp_path / "first", mixture, 1, **KINDS["experts"][1])
    model = PeftModel.from_pretrained(mixture(), folder)
    tensors = get_peft_model_state_dict(model)
    apart = experts_apart(tensors, model.peft_config["default"].to_dict())
    together = experts_together(apart)
    assert together.keys() == tensors.keys()
    assert all(torch.equal(together[name], tensor) for name, tensor in tensors.items())
    with InProcessGrid(ClientApp(), nodes=2, workers=0) as grid:
        with pytest.raises(RecipeError, match=r"experts.*': the factors of fused experts in one; wanted each expert's"):
            FedMerge(lora_svd()).start(grid, to_record(tensors), num_rounds=1)
        with pytest.raises(RecipeError, match="fused expert, and adapter_config has no target_parameters; wanted"):
            FedMerge(lora_svd()).start(grid, to_record(apart), num_rounds=1)
