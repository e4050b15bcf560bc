"""The merge engine beside its peers, measured in one run: prints tables with ratios, and which targets are met.

    python -m benchmarks.engine --quick        8 models of 16 M parameters, bfloat16
    python -m benchmarks.engine --full         8 models of 0.25 B parameters, bfloat16 and float32; replies of 100 M
    python -m benchmarks.engine --parts scaling --methods ties

Parts:
    files       fl_merge's execute(), from safetensors files to a safetensors folder; mergekit's command line on the
                same folders; how far their results are apart. Floor: read the base and all models once, write one.
    memory      execute() and mergekit's merge_state_dicts(), from tensors in memory to tensors in memory
    flower      aggregate_train of Flower's strategies and of FedMerge, on the same replies in memory
    server      FedMerge.start and FedAvg.start in process: peak memory with 8 and 64 clients, one round and two
    kernels     what loading and compiling the kernels takes; nowhere else is it inside the clock
    scaling     cost against the number of models and against their size

mergekit has an environment of its own, made on first use in the user's cache folder. It accumulates in float32, as
fl_merge does; densities are fl_merge's defaults.

Each row is a process of its own and each number a median of its repetitions. Imports, loading the kernels, and the
same work on a tiny model come before the clock starts; opening the files and writing the result are inside. Files are
in the page cache. "extra" is the highest anonymous memory above what the process had when the clock started: inputs in
memory are not in it, the result is. Rows that take long are repeated less often ("runs").
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import shutil
import signal
import sys
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

from rich.console import Console

import fl_merge
from benchmarks import rows, targets
from benchmarks.data import parameters_of
from benchmarks.measure import Measured, Worker, WorkFailedError
from benchmarks.peers import MERGEKIT, mergekit_python
from benchmarks.report import Report, Sheet, flower_sheet, plain, side_by_side
from benchmarks.scaling import measure_scaling
from fl_merge import METHODS

PARTS = ("files", "memory", "flower", "server", "kernels", "scaling")
COUNTS = (2, 4, 8, 16, 32)
BUSY = 0.25
"""Load per core, before the run, from which others are in the way. Peers whose threads wait for one another then slow
down far more than work in independent slices, so that even ratios are wrong."""

MEMORY_METHODS = ("weighted_average", "ties")  # the one that holds least, and one that holds much
AGREE = {  # where both define the same, and what is not the same all the same
    "weighted_average": "",
    "slerp, 2 models": "",
    "task_arithmetic": "",
    "ties": "other elements among equally large ones; elements whose sum is 0",
}
NOT_COMPARED = (
    "DARE's and DELLA's methods are not compared: the draws are others, and mergekit rescales what is kept to the L1 "
    "norm of the delta, not by 1 / density. Nor are breadcrumbs', which run with mergekit's gamma there."
)

console = Console(stderr=True, highlight=False)


def files_and_memory(bench: rows.Bench, arguments: argparse.Namespace, report: Report) -> list[targets.Limit]:
    """One table for each dtype, and mergekit's agreement with ours."""
    mergekit = None if arguments.no_mergekit else mergekit_python(tell)
    if mergekit is None:
        report.line("mergekit is left out.")
    limits: list[targets.Limit] = []
    for dtype in arguments.dtypes:
        work = rows.merge_rows(
            bench, arguments.models, arguments.size, dtype, arguments.methods, arguments.parts, mergekit
        )
        results = bench.measure(work)
        title = f"{arguments.models} models of {parameters_of(arguments.size):,} parameters, {dtype}"
        report.table(side_by_side(title, work, results))
        if mergekit and "files" in arguments.parts:
            report.table(agreement(bench, arguments.size, dtype, results))
        limits += targets.of_files(results, arguments.models, dtype)
    return limits


