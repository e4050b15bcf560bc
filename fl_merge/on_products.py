"""Methods for models, run on the products of adapters by the engine that runs them on models: in the full space, where
products are multiplied out a block of rows at a time, or in a smaller space.

Suffixes: P clients, O outputs (rows), I inputs (columns), R rank, K and L the sizes of a smaller space, S elements.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fl_merge.errors import RecipeError
from fl_merge.fill import Fillers
from fl_merge.ops.gram import BLOCK
from fl_merge.ops.lowrank import Factors
from fl_merge.reading import Sliced, pieces
from fl_merge.shapes import Coordinate, Matrix, Span, Tensorwise, VectorSpan, WeightedSum
from fl_merge.types import Cohort, CohortSpec, MergeMethod, Output, TensorSpec, Update

MADE_AT_ONCE = 8 * BLOCK
"""Elements of one client's product that are made at a time, in whole rows."""

_SLICE = 8 * BLOCK
"""Elements of each client that the engine works on at a time."""


class Product:
    """A product as a flat tensor of which slices are made when they are asked for.

    Rows are always made in the same blocks, so that an element has the same bits in every slice. The last block stays.
    """

    def __init__(self, factors: Factors) -> None:
        self._factors = factors
        self._columns = factors.a_RI.shape[1]
        self._step = max(1, MADE_AT_ONCE // max(1, self._columns))
        self._last: tuple[int, Tensor] | None = None

    def numel(self) -> int:
        """Elements of the product."""
        return self._factors.b_OR.shape[0] * self._columns

    def __getitem__(self, piece: slice) -> Tensor:
        start, stop, _ = piece.indices(self.numel())
        size = self._step * self._columns
        parts = []
        for block in range(start // size, -(-stop // size)):
            first = block * size
            parts.append(self._block(block)[max(0, start - first) : stop - first])
        return torch.cat(parts) if parts else torch.empty(0)

    def _block(self, block: int) -> Tensor:
        last = self._last
        if last is None or last[0] != block:
            rows_BR = self._factors.b_OR[block * self._step : (block + 1) * self._step]
            last = self._last = block, (rows_BR @ self._factors.a_RI).float().reshape(-1)
        return last[1]


class _Source:
    """One matrix under one name, as a source for the engine."""

    def __init__(self, name: str, spec: TensorSpec, values: Tensor | Factors | None) -> None:
        self._specs = {name: spec}
        self._spec, self._values = spec, values

    def specs(self) -> Mapping[str, TensorSpec]:
        return self._specs

    def read(self, name: str) -> Tensor:
        if isinstance(self._values, Tensor):
            return self._values
        whole = self.sliced(name)[0 : self._spec.numel]
        return whole.view(self._spec.shape)

    def sliced(self, name: str) -> Sliced:
        if isinstance(self._values, Tensor):
            return self._values.reshape(-1)
        if self._values is None:
            return torch.zeros(()).expand(self._spec.numel)
        return Product(self._values)

    def aliases(self) -> Mapping[str, str]:
        return {}


def planned(method: MergeMethod, spec: CohortSpec, shapes: dict[str, tuple[int, int]]) -> dict[str, Output]:
    """The outputs of a method for matrices of these shapes, by name.

    Raises:
        RecipeError: if it needs more than the clients' deltas (other names), or surveys the whole model.
    """
    tensors = {name: TensorSpec(shape, torch.float32) for name, shape in shapes.items()}
    inner = replace(spec, tensors=tensors, clients_N=(), statistics={})
    found = {output.name: output for output in method.plan(inner)}
    for name in tensors:
        compute = found[name].compute if name in found else None
        known = Span | WeightedSum | Coordinate | Matrix | Tensorwise | VectorSpan
        if not isinstance(compute, known) or len(found) != len(tensors):
            raise RecipeError(
                f"lora_merge: {method} cannot run on the products of adapters; wanted a method that merges deltas "
                "alone, such as ties"
            )
        require_products(method, compute)
    return found


def require_products(method: object, compute: object) -> None:
    """Refuse an elementwise method that surveys the whole model.

    Raises:
        RecipeError: naming the method.
    """
    surveys = isinstance(compute, Coordinate) and (compute.survey or compute.surveys or compute.gram)
    if surveys and isinstance(compute, Coordinate) and compute.scope == "model":
        raise RecipeError(
            f"lora_merge: {method} surveys the whole model, whose products are never in memory at once; wanted "
            "one that goes tensor by tensor (scope='tensor')"
        )


def merged(output: Output, spec: CohortSpec, shape: tuple[int, int], deltas_P: Sequence[Factors | Tensor]) -> Tensor:
    """The merged delta, (rows, columns) float32, by the method's definition.

    Args:
        output: of the method's plan; its shape is that of the full space.
        spec: the cohort.
        shape: of the deltas.
        deltas_P: one a client, as matrices or as products.
    """
    size = TensorSpec(shape, torch.float32)
    output = replace(output, spec=size, scope=None)
    updates = tuple(
        Update(client_id, weight, _Source(output.name, size, each))
        for client_id, weight, each in zip(spec.client_ids, spec.weights_N, deltas_P, strict=True)
    )
    cohort = Cohort(_Source(output.name, size, None), updates, spec.seed, spec.round)
    inner = replace(spec, tensors={output.name: size}, clients_N=())
    cpu = torch.device("cpu")
    fillers = Fillers(cohort, inner, step=_SLICE, piece=_SLICE, device=cpu, kernels=None)
    filler = fillers.prepare(output, torch.float32, map)
    merged_S = torch.empty(size.numel)
    for start, stop in pieces(size.numel, fillers.step(output)):
        filler.fill(start, stop, merged_S[start:stop])
    for start, stop in filler.again():
        filler.refill(start, stop, merged_S[start:stop], filled=True)
    return merged_S.view(shape)
