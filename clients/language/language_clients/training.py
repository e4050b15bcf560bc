"""Finetuning and evaluating a causal language model.

Shape suffixes: B sequences, L tokens of a sequence, V tokens of the vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from language_clients.routing import is_mixture
from language_clients.tokens import Tokens, batches, seeded, windows

WEIGHT_DECAY = 0.01
MAX_NORM = 1.0
WARM_UP = 0.05


def finetune(
    model: Any,
    tokens: Tokens,
    *,
    steps: int,
    batch_size: int,
    length: int,
    learning_rate: float,
    key: object,
    decay: bool = False,
) -> float:
    """Train those weights of a model that ask for gradients, in place, with AdamW on the cross entropy.

    For a mixture of experts the load-balancing loss is added, times `router_aux_loss_coef` of its config.

    Args:
        model: of transformers or peft, in float32.
        tokens: the text.
        steps: gradient steps; 0 for none.
        batch_size: sequences a step.
        length: tokens a sequence.
        learning_rate: of AdamW; gradients are clipped to norm 1.
        key: names the places at which sequences are cut out of the text, and the draws of dropout.
        decay: warm the learning rate up, then let it fall to nothing along a cosine.

    Returns:
        The mean loss of the last tenth of the steps, in nats a token; NaN without a step.
    """
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=learning_rate, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY)
    losses: list[float] = []
    balanced = {"output_router_logits": True} if is_mixture(model) else {}
    model.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeded("dropout", key).initial_seed())
        drawn = batches(tokens, batch_size=batch_size, length=length, steps=steps, key=key)
        for step, ids_BL in enumerate(drawn):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * (_schedule(step, steps) if decay else 1.0)
            found = model(input_ids=ids_BL[:, :-1], use_cache=False, **balanced)
            loss = functional.cross_entropy(found.logits.flatten(0, 1).float(), ids_BL[:, 1:].flatten())
            optimizer.zero_grad(set_to_none=True)
            (loss + model.config.router_aux_loss_coef * found.aux_loss if balanced else loss).backward()
            torch.nn.utils.clip_grad_norm_(weights, MAX_NORM)
            optimizer.step()
            losses.append(loss.item())
    model.eval()
    last = losses[-max(1, len(losses) // 10) :]
    return sum(last) / len(last) if last else math.nan


def _schedule(step: int, steps: int) -> float:
    warm = max(1, int(steps * WARM_UP))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


@torch.no_grad()
def bits_per_byte(
    model: Any, tokens: Tokens, *, length: int, limit: float, num_bytes: int | None = None, batch_size: int = 16
) -> tuple[float, float]:
    """How many bits the model needs for a byte of text: -log2 p(text) / bytes. 8 is what knowing nothing needs.

    Args:
        model: anything that is called with `input_ids` and gives `logits`.
        tokens: the text; sequences of it are evaluated each for itself, so the first tokens of each know little.
        length: tokens a sequence.
        limit: bytes of text, about.
        num_bytes: of a byte-level model: its other tokens are no text, and are left out of the distribution.
        batch_size: sequences at a time.

    Returns:
        Bits per byte, and the bytes that they were measured on.
    """
    bits = total = 0.0
    by_length: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for window in windows(tokens, length=length, limit=limit):
        by_length.setdefault(len(window[0]), []).append(window)  # the last one of a text is shorter
    for alike in by_length.values():
        for start in range(0, len(alike), batch_size):
            group = alike[start : start + batch_size]
            ids_BL = torch.stack([ids for ids, _ in group])
            bytes_BL = torch.stack([counts for _, counts in group]).double()
            logits_BLV = model(input_ids=ids_BL[:, :-1], use_cache=False).logits.float()
            nats_BL = _nats(logits_BLV[..., :num_bytes], ids_BL[:, 1:], counted=bytes_BL > 0)
            bits += float(nats_BL.double().sum()) / math.log(2)
            total += float(bytes_BL.sum())
    if total == 0:
        raise ValueError("no text to evaluate on")
    return bits / total, total


def _nats(logits_BLV: Tensor, ids_BL: Tensor, counted: Tensor) -> Tensor:
    """-log p of each token that stands for text, 0 for the others."""
    ids_BL = ids_BL.masked_fill(~counted, 0)
    nats_BL = functional.cross_entropy(logits_BLV.transpose(1, 2), ids_BL, reduction="none")
    return nats_BL.masked_fill(~counted, 0.0)
