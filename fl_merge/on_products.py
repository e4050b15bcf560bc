"""Methods for models, run on the products of adapters: in the full space by blocks of rows, or in a smaller space.

Suffixes: P clients, O outputs (rows), I inputs (columns), R rank, K and L the sizes of a smaller space, S elements.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from fl_merge.errors import RecipeError
from fl_merge.ops.combine import add_scaled_delta
from fl_merge.ops.gram import GramSum, gram_partials
from fl_merge.ops.lowrank import Factors
from fl_merge.shapes import Coordinate, Matrix, Slice, Span, WeightedSum
from fl_merge.types import CohortSpec, MergeMethod, Output, TensorSpec

_BLOCK = 1 << 20
"""Elements of one client's product that are made at a time."""


class Deltas(Protocol):
    """The clients' deltas of one matrix, a block of rows at a time."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        ...

    def rows(self, start: int, stop: int) -> Tensor:
        """(P, (stop - start) * columns) float32: these rows of every client, flattened."""
        ...

    def client(self, at: int) -> Tensor:
        """(S,) float32: all of one client, flattened."""
        ...


class OfFactors:
    """Deltas that are multiplied out as they are asked for, always in the same blocks: the same bits each time."""

    def __init__(self, parts_P: Sequence[Factors]) -> None:
        self._parts = parts_P
        self.shape = (parts_P[0].b_OR.shape[0], parts_P[0].a_RI.shape[1])

    def rows(self, start: int, stop: int) -> Tensor:
        """Of every client."""
        return torch.stack([self._rows(part, start, stop) for part in self._parts])

    def client(self, at: int) -> Tensor:
        """All rows of one."""
        return torch.cat([self._rows(self._parts[at], *block) for block in blocks(self.shape)])

    @staticmethod
    def _rows(part: Factors, start: int, stop: int) -> Tensor:
        return (part.b_OR[start:stop] @ part.a_RI).float().reshape(-1)


class AtHand:
    """Deltas that are small enough to be held: (P, rows, columns)."""

    def __init__(self, deltas_PRC: Tensor) -> None:
        self._deltas_PRC = deltas_PRC.float()
        self.shape = (deltas_PRC.shape[1], deltas_PRC.shape[2])

    def rows(self, start: int, stop: int) -> Tensor:
        """Of every client."""
        return self._deltas_PRC[:, start:stop].reshape(len(self._deltas_PRC), -1)

    def client(self, at: int) -> Tensor:
        """All rows of one."""
        return self._deltas_PRC[at].reshape(-1)


def blocks(shape: tuple[int, int]) -> list[tuple[int, int]]:
    """The rows of a matrix in blocks of about a million elements."""
    step = max(1, _BLOCK // max(1, shape[1]))
    return [(start, min(start + step, shape[0])) for start in range(0, max(shape[0], 1), step)]


def planned(method: MergeMethod, spec: CohortSpec, shapes: dict[str, tuple[int, int]]) -> dict[str, Output]:
    """The outputs of a method for matrices of these shapes, by name.

    Raises:
        RecipeError: if it needs more than the clients' deltas (statistics, other names).
    """
    tensors = {name: TensorSpec(shape, torch.float32) for name, shape in shapes.items()}
    inner = replace(spec, tensors=tensors, clients_N=(), statistics={})
    found = {output.name: output for output in method.plan(inner)}
    for name in tensors:
        compute = found[name].compute if name in found else None
        if not isinstance(compute, Span | WeightedSum | Coordinate | Matrix) or len(found) != len(tensors):
            raise RecipeError(
                f"lora_merge: {method} cannot run on the products of adapters; wanted a method that merges deltas "
                "alone, such as ties"
            )
        if isinstance(compute, Coordinate) and compute.scope == "model" and compute.survey is not None:
            raise RecipeError(
                f"lora_merge: {method} surveys the whole model, whose products are never in memory at once; wanted "
                "scope='tensor'"
            )
    return found


def merged(output: Output, deltas: Deltas, spec: CohortSpec) -> Tensor:
    """The merged delta, (rows, columns): a method's definition, a block of rows at a time where it is elementwise."""
    compute = output.compute
    shares_P = spec.weights_N if output.weights_N is None else output.weights_N
    weights_P = torch.tensor(shares_P, dtype=torch.float64)
    if isinstance(compute, Matrix):
        return compute.merge(_all(deltas).reshape(-1, *deltas.shape), weights_P)
    if isinstance(compute, Span):
        compute = fixed(compute, replace(spec, weights_N=tuple(shares_P)), _gram(deltas))
    if isinstance(compute, WeightedSum):
        return _weighted(compute, deltas)
    assert isinstance(compute, Coordinate)
    return _coordinate(compute, output.name, deltas, replace(spec, weights_N=tuple(shares_P)), weights_P)


def fixed(compute: Span, spec: CohortSpec, gram_PP: Tensor) -> WeightedSum:
    """The coefficients of a span once its Gram matrix is known; the base is zero, so weights and deltas are one."""
    return compute.fixed(spec, gram_PP)


def _all(deltas: Deltas) -> Tensor:
    return torch.cat([deltas.rows(*block) for block in blocks(deltas.shape)], dim=1)


def _gram(deltas: Deltas) -> Tensor:
    every_PS = _all(deltas)
    total = GramSum(len(every_PS))
    total.add(gram_partials(every_PS))
    return total.total()


def _weighted(compute: WeightedSum, deltas: Deltas) -> Tensor:
    out = []
    for block in blocks(deltas.shape):
        rows_PS = deltas.rows(*block)
        total_S = torch.zeros(rows_PS.shape[1], dtype=torch.float64)
        for row_S, coefficient in zip(rows_PS, compute.coefficients_N, strict=True):
            add_scaled_delta(total_S, torch.zeros(1, dtype=torch.float64), row_S, coefficient)
        out.append(total_S)
    return torch.cat(out).view(deltas.shape)


def _coordinate(compute: Coordinate, name: str, deltas: Deltas, spec: CohortSpec, weights_P: Tensor) -> Tensor:
    columns = deltas.shape[1]
    survey_PK = torch.empty(len(weights_P), 0, dtype=torch.float64)
    if compute.survey is not None:
        survey_PK = torch.stack([compute.survey(deltas.client(at)) for at in range(len(weights_P))])
    joint_K = torch.empty(0, dtype=torch.float64)
    if compute.joint is not None:
        joint_K = compute.joint(_all(deltas), weights_P)

    def at(start: int, stop: int, count: Callable[[], int] | None) -> Slice:
        first, last = start * columns, stop * columns
        return Slice(name, first, last, first, spec, survey_PK, count, joint_K=joint_K)

    votes: list[int] = []

    def count_votes() -> int:
        tally = compute.tally
        if tally is not None and not votes:
            each = (tally(deltas.rows(*block), weights_P, at(*block, None)) for block in blocks(deltas.shape))
            votes.append(int(sum(int(vote_S.sum(dtype=torch.float64)) for vote_S in each)))
        return votes[0] if votes else 0

    out = [compute.combine(deltas.rows(*block), weights_P, at(*block, count_votes)) for block in blocks(deltas.shape)]
    return torch.cat(out).view(deltas.shape)
