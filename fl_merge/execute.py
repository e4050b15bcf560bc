"""Run a plan: read, compute, cast, write, one tensor at a time and within it in slices.

The merged bytes do not depend on the number of threads or on the size of the slices: elementwise work is the same
wherever a slice begins, and sums over elements are partial sums over fixed blocks, added exactly.

Suffixes: N clients, S elements, K numbers of a survey.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from fl_merge.errors import MergeError
from fl_merge.ops.combine import add_scaled_delta
from fl_merge.ops.gram import BLOCK, gram_from_partials, gram_partials
from fl_merge.shapes import Coordinate, Copy, Matrix, Slice, Span, WeightedSum
from fl_merge.types import (
    BASE,
    Cohort,
    CohortSpec,
    MergeMethod,
    Output,
    Read,
    Scope,
    TensorSink,
    TensorSpec,
    Whole,
    compute_dtype,
)

SLICE_ELEMENTS = 8 * BLOCK
"""Elements of each client that are worked on at a time: 512 KiB in float32; a few clients fit a core's cache."""


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    Args:
        clients: whose updates are in it, in the cohort's order.
        weights: their shares.
        tensors: how many outputs were written.
        bytes_read, bytes_written: of tensors, each counted once.
        seconds: of wall time.
    """

    clients: tuple[str, ...]
    weights: tuple[float, ...]
    tensors: int
    bytes_read: int
    bytes_written: int
    seconds: float


def execute(
    method: MergeMethod,
    cohort: Cohort,
    sink: TensorSink,
    *,
    threads: int | None = None,
    slice_elements: int = SLICE_ELEMENTS,
    device: str | torch.device = "cpu",
    master: bool = False,
    on_tensor: Callable[[str], None] | None = None,
) -> MergeReport:
    """Merge a cohort whose updates have been checked.

    Args:
        method: what to do.
        cohort: the base and the updates.
        sink: where the merged tensors go; aborted if anything fails.
        threads: how many slices are worked on at once; by default one a core.
        slice_elements: rounded up to a multiple of 16384; changes speed and memory, not the result.
        device: where the arithmetic runs.
        master: write floating tensors in the dtype in which they are merged (float32) instead of the base's.
        on_tensor: called with the name of each tensor that is done, from any thread.

    Raises:
        MergeError: if the cohort is empty, a plan is inconsistent, or a merged value does not fit its dtype.
    """
    started = time.perf_counter()
    if not cohort.updates:
        raise MergeError("there is nothing to merge: the cohort has no update")
    spec = cohort.spec()
    outputs = list(method.plan(spec))
    written = {output.name: _master_spec(output.spec) if master else output.spec for output in outputs}
    if len(written) != len(outputs):
        names = [output.name for output in outputs]
        twice = next(name for name in names if names.count(name) > 1)
        raise MergeError(f"two outputs have the name '{twice}'")
    base = cohort.base.specs()
    tied = {name: first for name, first in cohort.base.aliases().items() if first in written and name not in written}
    aliases: dict[str, list[str]] = {}
    for name, first in tied.items():
        aliases.setdefault(first, []).append(name)
    everything = written | {name: written[first] for name, first in tied.items()}
    order = [name for name in base if name in everything] + [name for name in everything if name not in base]

    run = _Run(cohort, spec, max(BLOCK, math.ceil(slice_elements / BLOCK) * BLOCK), torch.device(device))
    try:
        sink.begin({name: everything[name] for name in order})
        with _pool(threads or os.cpu_count() or 1) as pool:
            try:
                run.measure_models(outputs, pool)
                jobs: list[Future[None]] = []
                for output in outputs:

                    def write(start: int, values_S: Tensor, output: Output = output) -> None:
                        cast_S = _cast(output.name, values_S, written[output.name].dtype)
                        for name in (output.name, *aliases.get(output.name, ())):
                            sink.write(name, start, cast_S)

                    jobs += run.schedule(output, pool, write, on_tensor)
                for job in jobs:
                    job.result()
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        sink.finish()
    except BaseException:
        sink.abort()
        raise
    return MergeReport(
        spec.client_ids,
        spec.weights_N,
        len(everything),
        run.bytes_read(outputs),
        sum(entry.nbytes for entry in everything.values()),
        time.perf_counter() - started,
    )


def _master_spec(spec: TensorSpec) -> TensorSpec:
    return TensorSpec(spec.shape, compute_dtype(spec.dtype)) if spec.is_floating else spec


@contextlib.contextmanager
def _pool(threads: int) -> Iterator[ThreadPoolExecutor]:
    """Threads in which torch does not start threads of its own: those would wait for each other's cores."""
    torch_threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, "merge", torch.set_num_threads, (1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(torch_threads)


Write = Callable[[int, Tensor], None]


class _Run:
    """The state of one merge: the cohort, and what has been measured of whole models."""

    def __init__(self, cohort: Cohort, spec: CohortSpec, slice_elements: int, device: torch.device) -> None:
        self.cohort = cohort
        self.spec = spec
        self.slice_elements = slice_elements
        self.device = device
        self.weights_N = torch.tensor(spec.weights_N, dtype=torch.float64)
        self._counting = threading.Lock()
        self._model_surveys: dict[tuple[int, Scope], Tensor] = {}
        self._model_sums: dict[tuple[int, Scope], WeightedSum] = {}

    def read(self, source: int, name: str) -> Tensor:
        """A whole tensor of the base or of a client, flattened, in its own dtype."""
        tensors = self.cohort.base if source == BASE else self.cohort.updates[source].tensors
        return tensors.read(name).reshape(-1)

    def bytes_read(self, outputs: Iterable[Output]) -> int:
        base = self.cohort.base.specs()
        clients = [update.tensors.specs() for update in self.cohort.updates]
        reads = {read for output in outputs for read in output.reads}
        return sum((base if read.source == BASE else clients[read.source])[read.name].nbytes for read in reads)

    def schedule(
        self, output: Output, pool: ThreadPoolExecutor, write: Write, on_tensor: Callable[[str], None] | None
    ) -> list[Future[None]]:
        """Start the work on one output: as one job if it is small, else slice by slice."""

        def done() -> None:
            if on_tensor is not None:
                on_tensor(output.name)

        if output.spec.numel <= self.slice_elements or isinstance(output.compute, Whole | Matrix):

            def whole() -> None:
                for start, stop in self.slices(output):
                    write(start, prepared(start, stop))
                done()

            prepared = _Lazy(lambda: self.prepare(output, map))
            return [pool.submit(whole)]
        function = self.prepare(output, pool.map)
        pieces = self.slices(output)
        unfinished = len(pieces)

        def one_slice(start: int, stop: int) -> None:
            nonlocal unfinished
            write(start, function(start, stop))
            with self._counting:
                unfinished -= 1
                last = unfinished == 0
            if last:
                done()

        return [pool.submit(one_slice, start, stop) for start, stop in pieces]

    def slices(self, output: Output) -> list[tuple[int, int]]:
        """The first and last-plus-one element of each slice; one empty slice for an empty tensor."""
        numel = output.spec.numel
        step = self.slice_elements if not isinstance(output.compute, Whole | Matrix) else max(numel, 1)
        return [(start, min(start + step, numel)) for start in range(0, max(numel, 1), step)]

    def prepare(self, output: Output, mapped: Callable[..., Iterable[Tensor]]) -> Callable[[int, int], Tensor]:
        """Everything that has to be known of the whole tensor; gives the function from a slice to its merged values."""
        compute = output.compute
        if isinstance(compute, Copy):
            tensor_S = self.read(output.reads[0].source, output.reads[0].name)
            return lambda start, stop: tensor_S[start:stop]
        if isinstance(compute, Whole):
            merged = compute.function(*(self._shaped(read) for read in output.reads))
            if tuple(merged.shape) != output.spec.shape:
                raise MergeError(
                    f"tensor '{output.name}': computed shape {tuple(merged.shape)}, planned {output.spec.shape}"
                )
            return lambda start, stop: merged.reshape(-1)[start:stop]
        inputs = _Inputs(self, output)
        if isinstance(compute, Matrix):
            return self._matrix(compute, output, inputs)
        if isinstance(compute, Span):
            compute = self._span_sum(compute, output, inputs, mapped)
        if isinstance(compute, WeightedSum):
            return _weighted_sum(compute, inputs)
        if isinstance(compute, Coordinate):
            return self._coordinate(compute, output, inputs, mapped)
        raise MergeError(f"tensor '{output.name}': the executor does not know how to run a {type(compute).__name__}")

    def _shaped(self, read: Read) -> Tensor:
        tensors = self.cohort.base if read.source == BASE else self.cohort.updates[read.source].tensors
        return tensors.read(read.name)

    def _matrix(self, compute: Matrix, output: Output, inputs: _Inputs) -> Callable[[int, int], Tensor]:
        rows = output.spec.shape[0]
        deltas_NRC = inputs.deltas(0, output.spec.numel).reshape(len(self.spec.client_ids), rows, -1)
        merged_S = inputs.base(0, output.spec.numel) + compute.merge(deltas_NRC, self.weights_N).reshape(-1)
        return lambda start, stop: merged_S[start:stop]

    def _span_sum(
        self, compute: Span, output: Output, inputs: _Inputs, mapped: Callable[..., Iterable[Tensor]]
    ) -> WeightedSum:
        if compute.scope == "model" and output.scope is not None:
            return self._model_sums[id(compute), output.scope]
        partials = list(mapped(lambda piece: _partials(compute, inputs, *piece), self.slices(output)))
        return compute.fixed(self.spec, gram_from_partials(partials))

    def _coordinate(
        self, compute: Coordinate, output: Output, inputs: _Inputs, mapped: Callable[..., Iterable[Tensor]]
    ) -> Callable[[int, int], Tensor]:
        clients = range(len(self.spec.client_ids))
        scope_start = 0
        if compute.survey is None:
            survey_NK = torch.empty(len(clients), 0, dtype=torch.float64)
        elif compute.scope == "model" and output.scope is not None:
            survey_NK = self._model_surveys[id(compute), output.scope]
            scope_start = output.scope.offsets[output.name]
        else:
            survey = compute.survey
            survey_NK = torch.stack(
                list(mapped(lambda client: survey(inputs.delta(client, 0, output.spec.numel)), clients))
            )

        def at(start: int, stop: int, count: Callable[[], int] | None) -> Slice:
            return Slice(output.name, start, stop, scope_start + start, self.spec, survey_NK, count, self.device)

        tally = _Once(lambda: self._tally(compute, output, inputs, lambda start, stop: at(start, stop, None)))

        def merged(start: int, stop: int) -> Tensor:
            delta_S = compute.combine(inputs.deltas(start, stop), self.weights_N, at(start, stop, tally))
            return inputs.base(start, stop) + delta_S

        return merged

    def _tally(self, compute: Coordinate, output: Output, inputs: _Inputs, at: Callable[[int, int], Slice]) -> int:
        if compute.tally is None:
            return 0
        votes = (compute.tally(inputs.deltas(*piece), self.weights_N, at(*piece)) for piece in self.slices(output))
        return sum(int(vote_S.sum(dtype=torch.float64)) for vote_S in votes)

    def measure_models(self, outputs: Iterable[Output], pool: ThreadPoolExecutor) -> None:
        """Surveys and Gram matrices whose scope is the whole model, before any tensor is merged."""
        groups: dict[tuple[int, Scope], list[Output]] = {}
        for output in outputs:
            if isinstance(output.compute, Coordinate | Span) and output.compute.scope == "model" and output.scope:
                groups.setdefault((id(output.compute), output.scope), []).append(output)
        for (key, scope), members in groups.items():
            compute = members[0].compute
            by_name = {output.name: _Inputs(self, output) for output in members}
            if isinstance(compute, Coordinate) and compute.survey is not None:
                widest = max((compute_dtype(output.spec.dtype) for output in members), key=lambda dtype: dtype.itemsize)
                surveys = []
                for client in range(len(self.spec.client_ids)):
                    whole = [by_name[name].delta(client, 0, self.spec.tensors[name].numel) for name in scope.names]
                    surveys.append(compute.survey(torch.cat([delta_S.to(widest) for delta_S in whole])))
                self._model_surveys[key, scope] = torch.stack(surveys)
            elif isinstance(compute, Span):
                pieces = [
                    (compute, by_name[output.name], *piece) for output in members for piece in self.slices(output)
                ]
                partials = list(pool.map(lambda piece: _partials(*piece), pieces))
                self._model_sums[key, scope] = compute.fixed(self.spec, gram_from_partials(partials))


class _Inputs:
    """The base and the clients' versions of one tensor, a slice at a time, in the dtype of the arithmetic."""

    def __init__(self, run: _Run, output: Output) -> None:
        self._run = run
        self._dtype = compute_dtype(output.spec.dtype)
        base = next(read for read in output.reads if read.source == BASE)
        self._base_S = run.read(BASE, base.name)
        self._clients = [run.read(read.source, read.name) for read in output.reads if read.source != BASE]

    def _widened(self, tensor_S: Tensor, start: int, stop: int) -> Tensor:
        return tensor_S[start:stop].to(self._run.device, self._dtype)

    def base(self, start: int, stop: int) -> Tensor:
        """(S,)"""
        return self._widened(self._base_S, start, stop)

    def delta(self, client: int, start: int, stop: int) -> Tensor:
        """(S,): one client minus the base."""
        return self._widened(self._clients[client], start, stop) - self.base(start, stop)

    def deltas(self, start: int, stop: int) -> Tensor:
        """(N, S): every client minus the base."""
        base_S = self.base(start, stop)
        deltas_NS = torch.empty(len(self._clients), stop - start, dtype=self._dtype, device=self._run.device)
        for delta_S, client_S in zip(deltas_NS, self._clients, strict=True):
            torch.sub(self._widened(client_S, start, stop), base_S, out=delta_S)
        return deltas_NS

    def weights(self, start: int, stop: int) -> Tensor:
        """(N, S): every client's own values."""
        return torch.stack([self._widened(client_S, start, stop) for client_S in self._clients])

    def combination(self, base_coefficient: float, coefficients_N: Iterable[float], start: int, stop: int) -> Tensor:
        """(S,): base_coefficient * theta_0 + sum c_i tau_i, added in float64 and rounded once."""
        base_S = self._base_S[start:stop].to(self._run.device, torch.float64)
        total_S = base_S * base_coefficient
        for client_S, coefficient in zip(self._clients, coefficients_N, strict=True):
            add_scaled_delta(total_S, base_S, client_S[start:stop], coefficient)
        return total_S.to(self._dtype)


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


class _Lazy:
    """Calls `make` when first used, in whichever thread that is."""

    def __init__(self, make: Callable[[], Callable[[int, int], Tensor]]) -> None:
        self._make = make
        self._made: Callable[[int, int], Tensor] | None = None

    def __call__(self, start: int, stop: int) -> Tensor:
        if self._made is None:
            self._made = self._make()
        return self._made(start, stop)


def _weighted_sum(compute: WeightedSum, inputs: _Inputs) -> Callable[[int, int], Tensor]:
    return lambda start, stop: inputs.combination(compute.base_coefficient, compute.coefficients_N, start, stop)


def _partials(compute: Span, inputs: _Inputs, start: int, stop: int) -> Tensor:
    vectors_NS = inputs.deltas(start, stop) if compute.on == "deltas" else inputs.weights(start, stop)
    return gram_partials(vectors_NS)


def _cast(name: str, values_S: Tensor, dtype: torch.dtype) -> Tensor:
    cast_S = values_S.to("cpu", dtype)
    if dtype.is_floating_point and not torch.isfinite(cast_S.to(compute_dtype(dtype))).all():
        largest = float(values_S.double().nan_to_num(nan=math.inf, posinf=math.inf, neginf=math.inf).abs().max())
        raise MergeError(
            f"tensor '{name}': a merged value of magnitude {largest:g} does not fit "
            f"{str(dtype).removeprefix('torch.')}; lower the method's scale"
        )
    return cast_S


def merged_specs(method: MergeMethod, base: Mapping[str, TensorSpec], clients: int = 2) -> dict[str, TensorSpec] | None:
    """The tensors that merging would give, planned on a cohort of that many clients: the check before a first round.

    Returns:
        Names, shapes and dtypes; None if the method refuses clients that are made up (it names real ones, say, or
        needs more), which only a round can tell.

    Raises:
        RecipeError: if the method does not fit these tensors.
    """
    ids = tuple(str(client) for client in range(clients))
    spec = CohortSpec(base, ids, (1.0 / clients,) * clients)
    try:
        return {output.name: output.spec for output in method.plan(spec)}
    except MergeError:
        return None
