"""Tiny models of each kind that LoRA is used on, adapters for them made and read by the real PEFT."""

from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=53, n_positions=16, n_embd=24, n_layer=2, n_head=3))


def mixture(experts=3) -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=53,
        hidden_size=16,
        intermediate_size=20,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=experts,
        num_experts_per_tok=2,
    )
    return MixtralForCausalLM(config)


def qwen3_mixture() -> nn.Module:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=53,
        hidden_size=16,
        moe_intermediate_size=10,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
    )
    return Qwen3MoeForCausalLM(config)


def gpt_oss() -> nn.Module:
    """Its experts are stored fused and the other way round; as in the real one, that of `down` are square."""
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=53,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    return GptOssForCausalLM(config)


def switch() -> nn.Module:
    """Of the mixtures whose experts transformers keeps as linear modules."""
    from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

    torch.manual_seed(0)
    config = SwitchTransformersConfig(
        vocab_size=53, d_model=16, d_kv=8, d_ff=20, num_layers=2, num_decoder_layers=1, num_heads=2, num_experts=3
    )
    return SwitchTransformersForConditionalGeneration(config)


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 10, 3, padding=1)
        self.second = nn.Conv2d(10, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(self.first(images).relu()).mean(dim=(2, 3)))


def convolutions() -> nn.Module:
    torch.manual_seed(0)
    return Convolutions()


FUSED = ["experts.gate_up_proj", "experts.down_proj"]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]

KINDS = {
    "llama": (llama, {"target_modules": ATTENTION}),
    "gpt2": (gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "conv": (convolutions, {"target_modules": ["first", "second"], "modules_to_save": ["head"]}),
    "embedding": (llama, {"target_modules": ["embed_tokens", "q_proj"]}),
    "mixed": (llama, {"target_modules": ATTENTION, "rank_pattern": {"q_proj": 6, "layers.1.mlp.down_proj": 3}}),
    "experts": (mixture, {"target_modules": ["q_proj"], "target_parameters": FUSED}),
    "each expert": (switch, {"target_modules": ["q", "wi", "wo"], "rank_pattern": {"expert_1.wi": 6}}),
}
"""A model and what of it is adapted."""


def make_adapter(
    folder: Path, build, seed: int, rank: int = 4, alpha: float = 8, dtype=torch.float32, **settings
) -> Path:
    """A folder as PEFT saves it, with factors as after training."""
    model = get_peft_model(build(), LoraConfig(r=rank, lora_alpha=alpha, **settings))
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=draw).mul(0.2).to(dtype)
        elif "modules_to_save" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=draw)
    model.save_pretrained(folder)
    return folder


def deltas(build, folder: Path) -> dict[str, torch.Tensor]:
    """What an adapter adds to each parameter of the model, as PEFT computes it; in float64."""
    base = {name: p.detach().double().clone() for name, p in build().double().named_parameters()}
    model = PeftModel.from_pretrained(build().double(), folder, autocast_adapter_dtype=False)
    model = model.double()
    merged = {name: p.detach() for name, p in model.merge_and_unload().named_parameters()}
    return {name: merged[name] - base[name] for name in base if not torch.equal(merged[name], base[name])}
