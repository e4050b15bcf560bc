"""A federation of eight clients on handwritten digits, and what each way of combining their models gives.

    make demo            or     python simulations/demo.py [--method ties] [--rounds 8] [--seed 0]

First a real federation: the Flower app in `clients/digits` runs for several rounds in process, its clients in worker
processes, and the merged model goes to the run folder. Then one table on the same clients and the same splits: the
baselines of `baselines.py`, and every registered merge method on the N models that the clients finetuned once from the
base, at its defaults and, where it has a `scale`, with the scale that is best on the server's validation images.

Nothing is chosen by looking at the test sets that the table reports.
"""

from __future__ import annotations

import argparse
import csv
import inspect
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from baselines import EPOCHS, HEADINGS, LEARNING_RATE, Population, Row, baselines, cells, model_bytes, population, table
from digits_clients import data
from digits_clients.data import Examples
from digits_clients.model import State
from fl_merge import METHODS
from fl_merge.errors import counted
from fl_merge.flower.simulate import simulate
from fl_merge.store import load
from one_shot import SCALES, Federation

APP = Path(__file__).resolve().parents[1] / "clients" / "digits"
LOCAL_EPOCHS = 5
SHOWN = (
    "weighted_average",
    "task_arithmetic",
    "slerp",
    "model_stock",
    "median",
    "ties",
    "dare_linear",
    "dare_ties",
    "magmax",
    "tsv_m",
    "iso_c",
    "wudi",
    "regmean",
)
"""The methods of the table: the best known ones of each family."""


# The federation ------------------------------------------------------------------------------------------------------


def run_federation(run_folder: Path, method: str, rounds: int, seed: int, console: Console) -> State:
    """Run the Flower app over several rounds, showing each as it happens; the run's files go to `run_folder`.

    Args:
        run_folder: where the run leaves its journal and the merged model.
        method: a registered merge method, at its defaults.
        rounds: at least 1; each client makes `LOCAL_EPOCHS` passes over its data in each.
        seed: of splits, training and draws.
        console: where the progress goes.

    Returns:
        The final global model, float32.
    """
    settings = [
        f"num-server-rounds={rounds}",
        f"local-epochs={LOCAL_EPOCHS}",
        f"seed={seed}",
        f"merge-method='{method}'",
    ]
    simulate(APP, overrides=settings, seed=seed, run_folder=run_folder, console=console)
    return load(run_folder)


# One-shot merges -----------------------------------------------------------------------------------------------------


