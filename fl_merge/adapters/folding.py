"""Fold an adapter into the model that it belongs to: theta = theta_0 + s B A, a new checkpoint beside the old one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fl_merge.adapters.config import PREFIX, AdapterConfig
from fl_merge.adapters.experts import EXPERT, Part, expert_parts
from fl_merge.adapters.folder import Adapter
from fl_merge.errors import RecipeError
from fl_merge.execute import MergeReport, execute
from fl_merge.pairs import Pair, factors, pairs_of
from fl_merge.shapes import Copy
from fl_merge.store import MemorySink, SafetensorsSink, SafetensorsSource
from fl_merge.types import (
    BASE,
    Cohort,
    CohortSpec,
    Output,
    Read,
    TensorSource,
    TensorSpec,
    Update,
    Whole,
    compute_dtype,
)

_QUANTISED = ("absmax", "quant_state", "qweight", "qzeros", "scales", "weight_scale", "weight_format", "SCB", "g_idx")
"""The last parts of names that only checkpoints of quantised weights have."""


def fold(
    adapters: Adapter | Sequence[Adapter],
    base: str | Path,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> MergeReport:
    """Write a model's checkpoint with adapters folded into its weights.

    Args:
        adapters: one, or several that are added up (an adapter and its residual).
        base: the model's folder or safetensors file; it is not changed.
        folder: for the new checkpoint; the base's configuration and tokenizer are copied beside it.
        dtype: of the folded tensors; by default the base's.
        max_shard_bytes: as for `SafetensorsSink`.

    Raises:
        RecipeError: if the base is quantised, or does not have a module's weight, or has it in another shape; for
            fused experts, if it is not known how the base's family stores them.
        MergeError: if a value does not fit the dtype, or the folder cannot be written.
    """
    given = [adapters] if isinstance(adapters, Adapter) else list(adapters)
    source = SafetensorsSource(base)
    refuse_quantised(source.specs(), f"'{base}'", config_of(Path(base)))
    updates = tuple(Update(str(at), 1.0, adapter.plain) for at, adapter in enumerate(given))
    report = execute(
        _Fold([adapter.config for adapter in given], dtype, config_of(Path(base))),
        Cohort(source, updates),
        SafetensorsSink(folder, max_shard_bytes=max_shard_bytes),
    )
    _copy_companions(Path(base), Path(folder))
    return report


def fold_into(
    base: TensorSource, adapters: Sequence[TensorSource], config: AdapterConfig, model: Mapping[str, Any] | None
) -> dict[str, Tensor]:
    """A model's tensors with adapters added to them, in float32 (float64 of a base in that).

    Args:
        base: the model.
        adapters: plain factors (scaling 1).
        config: of them all.
        model: the base's config.json; None where it is not known.

    Raises:
        RecipeError: as `require_places`.
        MergeError: if a value is not finite.
    """
    updates = tuple(Update(str(at), 1.0, adapter) for at, adapter in enumerate(adapters))
    sink = MemorySink()
    execute(_Fold([config] * len(adapters), None, model), Cohort(base, updates), sink, master=True)
    return sink.tensors


def require_places(
    tensors: Mapping[str, TensorSpec],
    adapter: Mapping[str, TensorSpec],
    config: AdapterConfig,
    model: Mapping[str, Any] | None,
) -> None:
    """Refuse an adapter that is not of this model.

    Args:
        tensors: the model's.
        adapter: plain factors.
        config: of the adapter.
        model: the base's config.json; None where it is not known.

    Raises:
        RecipeError: if the model does not have a module's weight, or has it in another shape.
    """
    _Places.of(tensors, adapter, config, model)


def refuse_quantised(specs: Mapping[str, TensorSpec], where: str, config: Mapping[str, Any] | None) -> None:
    """Refuse a checkpoint of quantised weights: the rounding of what is folded in would be larger than that.

    Args:
        specs: of its tensors.
        where: what it is called.
        config: its config.json; None where it is not known.

    Raises:
        RecipeError: naming the tensor, or the configuration's entry.
    """
    if (config or {}).get("quantization_config"):
        raise RecipeError(
            f"{where} is quantised (quantization_config in its config.json): an adapter cannot be folded into it; "
            "carry it as an adapter"
        )
    for name, spec in specs.items():
        narrow = spec.dtype.itemsize == 1 and (spec.is_floating or (name.endswith(".weight") and len(spec.shape) > 1))
        if narrow or name.rpartition(".")[2] in _QUANTISED:
            raise RecipeError(
                f"{where} is quantised (tensor '{name}', {spec}): an adapter cannot be folded into it; carry it as an "
                "adapter"
            )


def config_of(base: Path) -> Mapping[str, Any] | None:
    """The config.json beside a model's weights; None if there is none."""
    path = base / "config.json" if base.is_dir() else base.parent / "config.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


