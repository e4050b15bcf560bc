"""A round as a running sum: each update is added when it comes and then forgotten.

    S = sum n_i (theta_i - theta_0)        merged: theta_0 + S / sum n_i

It serves methods whose coefficients are a fixed factor times the clients' shares (`Span.running`). Disk and memory do
not grow with the number of clients.

The order of arrival must not show in the merged bytes. A sum in float64 would show it in its last bits, so S is kept as
two float64 numbers an element (double-double, some 106 bits): its error is about 2^-104 of S, and any order rounds to
the same merged element unless the exact one lies that close to the middle between two neighbours.

The two numbers are in memory-mapped scratch files, 16 bytes an element, which are the system's to write out.

Suffix: S elements.
"""

from __future__ import annotations

import math
import mmap
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from fl_merge.errors import MergeError, RecipeError, one_line
from fl_merge.execute import MergeReport
from fl_merge.store import claim, fill
from fl_merge.types import (
    BASE,
    CohortSpec,
    MergeMethod,
    TensorSink,
    TensorSource,
    TensorSpec,
    Update,
    Whole,
    client_order,
    compute_dtype,
)

_SLICE = 1 << 15
"""Elements that are added at a time: they and some ten intermediate results fit a core's cache."""

Job = tuple[Callable[[slice], None], slice]

_SPLITTER = 134217729.0  # 2^27 + 1


def two_sum(a_S: Tensor, b_S: Tensor) -> tuple[Tensor, Tensor]:
    """a + b as the rounded sum and its rounding error, exactly (Knuth). Args and Returns: (S,) float64."""
    sum_S = a_S + b_S
    part_S = sum_S - a_S
    return sum_S, (a_S - (sum_S - part_S)) + (b_S - part_S)


def two_product(a: float, b_S: Tensor) -> tuple[Tensor, Tensor]:
    """a * b as the rounded product and its rounding error, exactly (Dekker).

    Args:
        a: of magnitude below 2^970.
        b_S: (S,) float64, likewise.
    """
    product_S = b_S * a
    a_high, a_low = _halves(a)
    scaled_S = b_S * _SPLITTER
    high_S = scaled_S - (scaled_S - b_S)
    low_S = b_S - high_S
    error_S = ((high_S * a_high - product_S) + low_S * a_high + high_S * a_low) + low_S * a_low
    return product_S, error_S


def _halves(a: float) -> tuple[float, float]:
    """a as the sum of two numbers of 26 bits, whose products are exact (Veltkamp)."""
    scaled = a * _SPLITTER
    high = scaled - (scaled - a)
    return high, a - high


def add_product(high_S: Tensor, low_S: Tensor, weight: float, delta_S: Tensor) -> None:
    """(high + low) += weight * delta, in place, as double-double numbers.

    Args:
        high_S, low_S: (S,) float64: a number is their sum, low at most half a unit in the last place of high.
        weight: of this client.
        delta_S: (S,) float64.
    """
    product_S, error_S = two_product(weight, delta_S)
    sum_S, first_S = two_sum(high_S, product_S)
    rest_S, second_S = two_sum(low_S, error_S)
    sum_S, rest_S = _quick_two_sum(sum_S, first_S + rest_S)
    sum_S, rest_S = _quick_two_sum(sum_S, rest_S + second_S)
    high_S.copy_(sum_S)
    low_S.copy_(rest_S)


def _quick_two_sum(a_S: Tensor, b_S: Tensor) -> tuple[Tensor, Tensor]:
    """As `two_sum`, for |a| >= |b|."""
    sum_S = a_S + b_S
    return sum_S, b_S - (sum_S - a_S)


def add_quotient(base_S: Tensor, high_S: Tensor, low_S: Tensor, total: float) -> Tensor:
    """base + (high + low) / total, to about the last place of float64. Args and Returns: (S,) float64."""
    quotient_S = high_S / total
    product_S, error_S = two_product(total, quotient_S)
    rest_S = (((high_S - product_S) - error_S) + low_S) / total
    sum_S, lost_S = two_sum(base_S, quotient_S)
    return sum_S + (lost_S + rest_S)


