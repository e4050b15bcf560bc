"""From an output of a plan to the function that fills a piece of it with merged values: by torch, or by the compiled
passes where they serve. Both give the same bits.

Suffixes: N clients, S elements, K numbers of a survey.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Iterable
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fl_merge.cutoffs import Mapped, Part, largest_cutoffs
from fl_merge.errors import MergeError
from fl_merge.kernels.passes import LIMITS, Draws, Inputs
from fl_merge.ops.gram import GramSum, finite_gram, gram_of_lines
from fl_merge.ops.sparsify import keep_count
from fl_merge.reading import Versions, flat, pieces, serves, shaped, whole_deltas
from fl_merge.shapes import Coordinate, Copy, Matrix, Slice, Span, Tensorwise, VectorSpan, WeightedSum, draw_keys
from fl_merge.stages import KeepLargest, KeepRandom, Stages
from fl_merge.types import BASE, Cohort, CohortSpec, Output, Scope, Whole, compute_dtype

LINES_ELEMENTS = 1 << 17
"""About so many elements of a client's rows are looked at together, whatever the size of the slices."""

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
    """

    def __init__(
        self,
        output: Output,
        dtype: torch.dtype,
        native: Inputs,
        stages: Stages,
        weights_N: Tensor,
        cutoffs_N2: Tensor | None,
        keys_N: list[int] | None,
    ) -> None:
        super().__init__(output, dtype)
        self._native = native
        self._counting = threading.Lock()
        self._tally = 0
        self._draws: dict[tuple[int, int], Draws] = {}
        prune = stages.prune
        self._arguments: dict[str, Any] = {
            "weights_N": weights_N,
            "cutoffs_N2": cutoffs_N2,
            "keys_N": keys_N,
            "density": prune.density if prune is not None else 1.0,
            "rescale": isinstance(prune, KeepRandom) and prune.rescale,
            "election": stages.election,
            "normalize": stages.normalize,
            "scale": stages.scale,
        }

    def fill(self, start: int, stop: int, out_S: Tensor) -> None:
        draws = self._merge(start, stop, out_S, (stop - start) // 16)
        with self._counting:
            self._tally += draws.tally
            if draws.count:
                self._draws[start, stop] = draws

    def _merge(self, start: int, stop: int, out_S: Tensor, room: int) -> Draws:
        bits, draws = self._native.prune_combine(**self._arguments, start=start, stop=stop, out_S=out_S, room=room)
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


class Fillers:
    """Makes the fillers of one merge, and holds what has been measured of whole models.

    Args:
        cohort, spec: what is merged.
        step: elements of a slice for the torch definition, a multiple of `ops.gram.BLOCK`.
        piece: the same for the compiled passes.
        device: where the arithmetic runs.
        kernels: the compiled passes, if there are any.
    """

    def __init__(
        self,
        cohort: Cohort,
        spec: CohortSpec,
        *,
        step: int,
        piece: int,
        device: torch.device,
        kernels: ModuleType | None,
    ) -> None:
        self._cohort = cohort
        self._spec = spec
        self._step = step
        self._piece = piece
        self._device = device
        self._kernels = kernels
        self._model_surveys: dict[tuple[int, Scope], Tensor] = {}
        self._model_sums: dict[tuple[int, Scope], WeightedSum] = {}

    def _weights_N(self, output: Output) -> Tensor:
        return torch.tensor(self._spec_for(output).weights_N, dtype=torch.float64)

    def _spec_for(self, output: Output) -> CohortSpec:
        """The clients that an output is made of, in the order in which it reads them, and their shares in it."""
        clients = tuple(read.source for read in output.reads if read.source != BASE)
        everyone = clients == tuple(range(len(self._spec.client_ids)))
        spec = self._spec if everyone else self._spec.of_clients(clients)
        return spec if output.weights_N is None else replace(spec, weights_N=output.weights_N)

    def step(self, output: Output) -> int:
        """How many elements of an output are filled at a time."""
        if isinstance(output.compute, Whole | Matrix | Tensorwise):
            return max(output.spec.numel, 1)
        compiled = self._kernels is not None and serves(output, self._device)
        if isinstance(output.compute, Coordinate) and not isinstance(output.compute.stages, Stages):
            compiled = False
        return self._piece if compiled else self._step

    def prepare(self, output: Output, dtype: torch.dtype, mapped: Mapped) -> Filler:
        """Everything that has to be known of the whole tensor, and the filler that goes by it.

        Args:
            output: of the plan.
            dtype: in which it is written.
            mapped: like `map`, perhaps in several threads.
        """
        compute = output.compute
        if isinstance(compute, Copy):
            tensor_S = flat(self._cohort, output.reads[0])
            return Defined(output, dtype, lambda start, stop: tensor_S[start:stop])
        if isinstance(compute, Whole):
            return Defined(output, dtype, self._whole(compute, output))
        versions = Versions(self._cohort, output, self._device, self._kernels)
        if isinstance(compute, Matrix):
            return Defined(output, dtype, self._matrix(compute, output, versions))
        if isinstance(compute, Tensorwise):
            return Defined(output, dtype, self._tensorwise(compute, output, versions))
        if isinstance(compute, VectorSpan):
            return Defined(output, dtype, self._vector_span(compute, output, versions, mapped), self._step)
        if isinstance(compute, Span):
            compute = self._span_sum(compute, output, versions, mapped)
        if isinstance(compute, WeightedSum):
            if versions.native is not None:
                return CompiledSum(output, dtype, versions.native, compute)
            coefficients_N, base_coefficient = compute.coefficients_N, compute.base_coefficient
            return Defined(
                output, dtype, lambda *at: versions.combination(base_coefficient, coefficients_N, *at), self._step
            )
        if isinstance(compute, Coordinate):
            return self._coordinate(compute, output, dtype, versions, mapped)
        raise MergeError(f"tensor '{output.name}': the executor does not know how to run a {type(compute).__name__}")

    def _whole(self, compute: Whole, output: Output) -> Values:
        merged = compute.function(*(shaped(self._cohort, read) for read in output.reads))
        if tuple(merged.shape) != output.spec.shape:
            raise MergeError(
                f"tensor '{output.name}': computed shape {tuple(merged.shape)}, planned {output.spec.shape}"
            )
        return lambda start, stop: merged.reshape(-1)[start:stop]

    def _matrix(self, compute: Matrix, output: Output, versions: Versions) -> Values:
        rows = output.spec.shape[0]
        deltas_NRC = versions.deltas(0, versions.numel).reshape(versions.clients, rows, -1)
        merged_S = versions.base(0, versions.numel) + compute.merge(deltas_NRC, self._weights_N(output)).reshape(-1)
        return lambda start, stop: merged_S[start:stop]

    def _tensorwise(self, compute: Tensorwise, output: Output, versions: Versions) -> Values:
        base_S, deltas_NS = versions.base(0, versions.numel), versions.deltas(0, versions.numel)
        shape = output.spec.shape
        delta = compute.merge(base_S.view(shape), deltas_NS.view(-1, *shape), self._weights_N(output))
        merged_S = base_S + delta.reshape(-1)
        return lambda start, stop: merged_S[start:stop]

    def _vector_span(self, compute: VectorSpan, output: Output, versions: Versions, mapped: Mapped) -> Values:
        by_rows = compute.along == "rows"
        width = output.spec.shape[-1] if by_rows else versions.numel // output.spec.shape[0]
        step = max(1, LINES_ELEMENTS // width)
        parts = mapped(
            lambda at: gram_of_lines(versions.lines(compute.on, width, *at), compute.along),
            pieces(versions.numel // width, step),
        )
        gram_VNN = torch.cat(list(parts)) if by_rows else functools.reduce(torch.add, parts)
        base_V, coefficients_VN = compute.fixed(self._spec_for(output), finite_gram(gram_VNN.cpu()))

        def merged(start: int, stop: int) -> Tensor:
            index_S = torch.arange(start, stop)
            vector_S = index_S // width if by_rows else index_S % width
            each_S = (coefficients_N[vector_S].to(self._device) for coefficients_N in coefficients_VN.T)
            return versions.combination(base_V[vector_S].to(self._device), each_S, start, stop)

        return merged

    def _span_sum(self, compute: Span, output: Output, versions: Versions, mapped: Mapped) -> WeightedSum:
        if compute.scope == "model" and output.scope is not None:
            return self._model_sums[id(compute), output.scope]
        work = [(versions, *at) for at in pieces(versions.numel, self._step)]
        return self._measured(compute, self._spec_for(output), work, mapped)

    def _measured(
        self, compute: Span, spec: CohortSpec, work: list[tuple[Versions, int, int]], mapped: Mapped
    ) -> WeightedSum:
        gram = GramSum(len(spec.client_ids))
        for partials in mapped(lambda at: at[0].gram_partials(compute.on, at[1], at[2]), work):
            gram.add(partials)
        return compute.fixed(spec, gram.total())

    def _coordinate(
        self, compute: Coordinate, output: Output, dtype: torch.dtype, versions: Versions, mapped: Mapped
    ) -> Filler:
        scope_start = 0
        survey_NK = torch.empty(versions.clients, 0, dtype=torch.float64)
        if compute.scope == "model" and output.scope is not None:
            scope_start = output.scope.offsets[output.name]
            survey_NK = self._model_surveys.get((id(compute), output.scope), survey_NK)
        elif compute.survey is not None:
            survey_NK = self._survey(compute, [versions], mapped)
        if versions.native is not None and isinstance(compute.stages, Stages):
            return self._stages(compute.stages, output, dtype, versions.native, survey_NK, scope_start)

        spec, weights_N = self._spec_for(output), self._weights_N(output)
        joint_K = torch.empty(0, dtype=torch.float64)
        if compute.joint is not None:
            joint_K = compute.joint(versions.deltas(0, versions.numel), weights_N)

        def at(start: int, stop: int, count: Callable[[], int] | None) -> Slice:
            place = (output.name, start, stop, scope_start + start)
            return Slice(*place, spec, survey_NK, count, self._device, joint_K)

        def count_votes() -> int:
            tally, votes = compute.tally, 0
            if tally is not None:
                for start, stop in pieces(versions.numel, self._step):
                    vote_S = tally(versions.deltas(start, stop), weights_N, at(start, stop, None))
                    votes += int(vote_S.sum(dtype=torch.float64))
            return votes

        votes = _Once(count_votes)

        def merged(start: int, stop: int) -> Tensor:
            delta_S = compute.combine(versions.deltas(start, stop), weights_N, at(start, stop, votes))
            return versions.base(start, stop) + delta_S

        return Defined(output, dtype, merged, self._step)

    def _stages(
        self, stages: Stages, output: Output, dtype: torch.dtype, native: Inputs, survey_NK: Tensor, scope_start: int
    ) -> Filler:
        cutoffs_N2, keys_N = None, None
        if isinstance(stages.prune, KeepLargest):
            cutoffs_N2 = _rounded(survey_NK - torch.tensor([0.0, scope_start], dtype=torch.float64))
        if isinstance(stages.prune, KeepRandom):
            keys_N = draw_keys(self._spec_for(output), output.name)
        return CompiledStages(output, dtype, native, stages, self._weights_N(output), cutoffs_N2, keys_N)

    def _survey(self, compute: Coordinate, scope: list[Versions], mapped: Mapped) -> Tensor:
        """(N, K): what the survey says of each client's delta of the tensors in scope."""
        natives = [versions.native for versions in scope]
        if isinstance(compute.stages, Stages) and isinstance(compute.stages.prune, KeepLargest):
            parts, offset = [], 0
            for native in natives:
                if native is None:
                    break
                parts.append(Part(native, offset))
                offset += native.numel
            if len(parts) == len(scope):
                count = keep_count(compute.stages.prune.density, offset)
                return largest_cutoffs(parts, count, mapped, self._piece)
        survey = compute.survey
        assert survey is not None
        if len(scope) == 1:
            clients = range(scope[0].clients)
            return torch.stack(list(mapped(lambda client: survey(scope[0].delta(client, 0, scope[0].numel)), clients)))
        return torch.stack([survey(delta_S) for delta_S in whole_deltas(scope, scope[0].clients)])

    def measure_models(self, outputs: Iterable[Output], mapped: Mapped) -> None:
        """Surveys and Gram matrices whose scope is the whole model, before any tensor is merged."""
        groups: dict[tuple[int, Scope], list[Output]] = {}
        for output in outputs:
            if isinstance(output.compute, Coordinate | Span) and output.compute.scope == "model" and output.scope:
                groups.setdefault((id(output.compute), output.scope), []).append(output)
        for (key, scope), members in groups.items():
            compute = members[0].compute
            by_name = {output.name: Versions(self._cohort, output, self._device, self._kernels) for output in members}
            in_order = [by_name[name] for name in scope.names]
            if isinstance(compute, Coordinate) and compute.survey is not None:
                self._model_surveys[key, scope] = self._survey(compute, in_order, mapped)
            elif isinstance(compute, Span):
                work = [(versions, *at) for versions in in_order for at in pieces(versions.numel, self._step)]
                self._model_sums[key, scope] = self._measured(compute, self._spec_for(members[0]), work, mapped)


def _rounded(cutoffs_N2: Tensor) -> Tensor:
    """The same cuts with thresholds that float32 has: what is just on one of these was above the cut, or below."""
    found_N, last_N = cutoffs_N2.unbind(1)
    threshold_N = found_N.float().double()
    last_N = torch.where(threshold_N > found_N, math.inf, torch.where(threshold_N < found_N, -1.0, last_N))
    return torch.stack([threshold_N, last_N.clamp(-1.0, 2.0**62)], dim=1)


class _Once:
    """A number that is worked out when it is first asked for, by whichever thread that is."""

    def __init__(self, work_out: Callable[[], int]) -> None:
        self._work_out = work_out
        self._lock = threading.Lock()
        self._value: int | None = None

    def __call__(self) -> int:
        with self._lock:
            if self._value is None:
                self._value = self._work_out()
            return self._value
