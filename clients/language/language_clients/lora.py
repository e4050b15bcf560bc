"""A LoRA adapter on a model, by peft; its tensors under the names of PEFT's own files.

An adapter is a state dict as `get_peft_model_state_dict` gives it: `base_model.model.<module>.lora_A.weight` (rank, in)
and `.lora_B.weight` (out, rank).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fl_merge.pairs import RESIDUAL
from language_clients.tokens import seeded

A, B = ".lora_A.weight", ".lora_B.weight"


def wrap(model: Any, *, rank: int, alpha: float, targets: Sequence[str], seed: object) -> Any:
    """The model with an untrained adapter: A random (by the seed alone), B zero. Only the adapter asks for gradients.

    Args:
        model: of transformers; it is changed.
        rank: at least 1.
        alpha: the adapter's product counts alpha / rank times.
        targets: names of linear modules, or ("all-linear",).

    Raises:
        ValueError: if no module has such a name.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules="all-linear" if tuple(targets) == ("all-linear",) else list(targets),
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)  # between peft and transformers
        torch.manual_seed(seeded("adapter", seed).initial_seed())
        try:
            return get_peft_model(model, config)
        except ValueError as problem:
            raise ValueError(f"adapter-targets: {', '.join(targets)}: {problem}") from problem


def take(model: Any) -> dict[str, Tensor]:
    """The adapter's tensors."""
    from peft import get_peft_model_state_dict

    return {name: tensor.detach() for name, tensor in get_peft_model_state_dict(model).items()}


def put(model: Any, adapter: Mapping[str, Tensor]) -> None:
    """Write an adapter into the model's, in the model's rank (see `fitted`).

    A residual (`lora_residual`'s second adapter, which nobody trains) is added to the weights of the base.

    Raises:
        ValueError: if it is not an adapter of these modules.
    """
    from peft import set_peft_model_state_dict

    own = take(model)
    _add(model, residual(adapter))
    adapter = {name: tensor for name, tensor in adapter.items() if not name.startswith(RESIDUAL)}
    if own.keys() != adapter.keys():
        name = min(own.keys() ^ adapter.keys())
        whose = "is missing in what the server sent" if name in own else "is no part of this client's adapter"
        raise ValueError(f"adapter: tensor '{name}' {whose}; do server and clients name the same adapter-targets?")
    set_peft_model_state_dict(model, fitted(adapter, own))


def residual(adapter: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an adapter that belong to its residual."""
    return {name: tensor for name, tensor in adapter.items() if name.startswith(RESIDUAL)}


@torch.no_grad()
def _add(model: Any, factors: Mapping[str, Tensor]) -> None:
    for name, tensor in factors.items():
        if name.endswith(A):
            weight = model.get_submodule(name.removeprefix(RESIDUAL).removesuffix(A)).base_layer.weight
            weight += factors[name.removesuffix(A) + B].to(weight.dtype) @ tensor.to(weight.dtype)


def fitted(adapter: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An adapter in the ranks of another one.

    Of a higher rank the leading rows of A and columns of B are taken: the best approximation, if the server has sorted
    them as `lora_svd` does. A lower rank is filled up with own rows of A and zeros in B: the product stays the same.

    Args:
        adapter: what was received.
        own: the client's own, untrained; gives the shapes.

    Raises:
        ValueError: if modules differ in more than the rank.
    """
    result = {}
    for name, mine in own.items():
        theirs = adapter[name].to(mine.dtype)
        dim = 0 if name.endswith(A) else 1 if name.endswith(B) else None
        same = [at for at in range(mine.dim()) if at != dim]
        if theirs.dim() != mine.dim() or any(theirs.shape[at] != mine.shape[at] for at in same):
            found, wanted = tuple(theirs.shape), tuple(mine.shape)
            raise ValueError(f"adapter: tensor '{name}' of shape {found} does not fit this client's {wanted}")
        if dim is not None and theirs.shape[dim] != mine.shape[dim]:
            kept = min(theirs.shape[dim], mine.shape[dim])
            rest = mine.narrow(dim, kept, mine.shape[dim] - kept)
            theirs = torch.cat([theirs.narrow(dim, 0, kept), rest if dim == 0 else torch.zeros_like(rest)], dim)
        result[name] = theirs.contiguous()
    return result


def train_only(model: Any, factors: str) -> None:
    """Let only some factors of the adapter ask for gradients.

    Args:
        model: with an adapter.
        factors: "A", "B" or "AB".
    """
    for name, weight in model.named_parameters():
        if ".lora_A." in name or ".lora_B." in name:
            weight.requires_grad_((".lora_A." in name and "A" in factors) or (".lora_B." in name and "B" in factors))


def shared(adapter: Mapping[str, Tensor], factors: str) -> dict[str, Tensor]:
    """The part of an adapter that travels: "A", "B" or "AB"."""
    left_out = {"A": B, "B": A}.get(factors)
    return {name: tensor for name, tensor in adapter.items() if left_out is None or not name.endswith(left_out)}


def is_adapter(tensors: Mapping[str, Tensor]) -> bool:
    """Whether tensors are an adapter's."""
    return any(name.endswith(A) for name in tensors)


def rank_of(adapter: Mapping[str, Tensor]) -> int:
    """The largest rank of an adapter's modules.

    Raises:
        ValueError: if it has none.
    """
    ranks = [t.shape[0] for name, t in adapter.items() if name.endswith(A) and not name.startswith(RESIDUAL)]
    if not ranks:
        raise ValueError(f"no adapter: found {', '.join(list(adapter)[:3])}, wanted names that end in {A}")
    return max(ranks)
