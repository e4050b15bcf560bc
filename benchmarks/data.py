"""The models that are merged: Llama-shaped, a base and clients that differ a little from it, as safetensors folders."""

from __future__ import annotations

import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

TINY = 5000
"""Parameters of the models on which a process warms up."""

BASE_SPREAD, CLIENT_SPREAD = 0.02, 0.002
"""Standard deviations: of a model's values, as initializers have them, and of a client's change, a tenth of that."""


def llama_shapes(parameters: int) -> tuple[dict[str, tuple[int, ...]], dict[str, Any]]:
    """Tensors and config.json of a Llama-shaped model with about so many parameters.

    A width h gives embeddings of 8 h tokens (twice, they are not tied) and layers of 12 h^2.
    """
    width = max(16, 16 * round(1.5 * parameters ** (1 / 3) / 16))
    while width > 16 and 28 * width**2 > 1.2 * parameters:
        width -= 16
    layers = max(1, round((parameters - 16 * width**2) / (12 * width**2)))
    tokens, inner = 8 * width, 8 * width // 3
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (tokens, width)}
    for number in range(layers):
        layer = f"model.layers.{number}"
        shapes |= {f"{layer}.self_attn.{name}_proj.weight": (width, width) for name in "qkvo"}
        shapes |= {f"{layer}.mlp.{name}_proj.weight": (inner, width) for name in ("gate", "up")}
        shapes[f"{layer}.mlp.down_proj.weight"] = (width, inner)
        shapes |= {f"{layer}.{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (width,), "lm_head.weight": (tokens, width)}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 16,
        "num_key_value_heads": width // 16,
        "vocab_size": tokens,
        "tie_word_embeddings": False,
    }
    return shapes, config


def parameters_of(size: int) -> int:
    """How many parameters the models have that are asked to have about `size`."""
    return sum(math.prod(shape) for shape in llama_shapes(size)[0].values())


def make_models(folder: Path, models: int, parameters: int, dtype: str) -> None:
    """Make what is not there yet of a base and so many clients, as folders that Hugging Face libraries read."""
    import torch

    from fl_merge.store import SafetensorsSource, save

    shapes, config = llama_shapes(parameters)
    kind = getattr(torch, dtype)

    def make(number: int, name: str) -> None:
        if (folder / name).exists():
            return
        draw = torch.Generator().manual_seed(number)
        tensors = {}
        base = SafetensorsSource(folder / "base") if number else None
        for key, shape in shapes.items():
            values = torch.randn(shape, generator=draw).mul_(CLIENT_SPREAD if base else BASE_SPREAD)
            tensors[key] = (values.add_(base.read(key)) if base else values).to(kind)
        save(tensors, folder / name)
        (folder / name / "config.json").write_text(json.dumps(config | {"torch_dtype": dtype}))

    make(0, "base")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for made in [pool.submit(make, client + 1, f"client-{client}") for client in range(models)]:
            made.result()
