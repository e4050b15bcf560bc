"""What the tensors of a model are: which belong to a layer, which come before the layers and which after.

A family of models is a row of a table. A model of a family that has no row is read by its names alone: the layers are
the numbered group with the most tensors.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

Place = Literal["before", "layer", "after"]


@dataclass(frozen=True)
class Architecture:
    """One family of models.

    Args:
        family: `model_type` in config.json.
        layer: what the names of a layer's tensors begin with, `{i}` the layer's number.
        embeddings: tensors before the layers.
        final: tensors between the last layer and the head.
        head: the output projection.
        tied: the embedding that a head may share; such a head is not in the file.
        attention, mlp: a layer's linear maps, without `.weight`; those of the MLP in the order gate, up, down where
            there is a gate. `{e}` is an expert's number.
        outputs: those that write into the residual stream: with zeros in them a layer does nothing.
        norms: a layer's norms.
        router: what chooses among experts; None for a dense model.
        depth, width: keys of config.json for the numbers of layers and of hidden units.
        experts: keys that may hold the number of experts, depending on the version that wrote it; none if dense.
        per_layer: keys with a list of one entry a layer.
        layer_numbers: keys with a list of layers' numbers.
        derived: constants in a layer that older versions of transformers stored; models load without them.
    """

    family: str
    layer: str = "model.layers.{i}."
    embeddings: tuple[str, ...] = ("model.embed_tokens.weight",)
    final: tuple[str, ...] = ("model.norm.weight",)
    head: str | None = "lm_head.weight"
    tied: str | None = "model.embed_tokens.weight"
    attention: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    mlp: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    outputs: tuple[str, ...] = ("self_attn.o_proj", "mlp.down_proj")
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    router: str | None = None
    depth: str = "num_hidden_layers"
    width: str = "hidden_size"
    experts: tuple[str, ...] = ()
    per_layer: tuple[str, ...] = ("layer_types",)
    layer_numbers: tuple[str, ...] = ()
    derived: tuple[str, ...] = ("self_attn.rotary_emb.inv_freq",)

    def place(self, name: str) -> tuple[Place, int]:
        """Where a tensor stands, and in which layer (0 outside of layers)."""
        head, tail = self.layer.split("{i}")
        if name.startswith(head):
            number, _, rest = name[len(head) :].partition(tail)
            if number.isdigit() and rest:
                return "layer", int(number)
        if name in (*self.final, self.head):
            return "after", 0
        return ("before", 0) if name in self.embeddings or _EARLY.search(name) else ("after", 0)

    def is_derived(self, name: str) -> bool:
        """Whether a tensor is a constant that need not be stored."""
        return self.place(name)[0] == "layer" and self.rest(name) in self.derived

    def rest(self, name: str) -> str:
        """What the name of a layer's tensor ends with: without the layer."""
        head, tail = self.layer.split("{i}")
        return name[len(head) :].partition(tail)[2]

    def named(self, layer: int, rest: str) -> str:
        """The name of a layer's tensor."""
        return self.layer.replace("{i}", str(layer)) + rest


_LLAMA = Architecture("llama")
_QWEN_MOE = replace(
    _LLAMA,
    mlp=("mlp.experts.{e}.gate_proj", "mlp.experts.{e}.up_proj", "mlp.experts.{e}.down_proj"),
    outputs=("self_attn.o_proj", "mlp.experts.{e}.down_proj"),
    router="mlp.gate",
    experts=("num_experts", "num_local_experts"),
    layer_numbers=("mlp_only_layers",),
)
_GEMMA_NORMS = (*_LLAMA.norms, "pre_feedforward_layernorm", "post_feedforward_layernorm")

