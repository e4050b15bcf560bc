"""What a client sends for `moe_upcycle(router="hidden")`: where its text is, among the hidden states of the model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from language_clients.tokens import Tokens, windows


@torch.no_grad()
def mean_hidden(model: Any, tokens: Tokens, *, length: int, limit: float) -> dict[str, Tensor]:
    """The mean, over tokens, of what each layer's MLP reads.

    Args:
        model: of transformers, with layers at `model.layers` that have an `mlp`.
        tokens: the client's text.
        length: tokens a sequence.
        limit: bytes of text, about.

    Returns:
        `hidden/0`, `hidden/1`, ...: (H,) float32.
    """
    layers = model.get_decoder().layers
    sums = [torch.zeros(model.config.hidden_size, dtype=torch.float64) for _ in layers]
    count = 0

    def add(number: int) -> Any:
        def hook(module: Any, inputs: tuple[Tensor, ...]) -> None:
            sums[number] += inputs[0].double().flatten(0, -2).sum(dim=0)

        return hook

    hooks = [layer.mlp.register_forward_pre_hook(add(number)) for number, layer in enumerate(layers)]
    try:
        for ids_L, _ in windows(tokens, length=length, limit=limit):
            model(input_ids=ids_L[None, :-1], use_cache=False)
            count += len(ids_L) - 1
    finally:
        for hook in hooks:
            hook.remove()
    return {f"hidden/{number}": (total / max(count, 1)).float() for number, total in enumerate(sums)}
