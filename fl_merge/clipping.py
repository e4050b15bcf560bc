"""Shorten the deltas of clients that moved far, before any method merges them (Geyer et al., 2017, arXiv:1712.07557).

    clip_norm(ties(density=0.2), quantile=0.5)

tau_i becomes tau_i min(1, bound / ||tau_i||), with the norm over the whole model. What is not clipped keeps its bits.

Suffixes: N clients, S elements.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fl_merge.errors import MergeError, RecipeError
from fl_merge.hyperparameters import in_range
from fl_merge.method import as_method, require_inner
from fl_merge.ops.gram import BLOCK
from fl_merge.shapes import Copy, Matrix, Span, WeightedSum
from fl_merge.types import (
    BASE,
    Cohort,
    CohortSpec,
    MergeMethod,
    Output,
    TensorSource,
    TensorSpec,
    Update,
    compute_dtype,
)

Mapped = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]


@dataclass(frozen=True)
class Clipped:
    """A merge method that is given clipped deltas; made by `clip_norm`.

    Args:
        method: that merges them.
        max_norm: the bound, or None.
        quantile: of the cohort's norms, which is the bound; or None.
    """

    method: MergeMethod
    max_norm: float | None
    quantile: float | None

    outermost = True
    """It acts on whole models: only a server optimizer goes round it."""

    def plan(self, spec: CohortSpec) -> Iterator[Output]:
        """The plan of the method inside."""
        return self.method.plan(spec)

    def prepare(self, cohort: Cohort, mapped: Mapped) -> tuple[MergeMethod, Cohort, dict[str, Any]]:
        """What the executor runs in place of this, once the norms are known.

        Sums of deltas and functions of a matrix's deltas get the factors; for any other method the clients' tensors are
        shortened when they are read, whole and in the dtype of the arithmetic.

        Args:
            cohort: whose updates are to be clipped.
            mapped: like `map`, perhaps in several threads.

        Returns:
            The method, the cohort, and what the merge's report says of the clipping.
        """
        norms_N = delta_norms(cohort, mapped)
        bound = self.max_norm if self.max_norm is not None else _quantile(norms_N, self.quantile or 0.0)
        factors_N = tuple(1.0 if norm <= bound else bound / norm for norm in norms_N)
        notes = {"clip_norm": {"bound": bound, "norms": norms_N, "factors": factors_N}}
        if all(factor == 1.0 for factor in factors_N):
            return self.method, cohort, notes
        outputs = list(self.method.plan(cohort.spec()))
        spans: dict[int, Span] = {}  # those of one scope stay one object: its Gram matrix is measured once
        scaled = [_scaled(output, factors_N, spans) for output in outputs]
        if all(output is not None for output in scaled):
            return _Planned(tuple(output for output in scaled if output is not None)), cohort, notes
        updates = tuple(
            update if factor == 1.0 else replace(update, tensors=_Shortened(cohort.base, update, factor))
            for update, factor in zip(cohort.updates, factors_N, strict=True)
        )
        return self.method, replace(cohort, updates=updates), notes

    def __str__(self) -> str:
        bound = f"max_norm={self.max_norm!r}" if self.max_norm is not None else f"quantile={self.quantile!r}"
        return f"clip_norm({self.method}, {bound})"


def clip_norm(method: MergeMethod | str, *, max_norm: float | None = None, quantile: float | None = None) -> Clipped:
    """A method whose clients' deltas are clipped first, over the whole model, by their norm in float64.

    Args:
        method: any merge method.
        max_norm: no delta is longer than this, > 0.
        quantile: no delta is longer than this quantile of the round's norms, in [0, 1] (linear between clients; 0.5 is
            the median). Give one of the two.

    With `quantile=1`, or a `max_norm` that nobody reaches, it is the method itself bit for bit. Methods that are made
    of more than sums of deltas (TIES, the median) then read clipped tensors whole, not in slices.

    Raises:
        RecipeError: for none or both, a value out of range, or a method that acts on a whole round.
    """
    if (max_norm is None) == (quantile is None):
        raise RecipeError(f"clip_norm: found max_norm={max_norm!r}, quantile={quantile!r}, wanted one of them")
    if max_norm is not None:
        in_range("max_norm", max_norm, 0.0, open_low=True)
    if quantile is not None:
        in_range("quantile", quantile, 0.0, 1.0)
    inner = as_method(method)
    require_inner("clip_norm", inner)
    return Clipped(inner, None if max_norm is None else float(max_norm), None if quantile is None else float(quantile))


def delta_norms(cohort: Cohort, mapped: Mapped) -> tuple[float, ...]:
    """Each client's ||theta_i - theta_0|| over all floating tensors, tied ones once, in float64.

    Sums over blocks are added exactly (fsum), so that no order shows.
    """
    specs = cohort.spec().tensors
    names = [name for name, spec in specs.items() if spec.is_floating and spec.numel]

    def squares(at: tuple[int, str]) -> list[float]:
        client, name = at
        base_S = cohort.base.read(name).reshape(-1)
        client_S = cohort.updates[client].tensors.read(name).reshape(-1)
        blocks = []
        for start in range(0, base_S.numel(), BLOCK):
            delta_S = client_S[start : start + BLOCK].double() - base_S[start : start + BLOCK].double()
            blocks.append(float(delta_S.square().sum()))
        return blocks

    work = [(client, name) for client in range(len(cohort.updates)) for name in names]
    sums: dict[int, list[float]] = {client: [] for client in range(len(cohort.updates))}
    for (client, _), blocks in zip(work, mapped(squares, work), strict=True):
        sums[client] += blocks
    norms = tuple(math.sqrt(math.fsum(blocks)) for blocks in sums.values())
    for update, norm in zip(cohort.updates, norms, strict=True):
        if not math.isfinite(norm):
            raise MergeError(f"clip_norm: the norm of client '{update.client_id}' is beyond float64")
    return norms


def _quantile(norms_N: Sequence[float], quantile: float) -> float:
    ascending = sorted(norms_N)
    place = quantile * (len(ascending) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ascending) - 1)
    return ascending[below] + (place - below) * (ascending[above] - ascending[below])


def _scaled(output: Output, factors_N: tuple[float, ...], spans: dict[int, Span]) -> Output | None:
    """The output with each client's delta times its factor; None where only the executor could do that."""
    clients = [read.source for read in output.reads if read.source != BASE and read.of == "tensors"]
    if isinstance(output.compute, Copy) or not output.spec.is_floating:
        return output
    factors = [factors_N[client] for client in clients]
    compute = output.compute
    if isinstance(compute, WeightedSum):
        coefficients = tuple(c * factor for c, factor in zip(compute.coefficients_N, factors, strict=True))
        return replace(output, compute=WeightedSum(compute.base_coefficient, coefficients))
    if isinstance(compute, Span) and compute.on == "deltas":
        if id(compute) not in spans:
            spans[id(compute)] = _scaled_span(compute, tuple(factors))
        return replace(output, compute=spans[id(compute)])
    if isinstance(compute, Matrix):
        return replace(output, compute=_scaled_matrix(compute, factors))
    return None


