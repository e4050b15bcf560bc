"""Fold an adapter into the model that it belongs to: theta = theta_0 + s B A, a new checkpoint beside the old one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fl_merge.adapters.config import PREFIX, AdapterConfig
from fl_merge.adapters.folder import Adapter
from fl_merge.errors import RecipeError
from fl_merge.execute import MergeReport, execute
from fl_merge.lowrank import Pair, factors, pairs_of
from fl_merge.shapes import Copy
from fl_merge.store import SafetensorsSink, SafetensorsSource
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
        RecipeError: if the base is quantised, or does not have a module's weight, or has it in another shape.
        MergeError: if a value does not fit the dtype, or the folder cannot be written.
    """
    given = [adapters] if isinstance(adapters, Adapter) else list(adapters)
    source = SafetensorsSource(base)
    refuse_quantised(source.specs(), Path(base))
    updates = tuple(Update(str(at), 1.0, adapter.plain) for at, adapter in enumerate(given))
    report = execute(
        _Fold([adapter.config for adapter in given], dtype),
        Cohort(source, updates),
        SafetensorsSink(folder, max_shard_bytes=max_shard_bytes),
    )
    _copy_companions(Path(base), Path(folder))
    return report


def refuse_quantised(specs: Mapping[str, TensorSpec], base: Path) -> None:
    """Refuse a checkpoint of quantised weights: the rounding of what is folded in would be larger than that.

    Raises:
        RecipeError: naming the tensor, or the configuration's entry.
    """
    config = base / "config.json" if base.is_dir() else base.parent / "config.json"
    if config.is_file():
        try:
            found = json.loads(config.read_text(encoding="utf-8")).get("quantization_config")
        except (ValueError, AttributeError):
            found = None
        if found:
            raise RecipeError(
                f"'{base}' is quantised (quantization_config in its config.json): an adapter cannot be folded into it; "
                "carry it as an adapter"
            )
    for name, spec in specs.items():
        narrow = spec.dtype.itemsize == 1 and (spec.is_floating or (name.endswith(".weight") and len(spec.shape) > 1))
        if narrow or name.rpartition(".")[2] in _QUANTISED:
            raise RecipeError(
                f"'{base}' is quantised (tensor '{name}', {spec}): an adapter cannot be folded into it; carry it as an "
                "adapter"
            )


@dataclass(frozen=True)
class _Places:
    """Where an adapter belongs in a model.

    Args:
        products: by the name of a weight, the pair of factors, and whether the weight is stored the other way round.
        whole: by the name of a tensor, that of the adapter which takes its place (modules_to_save, biases).
    """

    products: Mapping[str, tuple[Pair, bool]]
    whole: Mapping[str, str]

    @classmethod
    def of(cls, tensors: Mapping[str, TensorSpec], theirs: Mapping[str, TensorSpec], config: AdapterConfig) -> _Places:
        """Of an adapter with these plain tensors in a model with those.

        Raises:
            RecipeError: if the model has no such weight, or one of another shape.
        """
        pairs, others = pairs_of(theirs)
        products, whole = {}, {}
        for pair in pairs.values():
            if pair.module.endswith("]"):
                raise RecipeError(
                    f"module '{pair.module}': fused experts cannot be folded without the model's code, which says how "
                    "they lie in memory; carry the adapter, or merge_and_unload() it with PEFT"
                )
            name = _found(tensors, pair.module.removeprefix(PREFIX) + ".weight", pair.module)
            products[name] = pair, _turned(config, pair, name, tensors[name])
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

    def __init__(self, configs: Sequence[AdapterConfig], dtype: torch.dtype | None) -> None:
        self._configs = configs
        self._dtype = dtype

    def plan(self, spec: CohortSpec) -> Iterator[Output]:
        each = [
            _Places.of(spec.tensors, theirs, config)
            for theirs, config in zip(spec.clients_N, self._configs, strict=True)
        ]
        for name, tensor in spec.tensors.items():
            target = tensor if self._dtype is None else TensorSpec(tensor.shape, self._dtype)
            added = [(at, *places.products[name]) for at, places in enumerate(each) if name in places.products]
            whole = [(at, places.whole[name]) for at, places in enumerate(each) if name in places.whole]
            start = Read(*whole[-1]) if whole else Read(BASE, name)
            if added:
                reads = [Read(at, factor) for at, pair, _ in added for factor in (pair.a, pair.b)]
                yield Output(name, target, (start, *reads), Whole(_adder([turned for _, _, turned in added])))
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
        refuse_quantised(base.specs(), where)
        self._base, self._adapter = base, adapter
        self._places = _Places.of(base.specs(), adapter.plain.specs(), adapter.config)

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
        pair, turned = self._places.products[name]
        return _adder([turned])(base, self._adapter.plain.read(pair.a), self._adapter.plain.read(pair.b)).to(dtype)

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
    """The base's name of a tensor: checkpoints of a bare model lack the first part ("transformer.")."""
    for candidate in (name, name.partition(".")[2], f"model.{name}"):
        if candidate in tensors:
            return candidate
    raise RecipeError(f"module '{module}': the base has no tensor '{name}'")


def _adder(turned: Sequence[bool]) -> Callable[..., Tensor]:
    def added(base: Tensor, *theirs: Tensor) -> Tensor:
        total = base.to(torch.float64)
        for number, turn in enumerate(turned):
            b_OR, a_RI = factors(theirs[2 * number], theirs[2 * number + 1])
            product = b_OR @ a_RI
            total = total + (product.T if turn else product).reshape(base.shape)
        return total.to(compute_dtype(base.dtype))

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
