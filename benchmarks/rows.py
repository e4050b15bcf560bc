"""What is measured: the rows of each table, as jobs for engine_worker.py."""

from __future__ import annotations

import itertools
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.data import TINY, make_models
from benchmarks.measure import Measured, Worker, WorkFailedError
from fl_merge import METHODS, build

MERGEKIT_METHODS = {  # ours, and theirs
    "weighted_average": "linear",
    "slerp": "slerp",
    "task_arithmetic": "task_arithmetic",
    "ties": "ties",
    "dare_linear": "dare_linear",
    "dare_ties": "dare_ties",
    "breadcrumbs": "breadcrumbs",
    "breadcrumbs_ties": "breadcrumbs_ties",
    "della": "della",
    "della_linear": "della_linear",
}
NOT_THE_SAME = ("dare", "della", "breadcrumbs")
"""How methods begin whose results differ from mergekit's: draws, defaults."""
FLOWER_ROBUST: dict[str, tuple[dict[str, Any], str]] = {
    # Flower's strategy, its settings, and the method of ours that does the same, where there is one
    "FedMedian": ({}, "median"),
    "MultiKrum": ({"num_malicious_nodes": 1, "num_nodes_to_select": 4}, "multi_krum"),
}
SERVER_CLIENTS = (8, 64)
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_ARENA_MAX": "2"}
"""glibc then gives blocks of 128 KiB and more back when they are freed: what is left is what the program holds."""


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Args:
        label: what was done.
        job: for the worker.
        against: in a peer's row, the label of the row of ours that does the same work.
        floor: the label of the row that reads and writes as much.
        python: the interpreter that runs the worker.
        environment: of the worker, beside this process's.
        may_refuse: a failure is an answer: the peer does not take these data.
        once: a process can do this work only once.
    """

    label: str
    job: Mapping[str, Any]
    against: str | None = None
    floor: str | None = None
    python: str = sys.executable
    environment: Mapping[str, str] = field(default_factory=dict)
    may_refuse: bool = False
    once: bool = False


@dataclass(frozen=True)
class Bench:
    """Where the data are, how often each job is measured, and for how long at most.

    Args:
        folder: of everything; the caller removes it.
        repeats: of each job.
        budget: seconds after which a job is not repeated any more: slow work varies less.
        tell: called with what is done now, and with failures.
    """

    folder: Path
    repeats: int
    budget: float
    tell: Callable[[str], None]
    failed: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    counter: Iterator[int] = field(default_factory=itertools.count)

    def data(self, models: int, size: int, dtype: str) -> Path:
        """The folder of these models, made on first use; a run with fewer models takes the first of them."""
        found = self.folder / dtype / str(size)
        make_models(found, models, size, dtype)
        return found

    def job(self, models: int, size: int, dtype: str, **more: Any) -> dict[str, Any]:
        """A job on these models."""
        data, tiny = self.data(models, size, dtype), self.data(models, TINY, dtype)
        return {"folder": str(data), "tiny": str(tiny), "models": models, "dtype": dtype, **more}

    def new_folder(self) -> str:
        """The name of a folder that is not there."""
        return str(self.folder / f"out-{next(self.counter)}")

    def measure(self, rows: Sequence[Row]) -> dict[str, Measured]:
        """Each row in a process of its own, by label; a row that fails is missing."""
        results: dict[str, Measured] = {}
        for number, row in enumerate(rows, start=1):
            self.tell(f"{number} of {len(rows)}: {row.label}")
            out = row.job.get("out") or self.new_folder()
            try:
                with Worker(row.python, row.environment) as worker:
                    job, repeats = {**row.job, "out": out}, 1 if row.once else self.repeats
                    found = results[row.label] = worker.run(job, repeats, self.budget)
                self.tell(f"    {found.wall:.3f} s, {(found.extra or 0) / 1e6:.0f} MB")
            except WorkFailedError as error:
                if row.may_refuse:
                    self.refused[row.label] = str(error)
                else:
                    self.tell(f"{row.label}: failed: {error}")
                    self.failed.append(row.label)
            finally:
                if not row.job.get("keep"):
                    shutil.rmtree(out, ignore_errors=True)
        return results


def merge_rows(
    bench: Bench, models: int, size: int, dtype: str, methods: Sequence[str], parts: Sequence[str], mergekit: str | None
) -> list[Row]:
    """Floors, fl_merge's executor and mergekit, on the same models; mergekit needs its interpreter."""
    rows: list[Row] = []
    common = bench.job(models, size, dtype)
    two = "slerp" in methods and models != 2
    for memory, part in ((False, "files"), (True, "memory")):
        if part not in parts:
            continue
        floor, floor_of_two = f"floor, {part}, {models} models", f"floor, {part}, 2 models"
        rows.append(Row(floor, common | {"kind": "floor", "memory": memory}))
        if two:
            rows.append(Row(floor_of_two, common | {"kind": "floor", "memory": memory, "models": 2}))
        for method in methods:
            cases = [(models, f"{part}: {method}", floor)]
            if method == "slerp" and two:  # mergekit's takes no more
                cases.append((2, f"{part}: slerp, 2 models", floor_of_two))
            for count, label, limit in cases:
                job = common | {"kind": "merge", "memory": memory, "method": method, "models": count}
                if not memory:
                    job |= {"floor": {"memory": False, "models": count}}
                theirs = MERGEKIT_METHODS.get(method) if mergekit and (method != "slerp" or count == 2) else None
                compared = not memory and theirs is not None and not method.startswith(NOT_THE_SAME)
                if compared:
                    job |= {"out": str(bench.folder / f"{method}-ours"), "keep": True}
                rows.append(Row(label, job, floor=limit))
                if theirs is None or mergekit is None:
                    continue
                density = METHODS[method].parameters.get("density")
                job = job | {"kind": "mergekit_memory" if memory else "mergekit", "method": theirs}
                job |= {"density": density.default if density else None}
                if compared:
                    job |= {"out": str(bench.folder / f"{method}-theirs")}
                title = f"mergekit, {part}: {theirs}" + (", 2 models" if label.endswith("2 models") else "")
                rows.append(Row(title, job, against=label, floor=limit, python=mergekit))
    return rows