def _scaled_span(span: Span, factors: tuple[float, ...]) -> Span:
    factors_N = torch.tensor(factors, dtype=torch.float64)

    def coefficients(spec: CohortSpec, gram_NN: Tensor | None) -> list[float]:
        scaled_NN = None if gram_NN is None else gram_NN * factors_N[:, None] * factors_N
        return [c * factor for c, factor in zip(span.coefficients(spec, scaled_NN), factors, strict=True)]

    return replace(span, coefficients=coefficients, running=None)


def _scaled_matrix(matrix: Matrix, factors: list[float]) -> Matrix:
    def merge(deltas_NRC: Tensor, weights_N: Tensor) -> Tensor:
        factors_N11 = torch.tensor(factors, dtype=deltas_NRC.dtype)[:, None, None]
        return matrix.merge(deltas_NRC * factors_N11, weights_N)

    return replace(matrix, merge=merge)


@dataclass(frozen=True)
class _Planned:
    """A plan that has been made."""

    outputs: tuple[Output, ...]

    def plan(self, spec: CohortSpec) -> Iterator[Output]:
        return iter(self.outputs)


@dataclass(frozen=True)
class _Shortened:
    """A client's tensors with its delta times a factor, made when they are read."""

    base: TensorSource
    update: Update
    factor: float
    _specs: dict[str, TensorSpec] = field(default_factory=dict)

    def specs(self) -> Mapping[str, TensorSpec]:
        if not self._specs:
            for name, spec in self.update.tensors.specs().items():
                dtype = compute_dtype(self.base.specs()[name].dtype) if spec.is_floating else spec.dtype
                self._specs[name] = TensorSpec(spec.shape, dtype)
        return self._specs

    def read(self, name: str) -> Tensor:
        tensor, spec = self.update.tensors.read(name), self.specs()[name]
        if not spec.is_floating:
            return tensor
        base = self.base.read(name).to(spec.dtype)
        return base + self.factor * (tensor.to(spec.dtype) - base)

    def aliases(self) -> Mapping[str, str]:
        return self.update.tensors.aliases()