@dataclass(frozen=True)
class _Places:
    """Where an adapter belongs in a model.

    Args:
        products: by the name of a weight, what is added to it: of fused experts one part each.
        whole: by the name of a tensor, that of the adapter which takes its place (modules_to_save, biases).
    """

    products: Mapping[str, Sequence[Part]]
    whole: Mapping[str, str]

    @classmethod
    def of(
        cls,
        tensors: Mapping[str, TensorSpec],
        theirs: Mapping[str, TensorSpec],
        config: AdapterConfig,
        model: Mapping[str, Any] | None,
    ) -> _Places:
        """Of an adapter with these plain tensors in a model with those, and with that config.json.

        Raises:
            RecipeError: if the model has no such weight, or one of another shape.
        """
        pairs, others = pairs_of(theirs)
        experts = [pair for pair in pairs.values() if EXPERT.fullmatch(pair.module)]
        parameters = config.raw.get("target_parameters") or ()
        products: dict[str, Sequence[Part]] = {**expert_parts(experts, tensors, parameters, model)}
        whole = {}
        for pair in pairs.values():
            if pair in experts:
                continue
            name = _found(tensors, pair.module.removeprefix(PREFIX) + ".weight", pair.module)
            products[name] = [Part(pair, _turned(config, pair, name, tensors[name]))]
        for other in others:
            name = _found(tensors, other.removeprefix(PREFIX).replace(".base_layer.", "."), other)
            if theirs[other].shape != tensors[name].shape:
                raise RecipeError(
                    f"tensor '{name}': shape {tensors[name].shape}, the adapter has {theirs[other].shape}"
                )
            whole[name] = other
        return cls(products, whole)


class _Fold:
    """The plan: each weight that has an adapter with its products added, all others as they are."""

    def __init__(
        self, configs: Sequence[AdapterConfig], dtype: torch.dtype | None, model: Mapping[str, Any] | None
    ) -> None:
        self._configs = configs
        self._dtype = dtype
        self._model = model

    def plan(self, spec: CohortSpec) -> Iterator[Output]:
        each = [
            _Places.of(spec.tensors, theirs, config, self._model)
            for theirs, config in zip(spec.clients_N, self._configs, strict=True)
        ]
        for name, tensor in spec.tensors.items():
            target = tensor if self._dtype is None else TensorSpec(tensor.shape, self._dtype)
            added = [(at, part) for at, places in enumerate(each) for part in places.products.get(name, ())]
            whole = [(at, places.whole[name]) for at, places in enumerate(each) if name in places.whole]
            start = Read(*whole[-1]) if whole else Read(BASE, name)
            if added:
                reads = [Read(at, factor) for at, part in added for factor in (part.pair.a, part.pair.b)]
                yield Output(name, target, (start, *reads), Whole(_adder([part for _, part in added])))
            elif whole:
                yield Output(name, target, (start,), Whole(lambda each: each.to(compute_dtype(each.dtype))))
            else:
                yield Output(name, tensor, (start,), Copy())


