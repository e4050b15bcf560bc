"""The merge engine beside its peers, measured in one run: prints one table with ratios.

    python benchmarks/engine.py --quick            8 models of 8 M parameters, bfloat16
    python benchmarks/engine.py --full             8 models of 0.25 B parameters, bfloat16 and float32
    python benchmarks/engine.py --scaling          cost against the number of models and against their size

What is measured:
    floor       read the base and all models once, write one model: nothing can be faster
    files       fl_merge's execute(), from safetensors files to a safetensors folder
    memory      the same, from tensors in memory to tensors in memory
    flower      aggregate_train of Flower's strategies and of FedMerge, on the same replies in memory
    mergekit    its command line on the same folders, in an environment of its own, made on first use in the user's
                cache folder. It accumulates in float32, as fl_merge does; densities are fl_merge's defaults.

Each number is a median over fresh processes. Imports, and the same work on a tiny model, come before the clock starts;
opening the files and writing the result are inside. Files are in the page cache. "extra" is the highest anonymous
memory above what the process had when the clock started: inputs in memory are not in it, the result is.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import platform
import select
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import fl_merge
from fl_merge import METHODS

WORKER = Path(__file__).with_name("engine_worker.py")
PARTS = ("files", "memory", "flower", "mergekit")
MERGEKIT = "mergekit==0.1.5"
MERGEKIT_TORCH = "torch==2.13.0"
MERGEKIT_METHODS = {  # ours, and theirs
    "weighted_average": "linear",
    "slerp": "slerp",
    "task_arithmetic": "task_arithmetic",
    "ties": "ties",
    "dare_linear": "dare_linear",
    "dare_ties": "dare_ties",
}
FLOWER_ROBUST = {  # Flower's strategy, its settings, and the method of ours that does the same
    "FedMedian": ({}, "median"),
    "MultiKrum": ({"num_malicious_nodes": 1, "num_nodes_to_select": 4}, "multi_krum"),
}
SAMPLE_SECONDS = 0.002
UNSTABLE = 0.5
"""The spread, (slowest - fastest) / median, from which a row's ratios say little."""

console = Console(width=max(132, Console().width), highlight=False)
notes = Console(stderr=True, highlight=False)


@dataclass(frozen=True)
class Measured:
    """Medians over the repeats of one job; seconds, and bytes where the system tells them."""

    wall: float
    cpu: float
    extra: int | None
    spread: float
    best: float


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        label: what was done.
        job: for the worker.
        against: in a peer's row, the label of the row of ours that does the same work.
        python: the interpreter that runs the worker.
        floor: the label of the row that reads and writes as much.
    """

    label: str
    job: dict[str, Any]
    against: str | None = None
    python: str = sys.executable
    floor: str | None = None


@dataclass(frozen=True)
class Bench:
    """Where the data are, and how often each job is measured."""

    folder: Path
    repeats: int
    counter: Iterator[int] = field(default_factory=itertools.count)
    failed: list[str] = field(default_factory=list)

    def data(self, models: int, size: int, dtype: str) -> Path:
        """The folder of these models, made on first use; a run with fewer models takes the first of them."""
        found = self.folder / f"{size}-{dtype}"
        make_models(found, models, size, dtype)
        return found

    def measure(self, row: Row) -> Measured | None:
        """Run the row's job in fresh processes; None, and a notice, if it fails."""
        runs = []
        for _ in range(self.repeats):
            out = self.folder / f"out-{next(self.counter)}"
            try:
                runs.append(run_worker(row.python, row.job | {"out": str(out)}))
            except RuntimeError as error:
                notes.print(f"{row.label}: failed: {error}", markup=False, soft_wrap=True)
                self.failed.append(row.label)
                return None
            finally:
                shutil.rmtree(out, ignore_errors=True)
        walls = [run.wall for run in runs]
        extras = [run.extra for run in runs if run.extra is not None]
        return Measured(
            statistics.median(walls),
            statistics.median(run.cpu for run in runs),
            int(statistics.median(extras)) if extras else None,
            (max(walls) - min(walls)) / statistics.median(walls),
            min(walls),
        )


