"""Work for benchmarks/engine.py, in a process of its own; standard library only until the job is known.

    python -m benchmarks.engine_worker

It reads jobs in JSON, a line each. Each kind of job is first done on a tiny model, so that imports, compiled kernels
and whatever else is loaded on first use are there before the clock starts. Then, for each repetition: it prepares,
says that it is ready, waits for a line, works, prints its wall and CPU seconds, hears whether that was the last
repetition, and prints what it has found out beside. It also runs in the interpreter of mergekit's environment.

A job with a `floor` has that job done too before each repetition, and says how long it took: what a machine does that
others use as well changes from minute to minute.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Job = dict[str, Any]
Work = Callable[[], object]

PREPARE = {
    "floor": "work_merge",
    "merge": "work_merge",
    "kernels": "work_merge",
    "difference": "work_merge",
    "flower": "work_flower",
    "server": "work_server",
    "mergekit": "work_mergekit",
    "mergekit_memory": "work_mergekit",
}
"""Kinds of jobs and the modules with the functions of the same names.

Such a function takes the job, the folder of models and the folder for the output, loads what is not to be measured,
and gives a function that is called before each repetition. That one gives the work; or the work and a function from
its result to what has been found out.
"""


def main() -> None:
    # What libraries print goes to the error stream; the parent reads the other one.
    with os.fdopen(os.dup(1), "w") as parent:
        os.dup2(2, 1)

        def say(answer: dict[str, Any]) -> None:
            print(json.dumps(answer), file=parent, flush=True)

        warm: set[tuple[str, ...]] = set()
        for line in iter(sys.stdin.readline, ""):
            do(json.loads(line), warm, say)


def do(job: Job, warm: set[tuple[str, ...]], say: Callable[[dict[str, Any]], None]) -> None:
    """One job with all its repetitions."""
    prepare = getattr(importlib.import_module(f"benchmarks.{PREPARE[job['kind']]}"), job["kind"])
    out = Path(job["out"])
    sort = tuple(str(job.get(key)) for key in ("kind", "method", "memory", "dtype", "strategy"))
    if sort not in warm and "tiny" in job:
        work, _ = both(prepare(job, Path(job["tiny"]), out)())
        work()
        clear(out)
        warm.add(sort)
    fresh = prepare(job, Path(job["folder"]), out)
    floor = floor_of(job) if "floor" in job else None
    last = False
    while not last:
        clear(out)
        beneath = floor() if floor is not None else {}
        work, examine = both(fresh())
        give_back_freed_memory()
        say({})
        sys.stdin.readline()
        cpu, wall = cpu_seconds(), time.perf_counter()
        result = work()
        seconds = {"wall": time.perf_counter() - wall, "cpu": cpu_seconds() - cpu}
        say(seconds | beneath)
        last = sys.stdin.readline() != "again\n"
        say(examine(result) if last and examine is not None else {})
        del work, result
    if not job.get("keep"):
        clear(out)


def floor_of(job: Job) -> Callable[[], dict[str, float]]:
    """Does the job that is a floor of another, and gives its wall and CPU seconds."""
    out = Path(job["out"] + "-floor")
    module = importlib.import_module(f"benchmarks.{PREPARE['floor']}")
    fresh = module.floor(job["floor"], Path(job["folder"]), out)

    def floor() -> dict[str, float]:
        work, _ = both(fresh())
        cpu, wall = cpu_seconds(), time.perf_counter()
        try:
            work()
            return {"floor_wall": time.perf_counter() - wall, "floor_cpu": cpu_seconds() - cpu}
        finally:
            clear(out)

    return floor


def both(given: Any) -> tuple[Work, Callable[[Any], dict[str, Any]] | None]:
    """The work, and what looks at its result, if anything does."""
    return given if isinstance(given, tuple) else (given, None)


def clear(out: Path) -> None:
    """Remove a folder of output."""
    shutil.rmtree(out, ignore_errors=True)


def give_back_freed_memory() -> None:
    """Return what preparation has freed to the system: the work could otherwise fill it without being seen to grow."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
