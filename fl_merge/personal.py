"""One merged delta for all clients and one bit an element for each: N personal models in little more room than one.

    saved = personal_masks(base, clients)            # or emr(base, clients)
    saved.save("personal")
    model = Personal.load("personal").model(base, "client-3")

Suffixes: N clients, S elements.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fl_merge.check import check_update
from fl_merge.errors import MergeError, RecipeError
from fl_merge.hyperparameters import in_range, whole_number
from fl_merge.ops.combine import weighted_sum
from fl_merge.ops.masks import own_mask, unified_delta
from fl_merge.store import MemorySource, load, save
from fl_merge.types import Update, client_order, compute_dtype

Models = Sequence[Mapping[str, Tensor]] | Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True)
class Personal:
    """A merged delta, and what of it is each client's: model_i = theta_0 + factor_i * (delta where mask_i, else 0).

    Args:
        delta: by tensor, in its shape, float32 (float64 for float64 bases).
        masks: by client and tensor: its elements' bits, eight a byte (`pack`).
        factors: by client.
    """

    delta: Mapping[str, Tensor]
    masks: Mapping[str, Mapping[str, Tensor]]
    factors: Mapping[str, float]

    def model(self, base: Mapping[str, Tensor], client_id: str) -> dict[str, Tensor]:
        """One client's model, in the base's dtypes; tensors without a delta are the base's.

        Raises:
            MergeError: for a client that there is no mask for, or a base that does not fit.
        """
        if client_id not in self.masks:
            raise MergeError(f"there is no mask of client '{client_id}' (clients: {', '.join(self.masks)})")
        masks = self.masks[client_id]
        return self._moved(base, lambda name, delta: self.factors[client_id] * _masked(delta, masks[name]))

    def consensus(self, base: Mapping[str, Tensor], at_least: int = 2) -> dict[str, Tensor]:
        """One model for all: the delta where at least so many masks have it, as the method `consensus` gives it.

        Raises:
            RecipeError: if `at_least` is not 1 to the number of clients.
        """
        whole_number("at_least", at_least, 1)
        if at_least > len(self.masks):
            raise RecipeError(f"parameter 'at_least': found {at_least}, wanted at most {len(self.masks)}, the clients")

        def agreed(name: str, delta: Tensor) -> Tensor:
            votes = sum(unpack(masks[name], delta.numel()).to(torch.int32) for masks in self.masks.values())
            assert isinstance(votes, Tensor)
            return torch.where(votes.reshape(delta.shape) >= at_least, delta, 0.0)

        return self._moved(base, agreed)

    def _moved(self, base: Mapping[str, Tensor], delta_of: Callable[[str, Tensor], Tensor]) -> dict[str, Tensor]:
        model = {name: tensor.clone() for name, tensor in base.items()}
        for name, delta in self.delta.items():
            if name not in base or base[name].shape != delta.shape:
                found = f"shape {tuple(base[name].shape)}" if name in base else "none"
                raise MergeError(f"base, tensor '{name}': found {found}, wanted shape {tuple(delta.shape)}")
            wide = base[name].to(delta.dtype) + delta_of(name, delta)
            model[name] = wide.to(base[name].dtype)
            if not torch.isfinite(model[name]).all():
                raise MergeError.of_value(name, float(wide.abs().max()), str(base[name].dtype))
        return model

    def save(self, folder: str | Path) -> None:
        """Write a safetensors folder, which must not hold a model yet."""
        tensors: dict[str, Tensor] = {f"delta/{name}": delta for name, delta in self.delta.items()}
        for number, (client_id, masks) in enumerate(self.masks.items()):
            tensors[f"factor/{number}/{client_id}"] = torch.tensor(self.factors[client_id], dtype=torch.float64)
            tensors |= {f"mask/{number}/{name}": mask for name, mask in masks.items()}
        save(MemorySource(tensors, tied={}), folder)  # each name's, for bases whose weights are not tied any more

    @classmethod
    def load(cls, folder: str | Path) -> Personal:
        """Read what `save` wrote.

        Raises:
            MergeError: if the file holds something else, or a mask does not fit its delta.
        """
        delta: dict[str, Tensor] = {}
        by_number: dict[str, dict[str, Tensor]] = {}
        clients: dict[str, tuple[str, float]] = {}
        for key, tensor in load(folder).items():
            kind, _, rest = key.partition("/")
            number, _, name = rest.partition("/")
            if kind == "delta":
                delta[rest] = tensor
            elif kind == "mask":
                by_number.setdefault(number, {})[name] = tensor
            elif kind == "factor" and tensor.numel() == 1:
                clients[number] = (name, float(tensor))
            else:
                raise MergeError(f"{folder}: tensor '{key}' is no part of personal models")
        for number, (client_id, factor) in clients.items():
            for name, each in delta.items():
                mask = by_number.get(number, {}).get(name)
                if mask is None or mask.dtype != torch.uint8 or mask.numel() != math.ceil(each.numel() / 8):
                    raise MergeError(f"{folder}: client '{client_id}', tensor '{name}': wanted a bit an element")
            if not math.isfinite(factor):
                raise MergeError(f"{folder}: client '{client_id}': factor {factor}, wanted a finite number")
        order = sorted(clients, key=client_order)
        return cls(
            delta,
            {clients[number][0]: by_number.get(number, {}) for number in order},
            {clients[number][0]: clients[number][1] for number in order},
        )


def personal_masks(
    base: Mapping[str, Tensor], clients: Models, *, scale: float = 1.0, threshold: float = 0.4
) -> Personal:
    """The sum of the deltas, and for each client the mask of what in it is its own (TALL masks).

    merged = scale * sum tau_i;  mask_i = |tau_i| > threshold * |merged - tau_i|;  model_i = theta_0 + mask_i merged
    (Wang et al., 2024, arXiv:2405.07813)

    Args:
        base: the state dict that every client started from.
        clients: their state dicts: a list (they are then called "0", "1", ...) or by client id.
        scale: multiplies the sum.
        threshold: lambda, >= 0; the paper chooses 0.2 to 0.6 for each client by its validation data.

    Raises:
        RecipeError: for settings out of range.
        UpdateError: if a client's tensors do not fit the base.
    """
    in_range("scale", scale)
    in_range("threshold", threshold, 0.0)

    def merged(deltas_NS: Tensor) -> Tensor:
        return weighted_sum(deltas_NS, torch.ones(len(deltas_NS), dtype=torch.float64)) * scale

    return _personal(base, clients, merged, lambda delta_S, merged_S: own_mask(delta_S, merged_S, threshold))[0]


def emr(base: Mapping[str, Tensor], clients: Models) -> Personal:
    """EMR-Merging: the unified delta, each client's mask of the elements that have its sign, and its factor.

    delta: as the method `emr`;  mask_i = (tau_i * delta > 0);  factor_i = sum |tau_i| / sum |mask_i delta|, both over
    the whole model (Huang et al., 2024, arXiv:2405.17461)

    Args and Raises: as for `personal_masks`.
    """
    found, norms = _personal(base, clients, unified_delta, lambda delta_S, merged_S: delta_S.sign() * merged_S > 0)
    factors = {client_id: own / kept if kept > 0 else 1.0 for client_id, (own, kept) in norms.items()}
    return Personal(found.delta, found.masks, factors)


def _personal(
    base: Mapping[str, Tensor],
    clients: Models,
    merged: Callable[[Tensor], Tensor],
    mask: Callable[[Tensor, Tensor], Tensor],
) -> tuple[Personal, dict[str, tuple[float, float]]]:
    """With factors of 1, and each client's L1 norms of its delta and of its part of the merged one."""
    given = dict(clients) if isinstance(clients, Mapping) else {str(n): model for n, model in enumerate(clients)}
    if not given:
        raise MergeError("there is nothing to merge: no client is given")
    models = {client_id: given[client_id] for client_id in sorted(given, key=client_order)}
    source = MemorySource(base)
    for client_id, model in models.items():
        update = Update(client_id, 1.0, MemorySource(model))
        check_update(update, source.specs(), max_num_examples=math.inf, values=source)
    delta: dict[str, Tensor] = {}
    masks: dict[str, dict[str, Tensor]] = {client_id: {} for client_id in models}
    norms = dict.fromkeys(models, (0.0, 0.0))
    tied = source.aliases()
    for name, tensor in base.items():
        if not tensor.is_floating_point() or tensor.numel() == 0:
            continue
        if name in tied:  # one weight of two names, which counts once
            delta[name] = delta[tied[name]]
            for each in masks.values():
                each[name] = each[tied[name]]
            continue
        wide = compute_dtype(tensor.dtype)
        deltas_NS = torch.stack([(model[name].to(wide) - tensor.to(wide)).reshape(-1) for model in models.values()])
        merged_S = merged(deltas_NS)
        delta[name] = merged_S.reshape(tensor.shape)
        for client_id, delta_S in zip(models, deltas_NS, strict=True):
            mask_S = mask(delta_S, merged_S)
            masks[client_id][name] = pack(mask_S)
            own, kept = norms[client_id]
            part_S = torch.where(mask_S, merged_S, 0.0)
            norms[client_id] = own + float(delta_S.double().abs().sum()), kept + float(part_S.double().abs().sum())
    return Personal(delta, masks, dict.fromkeys(models, 1.0)), norms


def pack(mask_S: Tensor) -> Tensor:
    """Booleans as bits, eight a byte, the first in the lowest bit.

    Returns:
        (ceil(S / 8),), uint8.
    """
    bits = torch.nn.functional.pad(mask_S.reshape(-1).to(torch.uint8), (0, -mask_S.numel() % 8)).reshape(-1, 8)
    return (bits << torch.arange(8, dtype=torch.uint8)).sum(dim=1, dtype=torch.uint8)


def unpack(packed: Tensor, numel: int) -> Tensor:
    """The booleans that `pack` was given, (numel,).

    Raises:
        MergeError: if there are not as many bits.
    """
    if packed.dtype != torch.uint8 or packed.numel() != math.ceil(numel / 8):
        raise MergeError(f"found {packed.numel()} bytes of {packed.dtype}, wanted {math.ceil(numel / 8)} of uint8")
    return ((packed[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1).bool().reshape(-1)[:numel]


def _masked(delta: Tensor, packed: Tensor) -> Tensor:
    return torch.where(unpack(packed, delta.numel()).reshape(delta.shape), delta, 0.0)
