"""Run a plan: read, compute, cast, write, several tensors at once and large ones in slices.

The merged bytes do not depend on the number of threads or on the size of the slices: elementwise work is the same
wherever a slice begins, and sums over elements are partial sums over fixed blocks, added in a fixed order.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

from fl_merge import kernels
from fl_merge.errors import MergeError, RecipeError, one_line
from fl_merge.fill import Fillers
from fl_merge.fillers import Filler
from fl_merge.ops.gram import BLOCK
from fl_merge.reading import pieces
from fl_merge.releases import Releases
from fl_merge.rooms import Rooms
from fl_merge.shapes import Copy
from fl_merge.types import (
    BASE,
    Cohort,
    CohortSpec,
    MergeMethod,
    Output,
    Read,
    TensorSink,
    TensorSpec,
    Whole,
    compute_dtype,
)

SLICE_ELEMENTS = 8 * BLOCK
"""Elements of each client that the torch definition works on at a time: a few clients' deltas fit a core's cache."""

PIECE_ELEMENTS = 1 << 21
"""The same for the compiled passes, which go through them in smaller blocks by themselves."""

WAITING = 2
"""So many outputs that have been filled in memory may wait to be written while their threads go on."""

SWITCH_SECONDS = 0.001
"""After so long a thread lets another have the interpreter. Python's own 5 ms are as long as many a compiled pass."""

_JOBS = 32
"""A tensor that is less than a thread's share of all elements, over this, is one thread's work from beginning to end:
others then wait for nothing of it."""


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    Args:
        clients: whose updates are in it, in the cohort's order.
        weights: their shares.
        tensors: how many outputs were written.
        bytes_read, bytes_written: of tensors, each counted once.
        seconds: of wall time.
        notes: what the plan says of tensors that were not merged as the method says, by name.
        found: what wrappers round the method found: the norms of `clip_norm`, the scale that was chosen.
    """

    clients: tuple[str, ...]
    weights: tuple[float, ...]
    tensors: int
    bytes_read: int
    bytes_written: int
    seconds: float
    notes: Mapping[str, str] = field(default_factory=dict)
    found: Mapping[str, Any] = field(default_factory=dict)


def execute(
    method: MergeMethod,
    cohort: Cohort,
    sink: TensorSink,
    *,
    threads: int | None = None,
    slice_elements: int | None = None,
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
        RecipeError: if there is no such device here.
        MergeError: if the cohort is empty, a plan is inconsistent, or a merged value does not fit its dtype.
    """
    started = time.perf_counter()
    where = _device(device)
    if not cohort.updates:
        raise MergeError("there is nothing to merge: the cohort has no update")
    found: Mapping[str, Any] = {}
    prepare = getattr(method, "prepare", None)
    if prepare is not None:  # a wrapper that looks at the updates first
        with worker_pool(threads or os.cpu_count() or 1) as pool:
            method, cohort, found = prepare(cohort, pool.map)
    spec = cohort.spec()
    outputs = list(method.plan(spec))
    written = {output.name: _master_spec(output.spec) if master else output.spec for output in outputs}
    if len(written) != len(outputs):
        names = [output.name for output in outputs]
        twice = next(name for name in names if names.count(name) > 1)
        raise MergeError(f"two outputs have the name '{twice}'")
    base = cohort.base.specs()
    tied = {name: first for name, first in cohort.base.aliases().items() if first in written and name not in written}
    everything = written | {name: written[first] for name, first in tied.items()}
    order = [name for name in base if name in everything] + [name for name in everything if name not in base]

    specs_read = _specs_read(outputs, cohort)
    fillers = Fillers(
        cohort,
        spec,
        step=_whole_blocks(slice_elements or SLICE_ELEMENTS),
        piece=_whole_blocks(slice_elements or PIECE_ELEMENTS),
        device=where,
        kernels=kernels.after(sum(entry.numel for entry in specs_read)) if where.type == "cpu" else None,
    )
    try:
        sink.begin({name: everything[name] for name in order})
        with worker_pool(threads or os.cpu_count() or 1) as pool:
            share = sum(output.spec.numel for output in outputs) // (_JOBS * (threads or os.cpu_count() or 1))
            releases = Releases(cohort)
            run = _Run(fillers, sink, written, tied, pool, share, releases, on_tensor)
            try:
                fillers.measure_models(outputs, pool.map)
                for output in outputs:
                    run.begin(output)
                    run.wait(2 * (threads or os.cpu_count() or 1))
                run.wait()
                releases.rest()
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        del run
        sink.finish()
    except BaseException:
        sink.abort()
        raise
    return MergeReport(
        spec.client_ids,
        spec.weights_N,
        len(everything),
        sum(entry.nbytes for entry in specs_read),
        sum(entry.nbytes for entry in everything.values()),
        time.perf_counter() - started,
        {output.name: output.note for output in outputs if output.note},
        found,
    )