# --- data ------------------------------------------------------------------------------------------------------------


def llama_shapes(parameters: int) -> tuple[dict[str, tuple[int, ...]], dict[str, Any]]:
    """Tensors and config.json of a Llama-shaped model with about so many parameters.

    A width h gives embeddings of 8 h tokens (twice, they are not tied) and layers of 12 h^2.
    """
    width = max(16, 16 * round(1.5 * parameters ** (1 / 3) / 16))
    while width > 16 and 28 * width**2 > 1.2 * parameters:
        width -= 16
    layers = max(1, round((parameters - 16 * width**2) / (12 * width**2)))
    tokens, inner = 8 * width, 8 * width // 3
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (tokens, width)}
    for number in range(layers):
        layer = f"model.layers.{number}"
        shapes |= {f"{layer}.self_attn.{name}_proj.weight": (width, width) for name in "qkvo"}
        shapes |= {f"{layer}.mlp.{name}_proj.weight": (inner, width) for name in ("gate", "up")}
        shapes[f"{layer}.mlp.down_proj.weight"] = (width, inner)
        shapes |= {f"{layer}.{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (width,), "lm_head.weight": (tokens, width)}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 16,
        "num_key_value_heads": width // 16,
        "vocab_size": tokens,
        "tie_word_embeddings": False,
    }
    return shapes, config


def make_models(folder: Path, models: int, parameters: int, dtype: str) -> None:
    """A base and clients that differ a little from it, as folders that Hugging Face libraries read."""
    import torch

    from fl_merge.store import SafetensorsSource, save

    shapes, config = llama_shapes(parameters)
    kind = getattr(torch, dtype)
    for number, name in enumerate(["base", *(f"client-{client}" for client in range(models))]):
        if (folder / name).exists():
            continue
        draw = torch.Generator().manual_seed(number)
        if name == "base":
            tensors = {key: (0.02 * torch.randn(shape, generator=draw)).to(kind) for key, shape in shapes.items()}
        else:
            base = SafetensorsSource(folder / "base")
            tensors = {
                key: (base.read(key) + 0.002 * torch.randn(shape, generator=draw)).to(kind)
                for key, shape in shapes.items()
            }
        save(tensors, folder / name)
        (folder / name / "config.json").write_text(json.dumps(config | {"torch_dtype": dtype}))


# --- measuring -------------------------------------------------------------------------------------------------------


