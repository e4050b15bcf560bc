"""Eight domains, one merge: every registered method against the weighted average, with intervals over seeds.

    python simulations/one_shot.py --seeds 10 --out runs/one_shot

Each seed is a whole experiment: a split of the images, a base pretrained on the public ones, eight clients that
finetune it once on their own domain, the baselines of `baselines.py`, and each method of the registry on the eight
models, at its defaults and, where it has a `scale`, with the one that is best on the server's validation images. Those
are no client's; the test images are looked at once, by the model that was chosen.

Statistics that a method asks for are computed by each client on its own training images after finetuning.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import study
from baselines import EPOCHS, Population, baselines, population
from digits_clients import data, model
from digits_clients.data import Examples
from digits_clients.model import State
from fl_merge import METHODS, FlMergeError, build, merge
from fl_merge.naming import STATISTICS
from fl_merge.statistics import collect
from study import Row

SCALES = tuple(round(2 ** (k / 2), 3) for k in range(-5, 5))
"""0.177 to 4 in steps of a factor 1.41: the scales that a tuned one is chosen from."""

BASELINES = "baselines"
AVERAGE = "weighted_average"
SCALED = "task_arithmetic"

QUICK_METHODS = ("weighted_average", "task_arithmetic", "ties", "nearswap")


# One seed -------------------------------------------------------------------------------------------------------------


def baseline_rows(seed: int, epochs: int) -> list[Row]:
    """The rows of the baselines for one seed."""
    federation = federation_of(seed, epochs)
    return [
        federation.row(found.name.partition(", forgets")[0], "baseline", found.accuracies)
        for found in baselines(federation.people)
    ]


def method_rows(seed: int, epochs: int, name: str, scales: Sequence[float]) -> list[Row]:
    """A method's rows for one seed: at its defaults, and with its scale tuned if it has one.

    Args:
        seed: of everything.
        epochs: of each client's finetuning.
        name: a registered method.
        scales: to choose from.
    """
    federation = federation_of(seed, epochs)
    people = federation.people
    start = time.perf_counter()
    try:
        state = federation.merged(name)
    except FlMergeError as problem:
        return [{"seed": seed, "model": name, "setting": "refused", "note": str(problem)}]
    seconds = time.perf_counter() - start
    rows = [federation.row(name, "default", people.judge(state), merge_seconds=seconds)]
    if "scale" in METHODS[name].parameters:
        validation = list(data.validation_examples(seed=seed).values())
        best, state = federation.tuned(name, scales, validation)
        rows.append(federation.row(name, "tuned", people.judge(state), scale=best))
    return rows


def model_methods() -> list[str]:
    """The registered methods that merge whole models (the others merge adapters)."""
    return [name for name, entry in METHODS.items() if entry.merges == "models"]


def work(name: str, seed: int, epochs: int, scales: Sequence[float] = ()) -> list[Row]:
    """The rows of one task."""
    return baseline_rows(seed, epochs) if name == BASELINES else method_rows(seed, epochs, name, scales)


@lru_cache(maxsize=1)
def federation_of(seed: int, epochs: int) -> Federation:
    """The clients of a seed and what they finetuned. A process keeps those of the seed that it is at."""
    return Federation(population(seed=seed, epochs=epochs))


class Federation:
    """The models of a population, ready to be merged by any method."""

    def __init__(self, people: Population) -> None:
        self.people = people
        self.weights = [float(len(client.train)) for client in people.clients]
        self.individual = people.individual
        steps = [people.epochs * model.steps_an_epoch(len(client.train)) for client in people.clients]
        self.metrics = {str(i): {"local-steps": count} for i, count in enumerate(steps)}
        self._statistics: dict[tuple[str, ...], list[dict[str, torch.Tensor]]] = {}

    def row(self, name: str, setting: str, accuracies: Mapping[str, float], **more: object) -> Row:
        """The row of a model with these accuracies on the clients' test sets."""
        own = self.individual
        each = [accuracies[domain] for domain in own]
        normalised = sum(accuracies[domain] / own[domain] for domain in own) / len(own)
        quality = {"mean": sum(each) / len(each), "worst": min(each), "normalised": normalised}
        return {"seed": self.people.seed, "model": name, "setting": setting, **quality, **accuracies, **more}

    def merged(self, name: str, **settings: Any) -> State:
        """One model of the N finetuned ones, weighted by their numbers of examples."""
        people = self.people
        return merge(
            build(name, **settings),
            people.base,
            list(people.finetuned),
            self.weights,
            seed=people.seed,
            statistics=self.statistics(name),
            metrics=self.metrics,
            threads=1,
        )

    def statistics(self, name: str) -> list[dict[str, torch.Tensor]] | None:
        """What the clients send for a method beyond their models; computed once, of all their training examples."""
        kinds = tuple(kind for kind in METHODS[name].sends if kind in STATISTICS)
        if not kinds:
            return None
        if kinds not in self._statistics:
            pairs = zip(self.people.finetuned, self.people.clients, strict=True)
            self._statistics[kinds] = [
                collect(model.network(state), [client.train.images_BHW], kinds, max(len(client.train), 1))
                for state, client in pairs
            ]
        return self._statistics[kinds]

    def tuned(self, name: str, scales: Sequence[float], validation: Sequence[Examples]) -> tuple[float, State]:
        """The scale with the best mean accuracy on the validation examples, the smallest of equals; and its model."""
        at = along_scales(lambda scale: self.merged(name, scale=scale), self.people.base)
        scores = {}
        for scale in scales:
            state = at(scale)
            scores[scale] = sum(model.accuracy(state, examples) for examples in validation)
        best = max(scores, key=scores.__getitem__)
        return best, at(best)