def _device(name: str | torch.device) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # the second is of a torch that was built without it
        found = one_line(str(error), 120)
        raise RecipeError(f"device: found '{name}', wanted one that torch has here, such as cpu ({found})") from None
    return device


def _specs_read(outputs: Sequence[Output], cohort: Cohort) -> list[TensorSpec]:
    """What a plan reads, each tensor once.

    Raises:
        MergeError: if it reads what is not there, or what does not fit the output that it is for.
    """
    sources: dict[tuple[int, str], Mapping[str, TensorSpec]] = {(BASE, "tensors"): cohort.base.specs()}
    for at, update in enumerate(cohort.updates):
        sources[at, "tensors"] = update.tensors.specs()
        sources[at, "statistics"] = update.statistics.specs() if update.statistics is not None else {}
    found: dict[Read, TensorSpec] = {}
    for output in outputs:
        for read in output.reads:
            where = (read.source, read.of)
            if where not in sources or read.name not in sources[where]:
                raise MergeError(f"tensor '{output.name}' is planned from {_named(read, cohort)}, which is not there")
            found[read] = sources[where][read.name]
        if isinstance(output.compute, Whole | Copy):
            continue
        if BASE not in {read.source for read in output.reads}:
            raise MergeError(f"tensor '{output.name}': planned without the base, from which deltas are taken")
        for read in output.reads:
            if found[read].numel != output.spec.numel:
                wanted = f"{_named(read, cohort)} with {found[read].numel} elements, wanted {output.spec.numel}"
                raise MergeError(f"tensor '{output.name}' is planned from {wanted}")
    return list(found.values())


def _named(read: Read, cohort: Cohort) -> str:
    if read.source == BASE:
        return f"'{read.name}' of the base"
    known = 0 <= read.source < len(cohort.updates)
    whose = f"client '{cohort.updates[read.source].client_id}'" if known else f"source {read.source}"
    return f"'{read.name}' of {whose}"


def _whole_blocks(elements: int) -> int:
    return max(BLOCK, math.ceil(elements / BLOCK) * BLOCK)


def _master_spec(spec: TensorSpec) -> TensorSpec:
    return TensorSpec(spec.shape, compute_dtype(spec.dtype)) if spec.is_floating else spec


@contextlib.contextmanager
def worker_pool(threads: int) -> Iterator[ThreadPoolExecutor]:
    """Threads in which torch does not start threads of its own: those would wait for each other's cores."""
    torch_threads = torch.get_num_threads()
    try:
        with _quick_switches(), ThreadPoolExecutor(threads, "merge", torch.set_num_threads, (1,)) as pool:
            torch.set_num_threads(1)  # in this thread too, which prepares while the others work
            yield pool
    finally:
        torch.set_num_threads(torch_threads)


_switching = threading.Lock()
_switched: list[float] = []


@contextlib.contextmanager
def _quick_switches() -> Iterator[None]:
    """Let threads wait less long for one another: a pass that is done needs the interpreter to begin the next."""
    with _switching:  # of merges at the same time, the first to begin changes it and the last to end changes it back
        _switched.append(sys.getswitchinterval())
        sys.setswitchinterval(min(_switched[0], SWITCH_SECONDS))
    try:
        yield
    finally:
        with _switching:
            before = _switched[0]
            _switched.pop()
            if not _switched:
                sys.setswitchinterval(before)