def merged_rows(people: Population, validation: Sequence[Examples], console: Console) -> list[Row]:
    """The rows of the methods shown, the plain average first: at defaults, then with `scale` tuned if there is one."""
    federation, rows = Federation(people), []
    shown = [name for name in SHOWN if name in METHODS]
    columns = TextColumn("merging: {task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=len(shown))
        for number, name in enumerate(shown, start=1):
            bar.update(task, description=name, completed=number - 1)
            if not console.is_terminal:
                console.print(f"merging: {name}, {number} of {len(shown)}", highlight=False)
            rows.append(default_row(name, federation))
            if "scale" in METHODS[name].parameters:
                bar.update(task, description=f"{name}, {len(SCALES)} scales")
                rows.append(tuned_row(name, federation, validation))
    return rows


def default_row(name: str, federation: Federation) -> Row:
    """The method at its defaults; the seconds are the shortest of three merges, or of one that takes longer."""
    sent = uplink(federation.people) + sum(map(model_bytes, federation.statistics(name) or []))
    seconds: list[float] = []
    while len(seconds) < 3 and sum(seconds) < 0.3:
        start = time.perf_counter()
        state = federation.merged(name)
        seconds.append(time.perf_counter() - start)
    return Row(name, federation.people.judge(state), sent, min(seconds))


def tuned_row(name: str, federation: Federation, validation: Sequence[Examples]) -> Row:
    """The method with the scale of `SCALES` that has the best mean accuracy on the validation examples.

    Of equally good scales the smallest is taken. The other settings stay at their defaults.
    """
    best, state = federation.tuned(name, SCALES, validation)
    start = time.perf_counter()
    federation.merged(name, scale=best)
    seconds = time.perf_counter() - start
    at_edge = best in (SCALES[0], SCALES[-1])
    note = f"the best scale is at the end of the grid {SCALES[0]:g} to {SCALES[-1]:g}" if at_edge else ""
    people = federation.people
    return Row(f"{name}, scale {best:g}", people.judge(state), uplink(people), seconds, note=note)


def uplink(people: Population) -> int:
    """Bytes of all clients' models, once."""
    return len(people.clients) * model_bytes(people.base)


# The table ------------------------------------------------------------------------------------------------------------


def conditions(people: Population, num_validation: int) -> str:
    """The sizes, seeds and choices that the numbers depend on."""
    first = people.clients[0]
    defaults = "; ".join(
        f"{name}: {', '.join(f'{key}={value.default}' for key, value in entry.parameters.items())}"
        for name, entry in METHODS.items()
        if name in SHOWN
        and entry.parameters
        and all(p.default is not inspect.Parameter.empty for p in entry.parameters.values())
    )
    return " ".join(
        [
            f"{len(people.clients)} clients with {len(first.train)} private images each, all different;",
            f"{data.PUBLIC} public images for pretraining; each accuracy is on {len(first.test)} test images that",
            "nobody trains or tunes on, so differences of a point or two are noise.",
            f"Merges are one-shot: each client makes {EPOCHS} passes (gradient descent with momentum, rate",
            f"{LEARNING_RATE}) from the pretrained base and sends {model_bytes(people.base) / 1e6:.2f} MB of float32.",
            f"Rows with a scale: chosen from {SCALES[0]:g} to {SCALES[-1]:g} in steps of a factor 1.41 by mean",
            f"accuracy on {num_validation} labelled validation examples of the server's ({data.VALIDATION} images, per",
            "domain); all other settings are defaults. norm. %: mean over domains of accuracy / that of its own model.",
            f"Seed {people.seed} throughout. Defaults: {defaults}.",
            "The other methods, ten seeds and confidence intervals: python simulations/one_shot.py.",
        ]
    )


def write_markdown(path: Path, rows: Sequence[Row], individual: dict[str, float], below: str) -> None:
    """The table as Markdown, its notes and the conditions below it."""
    lines = [
        f"| model | {' | '.join(HEADINGS)} |",
        f"|---|{'---:|' * len(HEADINGS)}",
        *(f"| {row.name} | {' | '.join(cells(row, individual))} |" for row in rows),
        "",
        *(f"- {row.name}: {row.note}" for row in rows if row.note),
        "",
        below,
        "",
    ]
    path.write_text("\n".join(lines), encoding="utf-8")


def write_csv(path: Path, rows: Sequence[Row], individual: dict[str, float]) -> None:
    """The table as CSV: shares in [0, 1] unrounded, bytes, seconds, and the accuracy on every domain."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        costs = ["uplink_bytes", "merge_seconds", "forward_passes"]
        writer.writerow(["model", "mean", "worst", "normalised", *costs, *individual, "note"])
        for row in rows:
            quality = [row.mean, row.worst, row.normalised(individual)]
            seconds = "" if row.merge_seconds is None else row.merge_seconds
            costs = [row.uplink_bytes, seconds, row.forward_passes]
            writer.writerow([row.name, *quality, *costs, *(row.accuracies[name] for name in individual), row.note])


def main() -> None:
    parser = argparse.ArgumentParser(description="A federation on digits, and one table of what each merge gives.")
    parser.add_argument("--method", default="ties", choices=list(METHODS), help="the federation's")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where the run folder goes (default runs/)")
    parser.add_argument("--table-only", action="store_true", help="skip the federation")
    arguments = parser.parse_args()
    console = Console()
    torch.set_num_threads(1)  # tensors this small gain nothing from more, and lose where cores are shared
    start = time.perf_counter()
    run_folder = arguments.runs / f"{datetime.now():%Y%m%d-%H%M%S}-digits"
    run_folder.mkdir(parents=True)

    federated = []
    if not arguments.table_only:
        federated.append(run_federation(run_folder, arguments.method, arguments.rounds, arguments.seed, console))

    what = "each client alone, and the baselines ..."
    if not console.is_terminal:
        console.print(what, highlight=False)
    with console.status(what):
        people = population(seed=arguments.seed)
        rows = baselines(people)
    validation = list(data.validation_examples(seed=arguments.seed).values())
    rows += merged_rows(people, validation, console)
    for state in federated:
        name = f"federation, {counted(arguments.rounds, 'round')}"
        note = f"{arguments.method} at its defaults in each round, {LOCAL_EPOCHS} local passes a round"
        rows.append(Row(name, people.judge(state), arguments.rounds * uplink(people), note=note))

    below = conditions(people, sum(map(len, validation)))
    console.print(table(rows, people.individual, "Eight clients, eight domains: accuracy over all domains"))
    console.print(below, style="dim", highlight=False)
    write_markdown(run_folder / "table.md", rows, people.individual, below)
    write_csv(run_folder / "table.csv", rows, people.individual)
    console.print(f"\n{run_folder}/ has table.md and table.csv; {time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped")
