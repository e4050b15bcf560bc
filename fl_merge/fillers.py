"""Functions that fill a piece of an output with merged values: by torch, or by the compiled passes.

Suffixes: N clients, S elements.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fl_merge.errors import MergeError
from fl_merge.kernels.passes import LIMITS, Draws, Inputs
from fl_merge.kernels.rows import combine_balanced
from fl_merge.shapes import Balanced, Elements, WeightedSum
from fl_merge.stages import Stages
from fl_merge.types import Output, compute_dtype

Values = Callable[[int, int], Tensor]
"""From the first and last-plus-one element of a slice to its merged values."""


class Filler:
    """Fills the pieces of one output.

    Args:
        output: which.
        dtype: in which it is written.
    """

    def __init__(self, output: Output, dtype: torch.dtype) -> None:
        self._output = output
        self._dtype = dtype

    def fill(self, start: int, stop: int, out_S: Tensor) -> None:
        """Write the merged elements from start to stop to `out_S`, in its dtype.

        Raises:
            MergeError: if one does not fit it.
        """
        raise NotImplementedError

    def again(self) -> list[tuple[int, int]]:
        """Asked when all pieces are filled: those that have to be filled a second time.

        Raises:
            MergeError: as `fill`.
        """
        return []

    def refill(self, start: int, stop: int, out_S: Tensor, *, filled: bool) -> None:
        """Fill a piece the second time.

        Args:
            start, stop, out_S: as for `fill`.
            filled: whether `out_S` still holds what was filled in the first time.
        """
        raise NotImplementedError

    def _refuse(self, largest: float) -> MergeError:
        return MergeError.of_value(self._output.name, largest, str(self._dtype))

    def _require(self, bits: int) -> None:
        """Refuse a largest magnitude, given as the bits of float32, that is infinite in the output's dtype."""
        if bits >= LIMITS[self._dtype]:
            raise self._refuse(float(torch.tensor(bits, dtype=torch.int32).view(torch.float32)))


class Defined(Filler):
    """By the torch definition, in slices of `step` elements (a piece of the compiled passes would be too large)."""

    def __init__(self, output: Output, dtype: torch.dtype, values: Values, step: int | None = None) -> None:
        super().__init__(output, dtype)
        self._values = values
        self._step = step

    def fill(self, start: int, stop: int, out_S: Tensor) -> None:
        step = self._step or max(stop - start, 1)
        for begin in range(start, max(stop, start + 1), step):
            end = min(begin + step, stop)
            self._fill(begin, end, out_S[begin - start : end - start])

    def _fill(self, start: int, stop: int, out_S: Tensor) -> None:
        values_S = self._values(start, stop)
        cast_S = values_S.to("cpu", self._dtype)
        if self._dtype.is_floating_point and not torch.isfinite(cast_S.to(compute_dtype(self._dtype))).all():
            finite_S = values_S.double().nan_to_num(nan=math.inf, posinf=math.inf, neginf=math.inf)
            raise self._refuse(float(finite_S.abs().max()))
        out_S.copy_(cast_S)


class CompiledSum(Filler):
    """A weighted sum, by a compiled pass."""

    def __init__(self, output: Output, dtype: torch.dtype, native: Inputs, compute: WeightedSum) -> None:
        super().__init__(output, dtype)
        self._native = native
        self._sum = compute

    def fill(self, start: int, stop: int, out_S: Tensor) -> None:
        compute = self._sum
        self._require(self._native.weighted_sum(compute.base_coefficient, compute.coefficients_N, start, stop, out_S))


class CompiledStages(Filler):
    """Pruning, election and sum, by a compiled pass.

    An election that is a draw is won by the sign that most of the tensor's elements have, which is known only when all
    are counted. Plus is assumed first; what minus would give is noted, and put in place if it turns out to be minus.

    Args:
        output, dtype: as for `Filler`.
        native: where the inputs are.
        stages, weights_N: what to do.
        prune: how each delta is pruned, as `Inputs.prune_combine` takes it, or `Inputs.rank_combine`.
        ranked: whether it is the latter.
    """

    def __init__(
        self,
        output: Output,
        dtype: torch.dtype,
        native: Inputs,
        stages: Stages,
        weights_N: Tensor,
        prune: Mapping[str, Any],
        *,
        ranked: bool = False,
    ) -> None:
        super().__init__(output, dtype)
        self._combine = native.rank_combine if ranked else native.prune_combine
        self._counting = threading.Lock()
        self._tally = 0
        self._draws: dict[tuple[int, int], Draws] = {}
        self._arguments: dict[str, Any] = {
            "weights_N": weights_N,
            "election": stages.election,
            "normalize": stages.normalize,
            "scale": stages.scale,
            **prune,
        }

    def fill(self, start: int, stop: int, out_S: Tensor) -> None:
        draws = self._merge(start, stop, out_S, (stop - start) // 16)
        with self._counting:
            self._tally += draws.tally
            if draws.count:
                self._draws[start, stop] = draws

    def _merge(self, start: int, stop: int, out_S: Tensor, room: int) -> Draws:
        bits, draws = self._combine(**self._arguments, start=start, stop=stop, out_S=out_S, room=room)
        self._require(bits)
        return draws

    def again(self) -> list[tuple[int, int]]:
        if self._tally < 0:
            return list(self._draws)
        for draws in self._draws.values():
            self._require(draws.largest)
        return []

    def refill(self, start: int, stop: int, out_S: Tensor, *, filled: bool) -> None:
        draws = self._draws.pop((start, stop))
        if not filled or draws.count > len(draws.places_M):
            draws = self._merge(start, stop, out_S, draws.count)
        Defined(self._output, self._dtype, lambda *_: torch.from_numpy(draws.otherwise_M)).fill(
            0, draws.count, minus_M := torch.empty(draws.count, dtype=self._dtype)
        )
        out_S[torch.from_numpy(draws.places_M - start)] = minus_M


class CompiledElements(Filler):
    """An elementwise method, by a compiled pass.

    Args:
        output, dtype: as for `Filler`.
        native: where the inputs are.
        elements: which method.
        weights_N: the clients' shares.
        clients: how many the method is told of; `native` may have fewer of them, those that are chosen.
    """

    def __init__(
        self, output: Output, dtype: torch.dtype, native: Inputs, elements: Elements, weights_N: Tensor, clients: int
    ) -> None:
        super().__init__(output, dtype)
        self._native = native
        self._arguments: dict[str, Any] = {
            "kind": elements.kind,
            "count": elements.count(clients),
            "factors_N": weights_N.tolist() if elements.weighted else [1.0] * native.clients,
            "numbers": elements.numbers,
            "scale": elements.scale,
        }

    def fill(self, start: int, stop: int, out_S: Tensor) -> None:
        self._require(self._native.combine_elements(**self._arguments, start=start, stop=stop, out_S=out_S))


class CompiledBalance(Filler):
    """A mean by balance, by a compiled pass.

    Args:
        output, dtype: as for `Filler`.
        native: where the inputs are.
        balanced: what to do.
        joint_K: its numbers.
    """

    def __init__(self, output: Output, dtype: torch.dtype, native: Inputs, balanced: Balanced, joint_K: Tensor) -> None:
        super().__init__(output, dtype)
        self._native = native
        self._scale = balanced.scale
        self._scales = balanced.scales(joint_K, native.clients)
        self._cutoffs_N2 = balanced.cutoffs_N2(joint_K, native.clients)

    def fill(self, start: int, stop: int, out_S: Tensor) -> None:
        known = self._scales, self._cutoffs_N2, self._scale
        self._require(combine_balanced(self._native, *known, start, stop, out_S))