class _Run:
    """The work on the outputs of one merge: small ones as one job each, large ones slice by slice.

    Args:
        share: elements of an output that is small; one of a single slice is too.
        releases: are told of what an output has read when that is done.
    """

    def __init__(
        self,
        fillers: Fillers,
        sink: TensorSink,
        written: Mapping[str, TensorSpec],
        tied: Mapping[str, str],
        pool: ThreadPoolExecutor,
        share: int,
        releases: Releases,
        on_tensor: Callable[[str], None] | None,
    ) -> None:
        self._fillers = fillers
        self._sink = sink
        self._written = written
        self._names: dict[str, list[str]] = {name: [name] for name in written}
        for name, first in tied.items():
            self._names[first].append(name)
        self._pool = pool
        self._share = share
        self._releases = releases
        self._on_tensor = on_tensor
        self._jobs: deque[Future[None]] = deque()
        self._counting = threading.Lock()
        self._rooms = Rooms(written, getattr(sink, "whole_bytes", 0), WAITING)

    def begin(self, output: Output) -> None:
        """Start the work on an output. What has to be known of a large one before is worked out by all threads."""
        dtype = self._written[output.name].dtype
        slices = pieces(output.spec.numel, self._fillers.step(output))
        if len(slices) == 1 or output.spec.numel <= self._share:

            def whole() -> None:
                filler = self._fillers.prepare(output, dtype, map)
                for piece in slices:
                    self._fill(filler, output, *piece)
                for piece in filler.again():
                    self._fill(filler, output, *piece, again=True)
                self._done(output)

            self._jobs.append(self._pool.submit(whole))
            return
        self._fill_all(self._fillers.prepare(output, dtype, self._pool.map), output, slices)

    def wait(self, left: int = 0) -> None:
        """Until so few jobs are left: what waits holds what it was prepared with. A job may start others as it ends."""
        while len(self._jobs) > left:
            self._jobs.popleft().result()

    def _fill_all(self, filler: Filler, output: Output, slices: list[tuple[int, int]], *, again: bool = False) -> None:
        unfinished = len(slices)

        def fill(start: int, stop: int) -> None:
            nonlocal unfinished
            self._fill(filler, output, start, stop, again=again)
            with self._counting:
                unfinished -= 1
                last = unfinished == 0
            if last:
                if not again and (second := filler.again()):
                    self._fill_all(filler, output, second, again=True)
                else:
                    self._done(output)

        for start, stop in slices:
            self._jobs.append(self._pool.submit(fill, start, stop))

    def _fill(self, filler: Filler, output: Output, start: int, stop: int, *, again: bool = False) -> None:
        names = self._names[output.name]
        place_S = self._rooms.place(output.name)
        if place_S is None:
            place_S = self._sink.place(names[0])
        out_S = (
            place_S[start:stop]
            if place_S is not None
            else torch.empty(stop - start, dtype=self._written[names[0]].dtype)
        )
        if again:
            filler.refill(start, stop, out_S, filled=place_S is not None)
        else:
            filler.fill(start, stop, out_S)
        if not self._rooms.has(output.name):
            for name in names if place_S is None else names[1:]:
                self._sink.write(name, start, out_S)

    def _done(self, output: Output) -> None:
        self._releases.add(output.reads, output.spec.nbytes)
        if self._rooms.has(output.name):
            self._rooms.hand_over(output.name, functools.partial(self._write, output))
            return
        let_go = getattr(self._sink, "release", None)
        if let_go is not None:
            for name in self._names[output.name]:
                let_go(name)
        self._tell(output)

    def _write(self, output: Output, filled_S: torch.Tensor) -> None:
        for name in self._names[output.name]:
            self._sink.write(name, 0, filled_S)
        self._tell(output)

    def _tell(self, output: Output) -> None:
        if self._on_tensor is not None:
            self._on_tensor(output.name)


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
