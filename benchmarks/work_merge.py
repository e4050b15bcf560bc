"""fl_merge's own work, and the floor beneath it. Functions as engine_worker.py wants them."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.engine_worker import Job, Work

STEPS = {"local-steps": 7}
"""What each client reports, for the methods that ask for it."""

FLOOR_SLICE = 1 << 20
"""Bytes that one thread reads at a time: enough that the calls cost nothing, and it stays in a core's cache."""


def model_folders(job: Job, folder: Path) -> tuple[Path, list[Path]]:
    """The base and the clients."""
    return folder / "base", [folder / f"client-{number}" for number in range(job["models"])]


def floor(job: Job, folder: Path, out: Path) -> Callable[[], Work]:
    """Read every byte of the base and the clients once, on all cores, and write one model's bytes.

    Files are mapped, as fl_merge maps them. What is read is summed up, the least that has to load each byte.
    """
    import numpy as np

    base, clients = model_folders(job, folder)
    files = [path / "model.safetensors" for path in (base, *clients)]

    def on_all_cores(arrays: list[Any], write: Callable[[int, Any], object]) -> None:
        def piece(start: int) -> None:
            for array in arrays:
                part = array[start : start + FLOOR_SLICE]
                np.add.reduce(part[: len(part) // 8 * 8].view(np.int64))
            write(start, arrays[0][start : start + FLOOR_SLICE])

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for _ in pool.map(piece, range(0, len(arrays[0]), FLOOR_SLICE)):
                pass

    if job["memory"]:
        arrays = [np.fromfile(path, dtype=np.uint8) for path in files]

        def memory() -> Any:
            output = np.empty_like(arrays[0])

            def write(start: int, piece: Any) -> None:
                output[start : start + len(piece)] = piece

            on_all_cores(arrays, write)
            return output

        return lambda: memory

    def from_files() -> None:
        mapped = [np.memmap(path, dtype=np.uint8, mode="r") for path in files]
        out.mkdir()
        # Measured: this is faster than writing through a mapping, with or without room claimed before.
        descriptor = os.open(out / "model.safetensors", os.O_WRONLY | os.O_CREAT)
        try:
            on_all_cores(mapped, lambda start, piece: os.pwrite(descriptor, piece, start))
        finally:
            os.close(descriptor)

    return lambda: from_files


def merge(job: Job, folder: Path, out: Path) -> Callable[[], Work]:
    """fl_merge's own executor: from files to a folder, or from memory to memory."""
    from fl_merge import build, kernels
    from fl_merge.execute import execute
    from fl_merge.store import MemorySink, MemorySource, SafetensorsSink, SafetensorsSource, load
    from fl_merge.types import Cohort, TensorSource, Update

    kernels.load()  # else the first large merge of a process would do it, inside the clock
    method = build(job["method"])
    base, clients = model_folders(job, folder)

    def cohort(source: Callable[[Path], TensorSource]) -> Cohort:
        updates = (Update(str(number), 1.0, source(path), STEPS) for number, path in enumerate(clients))
        return Cohort(source(base), tuple(updates))

    if job["memory"]:
        at_hand = cohort(lambda path: MemorySource(load(path)))

        def memory() -> MemorySink:
            sink = MemorySink()
            execute(method, at_hand, sink)
            return sink

        return lambda: memory
    return lambda: lambda: execute(method, cohort(SafetensorsSource), SafetensorsSink(out))


def kernels(job: Job, folder: Path, out: Path) -> Callable[[], Work]:
    """Import numba, load the kernels, and run each once: tiny merges with every method and dtype.

    All else has been imported and run before. With an empty `NUMBA_CACHE_DIR` this compiles, otherwise it loads what
    was compiled. A process does it once: there is no second repetition.

    job: `folders`, tiny models of each dtype.
    """
    from benchmarks.rows import methods_of
    from fl_merge import build
    from fl_merge import kernels as compiled
    from fl_merge.execute import execute
    from fl_merge.store import MemorySink, MemorySource, load
    from fl_merge.types import Cohort, Update

    cohorts = []
    for models in job["folders"]:
        base, clients = model_folders(job, Path(models))
        updates = [Update(str(number), 1.0, MemorySource(load(path)), STEPS) for number, path in enumerate(clients)]
        cohorts.append(Cohort(MemorySource(load(base)), tuple(updates)))

    def every_method() -> None:
        for cohort in cohorts:
            for name in methods_of(len(cohort.updates)):
                execute(build(name), cohort, MemorySink())

    def fresh() -> Work:
        every_method()  # by the definitions in torch: there are too few elements to load kernels by themselves

        def work() -> None:
            compiled.load()
            every_method()

        return work

    return fresh


def difference(job: Job, folder: Path, out: Path) -> Callable[[], Any]:
    """How far two folders of results are apart, by Frobenius norms: relative to the model, and to what merging changed.

    job: `first`, `second` (folders) and `base`.
    """
    from fl_merge.store import SafetensorsSource

    base, first, second = (SafetensorsSource(job[key]) for key in ("base", "first", "second"))

    def work() -> dict[str, float]:
        apart = whole = changed = 0.0
        unequal = elements = 0
        for name in first.specs():
            a, b = first.read(name).double(), second.read(name).double()
            apart += float((a - b).square().sum())
            whole += float(a.square().sum())
            changed += float((a - base.read(name).double()).square().sum())
            unequal += int((a != b).sum())
            elements += a.numel()
        return {
            "of_model": (apart / whole) ** 0.5,
            "of_change": (apart / changed) ** 0.5,
            "unequal": unequal / elements,
        }

    return lambda: (work, lambda found: found)