def methods_of(models: int) -> list[str]:
    """The methods that merge so many whole models, and need nothing beside them."""
    data_free = [name for name, entry in METHODS.items() if entry.merges == "models" and not entry.sends]
    return [name for name in data_free if models in build(name).clients]


def kernel_rows(bench: Bench, models: int, dtypes: Sequence[str]) -> list[Row]:
    """What compiled kernels cost a process before it has them."""
    folders = [str(bench.data(models, TINY, dtype)) for dtype in dtypes]
    job = {"kind": "kernels", "folder": folders[0], "folders": folders, "models": models}
    empty = {"NUMBA_CACHE_DIR": bench.new_folder()}
    return [
        Row("kernels: compile, first time on a machine", job, environment=empty, once=True),
        Row("kernels: load from cache", job, environment=empty, once=True),
    ]


def flower_rows(bench: Bench, models: int, size: int) -> list[Row]:
    """Strategies on the same replies, made from float32 models."""
    common = bench.job(models, size, "float32", kind="flower", settings={}, method=None, mean=True)
    rows: list[Row] = []
    for wire in ("float32", "float16", "bfloat16"):
        ours = f"FedMerge(weighted_average()), {wire}"
        rows.append(Row(ours, common | {"dtype": wire, "strategy": "FedMerge"}))
        job = common | {"dtype": wire, "strategy": "FedAvg"}
        rows.append(Row(f"FedAvg, {wire}", job, against=ours, may_refuse=wire == "bfloat16"))
    for strategy, (settings, method) in FLOWER_ROBUST.items():
        ours = f"FedMerge({method}()), float32"
        job = common | {"dtype": "float32", "mean": False}
        if method in METHODS:
            rows.append(Row(ours, job | {"strategy": "FedMerge", "method": method}))
        rows.append(Row(f"{strategy}, float32", job | {"strategy": strategy, "settings": settings}, against=ours))
    return rows


def server_rows(bench: Bench, size: int) -> list[Row]:
    """Whole servers: rounds and clients, updates on disk; and Flower's, which keeps every reply in memory."""
    common = bench.job(1, size, "float32", kind="server", spill=True, strategy="FedMerge")
    rows: list[Row] = []
    for clients in SERVER_CLIENTS:
        for rounds in (1, 2):
            job = common | {"clients": clients, "rounds": rounds}
            rows.append(Row(server_label(clients, rounds), job, once=True))
    for clients in SERVER_CLIENTS:
        job = common | {"clients": clients, "rounds": 2}
        label = f"{server_label(clients, 2)}, memory given back"
        rows.append(Row(label, job, environment=GIVES_BACK, once=True))
    few = SERVER_CLIENTS[0]
    in_memory = common | {"clients": few, "rounds": 1, "spill": False}
    rows.append(Row(f"FedMerge in memory, {few} clients, 1 round", in_memory, once=True))
    rows.append(Row(f"FedAvg, {few} clients, 1 round", in_memory | {"strategy": "FedAvg"}, once=True))
    return rows


def server_label(clients: int, rounds: int) -> str:
    """The row of FedMerge with updates on disk."""
    return f"FedMerge, {clients} clients, {rounds} round{'s' if rounds > 1 else ''}"


def memory_rows(bench: Bench, size: int, dtype: str, methods: Sequence[str], counts: Sequence[int]) -> list[Row]:
    """One merge of files in a fresh process for each method and number of models: what counts is its memory."""
    rows = []
    for method in methods:
        for count in counts:
            job = bench.job(count, size, dtype, kind="merge", memory=False, method=method)
            rows.append(Row(memory_label(method, count), job, once=True))
    return rows


def memory_label(method: str, count: int) -> str:
    """The row of a merge of so many models' files."""
    return f"files: {method}, {count} models"
