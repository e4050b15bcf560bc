"""Where the fused experts of a mixture lie in a checkpoint: in one tensor for all of them, or each by itself.

transformers keeps the experts of a layer in tensors of three dimensions, gate and up in one of them, and PEFT adapts
those (`target_parameters`). What is on disk depends on the family: gpt-oss stores the tensors as they are in memory;
Mixtral and Qwen store a gate, an up and a down matrix an expert, as they always have.

An adapter's file does not say which of a module's parameters its factors belong to; their shapes do.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fl_merge.adapters.config import PREFIX
from fl_merge.architectures import Architecture, architecture_of
from fl_merge.errors import RecipeError, counted
from fl_merge.pairs import Pair
from fl_merge.types import TensorSpec

EXPERT = re.compile(r"(.*)\[(\d+)\]$", re.DOTALL)
"""The name of one of fused experts as a module of its own."""

_WRAPPED = ".base_layer"
"""The inner one of two adapted parameters of a module has this after the module's name."""


@dataclass(frozen=True)
class Part:
    """What a pair of factors adds to a tensor of the model, or to a part of it.

    Args:
        pair: the factors.
        turned: whether the tensor holds the product the other way round.
        expert: of a tensor of all experts, the one to which it is added; None for a tensor that is one matrix.
        rows: of the product those that belong to the tensor, where a product is that of several; None for all.
    """

    pair: Pair
    turned: bool = False
    expert: int | None = None
    rows: slice | None = None


def expert_parts(
    pairs: Sequence[Pair],
    tensors: Mapping[str, TensorSpec],
    parameters: Sequence[str],
    config: Mapping[str, Any] | None,
) -> dict[str, list[Part]]:
    """The places of fused experts in a checkpoint, by the name of its tensor.

    Args:
        pairs: of the adapter, those of experts (`EXPERT`).
        tensors: of the checkpoint.
        parameters: the adapter's `target_parameters`.
        config: the checkpoint's config.json; None if there is none.

    Raises:
        RecipeError: naming the module, if the checkpoint has no place for it, or more than one.
    """
    by_path: dict[str, dict[str, dict[int, Pair]]] = {}
    for pair in pairs:
        match = EXPERT.fullmatch(pair.module)
        assert match is not None
        path = match[1].removeprefix(PREFIX)
        while path.endswith(_WRAPPED):
            path = path.removesuffix(_WRAPPED)
        by_path.setdefault(path, {}).setdefault(match[1], {})[int(match[2])] = pair
    for path, levels in by_path.items():
        for experts in levels.values():
            missing = sorted(set(range(max(experts) + 1)) - set(experts))
            if missing:
                raise RecipeError(
                    f"module '{PREFIX}{path}': found factors of {counted(len(experts), 'expert')} up to number "
                    f"{max(experts)}, wanted all of them (number {missing[0]} is not there)"
                )
    row = architecture_of(config, tensors)
    found: dict[str, list[Part]] = {}
    for path, levels in by_path.items():
        parts = _in_one_tensor(path, levels, tensors, parameters) or _one_by_one(path, levels, tensors, row)
        if not parts:
            shown = ", ".join(f"{len(each)} of {_shape(each)}" for each in levels.values())
            raise RecipeError(
                f"module '{PREFIX}{path}': fused experts ({shown}) whose place in the base is not known: it has no "
                f"tensors '{path}.*' of three dimensions that fit, and is of no family whose experts are known one by "
                "one (mixtral, qwen2_moe, qwen3_moe); carry the adapter, or merge_and_unload() it with PEFT"
            )
        found |= parts
    return found


def _in_one_tensor(
    path: str, levels: Mapping[str, Mapping[int, Pair]], tensors: Mapping[str, TensorSpec], parameters: Sequence[str]
) -> dict[str, list[Part]]:
    """A tensor (experts, out, in) for each adapted parameter, or all of them (experts, in, out)."""
    last = sorted({parameter.rpartition(".")[2] for parameter in parameters})
    names = [name for name in (f"{start}{path}.{each}" for start in ("", "model.") for each in last) if name in tensors]
    ways = []
    for turned in (False, True):
        places: dict[str, list[Part]] = {}
        for experts in levels.values():
            outputs, inputs = _shape(experts)
            wanted = (len(experts), inputs, outputs) if turned else (len(experts), outputs, inputs)
            fitting = [name for name in names if tensors[name].shape == wanted and name not in places]
            if len(fitting) != 1:
                break
            places[fitting[0]] = [Part(experts[number], turned, expert=number) for number in sorted(experts)]
        else:
            ways.append(places)
    if len(ways) > 1:
        raise RecipeError(
            f"module '{PREFIX}{path}': the experts are square matrices, of which the base's tensor does not show which "
            "way round they are; carry the adapter, or merge_and_unload() it with PEFT"
        )
    return ways[0] if ways else {}


def _one_by_one(
    path: str, levels: Mapping[str, Mapping[int, Pair]], tensors: Mapping[str, TensorSpec], row: Architecture
) -> dict[str, list[Part]]:
    """The matrices gate, up and down of each expert; gate and up are one parameter in memory, gate first."""
    place, layer = row.place(f"{path}.")
    if place != "layer" or not row.mlp or not all("{e}" in name for name in row.mlp):
        return {}
    parts: dict[str, list[Part]] = {}
    for experts in levels.values():
        if row.named(layer, row.mlp[0].replace("{e}", str(len(experts)))) + ".weight" in tensors:
            return {}  # the base has more of them
        for number, pair in experts.items():
            names = [row.named(layer, name.replace("{e}", str(number))) + ".weight" for name in row.mlp]
            shapes = [tensors[name].shape if name in tensors else () for name in names]
            if shapes[0] and shapes[0] == shapes[1] and (pair.outputs // 2, pair.inputs) == shapes[0]:
                half = pair.outputs // 2
                parts[names[0]] = [Part(pair, rows=slice(0, half))]
                parts[names[1]] = [Part(pair, rows=slice(half, None))]
            elif (pair.outputs, pair.inputs) == shapes[2]:
                parts[names[2]] = [Part(pair)]
            else:
                return {}
    return parts


def _shape(experts: Mapping[int, Pair]) -> tuple[int, int]:
    first = next(iter(experts.values()))
    return first.outputs, first.inputs
