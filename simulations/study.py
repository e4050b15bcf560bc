"""What the simulations share: work that can be stopped and goes on, paired bootstrap intervals, tables, files.

A study is a set of tasks with a key each, done by a function that returns rows: plain dictionaries, one for each seed
and configuration. Each finished task is a file in `OUT/parts`; a rerun does what is missing. What comes out:

    OUT/settings.json   what the rows depend on beside the seed; a rerun with other settings is refused
    OUT/raw.csv         one row a seed and configuration, unrounded
    OUT/table.md        the tables, as printed
    OUT/plot.png

Shape suffixes: R seeds (repetitions of the whole experiment).
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import fcntl
import hashlib
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Row = dict[str, Any]
"""Column -> text or number; None for what does not apply."""

RESAMPLES = 10_000


# Intervals ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and its bootstrap interval, in the unit of what was measured; bounds are nan for one seed."""

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether all of the interval is on one side of 0."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        """Rounded to a tenth, as in 62.1 [60.9, 63.0]."""
        return f"{self.mean:.1f}{self._bounds('')}"

    def signed(self) -> str:
        """The same with signs, for a difference: +3.1 [+1.9, +4.0]."""
        return f"{self.mean:+.1f}{self._bounds('+')}"

    def _bounds(self, sign: str) -> str:
        if math.isnan(self.low):
            return " [one seed]"
        return f" [{self.low:{sign}.1f}, {self.high:{sign}.1f}]"


def expanded_tail(level: float, count: int) -> float:
    """The share of the bootstrap distribution to cut off at each end for an interval of that level from `count` values.

    The plain percentile interval, (1 - level) / 2 at each end, is too narrow for few values: at 10 it contains the
    truth 90 to 91 times in 100, not 95. The expanded one (Hesterberg, 2015, arXiv:1411.5279, section 5.3) cuts off

        Phi(-sqrt(n / (n - 1)) * t),   t the (1 + level) / 2 quantile of Student's t with n - 1 degrees of freedom

    which makes up for the n in the variance of a resample, and for the variance that is estimated: for n = 10 and 95 %
    it is 0.86 % in place of 2.5 %.
    """
    from scipy.stats import t as student  # comes with scikit-learn; slow to import

    quantile = float(student.ppf((1 + level) / 2, count - 1))
    return NormalDist().cdf(-math.sqrt(count / (count - 1)) * quantile)


def bootstrap(values_R: Sequence[float], *, level: float = 0.95, resamples: int = RESAMPLES) -> Interval:
    """The mean of the values and its expanded percentile bootstrap interval; the draws are always the same.

    Args:
        values_R: one a seed.
        level: of confidence, in (0, 1).
        resamples: of R values each, drawn with replacement.

    It is never wider than the range of the values, which contains the middle of their distribution with probability
    1 - 2^(1 - R): from 6 seeds on that is above 0.95; with 3 it is 0.75, whatever `level` says.
    """
    values = np.asarray(values_R, dtype=np.float64)
    if values.ndim != 1 or len(values) == 0 or not np.isfinite(values).all():
        raise ValueError(f"bootstrap: found {list(values_R)}, wanted one finite number a seed, and at least one seed")
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return Interval(mean, math.nan, math.nan)
    drawn = np.random.default_rng(0).integers(len(values), size=(resamples, len(values)))
    means = values[drawn].mean(axis=1)
    tail = expanded_tail(level, len(values))
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(mean, float(low), float(high))


def paired(ours: Mapping[int, float], theirs: Mapping[int, float], **settings: Any) -> Interval:
    """The bootstrap interval of the mean difference ours - theirs, seed by seed.

    Seeds (a split, a start, an order of batches) differ more than methods do; a difference within one leaves that out.

    Args:
        ours, theirs: seed -> value, for the same seeds.
        settings: of `bootstrap`.
    """
    if ours.keys() != theirs.keys():
        raise ValueError(f"paired: found seeds {sorted(ours)} and {sorted(theirs)}, wanted the same")
    return bootstrap([ours[seed] - theirs[seed] for seed in sorted(ours)], **settings)


def by_seed(rows: Iterable[Row], column: str, factor: float = 1.0) -> dict[int, float]:
    """Seed -> one column's value times a factor. Every seed may come once."""
    found: dict[int, float] = {}
    for row in rows:
        if row["seed"] in found:
            raise ValueError(f"by_seed: seed {row['seed']} comes twice")
        found[row["seed"]] = factor * float(row[column])
    return found


