"""Fold an adapter into the model that it belongs to: theta = theta_0 + s B A, a new checkpoint beside the old one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

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


class _Fold:
    """The plan: each weight that has an adapter with its products added, all others as they are."""

    def __init__(self, configs: Sequence[AdapterConfig], dtype: torch.dtype | None) -> None:
        self._configs = configs
        self._dtype = dtype

    def plan(self, spec: CohortSpec) -> Iterator[Output]:
        wanted: dict[str, list[tuple[int, Pair]]] = {}
        saved: dict[str, tuple[int, str]] = {}
        for at, theirs in enumerate(spec.clients_N):
            pairs, others = pairs_of(theirs)
            for pair in pairs.values():
                if pair.module.endswith("]"):
                    raise RecipeError(
                        f"module '{pair.module}': fused experts cannot be folded without the model's code, which says "
                        "how they lie in memory; carry the adapter, or merge_and_unload() it with PEFT"
                    )
                wanted.setdefault(self._weight(spec.tensors, pair.module), []).append((at, pair))
            for name in others:
                plain = name.removeprefix(PREFIX).replace(".base_layer.", ".")
                saved[_found(spec.tensors, plain, name)] = (at, name)
        for name, tensor in spec.tensors.items():
            target = tensor if self._dtype is None else TensorSpec(tensor.shape, self._dtype)
            if name in wanted:
                reads = [Read(BASE, name)]
                turned = []
                for at, pair in wanted[name]:
                    reads += [Read(at, pair.a), Read(at, pair.b)]
                    turned.append(self._turned(self._configs[at], pair, name, tensor))
                yield Output(name, target, tuple(reads), Whole(_adder(turned)))
            elif name in saved:
                at, other = saved[name]
                if spec.clients_N[at][other].shape != tensor.shape:
                    raise RecipeError(
                        f"tensor '{name}': shape {tensor.shape}, the adapter has {spec.clients_N[at][other].shape}"
                    )
                yield Output(name, target, (Read(at, other),), Whole(lambda each: each.to(compute_dtype(each.dtype))))
            else:
                yield Output(name, tensor, (Read(BASE, name),), Copy())

    @staticmethod
    def _weight(tensors: Mapping[str, TensorSpec], module: str) -> str:
        return _found(tensors, module.removeprefix(PREFIX) + ".weight", module)

    @staticmethod
    def _turned(config: AdapterConfig, pair: Pair, name: str, tensor: TensorSpec) -> bool:
        """Whether the weight is stored the other way round: an embedding, or a Conv1D of GPT-2."""
        turned = pair.a.endswith("lora_embedding_A") or bool(config.raw.get("fan_in_fan_out"))
        shape: tuple[int, ...] = (pair.inputs, pair.outputs) if turned else (pair.outputs, pair.inputs)
        if len(pair.a_spec.shape) > 2:
            turned, shape = False, (pair.outputs, *pair.a_spec.shape[1:])
        if tensor.shape != shape and not turned and tensor.shape == shape[::-1]:
            # PEFT corrects the setting of a Conv1D when it loads an adapter, and saves it as it was given.
            return True
        if tensor.shape != shape and turned and tensor.shape == shape[::-1] and "lora_A" in pair.a:
            return False
        if tensor.shape != shape:
            raise RecipeError(f"tensor '{name}': shape {tensor.shape}, the adapter's product is {shape}")
        return turned


def _found(tensors: Mapping[str, TensorSpec], name: str, module: str) -> str:
    """The base's name of a tensor: checkpoints of a bare model lack the first part ("transformer.")."""
    for candidate in (name, name.partition(".")[2], f"model.{name}"):
        if candidate in tensors:
            return candidate
    raise RecipeError(f"module '{module}': the base has no tensor '{name}'")


def _adder(turned: Sequence[bool]) -> Any:
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