def running_factor(method: MergeMethod) -> float:
    """The factor of a method that is a running sum: its coefficients are that times the clients' shares.

    Raises:
        RecipeError: for any other method.
    """
    factor = getattr(getattr(method, "shape", method), "running", None)  # wrappers that leave sums alone have it too
    if factor is None:
        raise RecipeError(
            f"running_sum: found {method}, wanted a method whose coefficients are the clients' shares, such as "
            "weighted_average(); keep the updates on disk instead (spill_folder)"
        )
    return float(factor)


class RunningSum:
    """One round's sum. `add` the updates in any order, then `merge`.

    Args:
        method: for which `running_factor` gives a number.
        base: what the clients started from.
        folder: for the scratch files, whose maker removes them.
        seed, round_number: of the cohort, for the method's plan.

    Raises:
        RecipeError: if the method is no running sum.
    """

    def __init__(
        self, method: MergeMethod, base: TensorSource, folder: Path, *, seed: int = 0, round_number: int = 0
    ) -> None:
        self._factor = running_factor(method)
        self._method = method
        self._base = base
        self._seed, self._round = seed, round_number
        self._tied = base.aliases()
        self._specs = {name: spec for name, spec in base.specs().items() if name not in self._tied}
        self._added: dict[str, float] = {}
        self._others: dict[str, dict[str, Tensor]] = {}  # what is not summed but asked for, by client
        self._bytes_read = sum(spec.nbytes for spec in self._specs.values())
        self._started = time.perf_counter()
        self._failed = False
        self._folder = folder
        self._floating = {name: spec for name, spec in self._specs.items() if spec.is_floating and spec.numel}
        self._sums: dict[str, tuple[Tensor, Tensor]] = {}  # made with the first update
        plan = method.plan(CohortSpec(self._specs, ("0",), (1.0,), seed, round_number))
        self._asked = [
            read.name
            for output in plan
            for read in output.reads
            if read.source != BASE and output.name not in self._floating
        ]

    def add(self, update: Update) -> None:
        """Add an update that has passed the check. Nothing of it is referred to afterwards, but for counters.

        All of the update is read before anything is added: one that cannot be read changes nothing, and what reading it
        raises is raised. What fails after that leaves a sum that takes no more and is not merged.

        Raises:
            MergeError: if the client's is in the sum already, there is no room for the scratch files, or this update or
                an earlier one was added in part.
        """
        if self._failed:
            raise MergeError(f"client '{update.client_id}': the running sum takes no more, an update was added in part")
        if update.client_id in self._added:
            raise MergeError(f"client '{update.client_id}' is in the sum already")
        weight = update.num_examples * self._factor
        size = sum(spec.nbytes for spec in update.tensors.specs().values())
        others = {name: update.tensors.read(name).clone() for name in self._asked}
        pairs = {name: (self._base.read(name), update.tensors.read(name)) for name in self._floating}
        if not self._sums:
            self._sums = {
                name: (
                    _scratch(self._folder / f"{number}.high", name, spec),
                    _scratch(self._folder / f"{number}.low", name, spec),
                )
                for number, (name, spec) in enumerate(self._floating.items())
            }
        jobs: list[Job] = []
        for name, (high_S, low_S) in self._sums.items():
            base_S, client_S = (tensor.reshape(-1) for tensor in pairs[name])

            def work(
                piece: slice,
                base_S: Tensor = base_S,
                client_S: Tensor = client_S,
                high_S: Tensor = high_S,
                low_S: Tensor = low_S,
            ) -> None:
                delta_S = client_S[piece].double() - base_S[piece].double()
                add_product(high_S[piece], low_S[piece], weight, delta_S)

            jobs += [(work, piece) for piece in _pieces(high_S.numel())]
        self._failed = True  # until all of it is in
        try:
            _on_all_cores(jobs)
        except Exception as error:
            raise MergeError(
                f"client '{update.client_id}' was added to the running sum in part: {type(error).__name__}: "
                f"{one_line(str(error))}"
            ) from error
        self._others[update.client_id] = others
        self._added[update.client_id] = update.num_examples
        self._bytes_read += size
        self._failed = False

    def merge(self, sink: TensorSink) -> MergeReport:
        """Write the merged model, floating tensors in the dtype in which they are merged.

        Raises:
            MergeError: if nothing was added, an update was added in part, or a merged value does not fit its dtype.
        """
        if self._failed or not self._added:
            raise MergeError("the running sum is of no use: an update was added in part, or none at all")
        clients = tuple(sorted(self._added, key=client_order))
        total = math.fsum(self._added.values())
        shares = tuple(self._added[client] / total for client in clients)
        specs = {
            name: TensorSpec(spec.shape, compute_dtype(spec.dtype) if spec.is_floating else spec.dtype)
            for name, spec in self._base.specs().items()
        }
        names: dict[str, list[str]] = {name: [name] for name in self._specs}
        for name, first in self._tied.items():
            names[first].append(name)
        sink.begin(specs)
        try:
            jobs: list[Job] = []
            for name, (high_S, low_S) in self._sums.items():
                base_S, dtype = self._base.read(name).reshape(-1), specs[name].dtype

                def work(
                    piece: slice,
                    name: str = name,
                    base_S: Tensor = base_S,
                    high_S: Tensor = high_S,
                    low_S: Tensor = low_S,
                    dtype: torch.dtype = dtype,
                ) -> None:
                    exact_S = add_quotient(base_S[piece].double(), high_S[piece], low_S[piece], total)
                    values_S = exact_S.to(dtype)
                    if not values_S.abs().amax().isfinite():
                        raise MergeError.of_value(name, float(exact_S.abs().amax()), str(dtype))
                    for each in names[name]:
                        sink.write(each, piece.start, values_S)

                jobs += [(work, piece) for piece in _pieces(high_S.numel())]
            _on_all_cores(jobs)
            for output in self._method.plan(CohortSpec(self._specs, clients, shares, self._seed, self._round)):
                if output.name in self._floating:
                    continue
                reads = [
                    self._base.read(read.name) if read.source == BASE else self._others[clients[read.source]][read.name]
                    for read in output.reads
                ]
                value = output.compute.function(*reads) if isinstance(output.compute, Whole) else reads[0]
                for each in names[output.name]:
                    sink.write(each, 0, value.reshape(-1))
            sink.finish()
        except BaseException:
            sink.abort()
            raise
        written = sum(spec.nbytes for spec in specs.values())
        return MergeReport(clients, shares, len(specs), self._bytes_read, written, time.perf_counter() - self._started)


def _scratch(path: Path, name: str, spec: TensorSpec) -> Tensor:
    """Zeros of float64 in a file, so that they are no anonymous memory."""
    size = 8 * spec.numel
    try:
        with open(path, "w+b", buffering=0) as file:
            if not claim(file.fileno(), 0, size):
                fill(file.fileno(), 0, size)
            mapped = mmap.mmap(file.fileno(), size)
    except OSError as error:
        raise MergeError(
            f"cannot keep a running sum of {size:,} bytes for tensor '{name}' in '{path}': {error.strerror}"
        ) from error
    return torch.frombuffer(mapped, dtype=torch.float64)


def _pieces(numel: int) -> list[slice]:
    return [slice(start, min(start + _SLICE, numel)) for start in range(0, numel, _SLICE)]


def _on_all_cores(jobs: list[Job]) -> None:
    """Each job works on a slice that is small enough for torch to start no threads of its own."""
    with ThreadPoolExecutor(os.cpu_count(), "sum") as pool:
        for _ in pool.map(lambda job: job[0](job[1]), jobs):
            pass
