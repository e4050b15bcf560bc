"""What clients call the statistics that they send beside a model, and what shapes these have.

    count               how many examples the others are sums over: one number
    fisher/TENSOR       of the tensor's shape: for each element, the sum over examples of its Fisher information
    gram/MODULE         for a layer with MODULE.weight, the sum over its inputs x of x x^T:
                        (C, C), or (C + 1, C + 1) with a constant 1 as the last input, for MODULE.bias
                        (groups, C, C) likewise for a convolution of several groups
                        (V,) for an embedding: how often each of its V rows was looked up
    hidden/LAYER        (H,), for `moe_upcycle(router="hidden")`: the mean of what that layer's MLP reads

C is the number of columns of the weight taken as (out, rest). All but `hidden` are sums, not means: two clients'
add up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from fl_merge.types import TensorSpec

COUNT = "count"
FISHER = "fisher"
GRAM = "gram"
HIDDEN = "hidden"
STATISTICS = (FISHER, GRAM, HIDDEN)
"""The kinds of statistics that a method may ask for."""


def fisher_of(tensor: str) -> str:
    """The name of a tensor's Fisher information."""
    return f"{FISHER}/{tensor}"


def gram_of(module: str) -> str:
    """The name of a layer's Gram matrix."""
    return f"{GRAM}/{module}"


def hidden_of(layer: int) -> str:
    """The name of the mean of what a layer's MLP reads."""
    return f"{HIDDEN}/{layer}"


def member(module: str, what: str) -> str:
    """The name of a layer's weight or bias; the outermost module has an empty name."""
    return f"{module}.{what}" if module else what


@dataclass(frozen=True)
class GramLayout:
    """How a Gram matrix belongs to a layer.

    Args:
        groups: of a convolution; 1 for all else.
        columns: of the weight taken as (out, rest).
        constant: whether the last input is a constant 1.
        lookups: whether it is an embedding's: one number a row.
    """

    groups: int
    columns: int
    constant: bool
    lookups: bool = False

    @classmethod
    def of(cls, gram: tuple[int, ...], weight: tuple[int, ...]) -> GramLayout | None:
        """The layout of a Gram matrix of this shape for a weight of that shape; None if they do not belong together."""
        if len(weight) < 2 or not math.prod(weight):
            return None
        columns = math.prod(weight[1:])
        if len(gram) == 1:
            return cls(1, columns, constant=False, lookups=True) if len(weight) == 2 and gram[0] == weight[0] else None
        groups = gram[0] if len(gram) == 3 else 1
        square = len(gram) in (2, 3) and gram[-1] == gram[-2] and gram[-1] in (columns, columns + 1)
        if not square or groups < 1 or weight[0] % groups:
            return None
        return cls(groups, columns, constant=gram[-1] == columns + 1)


def misfit(
    name: str,
    found: TensorSpec,
    base: Mapping[str, TensorSpec],
    kinds: tuple[str, ...],
    hidden: Mapping[str, TensorSpec] | None = None,
) -> str | None:
    """What is wrong with a statistic's name, shape or dtype, for this base; None if nothing is.

    Args:
        name, found: of the statistic.
        base: the base's tensors.
        kinds: that were asked for.
        hidden: the means of hidden states that the base has, by name.
    """
    kind, _, of = name.partition("/")
    if name == COUNT:
        return None if found.numel == 1 else f"shape {found.shape}, wanted one number"
    if kind not in kinds:
        return f"was not asked for (asked for: {', '.join(kinds)})"
    if not found.is_floating:
        return f"dtype {str(found.dtype).removeprefix('torch.')}, wanted a floating dtype"
    if kind == FISHER:
        if of not in base or not base[of].is_floating:
            return f"the base has no floating tensor '{of}'"
        return None if found.shape == base[of].shape else f"shape {found.shape}, the tensor has {base[of].shape}"
    if kind == HIDDEN:
        wide = (hidden or {}).get(name)
        if wide is None:
            return f"the base has no layer '{of}' with an MLP"
        return None if found.shape == wide.shape else f"shape {found.shape}, what the MLP reads has {wide.shape}"
    weight = base.get(member(of, "weight"))
    if weight is None or not weight.is_floating:
        return f"the base has no floating tensor '{member(of, 'weight')}'"
    if GramLayout.of(found.shape, weight.shape) is None:
        side = math.prod(weight.shape[1:])
        wanted = f"({side}, {side}), one more for a bias, (groups, ...) of a convolution, or {weight.shape[:1]}"
        return f"shape {found.shape}, for a weight of {weight.shape} wanted {wanted}"
    return None


def expected_bytes(base: Mapping[str, TensorSpec], kinds: tuple[str, ...]) -> int:
    """About how many bytes of statistics a client will send for a model of these tensors, in float32."""
    size = 0
    for spec in base.values():
        if not spec.is_floating or not spec.numel:
            continue
        if FISHER in kinds:
            size += 4 * spec.numel
        if GRAM in kinds and len(spec.shape) > 1:
            size += 4 * (spec.numel // spec.shape[0] + 1) ** 2
    return size
