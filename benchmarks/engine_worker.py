"""One piece of work for benchmarks/engine.py, in a process of its own; standard library only until the job is known.

    python benchmarks/engine_worker.py '<job in JSON>'

The job is first done on a tiny model (what is loaded on first use is then loaded), then prepared on the real one. The
worker prints a line, waits for one, does the work, and prints its wall and CPU seconds. It also runs in the
interpreter of mergekit's environment, where fl_merge is not installed.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

Job = dict[str, Any]
Work = Callable[[], object]

FLOOR_SLICE = 1 << 20
"""Bytes that one thread reads at a time."""


def model_folders(job: Job, folder: Path) -> tuple[Path, list[Path]]:
    """The base and the clients."""
    return folder / "base", [folder / f"client-{number}" for number in range(job["models"])]


def floor(job: Job, folder: Path, out: Path) -> Work:
    """Read every byte of the base and the clients once, on all cores, and write one model's bytes."""
    import numpy as np

    base, clients = model_folders(job, folder)
    files = [path / "model.safetensors" for path in (base, *clients)]

    def pieces(length: int) -> list[tuple[int, int]]:
        return [(start, min(start + FLOOR_SLICE, length)) for start in range(0, length, FLOOR_SLICE)]

    def read(array: Any, start: int, stop: int) -> None:
        np.add.reduce(array[start : stop - (stop - start) % 8].view(np.int64))

    def on_all_cores(arrays: list[Any], write: Callable[[int, Any], object]) -> None:
        def piece(start: int, stop: int) -> None:
            for array in arrays:
                read(array, start, min(stop, len(array)))
            write(start, arrays[0][start:stop])

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for done in [pool.submit(piece, *limits) for limits in pieces(len(arrays[0]))]:
                done.result()

    if job["memory"]:
        arrays = [np.fromfile(path, dtype=np.uint8) for path in files]

        def memory() -> Any:
            output = np.empty_like(arrays[0])

            def write(start: int, piece: Any) -> None:
                output[start : start + len(piece)] = piece

            on_all_cores(arrays, write)
            return output

        return memory

    def from_files() -> None:
        mapped = [np.memmap(path, dtype=np.uint8, mode="r") for path in files]
        out.mkdir()
        descriptor = os.open(out / "model.safetensors", os.O_WRONLY | os.O_CREAT)
        try:
            on_all_cores(mapped, lambda start, piece: os.pwrite(descriptor, piece, start))
        finally:
            os.close(descriptor)

    return from_files


def merge(job: Job, folder: Path, out: Path) -> Work:
    """fl_merge's own executor: from files to a folder, or from memory to memory."""
    from fl_merge import build
    from fl_merge.execute import execute
    from fl_merge.store import MemorySink, MemorySource, SafetensorsSink, SafetensorsSource, load
    from fl_merge.types import Cohort, TensorSource, Update

    method = build(job["method"])
    base, clients = model_folders(job, folder)

    def cohort(source: Callable[[Path], TensorSource]) -> Cohort:
        updates = (Update(str(number), 1.0, source(path)) for number, path in enumerate(clients))
        return Cohort(source(base), tuple(updates))

    if job["memory"]:
        at_hand = cohort(lambda path: MemorySource(load(path)))

        def memory() -> MemorySink:
            sink = MemorySink()
            execute(method, at_hand, sink)
            return sink

        return memory
    return lambda: execute(method, cohort(SafetensorsSource), SafetensorsSink(out))


def flower(job: Job, folder: Path, out: Path) -> Work:
    """`aggregate_train` of a Flower strategy, or of FedMerge, on replies that are in memory."""
    import torch
    from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
    from flwr.serverapp import strategy as flower_strategies

    from fl_merge import build
    from fl_merge.flower import FedMerge
    from fl_merge.flower._flwr import TaskIdentity
    from fl_merge.flower.records import to_record
    from fl_merge.store import SafetensorsSource

    base, clients = model_folders(job, folder)
    dtype = getattr(torch, job["dtype"])

    def record(path: Path) -> Any:
        source = SafetensorsSource(path)
        return to_record({name: source.read(name) for name in source.specs()}, dtype)

    class Nodes:
        """As much of a Grid as sampling needs."""

        def get_node_ids(self) -> list[int]:
            return list(range(1, len(clients) + 1))

    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1
    ours = FedMerge(build(job["method"] or "weighted_average"))
    requests = list(ours.configure_train(1, record(base), ConfigRecord(), Nodes()))
    if len(requests) != len(clients):
        raise RuntimeError(f"{len(requests)} requests for {len(clients)} clients")
    theirs = getattr(flower_strategies, job["strategy"], None)  # which has no FedMerge
    chosen = ours if theirs is None else theirs(**job["settings"])
    replies = [
        Message(
            RecordDict({"arrays": record(path), "metrics": MetricRecord({"num-examples": 1})}),
            reply_to=request,
        )
        for request, path in zip(requests, clients, strict=True)
    ]

    def aggregate() -> Any:
        arrays, metrics = chosen.aggregate_train(1, replies)
        if not arrays:
            raise RuntimeError(f"{job['strategy']} made no model")
        return arrays, metrics

    return aggregate


def mergekit(job: Job, folder: Path, out: Path) -> Work:
    """What `mergekit-yaml` does with its arguments, in this process, so that its imports are not counted."""
    from mergekit.scripts.run_yaml import main

    base, clients = model_folders(job, folder)
    method, density = job["method"], job["density"]
    parameters: dict[str, Any] = {}
    if method == "slerp":
        parameters = {"t": 0.5}
        models: list[dict[str, Any]] = [{"model": str(path)} for path in clients]
    else:
        settings = {"weight": 1.0 / len(clients)} | ({"density": density} if density is not None else {})
        models = [{"model": str(path), "parameters": settings} for path in clients]
    config = {"merge_method": method, "models": models, "parameters": parameters}
    config |= {"dtype": "float32", "out_dtype": job["dtype"]}
    if method != "linear":
        config["base_model"] = str(clients[0] if method == "slerp" else base)
    recipe = out.with_suffix(".yaml")
    recipe.write_text(json.dumps(config))  # which is YAML
    arguments = [str(recipe), str(out), "--quiet", "--no-copy-tokenizer", "--no-write-model-card"]
    if folder == Path(job["tiny"]):  # torch takes this once in a process, before it computes; it then holds
        arguments += ["--num-threads", str(os.cpu_count())]
    return lambda: main(arguments, standalone_mode=False)


def main() -> None:
    job = json.loads(sys.argv[1])
    # What libraries print goes to the error stream; the parent reads the other one.
    with os.fdopen(os.dup(1), "w") as parent:
        os.dup2(2, 1)
        prepare = {"floor": floor, "merge": merge, "flower": flower, "mergekit": mergekit}[job["kind"]]
        out = Path(job["out"])
        prepare(job, Path(job["tiny"]), out)()
        shutil.rmtree(out, ignore_errors=True)
        work = prepare(job, Path(job["folder"]), out)
        give_back_freed_memory()
        print("ready", file=parent, flush=True)
        sys.stdin.readline()
        cpu, wall = cpu_seconds(), time.perf_counter()
        result = work()
        seconds = {"wall": time.perf_counter() - wall, "cpu": cpu_seconds() - cpu}
        print(json.dumps(seconds), file=parent, flush=True)
        del result


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