def run_worker(python: str, job: dict[str, Any]) -> Measured:
    """Run one job once, watching its anonymous memory from here.

    Raises:
        RuntimeError: if the worker fails, with the last line that it printed.
    """
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if python != sys.executable:
        environment.pop("PYTHONPATH", None)
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [python, str(WORKER), json.dumps(job)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            if process.stdout.readline() == "ready\n":
                before = anonymous_bytes(process.pid)
                highest = before or 0
                process.stdin.write("\n")
                process.stdin.flush()
                while not select.select([process.stdout], [], [], SAMPLE_SECONDS)[0]:
                    highest = max(highest, anonymous_bytes(process.pid) or 0)
                highest = max(highest, anonymous_bytes(process.pid) or 0)
                answer = process.stdout.readline()  # empty if the worker has died
                if answer:
                    seconds = json.loads(answer)
                    extra = None if before is None else highest - before
                    return Measured(seconds["wall"], seconds["cpu"], extra, 0.0, seconds["wall"])
            process.wait()
            errors.seek(0)
            lines = errors.read().strip().splitlines()
            raise RuntimeError(lines[-1] if lines else f"exit code {process.returncode}")
        finally:
            process.kill()
            process.wait()
            process.stdin.close()
            process.stdout.close()


def anonymous_bytes(pid: int) -> int | None:
    """A process's anonymous memory; None where the system does not tell (anywhere but on Linux)."""
    try:
        with open(f"/proc/{pid}/status") as file:
            for line in file:
                if line.startswith("RssAnon:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def mergekit_python() -> str | None:
    """The interpreter of mergekit's environment, made on first use; None, and a notice, if it cannot be made."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fl_merge-bench"
    home = cache / MERGEKIT.replace("==", "-")
    python = home / "bin" / "python"
    works = [str(python), "-c", "import mergekit"]
    if python.exists() and subprocess.run(works, capture_output=True).returncode == 0:
        return str(python)
    notes.print(f"installing {MERGEKIT} into {home}: a few minutes, once", soft_wrap=True)
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet", MERGEKIT, MERGEKIT_TORCH]
    for command in ([sys.executable, "-m", "venv", "--clear", str(home)], pip):
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode != 0:
            last = (done.stdout.strip().splitlines() or ["no reason given"])[-1]
            notes.print(f"mergekit is left out: it cannot be installed ({last})", markup=False, soft_wrap=True)
            shutil.rmtree(home, ignore_errors=True)
            return None
    return str(python)


# --- what is measured ------------------------------------------------------------------------------------------------


def rows_of(bench: Bench, arguments: argparse.Namespace, dtype: str, mergekit: str | None) -> list[Row]:
    """Every job of one table; the floors first."""
    count, parts, methods = arguments.models, arguments.parts, arguments.methods
    data = bench.data(count, arguments.size, dtype)
    common = {"folder": str(data), "tiny": str(bench.data(count, 5000, dtype)), "models": count, "dtype": dtype}
    pair = common | {"models": 2}
    rows: list[Row] = []
    floors = {False: f"floor, files, {count} models", True: f"floor, memory, {count} models"}
    floor_of_two = "floor, files, 2 models"
    for memory, part in ((False, "files"), (True, "memory")):
        if part in parts or (part == "files" and mergekit):
            rows.append(Row(floors[memory], common | {"kind": "floor", "memory": memory}))
    two = "slerp" in methods and count != 2 and ("files" in parts or mergekit)
    if two:
        rows.append(Row(floor_of_two, pair | {"kind": "floor", "memory": False}))
    for memory, part in ((False, "files"), (True, "memory")):
        for method in methods if part in parts else ():
            job = {"kind": "merge", "memory": memory, "method": method}
            rows.append(Row(f"{part}: {method}", common | job, floor=floors[memory]))
            if method == "slerp" and not memory and two:
                rows.append(Row("files: slerp, 2 models", pair | job, floor=floor_of_two))
    for method in methods if mergekit else ():
        if method in MERGEKIT_METHODS:
            default = METHODS[method].parameters.get("density")
            job = {"kind": "mergekit", "method": MERGEKIT_METHODS[method], "density": default and default.default}
            ours, inputs, limit = f"files: {method}", common, floors[False]
            if method == "slerp" and two:
                ours, inputs, limit = "files: slerp, 2 models", pair, floor_of_two
            label = f"mergekit: {MERGEKIT_METHODS[method]}" + (", 2 models" if inputs is pair else "")
            rows.append(Row(label, inputs | job, against=ours, python=mergekit, floor=limit))
    if "flower" in parts:
        for wire in ("float32", "float16"):
            job = {"kind": "flower", "dtype": wire, "settings": {}, "method": None}
            ours = f"flower: FedMerge(weighted_average()), {wire}"
            rows.append(Row(ours, common | job | {"strategy": "FedMerge"}))
            rows.append(Row(f"flower: FedAvg, {wire}", common | job | {"strategy": "FedAvg"}, against=ours))
        for strategy, (settings, method) in FLOWER_ROBUST.items() if arguments.full else ():
            job = {"kind": "flower", "dtype": "float32"}
            ours = f"flower: FedMerge({method}()), float32"
            if method in METHODS:
                rows.append(Row(ours, common | job | {"strategy": "FedMerge", "settings": {}, "method": method}))
            job |= {"strategy": strategy, "settings": settings, "method": None}
            rows.append(Row(f"flower: {strategy}, float32", common | job, against=ours))
    return rows


def side_by_side(bench: Bench, arguments: argparse.Namespace, dtype: str, mergekit: str | None) -> None:
    """Measure everything on models of one dtype and print the table."""
    rows = rows_of(bench, arguments, dtype, mergekit)
    results: dict[str, Measured] = {}
    with notes.status("") as status:
        for number, row in enumerate(rows, start=1):
            status.update(f"{dtype}: {number} of {len(rows)}: {row.label}")
            found = bench.measure(row)
            if found is not None:
                results[row.label] = found
    table = Table(
        title=f"{arguments.models} models of {parameters_of(arguments.size):,} parameters, {dtype}; "
        f"median of {bench.repeats}",
        title_justify="left",
        box=None,
        pad_edge=False,
        header_style="bold",
    )
    table.add_column("work", no_wrap=True)
    for heading in (
        "wall s",
        "best s",
        "spread",
        "CPU s",
        "extra MB",
        "x floor",
        "CPU x floor",
        "x ours",
        "CPU x ours",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        mine = results.get(row.label)
        if mine is None:
            table.add_row(row.label, "failed")
            continue
        extra = "" if mine.extra is None else f"{mine.extra / 1e6:.0f}"
        seconds = (f"{mine.wall:.3f}", f"{mine.best:.3f}", f"{mine.spread:.0%}", f"{mine.cpu:.3f}", extra)
        table.add_row(
            row.label, *seconds, *ratios(mine, results.get(row.floor)), *ratios(mine, results.get(row.against))
        )
    console.print(table)
    unstable = [row.label for row in rows if row.label in results and results[row.label].spread > UNSTABLE]
    if unstable:
        console.print(
            f"\nUnstable (spread over {UNSTABLE:.0%}), not to be quoted: {'; '.join(unstable)}", soft_wrap=True
        )


def ratios(mine: Measured, other: Measured | None) -> tuple[str, str]:
    """Of walls and of CPU seconds."""
    if other is None:
        return "", ""
    return f"{mine.wall / other.wall:.1f}", f"{mine.cpu / other.cpu:.1f}" if other.cpu > 0 else ""


def scaling(bench: Bench, arguments: argparse.Namespace, dtype: str) -> None:
    """Print the cost of each method against N and against size, with the slope of the line through the logarithms."""
    counts = [2, 4, 8, 16, 32]
    sizes = [arguments.size // 4, arguments.size, arguments.size * 4]
    by_count = [(count, count, arguments.size) for count in counts]
    by_size = [(parameters_of(size), arguments.models, size) for size in sizes]
    for title, unit, points in (
        (f"{parameters_of(arguments.size):,} parameters, {dtype}, from files to files", "N = {}", by_count),
        (f"{arguments.models} models, {dtype}, from files to files", "{:,}", by_size),
    ):
        table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
        table.add_column("wall s (extra MB)", no_wrap=True)
        for x, _, _ in points:
            table.add_column(unit.format(x), justify="right", no_wrap=True)
        table.add_column("exponent", justify="right")
        table.add_column("of CPU s", justify="right")
        for name in ("floor", *arguments.methods):
            cells, found = [], []
            for x, count, size in points:
                data, tiny = bench.data(count, size, dtype), bench.data(count, 5000, dtype)
                job = {"folder": str(data), "tiny": str(tiny), "models": count, "dtype": dtype, "memory": False}
                job |= {"kind": "floor"} if name == "floor" else {"kind": "merge", "method": name}
                with notes.status(f"{name}: {unit.format(x)}"):
                    measured = bench.measure(Row(f"{name}, {unit.format(x)}", job))
                if measured is None:
                    cells.append("failed")
                    continue
                found.append((x, measured))
                extra = "" if measured.extra is None else f" ({measured.extra / 1e6:.0f})"
                cells.append(f"{measured.wall:.3f}{extra}")
            walls = exponent([(x, measured.wall) for x, measured in found])
            cpus = exponent([(x, measured.cpu) for x, measured in found])
            table.add_row(name, *cells, walls, cpus)
        console.print(table)
        console.print()


def exponent(points: Sequence[tuple[float, float]]) -> str:
    """The slope of log y over log x, by least squares."""
    if len(points) < 2 or any(y <= 0 for _, y in points):
        return ""
    fit = statistics.linear_regression([math.log(x) for x, _ in points], [math.log(y) for _, y in points])
    return f"{fit.slope:.2f}"


def parameters_of(size: int) -> int:
    """How many parameters the models have that are asked to have about `size`."""
    return sum(math.prod(shape) for shape in llama_shapes(size)[0].values())


def machine() -> str:
    """The machine and the versions in one line."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass
    load = f", load {os.getloadavg()[0]:.1f} before the run" if hasattr(os, "getloadavg") else ""
    packages = ", ".join(f"{package} {version(package)}" for package in ("torch", "numpy", "safetensors", "flwr"))
    return (
        f"{os.cpu_count()} cores, {name}{load}\n{platform.system()} {platform.release()}, Python "
        f"{platform.python_version()}, fl_merge {fl_merge.__version__}, {packages}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--quick", action="store_true", help="8 M parameters, median of 3 (the default)")
    sizes.add_argument("--full", action="store_true", help="0.25 B parameters, median of 5, Flower's robust strategies")
    parser.add_argument("--scaling", action="store_true", help="cost against N and size, instead of the table")
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="some methods instead of all")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="some parts instead of all")
    parser.add_argument("--no-mergekit", action="store_true", help="leave mergekit out (and do not install it)")
    parser.add_argument("--models", type=int, default=8, help="clients' models beside the base (default: 8)")
    parser.add_argument("--size", type=int, help="parameters of a model, about")
    parser.add_argument("--dtypes", nargs="+", choices=["bfloat16", "float16", "float32"], help="of the files")
    parser.add_argument("--repeats", type=int, help="measurements of each job")
    arguments = parser.parse_args()
    arguments.size = arguments.size or (250_000_000 if arguments.full else 8_000_000)
    arguments.repeats = arguments.repeats or (5 if arguments.full else 3)
    failed: list[str] = []
    dtypes = arguments.dtypes or (["bfloat16", "float32"] if arguments.full else ["bfloat16"])
    arguments.methods = arguments.methods or list(METHODS)
    unknown = [method for method in arguments.methods if method not in METHODS]
    if unknown:
        parser.error(f"no such method: {', '.join(unknown)} (there are: {', '.join(METHODS)})")
    if arguments.models < 2 or arguments.size < 1000:
        parser.error("at least 2 models of at least 1000 parameters are wanted")

    console.print(machine(), soft_wrap=True)
    console.print()
    # Ended from outside, as with Ctrl-C: processes and files are cleared away.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    wants_mergekit = "mergekit" in arguments.parts and not arguments.no_mergekit and not arguments.scaling
    try:
        mergekit = mergekit_python() if wants_mergekit else None
        with tempfile.TemporaryDirectory(prefix="fl-merge-engine-") as folder:
            for dtype in dtypes:
                bench = Bench(Path(folder) / dtype, arguments.repeats, failed=failed)
                if arguments.scaling:
                    scaling(bench, arguments, dtype)
                else:
                    side_by_side(bench, arguments, dtype, mergekit)
                shutil.rmtree(bench.folder)
    except KeyboardInterrupt:
        notes.print("stopped")
        sys.exit(130)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
