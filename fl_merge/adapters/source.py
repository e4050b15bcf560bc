"""An adapter as a source of plain factors: every scaling in B, the fused experts of a mixture one by one.

PEFT keeps the factors of E experts in two matrices, A (E r, in), an expert's rows together, and B (out, r E), an
expert's columns E apart. Here each expert is a module of its own, `x[e]`: their products are merged, and no other.

Suffixes: E experts, R rank, O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fl_merge.adapters.config import NUMBERED, AdapterConfig
from fl_merge.adapters.experts import EXPERT
from fl_merge.errors import MergeError, TensorMismatchError
from fl_merge.pairs import Pair, pairs_of
from fl_merge.store import MemorySource
from fl_merge.types import TensorSource, TensorSpec, compute_dtype


@dataclass(frozen=True)
class _Place:
    """Where a tensor comes from: in the file, and which expert of how many, and what it is multiplied by."""

    name: str
    factor: float = 1.0
    expert: int = 0
    experts: int = 1
    is_b: bool = False


class PlainAdapter:
    """The tensors of an adapter with scaling 1: what `merge_adapters` and the methods for adapters read.

    Args:
        config: its configuration.
        tensors: under PEFT's names.

    Raises:
        TensorMismatchError: if factors do not fit each other or the configuration, naming the tensor.
    """

    def __init__(self, config: AdapterConfig, tensors: TensorSource) -> None:
        self.config = config
        self._tensors = tensors
        self._specs: dict[str, TensorSpec] = {}
        self._places: dict[str, _Place] = {}
        self.scalings: dict[str, float] = {}
        self.experts: dict[str, int] = {}
        try:
            pairs, others = pairs_of(tensors.specs())
        except MergeError as error:
            raise TensorMismatchError(str(error)) from None
        if not pairs:
            raise TensorMismatchError("no tensor 'lora_A' with its 'lora_B'; wanted a LoRA adapter")
        for name in others:
            if ".lora_" in name or "trainable_tokens" in name:
                raise TensorMismatchError("a kind of tensor that cannot be merged as a product", tensor=name)
            self._specs[name], self._places[name] = tensors.specs()[name], _Place(name)
        for module in sorted(pairs):
            self._take(pairs[module])

    def _take(self, pair: Pair) -> None:
        problem = pair.problem()
        if problem is not None:
            raise TensorMismatchError(problem, tensor=pair.a)
        rank, scaling = self.config.rank_of(pair.module), self.config.scaling_of(pair.module)
        experts = pair.rank // rank if self.config.has_parameters and len(pair.a_spec.shape) == 2 else 1
        if experts > 1 and self.config.parameter_patterns():
            named = ", ".join(self.config.parameter_patterns())
            raise TensorMismatchError(
                f"a pattern for an adapted parameter ({named}): its rank is not known without the model", tensor=pair.a
            )
        if experts * rank != pair.rank:
            raise TensorMismatchError(f"rank {pair.rank}, the configuration has {rank}", tensor=pair.a)
        if experts > 1:
            self.experts[pair.module] = experts
        a_spec, b_spec = pair.of_rank(rank)
        for expert in range(experts):
            module = f"{pair.module}[{expert}]" if experts > 1 else pair.module
            a, b = (module + name.removeprefix(pair.module) for name in (pair.a, pair.b))
            self._specs[a] = TensorSpec(a_spec.shape, compute_dtype(a_spec.dtype))
            self._specs[b] = TensorSpec(b_spec.shape, compute_dtype(b_spec.dtype))
            self._places[a] = _Place(pair.a, 1.0, expert, experts)
            self._places[b] = _Place(pair.b, scaling, expert, experts, is_b=True)
            self.scalings[module] = scaling

    def specs(self) -> Mapping[str, TensorSpec]:
        """Names, shapes and dtypes; factors in the dtype in which they are merged."""
        return self._specs

    def read(self, name: str, *, scaled: bool = True) -> Tensor:
        """A tensor; of a B, times the module's scaling unless that is not wanted."""
        place = self._places[name]
        tensor = self._tensors.read(place.name)
        if name not in self._specs or not tensor.dtype.is_floating_point:
            return tensor
        if place.experts > 1:
            tensor = _expert_of(tensor, place)
        wide = tensor.to(self._specs[name].dtype)
        return wide * place.factor if scaled and place.factor != 1.0 else wide

    def stored_specs(self) -> Mapping[str, TensorSpec]:
        """The tensors of the file, as they are stored."""
        return self._tensors.specs()

    def stored(self, name: str) -> str:
        """The name of the tensor in the file of which this one is a part, or the whole."""
        return self._places[name].name

    def aliases(self) -> Mapping[str, str]:
        """None: an adapter's file stores each tensor once."""
        return {}