class FoldedSource:
    """A model with an adapter on it, folded in when a tensor is read, in the model's dtype.

    Args:
        base: the model's tensors.
        adapter: that belongs to it.
        where: the model's folder or file, for messages.

    Raises:
        RecipeError: as `fold`.
    """

    def __init__(self, base: TensorSource, adapter: Adapter, where: Path) -> None:
        refuse_quantised(base.specs(), f"'{where}'", config_of(where))
        self._base, self._adapter = base, adapter
        self._places = _Places.of(base.specs(), adapter.plain.specs(), adapter.config, config_of(where))

    def specs(self) -> Mapping[str, TensorSpec]:
        """As the model's."""
        return self._base.specs()

    def read(self, name: str) -> Tensor:
        """A tensor of the model, with what the adapter adds to it."""
        whole = self._places.whole.get(name)
        base = self._base.read(name) if whole is None else self._adapter.plain.read(whole)
        dtype = self._base.specs()[name].dtype
        if name not in self._places.products:
            return base.to(dtype)
        parts = self._places.products[name]
        factors = [self._adapter.plain.read(factor) for part in parts for factor in (part.pair.a, part.pair.b)]
        return _adder(parts)(base, *factors).to(dtype)

    def aliases(self) -> Mapping[str, str]:
        """As the model's."""
        return self._base.aliases()


def _turned(config: AdapterConfig, pair: Pair, name: str, tensor: TensorSpec) -> bool:
    """Whether a weight is stored the other way round: an embedding's, or that of a Conv1D of GPT-2."""
    if len(pair.a_spec.shape) > 2:
        plain: tuple[int, ...] = (pair.outputs, *pair.a_spec.shape[1:])
        turned = False
    else:
        plain = (pair.outputs, pair.inputs)
        turned = pair.a.endswith("lora_embedding_A") or bool(config.raw.get("fan_in_fan_out"))
        if plain[0] != plain[1] and not pair.a.endswith("lora_embedding_A"):
            # PEFT corrects fan_in_fan_out by the layer's type when it loads; of a shape that is not square it shows.
            turned = tensor.shape == plain[::-1]
    wanted = plain[::-1] if turned else plain
    if tensor.shape != wanted:
        raise RecipeError(f"tensor '{name}': shape {tensor.shape}, the adapter's product is {wanted}")
    return turned


def _found(tensors: Mapping[str, TensorSpec], name: str, module: str) -> str:
    """The base's name of a tensor: checkpoints of a bare model lack the first part ("transformer."), and those of
    Mixtral say `block_sparse_moe` of what is `mlp` in memory."""
    for candidate in (name, name.partition(".")[2], f"model.{name}", name.replace(".mlp.", ".block_sparse_moe.")):
        if candidate in tensors:
            return candidate
    raise RecipeError(f"module '{module}': the base has no tensor '{name}'")


def _adder(parts: Sequence[Part]) -> Callable[..., Tensor]:
    """From a tensor of the base, and the A and B of each part, to the tensor with the products added, in float64."""

    def product(number: int, theirs: Sequence[Tensor]) -> Tensor:
        b_OR, a_RI = factors(theirs[2 * number], theirs[2 * number + 1])
        part = parts[number]
        made = (b_OR if part.rows is None else b_OR[part.rows]) @ a_RI
        return made.T if part.turned else made

    def added(base: Tensor, *theirs: Tensor) -> Tensor:
        wide = compute_dtype(base.dtype)
        experts = sorted({part.expert for part in parts if part.expert is not None})
        if experts:  # one at a time, or all of them would be in memory in float64
            total = base.to(wide, copy=True)
            for expert in experts:
                whole = base[expert].to(torch.float64)
                for number in (at for at, part in enumerate(parts) if part.expert == expert):
                    whole = whole + product(number, theirs)
                total[expert] = whole.to(wide)
            return total
        whole = base.to(torch.float64)
        for number in range(len(parts)):
            whole = whole + product(number, theirs).reshape(base.shape)
        return whole.to(wide)

    return added


def _copy_companions(base: Path, folder: Path) -> None:
    """Everything beside the weights that makes a folder a model: configuration, tokenizer, templates."""
    if not base.is_dir() or base.resolve() == folder.resolve():
        return
    for path in base.iterdir():
        if (
            path.is_file()
            and path.suffix in (".json", ".txt", ".model", ".jinja", ".md")
            and "safetensors" not in path.name
        ):
            shutil.copyfile(path, folder / path.name)
