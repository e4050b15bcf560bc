"""Fifteen clients, three of them bad: what each aggregator makes of eight rounds.

    python simulations/attackers.py --seeds 10 --out runs/attackers

The clients share the private images by Dirichlet label skew (alpha 0.5) and all take part in all rounds, from a random
start. Three of them (20 %, drawn by the seed) train as the others do and then send

    flip      theta_0 - tau: what they learned, with its signs turned
    scale     theta_0 + 10 tau
    noise     theta_0 + normal noise, in each tensor ten times as long as tau
    collude   theta_0 - 0.5 m, the same from all three, with m the mean of what the good clients learned: not far out,
              nearer to each other than any two good clients are (Xie et al., 2019, arXiv:1903.03936, inner product
              manipulation)

The server knows nothing of who is bad; methods that take it are told how many may be. "clipped" is `clip_norm` at the
median of the round's norms, before the method. What is compared is the mean
accuracy after the last three rounds on the 360 test images. Where several settings of a method are given, the one with
the best validation accuracy is taken, in each seed and under each attack.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console

import study
from digits_clients import data, model
from digits_clients.data import seeded
from digits_clients.model import State
from federation import HIDDEN, Attack, Local, federate
from fl_merge import METHODS
from rounds import Setting, judged, tried
from study import Row

CLIENTS, BAD, ROUNDS, LAST, ALPHA = 15, 3, 8, 3, 0.5
LOCAL = Local(epochs=3)
SCALE, COLLUSION = 10.0, 0.5

AGGREGATORS: Mapping[str, tuple[Setting, ...]] = {
    "weighted_average": (Setting("weighted_average"),),
    "ties": (Setting("ties"),),
    "iso_c": (Setting("iso_c", {"scale": 0.2}),),
    "median": (Setting("median"),),
    "trimmed_mean": (Setting("trimmed_mean", {"beta": 0.2}),),
    "krum": (Setting("krum", {"f": BAD}),),
    "multi_krum": (Setting("multi_krum", {"f": BAD}),),
    "bulyan": (Setting("bulyan", {"f": BAD}),),
    "geometric_median": (Setting("geometric_median"),),
    "average, clipped": (Setting("weighted_average", clip=0.5),),
    "ties, clipped": (Setting("ties", clip=0.5),),
    "centered_clipping": tuple(Setting("centered_clipping", {"rho": rho}) for rho in (0.5, 2.0)),
}
"""What is compared, as far as it is registered; the first is what the others are compared with."""


# What bad clients send ------------------------------------------------------------------------------------------------


def delta(sent: State, learned: State) -> State:
    """What training changed."""
    return {name: learned[name] - sent[name] for name in sent}


def moved(sent: State, change: State, factor: float) -> State:
    """The model that was sent, changed."""
    return {name: sent[name] + factor * change[name] for name in sent}


def times(factor: float) -> Attack:
    """Bad clients send their delta times a factor."""

    def attack(sent: State, learned: Sequence[State], bad: Sequence[int], draws: torch.Generator) -> list[State]:
        return [moved(sent, delta(sent, m), factor) if i in bad else m for i, m in enumerate(learned)]

    return attack


def noise(sent: State, learned: Sequence[State], bad: Sequence[int], draws: torch.Generator) -> list[State]:
    """Bad clients send normal noise, in each tensor `SCALE` times as long as their delta there."""

    def noisy(change: State) -> State:
        drawn = {name: torch.randn(tensor.shape, generator=draws) for name, tensor in change.items()}
        return {name: drawn[name] * (change[name].norm() / drawn[name].norm()) for name in change}

    return [moved(sent, noisy(delta(sent, m)), SCALE) if i in bad else m for i, m in enumerate(learned)]


def collude(sent: State, learned: Sequence[State], bad: Sequence[int], draws: torch.Generator) -> list[State]:
    """All bad clients send the base less `COLLUSION` times the mean delta of the good ones."""
    good = [delta(sent, m) for i, m in enumerate(learned) if i not in bad]
    mean = {name: torch.stack([each[name] for each in good]).mean(0) for name in sent}
    against = moved(sent, mean, -COLLUSION)
    return [dict(against) if i in bad else m for i, m in enumerate(learned)]


ATTACKS: Mapping[str, Attack | None] = {
    "none": None,
    "flip": times(-1.0),
    "scale": times(SCALE),
    "noise": noise,
    "collude": collude,
}


# One aggregator under one attack, one seed ----------------------------------------------------------------------------


def work(name: str, attack: str, seed: int, rounds: int) -> list[Row]:
    """A row for each setting of an aggregator; `chosen` is 1 for the one with the best validation accuracy."""
    task = {"seed": seed, "attack": attack, "aggregator": name}
    return tried(task, AGGREGATORS[name], lambda setting: run(setting, attack, seed, rounds))


def run(setting: Setting, attack: str, seed: int, rounds: int) -> Row:
    """Accuracies of one federation under attack."""
    clients = [data.client(i, CLIENTS, setting="dirichlet", alpha=ALPHA, seed=seed) for i in range(CLIENTS)]
    states = federate(
        model.random_state(seed, HIDDEN),
        clients,
        setting.build(),
        rounds=rounds,
        per_round=CLIENTS,
        seed=seed,
        local=LOCAL,
        attack=ATTACKS[attack],
        bad=bad_clients(seed),
    )
    return judged(states, seed, LAST)


def bad_clients(seed: int) -> list[int]:
    """Who is bad: three of the fifteen, the same for every method and attack."""
    return sorted(torch.randperm(CLIENTS, generator=seeded("bad", seed))[:BAD].tolist())


# All of them ----------------------------------------------------------------------------------------------------------


def tables(rows: Sequence[Row]) -> str:
    """Accuracy under each attack, then the difference to the average under the same attack."""
    refused = {row["aggregator"]: row["refused"] for row in rows if row.get("refused")}
    chosen = [row for row in study.where(rows, chosen=1) if row["aggregator"] not in refused]
    attacks = list(dict.fromkeys(row["attack"] for row in chosen))
    names = list(dict.fromkeys(row["aggregator"] for row in chosen))
    found = {
        (name, attack): study.by_seed(study.where(chosen, aggregator=name, attack=attack), "test", 100)
        for name in names
        for attack in attacks
    }
    accuracy = [
        [name, *(str(study.bootstrap(list(found[name, attack].values()))) for attack in attacks)] for name in names
    ]
    against = [
        [name, *(study.paired(found[name, attack], found[names[0], attack]).signed() for attack in attacks)]
        for name in names[1:]
    ]
    parts = [
        "Accuracy, %:",
        study.markdown(["aggregator", *attacks], accuracy),
        f"Difference to {names[0]} under the same attack, points:",
        study.markdown(["aggregator", *attacks], against),
    ]
    if refused:
        parts.append("\n".join(f"- {name}: {why}" for name, why in refused.items()))
    return "\n\n".join(parts)


def plot(rows: Sequence[Row], path: Path) -> None:
    """A bar for each aggregator under each attack, with its interval."""
    chosen = study.where(rows, chosen=1)
    attacks = list(dict.fromkeys(row["attack"] for row in chosen))
    names = list(dict.fromkeys(row["aggregator"] for row in chosen))
    drawn, axes = study.figure(8, 3.2)
    width = 0.85 / len(names)
    for number, name in enumerate(names):
        bars = [
            study.bootstrap([100 * row["test"] for row in study.where(chosen, aggregator=name, attack=attack)])
            for attack in attacks
        ]
        errors = [[bar.mean - bar.low for bar in bars], [bar.high - bar.mean for bar in bars]]
        places = [place + (number - len(names) / 2) * width for place in range(len(attacks))]
        heights = [bar.mean for bar in bars]
        axes.bar(places, heights, width, yerr=errors, label=name, error_kw={"linewidth": 0.6}, color=f"C{number % 10}")
    axes.set_xticks(range(len(attacks)), attacks)
    axes.set_ylabel("test accuracy, %")
    axes.legend(frameon=False, fontsize=6, ncols=6, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    study.save(drawn, path)


def main() -> None:
    options = study.arguments("Robust aggregators against bad clients.", "attackers").parse_args()
    seeds, rounds, attacks = options.seeds, ROUNDS, list(ATTACKS)
    names = [name for name, settings in AGGREGATORS.items() if settings[0].method in METHODS]
    if options.quick:
        seeds, rounds, attacks, names = 2, 2, ["none", "scale"], names[:3]
    tasks = {}
    for seed in range(seeds):
        for attack in attacks:
            for name in names:
                key = study.key(f"seed-{seed}", attack, name, of=list(map(str, AGGREGATORS[name])))
                tasks[key] = (name, attack, seed, rounds)
    settings = {"rounds": rounds, "epochs": LOCAL.epochs, "hidden": HIDDEN, "clients": [CLIENTS, BAD], "alpha": ALPHA}
    console = Console()
    rows = study.perform(tasks, work, options.out, settings, workers=options.workers, console=console)
    plot(rows, options.out / "plot.png")
    study.report(options.out, rows, tables(rows), console)


if __name__ == "__main__":
    study.command(main)
