"""From an output of a plan to the function that fills a piece of it with merged values: by torch, or by the compiled
passes where they serve. Both give the same bits.

Suffixes: N clients, S elements, K numbers of a survey.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fl_merge.cutoffs import Mapped, Part, largest_cutoffs, within_tensor
from fl_merge.errors import MergeError
from fl_merge.fillers import CompiledBalance, CompiledElements, CompiledStages, CompiledSum, Defined, Filler, Values
from fl_merge.kernels.passes import Inputs
from fl_merge.kernels.rows import Rows
from fl_merge.measuring import measured
from fl_merge.ops.gram import BLOCK, GramSum, finite_gram, gram_of_lines
from fl_merge.ops.sparsify import keep_count, middle_counts, rank_line, shrinkage
from fl_merge.reading import Versions, flat, pieces, row_length, serves, shaped, whole_deltas
from fl_merge.shapes import (
    Balanced,
    Coordinate,
    Copy,
    Elements,
    Matrix,
    Slice,
    Span,
    Tensorwise,
    VectorSpan,
    WeightedSum,
    draw_keys,
)
from fl_merge.stages import KeepLargest, KeepMiddle, KeepRandom, KeepRanked, Selected, Stages
from fl_merge.types import BASE, Cohort, CohortSpec, Output, Scope, Whole

LINES_ELEMENTS = 1 << 17
"""About so many elements of a client's rows are looked at together, whatever the size of the slices."""


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
        self._model_choices: dict[tuple[int, Scope], Tensor] = {}

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
        if isinstance(output.compute, Coordinate) and output.compute.stages is None:
            compiled = False
        step, block = self._piece if compiled else self._step, self._block(output)
        return math.ceil(step / block) * block

    def _block(self, output: Output) -> int:
        """Slices are multiples of so many elements: whole rows, where a method asks for them."""
        if isinstance(output.compute, Coordinate) and output.compute.rows:
            row = row_length(output.spec)
            return row * max(1, BLOCK // row)
        return BLOCK

    def _small_step(self, output: Output) -> int:
        """How many elements the torch definition works on at a time."""
        block = self._block(output)
        return math.ceil(self._step / block) * block

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
        work = self._gram_work(versions)
        return self._measured(compute, self._spec_for(output), work, mapped)

    def _measured(
        self, compute: Span, spec: CohortSpec, work: list[tuple[Versions, int, int]], mapped: Mapped
    ) -> WeightedSum:
        return compute.fixed(spec, self._gram(compute.on, work, mapped))

    def _gram_work(self, versions: Versions) -> list[tuple[Versions, int, int]]:
        step = self._step if versions.native is None else self._piece
        return [(versions, *at) for at in pieces(versions.numel, step)]

    def _gram(self, on: str, work: list[tuple[Versions, int, int]], mapped: Mapped) -> Tensor:
        """(N, N) float64: the inner products of the deltas or weights over these pieces."""
        gram = GramSum(work[0][0].clients)
        for partials in mapped(lambda at: at[0].gram_partials(on, at[1], at[2]), work):
            gram.add(partials)
        return gram.total()

    def _coordinate(
        self, compute: Coordinate, output: Output, dtype: torch.dtype, versions: Versions, mapped: Mapped
    ) -> Filler:
        scope_start = 0
        survey_NK = torch.empty(versions.clients, 0, dtype=torch.float64)
        joint_K = torch.empty(0, dtype=torch.float64)
        spec, weights_N, step = self._spec_for(output), self._weights_N(output), self._small_step(output)
        if compute.scope == "model" and output.scope is not None:
            key = id(compute), output.scope
            scope_start = output.scope.offsets[output.tensor]
            survey_NK = self._model_surveys.get(key, survey_NK)
            joint_K = self._model_choices.get(key, joint_K)
        else:
            if compute.survey is not None or compute.surveys is not None:
                survey_NK = self._survey(compute, spec.client_ids, [versions], mapped)
            if compute.gram is not None:
                work = self._gram_work(versions)
                joint_K = compute.gram(spec, self._gram("deltas", work, mapped))

        def at(start: int, stop: int, known_K: Tensor, count: Callable[[], int] | None = None) -> Slice:
            place = (output.tensor, start, stop, scope_start + start)
            return Slice(*place, spec, survey_NK, count, self._device, known_K, row_length(output.spec))

        joint_K = measured(
            compute.measures,
            joint_K,
            versions,
            weights_N,
            at,
            mapped,
            step=step,
            block=self._block(output),
            piece=self._piece,
        )
        if versions.native is not None and isinstance(compute.stages, Elements):
            native, clients = versions.native, versions.clients
            if compute.stages.chosen:
                native = native.some([int(client) for client in joint_K])
            return CompiledElements(output, dtype, native, compute.stages, weights_N, clients)
        if versions.native is not None and isinstance(compute.stages, Balanced):
            return CompiledBalance(output, dtype, versions.native, compute.stages, joint_K)
        if versions.native is not None and isinstance(compute.stages, Selected):
            arguments = {"varying_2": joint_K[:2], "election": "sum"}
            stages, shares_N = Stages(None, "total", True, compute.stages.scale), compute.stages.shares_N(joint_K)
            return CompiledStages(output, dtype, versions.native, stages, shares_N, arguments)
        if versions.native is not None and isinstance(compute.stages, Stages):
            filler = self._stages(
                compute.stages, output, dtype, versions.native, survey_NK, joint_K, scope_start=scope_start
            )
            if filler is not None:
                return filler

        def count_votes() -> int:
            tally, votes = compute.tally, 0
            if tally is not None:
                for start, stop in pieces(versions.numel, step):
                    vote_S = tally(versions.deltas(start, stop), weights_N, at(start, stop, joint_K))
                    votes += int(vote_S.sum(dtype=torch.float64))
            return votes

        votes = _Once(count_votes)

        def merged(start: int, stop: int) -> Tensor:
            delta_S = compute.combine(versions.deltas(start, stop), weights_N, at(start, stop, joint_K, votes))
            return versions.base(start, stop) + delta_S

        return Defined(output, dtype, merged, step)

    def _stages(
        self,
        stages: Stages,
        output: Output,
        dtype: torch.dtype,
        native: Inputs,
        survey_NK: Tensor,
        joint_K: Tensor,
        *,
        scope_start: int,
    ) -> Filler | None:
        """The compiled pass for these stages, if there is one."""
        prune, weights_N = stages.prune, self._weights_N(output)
        arguments: dict[str, Any] = {}
        if stages.election is not None and bool((weights_N < 0).any()):
            return None
        if isinstance(prune, KeepLargest | KeepMiddle):
            cutoffs = [within_tensor(cut_N2, scope_start) for cut_N2 in torch.split(survey_NK, 2, dim=1)]
            arguments = {"cutoffs_N2": cutoffs[-1], "upper_N2": cutoffs[0] if len(cutoffs) > 1 else None}
        ranked = False
        if isinstance(prune, KeepRandom | KeepRanked):
            spec, divisor_N = self._spec_for(output), None
            density_N = prune.densities(spec)
            if prune.rescale is not True:
                divisor_N = shrinkage(joint_K.reshape(2, -1)).tolist() if prune.rescale else [1.0] * native.clients
            if isinstance(prune, KeepRandom):
                factor_N = [1 / density for density in density_N] if prune.rescale is True else None
                arguments = {"density_N": density_N, "factor_N": factor_N, "divisor_N": divisor_N}
            else:
                row = row_length(output.spec)
                lines_N2 = [rank_line(density, prune.epsilon, row) for density in density_N]
                ranked = any(step for _, step in lines_N2)
                if ranked:
                    arguments = {"row": row, "lines_N2": lines_N2, "divisor_N": divisor_N}
                else:  # one chance for all
                    density_N = [highest for highest, _ in lines_N2]
                    factor_N = (
                        (1 / torch.tensor(density_N, dtype=torch.float32)).tolist() if divisor_N is None else None
                    )
                    arguments = {"density_N": density_N, "factor_N": factor_N, "divisor_N": divisor_N}
            arguments["keys_N"] = draw_keys(spec, output.tensor)
        return CompiledStages(output, dtype, native, stages, weights_N, arguments, ranked=ranked)

    def _survey(self, compute: Coordinate, client_ids: Sequence[str], scope: list[Versions], mapped: Mapped) -> Tensor:
        """(N, K): what the survey says of each client's delta of the tensors in scope."""
        stages = compute.stages
        if isinstance(stages, Stages) and isinstance(stages.prune, KeepLargest | KeepMiddle):
            parts, offset = [], 0
            for versions in scope:
                if versions.native is None:
                    break
                parts.append(Part(Rows(versions.native), offset))
                offset += versions.native.numel
            if len(parts) == len(scope):
                density_N = [stages.prune.density_of(client_id) for client_id in client_ids]
                return self._cutoffs(stages.prune, density_N, parts, offset, mapped)
        surveys = [compute.survey_of(client_id) for client_id in client_ids]

        def surveyed(client: int, delta_S: Tensor) -> Tensor:
            survey = surveys[client]
            assert survey is not None
            return survey(delta_S)

        clients = range(len(surveys))
        if len(scope) == 1:
            found = mapped(lambda client: surveyed(client, scope[0].delta(client, 0, scope[0].numel)), clients)
            return torch.stack(list(found))
        return torch.stack([surveyed(*each) for each in zip(clients, whole_deltas(scope, len(clients)), strict=True)])

    def _cutoffs(
        self,
        prune: KeepLargest | KeepMiddle,
        density_N: Sequence[float],
        parts: Sequence[Part],
        numel: int,
        mapped: Mapped,
    ) -> Tensor:
        """(N, 2) or (N, 4): where each client's delta is cut, as the stages' own survey finds it."""
        piece = max(self._piece, numel) if mapped is map else self._piece  # what one thread does need not be in pieces
        if isinstance(prune, KeepLargest):
            counts_N = [keep_count(density, numel) for density in density_N]
            return largest_cutoffs(parts, list(enumerate(counts_N)), mapped, piece)
        wanted = []
        for client, density in enumerate(density_N):
            dropped, kept = middle_counts(density, prune.gamma, numel)
            wanted += [(client, dropped), (client, dropped + kept)]
        return largest_cutoffs(parts, wanted, mapped, piece).reshape(len(density_N), 4)

    def measure_models(self, outputs: Iterable[Output], mapped: Mapped) -> None:
        """Surveys and Gram matrices whose scope is the whole model, before any tensor is merged."""
        groups: dict[tuple[int, Scope], list[Output]] = {}
        for output in outputs:
            if isinstance(output.compute, Coordinate | Span) and output.compute.scope == "model" and output.scope:
                groups.setdefault((id(output.compute), output.scope), []).append(output)
        for (key, scope), members in groups.items():
            compute = members[0].compute
            by_name = {output.tensor: Versions(self._cohort, output, self._device, self._kernels) for output in members}
            in_order = [by_name[name] for name in scope.names]
            work = [piece for versions in in_order for piece in self._gram_work(versions)]
            spec = self._spec_for(members[0])
            if isinstance(compute, Span):
                self._model_sums[key, scope] = self._measured(compute, spec, work, mapped)
            elif isinstance(compute, Coordinate):
                if compute.survey is not None or compute.surveys is not None:
                    self._model_surveys[key, scope] = self._survey(compute, spec.client_ids, in_order, mapped)
                if compute.gram is not None:
                    self._model_choices[key, scope] = compute.gram(spec, self._gram("deltas", work, mapped))


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