def where(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    """The rows whose columns have these values."""
    return [row for row in rows if all(row[column] == value for column, value in wanted.items())]


# Doing it -------------------------------------------------------------------------------------------------------------


class StudyError(Exception):
    """The folder holds another study's rows, or a task failed."""


def arguments(description: str, name: str, parser: argparse.ArgumentParser | None = None) -> argparse.ArgumentParser:
    """The options that every simulation has."""
    parser = parser or argparse.ArgumentParser(description=description)
    parser.add_argument("--seeds", type=int, default=10, help="repetitions of everything (default 10)")
    parser.add_argument("--out", type=Path, default=Path("runs") / name, help=f"default runs/{name}")
    parser.add_argument("--workers", type=int, default=2, help="processes (default 2); 0 for this one")
    parser.add_argument("--quick", action="store_true", help="two seeds of a much smaller study, to see that it runs")
    return parser


def key(*words: str, of: object = None) -> str:
    """A task's key from words and, shortened, whatever else makes it another task; good as the name of a file."""
    told = "_".join(re.sub(r"[^A-Za-z0-9.-]+", "-", word) for word in words)
    digest = hashlib.blake2b(json.dumps(of).encode(), digest_size=4).hexdigest()
    return told if of is None else f"{told}_{digest}"


def perform(
    tasks: Mapping[str, tuple[Any, ...]],
    work: Callable[..., list[Row]],
    folder: Path,
    settings: Mapping[str, Any],
    *,
    workers: int = 2,
    console: Console | None = None,
) -> list[Row]:
    """Do the tasks that have no rows in the folder yet, in processes of their own, and give the rows of all of them.

    Ctrl-C, or anything else that ends it, keeps what finished tasks left.

    Args:
        tasks: key (a file name) -> the arguments of `work`.
        work: a function of a module; its rows hold text, numbers and None.
        folder: of the study, made if it is not there.
        settings: what rows depend on beside the task, as JSON; has to be what the folder's earlier rows were made with.
        workers: processes; 0 to do it in this one.
        console: where the progress is shown.

    Raises:
        StudyError: for a folder with other settings or with another run at work in it, or when a task failed.
    """
    parts = folder / "parts"
    parts.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        return _perform(tasks, work, folder, settings, workers, console)


def _perform(
    tasks: Mapping[str, tuple[Any, ...]],
    work: Callable[..., list[Row]],
    folder: Path,
    settings: Mapping[str, Any],
    workers: int,
    console: Console | None,
) -> list[Row]:
    parts = folder / "parts"
    _same_settings(folder / "settings.json", settings)
    missing = {key: task for key, task in tasks.items() if not (parts / f"{key}.json").exists()}
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as bar:
        shown = bar.add_task(folder.name, total=len(tasks), completed=len(tasks) - len(missing))
        for key, rows in _in_processes(missing, work, workers):
            _write_whole(parts / f"{key}.json", json.dumps(rows, indent=0))
            bar.advance(shown)
    return [row for key in tasks for row in json.loads((parts / f"{key}.json").read_text(encoding="utf-8"))]


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """While it lasts, no other run works in the folder. The lock is gone with the process, however that ends."""
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StudyError(f"another run is at work in {folder}: wait for it, or give another --out") from None
        yield


def _in_processes(
    tasks: Mapping[str, tuple[Any, ...]], work: Callable[..., list[Row]], workers: int
) -> Iterable[tuple[str, list[Row]]]:
    """Key and rows of each task, as they are done."""
    if workers == 0 or not tasks:
        for key, task in tasks.items():
            yield key, work(*task)
        return
    spawn = multiprocessing.get_context("spawn")  # a fork of a process that has run torch may hang
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(min(workers, len(tasks)), mp_context=spawn, initializer=_begin_worker)
    try:
        futures = {pool.submit(work, *task): key for key, task in tasks.items()}
        for future in as_completed(futures):
            try:
                rows = future.result()
            except Exception as error:
                raise StudyError(f"{futures[future]}: {type(error).__name__}: {error}") from error
            yield futures[future], rows
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in set(multiprocessing.active_children()) - before:
            process.terminate()
        raise
    pool.shutdown()


def _begin_worker() -> None:
    """One thread, deaf to Ctrl-C (the parent ends its workers), and gone when the parent is."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:

        def follow() -> None:
            parent.join()
            os._exit(1)

        threading.Thread(target=follow, daemon=True).start()


def _same_settings(path: Path, settings: Mapping[str, Any]) -> None:
    wanted = json.loads(json.dumps(settings))
    if not path.exists():
        _write_whole(path, json.dumps(wanted, indent=1))
        return
    found = json.loads(path.read_text(encoding="utf-8"))
    for key in {**found, **wanted}:
        if found.get(key) != wanted.get(key):
            raise StudyError(
                f"{path.parent} has rows made with {key} = {found.get(key)}, wanted {wanted.get(key)}: "
                "give another --out, or remove that folder"
            )


def _write_whole(path: Path, text: str) -> None:
    """The file is there with all of the text, or as it was."""
    new = path.with_suffix(".new")
    new.write_text(text, encoding="utf-8")
    os.replace(new, path)


def command(main: Callable[[], None]) -> None:
    """Run a script's main: Ctrl-C and a StudyError end it with a line, not with a traceback."""
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped; what is finished is kept, and the same command goes on from there")
    except StudyError as problem:
        sys.exit(str(problem))


# What comes out -------------------------------------------------------------------------------------------------------


def markdown(headings: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table: the first column to the left, the others to the right."""
    text = [f"| {' | '.join(headings)} |", f"|---|{'---:|' * (len(headings) - 1)}"]
    return "\n".join([*text, *(f"| {' | '.join(line)} |" for line in lines)])


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """All rows, unrounded; columns in the order in which they first come; None is an empty cell."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def report(folder: Path, rows: Sequence[Row], text: str, console: Console) -> None:
    """Write raw.csv and table.md, and print the latter as it is."""
    write_csv(folder / "raw.csv", rows)
    (folder / "table.md").write_text(f"{text}\n", encoding="utf-8")
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    console.print(f"\n{folder}/ has raw.csv, table.md and plot.png", style="dim", highlight=False)


def figure(width: float, height: float, columns: int = 1) -> tuple[Any, Any]:
    """A figure and its axes (several, side by side, on one scale), without a display."""
    import matplotlib as mpl  # a second's import: workers do without

    mpl.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False})
    return pyplot.subplots(1, columns, figsize=(width, height), layout="constrained", sharey=True)


def save(drawn: Any, path: Path) -> None:
    """Write the figure as a small PNG and forget it."""
    from matplotlib import pyplot

    drawn.savefig(path, dpi=85)
    pyplot.close(drawn)