def agreement(bench: rows.Bench, size: int, dtype: str, results: Mapping[str, Measured]) -> Sheet:
    """How far mergekit's results are from ours where both compute the same."""
    sheet = Sheet(
        f"{MERGEKIT} and fl_merge, {dtype}: Frobenius norm of the difference of the results",
        ("method", "of the model", "of what merging changed", "elements unequal", "beside rounding"),
        notes=[NOT_COMPARED],
    )
    base = bench.data(1, size, dtype) / "base"
    for label, beside in AGREE.items():
        method = label.partition(",")[0]
        first, second = (bench.folder / f"{method}-{whose}" for whose in ("ours", "theirs"))
        if f"files: {label}" in results and first.is_dir() and second.is_dir():
            tell(f"comparing {label}")
            job = {"kind": "difference", "first": str(first), "second": str(second), "base": str(base)}
            try:
                with Worker() as worker:
                    found = worker.run(job | {"folder": "", "out": bench.new_folder()}).more
                cells = (f"{found['of_model']:.1e}", f"{found['of_change']:.1e}", f"{found['unequal']:.2%}")
                sheet.rows.append((label, *cells, beside))
            except WorkFailedError as error:
                tell(f"{label}: not compared: {error}")
                bench.failed.append(f"comparison of {label}")
        for folder in (first, second):
            shutil.rmtree(folder, ignore_errors=True)
    return sheet


def flower(bench: rows.Bench, arguments: argparse.Namespace, report: Report) -> list[targets.Limit]:
    """Strategies beside FedMerge."""
    work = rows.flower_rows(bench, arguments.models, arguments.flower_size)
    results = bench.measure(work)
    size = parameters_of(arguments.flower_size)
    title = f"aggregate_train of {arguments.models} replies of {size:,} parameters in memory"
    sheet = flower_sheet(title, work, results, bench.refused)
    sheet.notes.append(
        '"models" is the extra memory in models of the replies\' dtype. "GB/s" is of the replies\' bytes. Errors are '
        "distances from the mean in float64, relative to those of that mean rounded to the replies' dtype. FedMerge "
        "has spill_above_bytes=None: updates stay in memory, as with Flower's strategies."
    )
    report.table(sheet)
    return targets.of_flower(results)


def server(bench: rows.Bench, arguments: argparse.Namespace, report: Report) -> list[targets.Limit]:
    """Whole servers."""
    work = rows.server_rows(bench, arguments.server_size)
    results = bench.measure(work)
    size = 4 * parameters_of(arguments.server_size)
    sheet = plain(f"a server in process, clients of {size / 1e6:.0f} MB, float32", "Strategy.start", work, results)
    settings = " ".join(f"{name}={value}" for name, value in rows.GIVES_BACK.items())
    sheet.notes.append(
        "Updates are on disk (spill_folder) unless it says in memory. Extra memory is above the process with the "
        "initial record at hand; it holds the strategy's copies of the model and the replies that are being dealt "
        f'with. Walls include making the replies. "memory given back": with {settings}.'
    )
    report.table(sheet)
    return targets.of_server(results, size)


def kernels(bench: rows.Bench, arguments: argparse.Namespace, report: Report) -> list[targets.Limit]:
    """Seconds before the first merge that are in no other row."""
    work = rows.kernel_rows(bench, arguments.models, ("bfloat16", "float16", "float32"))
    title = "loading the kernels: importing numba, and every method once on tiny models of three dtypes"
    report.table(plain(title, "kernels", work, bench.measure(work)))
    return []