def along_scales(merged: Callable[[float], State], base: State) -> Callable[[float], State]:
    """The merged model for any scale, from one merge if the method is linear in it, else from a merge each.

    Linear is what gives, at scale 2, base + 2 * (model at 1 - base), to 1e-5 of that delta's norm.
    """
    delta = {name: tensor - base[name] for name, tensor in merged(1.0).items()}

    def on_the_line(scale: float) -> State:
        return {name: tensor + scale * delta[name] for name, tensor in base.items()}

    line, found = on_the_line(2.0), merged(2.0)
    off = norm({name: tensor - line[name] for name, tensor in found.items()})
    return on_the_line if off <= 1e-5 * norm(delta) else merged


def norm(tensors: Mapping[str, torch.Tensor]) -> float:
    """Euclidean norm over all tensors."""
    return sum(float(tensor.double().square().sum()) for tensor in tensors.values()) ** 0.5


# All seeds ------------------------------------------------------------------------------------------------------------


def tables(rows: Sequence[Row], scales: Sequence[float]) -> str:
    """The tables of means and of paired differences, as Markdown."""
    refusals = {row["model"]: row["note"] for row in rows if row["setting"] == "refused"}
    done = [row for row in rows if row["model"] not in refusals]
    average = study.by_seed(study.where(done, model=AVERAGE, setting="default"), "mean", 100)
    scaled = study.by_seed(study.where(done, model=SCALED, setting="tuned"), "mean", 100)
    quality = ["mean %", "worst %", "norm. %", "against the average"]
    baseline_lines, lines = [], []
    for name, setting, found in configurations(done):
        mean = study.by_seed(found, "mean", 100)
        line = [name, *means(found), study.paired(mean, average).signed()]
        if setting == "baseline":
            baseline_lines.append(line)
            continue
        if setting == "tuned":
            line = [f"{name}, {shown_scale(found)}", *line[1:], study.paired(mean, scaled).signed()]
        lines.append((sum(mean.values()), [*line, ""][: len(quality) + 2]))
    lines.sort(key=lambda line: -line[0])
    parts = [
        study.markdown(["baseline", *quality], baseline_lines),
        study.markdown(["method", *quality, "against scaled task arithmetic"], [line for _, line in lines]),
    ]
    if refusals:
        parts.append("Refused, and so not in the table:")
        parts.append("\n".join(f"- {name}: {note}" for name, note in refusals.items()))
    ends = scales[0], scales[-1]
    edges = ", ".join(sorted({row["model"] for row in done if row.get("scale") in ends}))
    if edges:
        parts.append(f"In some seed the best scale was at an end of the grid, {ends[0]:g} or {ends[1]:g}: {edges}.")
    return "\n\n".join(parts)