ARCHITECTURES: Mapping[str, Architecture] = {
    row.family: row
    for row in (
        _LLAMA,
        replace(_LLAMA, family="mistral"),
        replace(_LLAMA, family="qwen2"),
        replace(_LLAMA, family="qwen3"),
        replace(_LLAMA, family="gemma"),
        replace(_LLAMA, family="gemma2", norms=_GEMMA_NORMS),
        replace(_LLAMA, family="gemma3_text", norms=_GEMMA_NORMS),
        replace(
            _LLAMA,
            family="phi3",
            attention=("self_attn.qkv_proj", "self_attn.o_proj"),
            mlp=("mlp.gate_up_proj", "mlp.down_proj"),
        ),
        replace(
            _LLAMA,
            family="mixtral",
            mlp=(
                "block_sparse_moe.experts.{e}.w1",
                "block_sparse_moe.experts.{e}.w3",
                "block_sparse_moe.experts.{e}.w2",
            ),
            outputs=("self_attn.o_proj", "block_sparse_moe.experts.{e}.w2"),
            router="block_sparse_moe.gate",
            experts=("num_local_experts",),
        ),
        replace(_QWEN_MOE, family="qwen2_moe", outputs=(*_QWEN_MOE.outputs, "mlp.shared_expert.down_proj")),
        replace(_QWEN_MOE, family="qwen3_moe"),
        Architecture(
            "gpt2",
            layer="transformer.h.{i}.",
            embeddings=("transformer.wte.weight", "transformer.wpe.weight"),
            final=("transformer.ln_f.weight", "transformer.ln_f.bias"),
            tied="transformer.wte.weight",
            attention=("attn.c_attn", "attn.c_proj"),
            mlp=("mlp.c_fc", "mlp.c_proj"),
            outputs=("attn.c_proj", "mlp.c_proj"),
            norms=("ln_1", "ln_2"),
            depth="n_layer",
            width="n_embd",
            per_layer=(),
            derived=("attn.bias", "attn.masked_bias"),
        ),
        Architecture(
            "gpt_neox",
            layer="gpt_neox.layers.{i}.",
            embeddings=("gpt_neox.embed_in.weight",),
            final=("gpt_neox.final_layer_norm.weight", "gpt_neox.final_layer_norm.bias"),
            head="embed_out.weight",
            tied="gpt_neox.embed_in.weight",
            attention=("attention.query_key_value", "attention.dense"),
            mlp=("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
            outputs=("attention.dense", "mlp.dense_4h_to_h"),
            per_layer=(),
            derived=("attention.bias", "attention.masked_bias", "attention.rotary_emb.inv_freq"),
        ),
    )
}
"""The families by `model_type`. A new family is a new row."""

_NUMBER = re.compile(r"(?:^|\.)(\d+)\.")
_EARLY = re.compile(r"(?:^|[._])(?:embed|embeds|embeddings?|embed_tokens|embed_in|wte|wpe|tok|patch)(?:$|[._])")
"""Names of tensors that stand before the layers, in families that have no row."""


def architecture_of(config: Mapping[str, Any] | None, names: Iterable[str]) -> Architecture:
    """The row of a model's family, its layer pattern fitted to the names that are there.

    Args:
        config: of config.json; None for plain tensors.
        names: of the model's tensors.

    Returns:
        The family's row; for another family, or where the names do not fit (a bare backbone is saved without its
        prefix), a row with the pattern that the names have.
    """
    found = sorted(names)
    row = ARCHITECTURES.get(str((config or {}).get("model_type")))
    if row is not None and any(row.place(name)[0] == "layer" for name in found):
        return row
    pattern = _pattern(found)
    if row is None:
        depths = [key for key in ("num_hidden_layers", "n_layer", "num_layers") if key in (config or {})]
        row = Architecture("unknown", embeddings=(), final=(), tied=None, depth=(*depths, "num_hidden_layers")[0])
    return replace(row, layer=pattern or row.layer)


def _pattern(names: Iterable[str]) -> str | None:
    """What the layers' names begin with: of all numbered groups the one with the most tensors."""
    groups = Counter(name[: match.start(1)] for name in names for match in [_NUMBER.search(name)] if match)
    if not groups:
        return None
    largest = max(sorted(groups), key=groups.__getitem__)
    return f"{largest}{{i}}."


def depth_of(row: Architecture, names: Iterable[str]) -> int:
    """How many layers a model has, by its tensors; 0 for one without layers."""
    numbers = {number for place, number in map(row.place, names) if place == "layer"}
    return max(numbers) + 1 if numbers else 0


def restacked(
    config: Mapping[str, Any], row: Architecture, layers: Iterable[tuple[Mapping[str, Any], int]]
) -> Iterator[tuple[str, Any]]:
    """What changes in config.json when a model has other layers.

    Args:
        config: of the model that the new one's config starts from.
        row: its family.
        layers: for each new layer, the config of the model that it comes from and its number there.

    Yields:
        Keys and their new values: the depth, lists of one entry a layer, lists of layers' numbers.
    """
    taken = list(layers)
    yield row.depth, len(taken)
    for key in row.per_layer:
        if isinstance(config.get(key), list):
            yield key, [source[key][layer] for source, layer in taken]
    for key in row.layer_numbers:
        if isinstance(config.get(key), list):
            yield key, [new for new, (source, layer) in enumerate(taken) if layer in source.get(key, [])]
