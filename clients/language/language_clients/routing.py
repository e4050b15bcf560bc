"""Where a mixture of experts sends text.

Suffixes: R tokens, K experts of a token, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from language_clients.tokens import Tokens, windows


def is_mixture(model: Any) -> bool:
    """Whether a transformers model has experts and routers that can be asked for."""
    return hasattr(model.config, "output_router_logits")


@torch.no_grad()
def expert_load(model: Any, tokens: Tokens, *, length: int, limit: float) -> list[float]:
    """The share of tokens' choices that each expert gets, as a mean over layers; they sum to 1.

    Args:
        model: a mixture of experts of transformers.
        tokens: the text.
        length: tokens a sequence.
        limit: bytes of text, about.
    """
    counts_E, top_k = torch.zeros(()), int(model.config.num_experts_per_tok)
    for ids_L, _ in windows(tokens, length=length, limit=limit):
        found = model(input_ids=ids_L[None, :-1], use_cache=False, output_router_logits=True)
        for scores_RE in found.router_logits:
            chosen_RK: Tensor = scores_RE.topk(top_k, dim=-1).indices
            counts_E = counts_E + torch.bincount(chosen_RK.flatten(), minlength=scores_RE.shape[-1])
    return [float(share) for share in counts_E.double() / counts_E.sum()]
