"""The tensors of a LoRA adapter: pairs of factors by module, and the others.

The pairs are `x.lora_A.weight` (rank, in) and `x.lora_B.weight` (out, rank), or `x.lora_embedding_A` and
`x.lora_embedding_B`; of a convolution A is (rank, in, height, width) and B (out, rank, 1, 1). The others are those of
modules_to_save and biases.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fl_merge.errors import MergeError
from fl_merge.ops.lowrank import Factors
from fl_merge.types import TensorSpec

SUFFIXES = {".lora_A.weight": ".lora_B.weight", ".lora_embedding_A": ".lora_embedding_B"}
"""The end of the name of each kind of A, and that of the B that belongs to it."""

RESIDUAL = "residual."
"""Before the names of a second adapter that belongs to the first (`lora_residual`)."""


@dataclass(frozen=True)
class Pair:
    """The two tensors of one module.

    Args:
        module: its name.
        a, b: the tensors' names.
        a_spec, b_spec: what they are.
    """

    module: str
    a: str
    b: str
    a_spec: TensorSpec
    b_spec: TensorSpec

    @property
    def rank(self) -> int:
        """Of the product."""
        return self.a_spec.shape[0]

    @property
    def outputs(self) -> int:
        """Rows of the product."""
        return self.b_spec.shape[0]

    @property
    def inputs(self) -> int:
        """Columns of the product; of a convolution, channels times the kernel."""
        return math.prod(self.a_spec.shape[1:])

    def problem(self) -> str | None:
        """Why the two are no factors of one product; None if they are."""
        a, b = self.a_spec.shape, self.b_spec.shape
        if len(a) < 2 or len(b) != len(a) or 0 in (*a, *b):
            return f"factors of shapes {a} and {b}, wanted (rank, in) and (out, rank)"
        if a[0] != b[1]:
            return f"A {a} has rank {a[0]} and B {b} rank {b[1]}, wanted one rank (factors are not broadcast)"
        if any(size != 1 for size in b[2:]):
            return f"B {b}, wanted a kernel of 1 x 1"
        if not (self.a_spec.is_floating and self.b_spec.is_floating):
            return f"factors of dtypes {self.a_spec.dtype} and {self.b_spec.dtype}, wanted floating ones"
        return None

    def of_rank(self, rank: int) -> tuple[TensorSpec, TensorSpec]:
        """A and B of the same module with another rank."""
        a, b = self.a_spec, self.b_spec
        return TensorSpec((rank, *a.shape[1:]), a.dtype), TensorSpec((b.shape[0], rank, *b.shape[2:]), b.dtype)


def pairs_of(specs: Mapping[str, TensorSpec]) -> tuple[dict[str, Pair], list[str]]:
    """The pairs of an adapter by module, and the names of its other tensors.

    Raises:
        MergeError: for an A without its B or a B without its A.
    """
    pairs: dict[str, Pair] = {}
    taken: set[str] = set()
    for name in specs:
        for ending, other in SUFFIXES.items():
            if name.endswith(ending):
                module = name.removesuffix(ending)
                if module + other not in specs:
                    raise MergeError(f"tensor '{name}' has no '{module + other}' beside it")
                pairs[module] = Pair(module, name, module + other, specs[name], specs[module + other])
                taken |= {name, module + other}
    others = [name for name in specs if name not in taken]
    for name in others:
        if name.endswith(tuple(SUFFIXES.values())):
            raise MergeError(f"tensor '{name}' has no A beside it")
    return pairs, others


def factors(a: Tensor, b: Tensor) -> Factors:
    """Two tensors of an adapter as the factors of a product."""
    return Factors(b.to(torch.float64).reshape(b.shape[0], -1), a.to(torch.float64).reshape(a.shape[0], -1))
