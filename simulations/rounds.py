"""Twenty rounds from a random start under label skew, a quarter of the clients in each: methods as aggregators.

    python simulations/rounds.py --seeds 10 --out runs/rounds

Twenty clients share the private images by Dirichlet label skew (alpha 0.1: a class or two each; 0.5: several); five
take part in each round. Twenty methods aggregate at their defaults; some also with a tuned setting, and inside server
optimizers. The baselines are FedAvg, FedAvgM and FedAdam with tuned settings, and a model trained on the pooled
data with as many gradient steps as all the clients of all rounds made.

Whatever is tuned is tuned in each seed for itself, by the mean accuracy over the last five rounds on the server's 85
validation images. The figure that is compared is the mean over the last five rounds on the 360 test images: with few
clients a round, single rounds go up and down.

The network is that of the app with layers of 128 units in place of 512.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

import study
from digits_clients import data, model
from digits_clients.model import State
from federation import HIDDEN, Local, accuracies, federate
from fl_merge import METHODS, FlMergeError, build
from fl_merge.clipping import clip_norm
from fl_merge.optimizers import build_optimizer, server_optimizer
from fl_merge.types import MergeMethod
from one_shot import model_methods
from study import Row

ALPHAS = (0.1, 0.5)
CLIENTS, PER_ROUND, ROUNDS = 20, 5, 20
LAST = 5
"""Rounds at the end whose mean accuracy is compared."""

DEFAULTS = (
    "ties",
    "dare_ties",
    "della",
    "breadcrumbs_ties",
    "sce",
    "magmax",
    "fedgma",
    "consensus",
    "pcb",
    "karcher",
    "model_stock",
    "median",
    "trimmed_mean",
    "geometric_median",
    "tsv_m",
    "iso_c",
    "svc",
    "wudi",
    "fisher",
    "regmean",
)
"""Methods that are run at their defaults. Left out are those that are the average or nearly another of these here."""


def grid(name: str, values: Sequence[float]) -> tuple[Mapping[str, float], ...]:
    """One setting at each of the values."""
    return tuple({name: value} for value in values)


TUNED: Mapping[str, tuple[Mapping[str, float], ...]] = {
    "task_arithmetic": grid("scale", (0.5, 1.0, 1.5, 2.0)),
    "ties": grid("scale", (0.25, 0.5, 1.0, 2.0)),
    "tsv_m": grid("scale", (0.25, 0.5, 1.0, 2.0)),
    "iso_c": grid("scale", (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)),
    "wudi": grid("ridge", (0.01, 0.1, 1.0, 10.0, 100.0)),
    "regmean": grid("ridge", (0.0, 0.001, 0.01, 0.1, 1.0, 10.0, 100.0)),
}
"""Methods with a setting that is tuned, and the values to choose from: wide enough that the best is inside."""

OPTIMIZED: Mapping[str, Mapping[str, float]] = {"ties": {}, "iso_c": {"scale": 1.0}}
"""Methods that are run inside server optimizers, at which settings."""

Optimizer = Mapping[str, float | str]


def momenta(*grids: tuple[float, Sequence[float]]) -> list[Optimizer]:
    """Momentum at each beta with each of its learning rates."""
    return [{"name": "momentum", "lr": lr, "beta": beta} for beta, rates in grids for lr in rates]


def adams(*grids: tuple[float, Sequence[float]]) -> list[Optimizer]:
    """Adam at each tau with each of its learning rates."""
    return [{"name": "adam", "lr": lr, "tau": tau} for tau, rates in grids for lr in rates]


MOMENTA = momenta((0.5, (0.25, 0.5, 1.0, 2.0, 4.0)), (0.9, (0.1, 0.3, 1.0, 3.0)))
MOMENTA_OF = {"ties": MOMENTA, "iso_c": momenta((0.5, (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)), (0.9, (0.1, 0.3, 1.0, 3.0)))}
ADAMS_OF = adams((1e-3, (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)))
ADAMS = [*ADAMS_OF, *adams((1e-2, (0.03, 0.1, 0.3, 1.0)))]
"""Of the average, and of methods that have a size of their own. Iso-C wants longer steps."""

FEDAVG, FEDAVGM, FEDADAM, CENTRALISED = "FedAvg", "FedAvgM, tuned", "FedAdam, tuned", "centralised"
AGAINST = {FEDAVG: FEDAVG, FEDAVGM: "tuned FedAvgM", FEDADAM: "tuned FedAdam", CENTRALISED: CENTRALISED}
"""What every row of the tables is compared with, and how the heading says it."""


@dataclass(frozen=True)
class Setting:
    """One way of aggregating.

    Args:
        method: its registered name.
        parameters: its settings.
        optimizer: a server optimizer's settings, with its name; empty for none.
        clip: the quantile of the round's norms at which deltas are clipped first; None for not.
    """

    method: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    optimizer: Mapping[str, Any] = field(default_factory=dict)
    clip: float | None = None

    def build(self) -> MergeMethod:
        """The method, behind its clipping and in its optimizer."""
        method: MergeMethod = build(self.method, **self.parameters)
        if self.clip is not None:
            method = clip_norm(method, quantile=self.clip)
        return server_optimizer(method, build_optimizer(self.optimizer)) if self.optimizer else method

    def __str__(self) -> str:
        told = {**self.parameters, **self.optimizer, **({} if self.clip is None else {"clip": self.clip})}
        return " ".join(value if key == "name" else f"{key}={value}" for key, value in told.items())


def aggregators(methods: Sequence[str]) -> dict[str, tuple[Setting, ...]]:
    """Name -> the settings to choose from on validation data, for every row of the tables."""
    average = "weighted_average"
    found: dict[str, tuple[Setting, ...]] = {FEDAVG: (Setting(average),)}
    found[FEDAVGM] = tuple(Setting(average, {}, each) for each in MOMENTA)
    found[FEDADAM] = tuple(Setting(average, {}, each) for each in ADAMS)
    for name in DEFAULTS:
        if name in methods:
            found[name] = (Setting(name),)
    for name, choices in TUNED.items():
        if name in methods:
            found[f"{name}, tuned"] = tuple(Setting(name, parameters) for parameters in choices)
    for name, parameters in OPTIMIZED.items():
        if name in methods:
            found[f"{name} + momentum, tuned"] = tuple(Setting(name, parameters, each) for each in MOMENTA_OF[name])
            found[f"{name} + adam, tuned"] = tuple(Setting(name, parameters, each) for each in ADAMS_OF)
    return found


# One aggregator, one seed ---------------------------------------------------------------------------------------------


def one_aggregator(name: str, settings: Sequence[Setting], alpha: float, seed: int, rounds: int) -> list[Row]:
    """A row for each setting, as `tried`."""
    task = {"seed": seed, "alpha": alpha, "aggregator": name}
    return tried(task, settings, lambda setting: run(setting, alpha, seed, rounds))


def tried(task: Row, settings: Sequence[Setting], found: Callable[[Setting], Row]) -> list[Row]:
    """A row for each setting; `chosen` is 1 for the one with the best validation accuracy, the first of equals.

    Args:
        task: what the rows have in common.
        settings: to choose from.
        found: what comes of a setting, `validation` in it.
    """
    rows = []
    for setting in settings:
        row = task | {"setting": str(setting), "chosen": 0}
        try:
            rows.append(row | found(setting))
        except FlMergeError as problem:
            rows.append(row | {"refused": str(problem)})
    done = [row for row in rows if "refused" not in row]
    if done:
        max(done, key=lambda row: row["validation"])["chosen"] = 1
    return rows


def run(setting: Setting, alpha: float, seed: int, rounds: int) -> Row:
    """Accuracies of one federation."""
    clients = [data.client(i, CLIENTS, setting="dirichlet", alpha=alpha, seed=seed) for i in range(CLIENTS)]
    states = federate(
        model.random_state(seed, HIDDEN),
        clients,
        setting.build(),
        rounds=rounds,
        per_round=PER_ROUND,
        seed=seed,
        sends=METHODS[setting.method].sends,
    )
    return judged(states, seed, LAST)


def judged(states: Iterator[State], seed: int, last: int) -> Row:
    """Accuracies on validation and test images over the last so many rounds, and on test images in each."""
    parts = data.split(seed)
    found = accuracies(states, {"validation": data.examples(parts.validation), "test": data.examples(parts.test)})
    return {
        **{name: mean(values[-last:]) for name, values in found.items()},
        **{f"round {number}": value for number, value in enumerate(found["test"], start=1)},
    }


def mean(values: Sequence[float]) -> float:
    """Their sum divided by their number."""
    return sum(values) / len(values)


def centralised(alpha: float, seed: int, rounds: int) -> list[Row]:
    """The pooled private images, as many gradient steps as all clients of all rounds make, batches of the same size."""
    local = Local()
    pooled = data.examples(data.split(seed).private)
    share = len(pooled) // CLIENTS
    steps = rounds * PER_ROUND * local.epochs * model.steps_an_epoch(share)
    state = model.train(
        model.random_state(seed, HIDDEN),
        pooled,
        epochs=-(-steps // model.steps_an_epoch(len(pooled))),
        learning_rate=local.learning_rate,
        seed=(seed, "centralised"),
        max_steps=steps,
    )
    parts = data.split(seed)
    found = {
        "validation": model.accuracy(state, data.examples(parts.validation)),
        "test": model.accuracy(state, data.examples(parts.test)),
        f"round {rounds}": model.accuracy(state, data.examples(parts.test)),
    }
    return [{"seed": seed, "alpha": alpha, "aggregator": CENTRALISED, "setting": "", "chosen": 1, **found}]


def work(name: str, settings: Sequence[Setting], alpha: float, seed: int, rounds: int) -> list[Row]:
    """The rows of one task."""
    if name == CENTRALISED:
        return centralised(alpha, seed, rounds)
    return one_aggregator(name, settings, alpha, seed, rounds)


# All of them ----------------------------------------------------------------------------------------------------------


def tables(rows: Sequence[Row], rounds: int) -> str:
    """A table for each alpha, the best aggregator first."""
    parts = []
    for alpha in dict.fromkeys(row["alpha"] for row in rows):
        chosen = study.where(rows, alpha=alpha, chosen=1)
        values = {name: study.where(chosen, aggregator=name) for name in dict.fromkeys(r["aggregator"] for r in chosen)}
        seeds = len(values[FEDAVG])
        last_rounds = {name: study.by_seed(found, "test", 100) for name, found in values.items() if len(found) == seeds}
        others = [name for name in AGAINST if name in last_rounds]
        lines = []
        for name, found in last_rounds.items():
            against = ["" if name == other else study.paired(found, last_rounds[other]).signed() for other in others]
            ends = [mean_of(values[name], f"round {number}") for number in (min(5, rounds), rounds)]
            lines.append((sum(found.values()), [name, str(study.bootstrap(list(found.values()))), *ends, *against]))
        lines.sort(key=lambda line: -line[0])
        headings = [f"last {LAST} rounds %", f"round {min(5, rounds)} %", f"round {rounds} %"]
        headings += [f"against {AGAINST[name]}" for name in others]
        parts.append(f"Dirichlet {alpha}:")
        parts.append(study.markdown(["aggregator", *headings], [line for _, line in lines]))
    refused = {row["aggregator"]: row["refused"] for row in rows if row.get("refused")}
    if refused:
        parts.append("Refused, and so not in the tables:")
        parts.append("\n".join(f"- {name}: {why}" for name, why in refused.items()))
    parts.append("How often each setting was chosen:")
    parts.append("\n".join(choices(rows)))
    found = edges(rows)
    told = ", ".join(f"{name} ({count})" for name, count in found.items()) if found else "none"
    parts.append(f"How often the best was at an end of the grid that it was chosen from: {told}.")
    return "\n\n".join(parts)


def mean_of(rows: Sequence[Row], column: str) -> str:
    """The mean over seeds in percent; nothing where there is no such value."""
    values = [row[column] for row in rows if row.get(column) is not None]
    return f"{100 * sum(values) / len(values):.1f}" if values else ""


def choices(rows: Sequence[Row]) -> list[str]:
    """For each aggregator with several settings: which were chosen, and in how many seeds, over all alphas."""
    lines = []
    for name in dict.fromkeys(row["aggregator"] for row in rows):
        own = study.where(rows, aggregator=name)
        settings = list(dict.fromkeys(row["setting"] for row in own))
        if len(settings) > 1:
            counts = [(setting, len(study.where(own, setting=setting, chosen=1))) for setting in settings]
            lines.append(f"- {name}: " + ", ".join(f"{setting} ({count})" for setting, count in counts if count))
    return lines


def edges(rows: Sequence[Row]) -> dict[str, int]:
    """For each aggregator: how often the smallest or the largest of the values that are varied was chosen.

    A learning rate is varied for each beta or tau, any other setting by itself; 0, where a range begins, is no end.
    """
    found: dict[str, int] = {}
    for name in dict.fromkeys(row["aggregator"] for row in rows):
        own = study.where(rows, aggregator=name)
        grids: dict[str, dict[float, str]] = {}
        for setting in dict.fromkeys(row["setting"] for row in own):
            varied = re.search(r"\blr=(\S+)", setting) or re.search(r"\b\w+=(\S+)", setting)
            if varied:
                rest = setting[: varied.start()] + setting[varied.end() :]
                grids.setdefault(rest, {})[float(varied[1])] = setting
        ends = {each[at(each)] for each in grids.values() if len(each) > 1 for at in (min, max) if at(each) != 0}
        count = sum(len(study.where(own, setting=setting, chosen=1)) for setting in ends)
        if count:
            found[name] = count
    return found


def plot(rows: Sequence[Row], rounds: int, path: Path) -> None:
    """Test accuracy over rounds: FedAvg, FedAvgM, FedAdam, and the four best others; the ceiling as a line."""
    alphas = list(dict.fromkeys(row["alpha"] for row in rows))
    drawn, panels = study.figure(8, 3.4, len(alphas))
    for axes, alpha in zip(panels if len(alphas) > 1 else [panels], alphas, strict=True):
        chosen = study.where(rows, alpha=alpha, chosen=1)
        means: dict[str, float] = {}
        for name in dict.fromkeys(row["aggregator"] for row in chosen):
            own = study.where(chosen, aggregator=name)
            means[name] = sum(row["test"] for row in own) / len(own)
        others = sorted((n for n in means if n not in (FEDAVG, FEDAVGM, FEDADAM, CENTRALISED)), key=lambda n: -means[n])
        for name in (FEDAVG, FEDAVGM, FEDADAM, *others[:4]):
            own = study.where(chosen, aggregator=name)
            curve = [
                study.bootstrap([100 * row[f"round {number}"] for row in own], resamples=1000)
                for number in range(1, rounds + 1)
            ]
            numbers = range(1, rounds + 1)
            (line,) = axes.plot(numbers, [each.mean for each in curve], linewidth=1.2, label=name)
            low, high = [each.low for each in curve], [each.high for each in curve]
            axes.fill_between(numbers, low, high, alpha=0.12, color=line.get_color(), linewidth=0)
        axes.axhline(100 * means[CENTRALISED], linestyle=":", linewidth=0.8, color="grey", label=CENTRALISED)
        axes.set_title(f"Dirichlet {alpha}", fontsize=8)
        axes.set_xlabel("round")
        axes.legend(frameon=False, fontsize=6, loc="lower right")
    (panels[0] if len(alphas) > 1 else panels).set_ylabel("test accuracy, %; bands are 95 % intervals")
    study.save(drawn, path)


def main() -> None:
    options = study.arguments("Methods as aggregators over rounds.", "rounds").parse_args()
    seeds, rounds, alphas = options.seeds, ROUNDS, ALPHAS
    wanted = aggregators(model_methods())
    if options.quick:
        seeds, rounds, alphas = 2, 2, (0.5,)
        wanted = {name: settings[:2] for name, settings in aggregators(["ties"]).items() if "adam," not in name}
    tasks = {}
    for seed in range(seeds):
        for alpha in alphas:
            for name, settings in {**wanted, CENTRALISED: ()}.items():
                key = study.key(f"seed-{seed}", f"alpha-{alpha}", name, of=[str(setting) for setting in settings])
                tasks[key] = (name, settings, alpha, seed, rounds)
    settings = {"rounds": rounds, "hidden": HIDDEN, "clients": [CLIENTS, PER_ROUND]}
    console = Console()
    rows = study.perform(tasks, work, options.out, settings, workers=options.workers, console=console)
    plot(rows, rounds, options.out / "plot.png")
    study.report(options.out, rows, tables(rows, rounds), console)


if __name__ == "__main__":
    study.command(main)