def scaling(bench: rows.Bench, arguments: argparse.Namespace, report: Report) -> list[targets.Limit]:
    """Exponents for every method, and memory with few and with many models."""
    size = arguments.scaling_size
    at_each_count = size if arguments.full else size // 4
    slopes = measure_scaling(
        bench,
        report,
        arguments.dtypes[0],
        arguments.methods,
        COUNTS,
        at_each_count,
        (size // 4, size // 2, size),
        arguments.models,
    )
    counts = (COUNTS[2], COUNTS[-1])
    methods = [method for method in MEMORY_METHODS if method in arguments.methods]
    work = rows.memory_rows(bench, at_each_count, arguments.dtypes[0], methods, counts)
    results = bench.measure(work)
    title = f"memory against N: models of {parameters_of(at_each_count):,} parameters, {arguments.dtypes[0]}"
    report.table(plain(title, "work", work, results))
    limits = targets.of_scaling(slopes)
    for method in methods:
        limits += targets.of_memory(results, method, counts)
    return limits


# --- the command line ------------------------------------------------------------------------------------------------


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line, with defaults filled in."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.engine",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--quick", action="store_true", help="16 M parameters, in minutes (the default)")
    sizes.add_argument("--full", action="store_true", help="0.25 B parameters, two dtypes: hours, and 30 GB of disk")
    parser.add_argument("--scaling", action="store_true", help="short for --parts scaling")
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="some methods instead of all")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="some parts instead of all")
    parser.add_argument("--no-mergekit", action="store_true", help="leave mergekit out (and do not install it)")
    parser.add_argument("--models", type=int, default=8, help="clients' models beside the base (default: 8)")
    parser.add_argument("--size", type=int, help="parameters of a model, about")
    parser.add_argument("--flower-size", type=int, help="of a reply (default: 16 M, with --full 100 M)")
    parser.add_argument("--server-size", type=int, help="of a client of the server (default: 5 M, with --full 50 M)")
    parser.add_argument("--scaling-size", type=int, help="the largest model (default: 32 M, with --full 0.25 B)")
    parser.add_argument("--dtypes", nargs="+", choices=["bfloat16", "float16", "float32"], help="of the files")
    parser.add_argument("--repeats", type=int, help="measurements of each job (default: 5)", default=5)
    parser.add_argument("--budget", type=float, help="seconds after which a job is not repeated any more")
    parser.add_argument(
        "--markdown", type=Path, metavar="FILE", help="write the tables there as well, between its marks if it has them"
    )
    chosen = parser.parse_args(arguments)
    if chosen.scaling:
        chosen.parts = ["scaling"]
    full = chosen.full
    chosen.size = chosen.size or (250_000_000 if full else 16_000_000)
    chosen.flower_size = chosen.flower_size or (100_000_000 if full else 16_000_000)
    chosen.server_size = chosen.server_size or (50_000_000 if full else 5_000_000)
    chosen.scaling_size = chosen.scaling_size or (250_000_000 if full else 32_000_000)
    chosen.dtypes = chosen.dtypes or (["bfloat16", "float32"] if full else ["bfloat16"])
    chosen.budget = chosen.budget or (300.0 if full else 1.0)
    chosen.methods = chosen.methods or rows.methods_of(chosen.models)
    unknown = [method for method in chosen.methods if method not in METHODS]
    if unknown:
        parser.error(f"no such method: {', '.join(unknown)} (there are: {', '.join(METHODS)})")
    if chosen.models < 2 or min(chosen.size, chosen.flower_size, chosen.server_size, chosen.scaling_size // 4) < 1000:
        parser.error("at least 2 models of at least 1000 parameters are wanted (--scaling-size: 4000)")
    return chosen


def machine() -> str:
    """The machine and the versions in two lines."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass
    load = f", load {os.getloadavg()[0]:.1f} before the run" if hasattr(os, "getloadavg") else ""
    packages = ", ".join(
        f"{package} {version(package)}" for package in ("torch", "numpy", "numba", "safetensors", "flwr")
    )
    return (
        f"{os.cpu_count()} cores, {name}{load}\n{platform.system()} {platform.release()}, Python "
        f"{platform.python_version()}, fl_merge {fl_merge.__version__}, {packages}"
    )


def tell(text: str) -> None:
    """Progress and failures, on the error stream."""
    console.print(text, markup=False, soft_wrap=True)


def main() -> None:
    arguments = parsed()
    report = Report(shlex.join(["python", "-m", "benchmarks.engine", *sys.argv[1:]]), arguments.markdown)
    report.line(machine())
    if hasattr(os, "getloadavg") and os.getloadavg()[0] > BUSY * (os.cpu_count() or 1):
        report.line("Other programs are running: walls and their ratios do not hold, not even roughly.")

    def stop(*_: object) -> NoReturn:
        sys.exit(143)

    # Ended from outside, as with Ctrl-C: processes and files are cleared away.
    signal.signal(signal.SIGTERM, stop)
    limits: list[targets.Limit] = []
    failed: list[str] = []
    try:
        for names, part in (
            (("kernels",), kernels),
            (("files", "memory"), files_and_memory),
            (("flower",), flower),
            (("server",), server),
            (("scaling",), scaling),
        ):
            if not set(names) & set(arguments.parts):
                continue
            # A folder for each part: the models of one are not kept beside those of the next.
            with tempfile.TemporaryDirectory(prefix="fl-merge-engine-") as folder:
                bench = rows.Bench(Path(folder), arguments.repeats, arguments.budget, tell, failed)
                limits += part(bench, arguments, report)
    except KeyboardInterrupt:
        tell("stopped")
        sys.exit(130)
    where = (
        "at the sizes of --full" if arguments.full else "at the sizes of this run (they are meant for those of --full)"
    )
    if limits:
        report.table(targets.sheet(limits, where))
    report.save()
    if failed:
        tell(f"failed: {', '.join(failed)}")
        sys.exit(1)


if __name__ == "__main__":
    main()