def configurations(rows: Sequence[Row]) -> list[tuple[str, str, list[Row]]]:
    """(model, setting, its rows) in the order in which they first come."""
    keys = dict.fromkeys((row["model"], row["setting"]) for row in rows)
    return [(name, setting, study.where(rows, model=name, setting=setting)) for name, setting in keys]


def means(rows: Sequence[Row]) -> list[str]:
    """Mean accuracy with its interval, then the means of the worst domain's and of the normalised accuracy."""
    every = {column: [100 * row[column] for row in rows] for column in ("mean", "worst", "normalised")}
    worst, normalised = (sum(every[column]) / len(rows) for column in ("worst", "normalised"))
    return [str(study.bootstrap(every["mean"])), f"{worst:.1f}", f"{normalised:.1f}"]


def shown_scale(rows: Sequence[Row]) -> str:
    """The scales that were chosen, from the smallest to the largest over seeds."""
    low, high = min(row["scale"] for row in rows), max(row["scale"] for row in rows)
    return f"scale {low:g}" if low == high else f"scale {low:g} to {high:g}"


def plot(rows: Sequence[Row], path: Path) -> None:
    """Mean accuracy and interval of each method, at its defaults and tuned, with the baselines as lines."""
    done = [row for row in rows if row["setting"] != "refused"]
    top = len({row["model"] for row in done if row["setting"] != "baseline"}) - 0.3
    found = {
        (name, setting): study.bootstrap([100 * row["mean"] for row in some])
        for name, setting, some in configurations(done)
    }
    names = list(dict.fromkeys(name for name, setting in found if setting != "baseline"))
    best = {name: max(found[key].mean for key in found if key[0] == name) for name in names}
    names.sort(key=best.__getitem__)
    drawn, axes = study.figure(7, 1.2 + 0.17 * len(names))
    for setting, shift, colour in (("default", 0.15, "tab:blue"), ("tuned", -0.15, "tab:orange")):
        have = [(place, found[name, setting]) for place, name in enumerate(names) if (name, setting) in found]
        axes.errorbar(
            [each.mean for _, each in have],
            [place + shift for place, _ in have],
            xerr=[[each.mean - each.low for _, each in have], [each.high - each.mean for _, each in have]],
            fmt="o",
            markersize=3,
            linewidth=1,
            color=colour,
            label="at its defaults" if setting == "default" else "scale tuned",
        )
    for (name, setting), each in found.items():
        if setting == "baseline" and name in ("pretrained", "sequential", "joint", "individual, on its own"):
            axes.axvline(each.mean, linewidth=0.8, linestyle=":", color="grey")
            label = name.partition(",")[0]
            axes.text(each.mean, top, label, rotation=90, fontsize=6, va="bottom", ha="center")
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(-0.7, top)
    axes.set_xlabel("mean accuracy over the eight domains, %; bars are 95 % intervals over seeds")
    axes.legend(loc="lower right", frameon=False)
    study.save(drawn, path)


def main() -> None:
    options = study.arguments("Every merge method on eight domains.", "one_shot").parse_args()
    console = Console()
    seeds, epochs, methods, scales = options.seeds, EPOCHS, model_methods(), SCALES
    if options.quick:
        seeds, epochs, scales = 2, 1, (0.5, 1.0, 2.0)
        methods = [name for name in QUICK_METHODS if name in METHODS]
    tasks: dict[str, tuple[Any, ...]] = {}
    for seed in range(seeds):
        tasks[study.key(f"seed-{seed}", "baselines")] = (BASELINES, seed, epochs)
        for name in methods:
            tasks[study.key(f"seed-{seed}", name)] = (name, seed, epochs, scales)
    settings = {"epochs": epochs, "scales": scales}
    rows = study.perform(tasks, work, options.out, settings, workers=options.workers, console=console)
    plot(rows, options.out / "plot.png")
    study.report(options.out, rows, tables(rows, scales), console)


if __name__ == "__main__":
    study.command(main)
