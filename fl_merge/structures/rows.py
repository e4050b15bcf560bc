"""Dense families and the mixtures of experts that they become: a table, like that of `fl_merge.architectures`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fl_merge.architectures import ARCHITECTURES, Architecture, depth_of
from fl_merge.naming import hidden_of
from fl_merge.types import TensorSpec

_KEPT = ("self_attn.[qkvo]_proj.weight", "input_layernorm.weight", "post_attention_layernorm.weight")
_QWEN_CONFIG = {
    "moe_intermediate_size": "$intermediate_size",
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
}


@dataclass(frozen=True)
class Upcycling:
    """How a dense family becomes a mixture of experts.

    Args:
        families: `model_type` of the dense models.
        marks: ends of names that all dense models have, by which they are told apart (the rows are tried in order).
        dense, sparse: the families' rows; their `mlp` name the same maps in the same order.
        keeps: globs of all other tensors that a layer may have: the mixture has a place for these and no others.
        biases: whether the MLP's maps have biases, also in the mixture.
        config: keys of the mixture's config and their values; "$key" is the value of another key.
        drops: keys of the dense config that mean nothing in the mixture.
        shared: maps of an expert that every token passes, in the order of `mlp`, and its gate; None without.
        wide: the key of the shared expert's width.
    """

    families: tuple[str, ...]
    marks: tuple[str, ...]
    dense: Architecture
    sparse: Architecture
    keeps: tuple[str, ...] = _KEPT
    biases: bool = False
    config: Mapping[str, Any] = field(default_factory=dict)
    drops: tuple[str, ...] = ()
    shared: tuple[str, ...] | None = None
    wide: str | None = None


_PLAIN = Architecture("mlp", layer="", embeddings=(), final=(), head=None, tied=None, mlp=("hidden1", "hidden2"))

UPCYCLINGS: tuple[Upcycling, ...] = (
    Upcycling(
        ("qwen3",),
        ("self_attn.q_norm.weight", "mlp.gate_proj.weight"),
        ARCHITECTURES["qwen3"],
        ARCHITECTURES["qwen3_moe"],
        keeps=(*_KEPT, "self_attn.[qk]_norm.weight", "self_attn.[qkvo]_proj.bias"),
        config={"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], **_QWEN_CONFIG},
        drops=("layer_types", "max_window_layers"),
    ),
    Upcycling(
        ("qwen2",),
        ("self_attn.q_proj.bias", "mlp.gate_proj.weight"),
        ARCHITECTURES["qwen2"],
        ARCHITECTURES["qwen2_moe"],
        keeps=(*_KEPT, "self_attn.[qkv]_proj.bias"),
        config={"model_type": "qwen2_moe", "architectures": ["Qwen2MoeForCausalLM"], "qkv_bias": True, **_QWEN_CONFIG},
        shared=(
            "mlp.shared_expert.gate_proj",
            "mlp.shared_expert.up_proj",
            "mlp.shared_expert.down_proj",
            "mlp.shared_expert_gate",
        ),
        wide="shared_expert_intermediate_size",
    ),
    Upcycling(
        ("llama", "mistral"),
        ("mlp.gate_proj.weight",),
        ARCHITECTURES["llama"],
        ARCHITECTURES["mixtral"],
        config={
            "model_type": "mixtral",
            "architectures": ["MixtralForCausalLM"],
            "output_router_logits": False,
            "router_aux_loss_coef": 0.001,
            "router_jitter_noise": 0.0,
        },
        drops=("attention_bias", "mlp_bias", "pretraining_tp"),
    ),
    Upcycling(
        ("mlp",),
        ("hidden1.weight", "hidden2.weight"),
        _PLAIN,
        replace(
            _PLAIN,
            family="mlp_moe",
            mlp=("experts.{e}.hidden1", "experts.{e}.hidden2"),
            router="router",
            experts=("num_experts",),
        ),
        keeps=("output.weight", "output.bias"),
        biases=True,
        config={"model_type": "mlp_moe"},
    ),
)
"""The dense families that have a mixture of experts beside them. A new one is a new row."""

EXPERTS = ("num_experts", "num_local_experts")
"""Keys of the number of experts: which of them a config has depends on the family and on who wrote it."""

TOP_K = "num_experts_per_tok"
"""The key of the number of experts that a token is given to, in all mixtures."""


def upcycling_of(names: Iterable[str]) -> Upcycling | None:
    """The first row whose marks the names of a dense model have; None if there is none."""
    ends = set(names)
    return next((row for row in UPCYCLINGS if all(any(_ends(name, mark) for name in ends) for mark in row.marks)), None)


def mlp_inputs(tensors: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """What a client can be asked for of a dense model's hidden states: for each layer, the mean of what its MLP reads.

    Returns:
        Names (`fl_merge.naming`) and descriptions; none for a model without a mixture beside it.
    """
    return {
        hidden_of(number): TensorSpec(tensors[f"{module}.weight"].shape[1:], torch.float32)
        for number, module in enumerate(mlp_modules(tensors))
    }


def mlp_modules(names: Iterable[str]) -> list[str]:
    """The first linear map of each layer's MLP, whose input a router would read; none for an unknown family."""
    ends = set(names)
    up = upcycling_of(ends)
    if up is None:
        return []
    blocks = [up.dense.named(n, "") for n in range(depth_of(up.dense, ends))] if "{i}" in up.dense.layer else [""]
    modules = [f"{block}{up.dense.mlp[0]}" for block in blocks]
    return [module for module in modules if f"{module}.weight" in ends]


def sparse_row_of(names: Iterable[str]) -> Architecture | None:
    """The row of a mixture of experts, by the name of its router; None if it has none that is known."""
    ends = set(names)
    rows = [*ARCHITECTURES.values(), *(row.sparse for row in UPCYCLINGS)]
    return next((row for row in rows if row.router and any(_ends(name, f"{row.router}.weight") for name in ends)), None)


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")
