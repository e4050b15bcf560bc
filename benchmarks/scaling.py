"""Cost against the number of models and against their size, with the slopes of the lines through the logarithms."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.data import parameters_of
from benchmarks.measure import Measured, Worker, WorkFailedError
from benchmarks.report import Report, Sheet, exponent, number
from benchmarks.rows import Bench
from fl_merge import build

FEW = 3
"""Repetitions of each point at most: the fit is over many points."""

MOVED_BESIDE = 2
"""Models that a merge moves beside the clients': it reads the base and writes the result."""


@dataclass
class Slopes:
    """A method's exponents.

    Args:
        clients: over the number of clients N. What is read and written beside (a base and a result) makes it less than
            1 for work that is exactly linear.
        moved: over the number of models that are read and written, N + 2.
        size: over the parameters of a model.
        by_count: what was measured for each N.
    """

    clients: float | None = None
    moved: float | None = None
    size: float | None = None
    by_count: dict[int, Measured] = field(default_factory=dict)


def measure_scaling(
    bench: Bench,
    report: Report,
    dtype: str,
    methods: Sequence[str],
    counts: Sequence[int],
    count_size: int,
    sizes: Sequence[int],
    models: int,
) -> dict[str, Slopes]:
    """Print two tables, of files to files; the floor is a row of each.

    Args:
        bench: where, and how often.
        report: prints them.
        dtype: of the models.
        methods: of fl_merge.
        counts: numbers of clients N, with models of `count_size` parameters.
        count_size: see there.
        sizes: numbers of parameters, with `models` clients.
        models: see there.
    """
    by_count = Sheet(
        f"wall s against N: models of {parameters_of(count_size):,} parameters, {dtype}, files to files",
        ("work", *(f"N = {count}" for count in counts), "exponent in N", "in N + 2", "of CPU s"),
        notes=[
            "N + 2 models are moved: the clients' and the base are read, one is written. Work that is exactly linear "
            "in what it moves has an exponent below 1 in N and of 1 in N + 2."
        ],
    )
    by_size = Sheet(
        f"wall s against size: {models} models, {dtype}, files to files",
        ("work", *(f"{parameters_of(size):,}" for size in sizes), "exponent", "of CPU s"),
    )
    slopes = {}
    for name in ("floor", *methods):
        found = slopes[name] = Slopes()
        cases = [(count, count_size) for count in counts] + [(models, size) for size in sizes]
        measured = points(bench, name, cases, dtype)
        here = measured[: len(counts)]
        found.by_count = {count: each for count, each in zip(counts, here, strict=True) if each is not None}
        found.clients = exponent([(count, each.wall) for count, each in found.by_count.items()])
        moved = [(count + MOVED_BESIDE, each) for count, each in found.by_count.items()]
        found.moved, cpu = slopes_of(moved)
        by_count.rows.append((name, *map(cell, here), number(found.clients), number(found.moved), number(cpu)))
        here = measured[len(counts) :]
        grown = [(parameters_of(size), each) for size, each in zip(sizes, here, strict=True) if each is not None]
        found.size, cpu = slopes_of(grown)
        by_size.rows.append((name, *map(cell, here), number(found.size), number(cpu)))
    report.table(by_count)
    report.table(by_size)
    return slopes


def slopes_of(measured: Sequence[tuple[float, Measured]]) -> tuple[float | None, float | None]:
    """The exponents of wall and of CPU seconds."""
    return exponent([(x, each.wall) for x, each in measured]), exponent([(x, each.cpu) for x, each in measured])


def points(bench: Bench, name: str, cases: Sequence[tuple[int, int]], dtype: str) -> list[Measured | None]:
    """One method on models of so many clients and parameters each, in one process."""
    measured: list[Measured | None] = []
    with Worker() as worker:
        for count, size in cases:
            if name != "floor" and count not in build(name).clients:
                measured.append(None)
                continue
            bench.tell(f"{name}: {count} models of {size:,} parameters")
            job = bench.job(count, size, dtype, memory=False, out=bench.new_folder())
            job |= {"kind": "floor"} if name == "floor" else {"kind": "merge", "method": name}
            try:
                measured.append(worker.run(job, min(bench.repeats, FEW), bench.budget))
            except WorkFailedError as error:
                bench.tell(f"{name}, {count} models: failed: {error}")
                bench.failed.append(name)
                break
            finally:
                shutil.rmtree(job["out"], ignore_errors=True)
    return measured + [None] * (len(cases) - len(measured))


def cell(measured: Measured | None) -> str:
    """Wall seconds. Memory is no part of it: the process has done other work before."""
    return "-" if measured is None else f"{measured.wall:.3f}"