def _expert_of(tensor: Tensor, place: _Place) -> Tensor:
    if place.is_b:
        return tensor.reshape(tensor.shape[0], -1, place.experts)[:, :, place.expert]
    return tensor.reshape(place.experts, -1, tensor.shape[-1])[place.expert]


def experts_apart(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """An adapter in which each of fused experts is a module of its own, `x[e]`, as a server of a federation merges it.

    PEFT's factors of fused experts lie across each other: their B A is no product of anybody's. Other tensors, and
    scalings, stay as they are.

    Args:
        tensors: as `get_peft_model_state_dict` gives them.
        config: the adapter's, such as `model.peft_config["default"].to_dict()`.

    Raises:
        RecipeError: for an adapter that cannot be merged.
        TensorMismatchError: for tensors that do not fit the configuration.
    """
    source = MemorySource(tensors)
    plain = PlainAdapter(AdapterConfig.read(config, "adapter"), source)
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    return {name: plain.read(name, scaled=False).to(dtypes[plain.stored(name)]) for name in plain.specs()}


def experts_together(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An adapter as PEFT has it, from one whose experts are modules of their own (`experts_apart`)."""
    return fused(tensors)[0]


def fused(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, int], set[str]]:
    """Plain tensors in PEFT's form: experts put together again, and all experts of one rank.

    Returns:
        The tensors, each module's rank, and which of the modules are fused experts.
    """
    pairs, others = pairs_of({name: TensorSpec.of(tensor) for name, tensor in tensors.items()})
    found = {name: tensors[name] for name in others}
    ranks, groups = {}, dict[str, dict[int, Pair]]()
    numbered = max((pair.rank for module, pair in pairs.items() if NUMBERED.search(module)), default=0)
    for module, pair in pairs.items():
        match = EXPERT.fullmatch(module)
        if match is not None:
            groups.setdefault(match[1], {})[int(match[2])] = pair
            continue
        ranks[module] = numbered if NUMBERED.search(module) else pair.rank
        found[pair.a], found[pair.b] = _padded(tensors[pair.a], tensors[pair.b], ranks[module])
    widest = max((pair.rank for group in groups.values() for pair in group.values()), default=0)
    for module, group in groups.items():
        every_a, every_b = [], []
        for number in sorted(group):
            a, b = _padded(tensors[group[number].a], tensors[group[number].b], widest)
            every_a.append(a)
            every_b.append(b)
        pair = group[min(group)]
        found[module + pair.a.removeprefix(pair.module)] = torch.cat(every_a)
        b_ORE = torch.stack(every_b, dim=2)
        found[module + pair.b.removeprefix(pair.module)] = b_ORE.reshape(b_ORE.shape[0], -1)
        ranks[module] = widest
    return found, ranks, set(groups)


def _padded(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The same product in factors of a larger rank."""
    more = rank - a.shape[0]
    if not more:
        return a, b
    return torch.cat([a, a.new_zeros(more, *a.shape[1:])]), torch.cat([b, b.new_zeros(b.shape[0], more)], dim=1)
