"""Subtract what one client learned: what is forgotten, what is kept, and what a random vector would have done.

    python simulations/negation.py --seeds 10 --out runs/negation

Each of the eight domains in turn is to be forgotten. Two starts:

    joint     a model trained on the pooled data knows all domains; the domain's client finetunes it further, and that
              delta is subtracted: theta_joint - c tau   (Ilharco et al., 2022, arXiv:2212.04089, section 3)
    merge     the eight clients finetune the pretrained base once; the raw sum of the other seven task vectors is taken
              at a scale, and the domain's own times the same scale and a coefficient c: from 1 (it takes part) over 0
              (it is left out) to below 0 (it is subtracted)

In `joint` there is a control: a vector of normal noise as long, in each tensor, as the client's delta. Accuracy is on
the domain's 360 test images, and on those of the other seven domains (their mean); all of it is averaged over the eight
domains within a seed, and intervals are over seeds. The scale in `merge` is the one of
`task_arithmetic(normalize=False)` that is best on the server's validation images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import torch
from rich.console import Console

import study
from baselines import EPOCHS, finetune, joint_state
from digits_clients import data, model
from digits_clients.data import seeded
from digits_clients.model import State
from fl_merge import build, merge
from one_shot import Federation, federation_of
from study import Row

SCALES = tuple(round(0.1 * k, 1) for k in range(1, 11))
"""Of the sum of task vectors in `merge`."""

SUBTRACTED = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
"""Coefficients with which the task vector is subtracted from the joint model."""

COEFFICIENTS = (1.0, 0.5, 0.0, -0.5, -1.0, -2.0)
"""Coefficients of the domain's task vector in the merge, as multiples of the scale of the other seven."""


def work(start: str, domain: int, seed: int, epochs: int) -> list[Row]:
    """The rows of one domain that is to be forgotten."""
    federation = federation_of(seed, epochs)
    rows = from_joint(federation, domain) if start == "joint" else from_merge(federation, domain)
    name = federation.people.clients[domain].name
    return [{"seed": seed, "start": start, "forgotten": name, **row} for row in rows]


def from_joint(federation: Federation, domain: int) -> list[Row]:
    """Subtract from the joint model: the client's task vector, and noise of its length."""
    people, base = federation.people, joint_of(federation)
    client = people.clients[domain]
    learned = finetune(base, client, seed=(people.seed, "negation", domain), epochs=people.epochs)
    draws = seeded("control", people.seed, domain)
    noisy = {name: base[name] + noise_like(learned[name] - base[name], draws) for name in base}
    rows = []
    for vector, finetuned in (("task vector", learned), ("noise", noisy)):
        for coefficient in SUBTRACTED:
            method = build("task_arithmetic", coefficients={client.name: -coefficient})
            state = merge(method, base, {client.name: finetuned}, threads=1)
            rows.append({"vector": vector, "coefficient": -coefficient, **judged(federation, state, domain)})
    return rows


def from_merge(federation: Federation, domain: int) -> list[Row]:
    """The sum of all task vectors, the domain's with several coefficients."""
    people, scale = federation.people, scale_of(federation)
    updates = {client.name: state for client, state in zip(people.clients, people.finetuned, strict=True)}
    rows = []
    for coefficient in COEFFICIENTS:
        own = {people.clients[domain].name: coefficient}
        method = build("task_arithmetic", scale=scale, coefficients=own, normalize=False)
        state = merge(method, people.base, updates, threads=1)
        row = {"vector": "task vector", "coefficient": coefficient, "scale": scale}
        rows.append(row | judged(federation, state, domain))
    return rows


def judged(federation: Federation, state: State, domain: int) -> Row:
    """Accuracy on the domain, and the mean over the others."""
    found = list(federation.people.judge(state).values())
    others = [value for i, value in enumerate(found) if i != domain]
    return {"target": found[domain], "others": sum(others) / len(others)}


def noise_like(change: torch.Tensor, draws: torch.Generator) -> torch.Tensor:
    """Normal noise as long as a tensor."""
    drawn = torch.randn(change.shape, generator=draws)
    return drawn * (change.norm() / drawn.norm())


@lru_cache(maxsize=1)
def joint_of(federation: Federation) -> State:
    """The model trained on the pooled data."""
    return joint_state(federation.people)


@lru_cache(maxsize=1)
def scale_of(federation: Federation) -> float:
    """The scale of the sum of task vectors that is best on the validation images."""
    validation = list(data.validation_examples(seed=federation.people.seed).values())

    def score(scale: float) -> float:
        state = federation.merged("task_arithmetic", scale=scale, normalize=False)
        return sum(model.accuracy(state, examples) for examples in validation)

    return max(SCALES, key=score)


# All of it ------------------------------------------------------------------------------------------------------------


def per_seed(rows: Sequence[Row], column: str) -> dict[int, float]:
    """Seed -> the mean over forgotten domains, in percent."""
    found: dict[int, list[float]] = {}
    for row in rows:
        found.setdefault(row["seed"], []).append(100 * row[column])
    return {seed: sum(values) / len(values) for seed, values in found.items()}


def curve(rows: Sequence[Row], start: str, vector: str) -> dict[float, Mapping[str, dict[int, float]]]:
    """Coefficient -> {"target", "others"} -> seed -> percent."""
    own = study.where(rows, start=start, vector=vector)
    return {
        coefficient: {
            column: per_seed(study.where(own, coefficient=coefficient), column) for column in ("target", "others")
        }
        for coefficient in dict.fromkeys(row["coefficient"] for row in own)
    }


def tables(rows: Sequence[Row]) -> str:
    """Accuracy on what is to be forgotten and on the rest, by coefficient, and the change since coefficient 0."""
    parts = []
    titles = {
        ("joint", "task vector"): "From the joint model, the client's task vector times:",
        ("joint", "noise"): "From the joint model, noise as long as the task vector, times:",
        ("merge", "task vector"): "From the merge of the other seven, the client's task vector times:",
    }
    headings = ["coefficient", "forgotten domain %", "other seven %", "change, forgotten", "change, others"]
    for (start, vector), title in titles.items():
        found = curve(rows, start, vector)
        lines = []
        for coefficient, values in found.items():
            accuracy = [str(study.bootstrap(list(values[column].values()))) for column in ("target", "others")]
            change = [study.paired(values[column], found[0.0][column]).signed() for column in ("target", "others")]
            lines.append(
                [f"{coefficient:+g}" if coefficient else "0", *accuracy, *(change if coefficient else ["", ""])]
            )
        parts += [title, study.markdown(headings, lines)]
    return "\n\n".join(parts)


def plot(rows: Sequence[Row], path: Path) -> None:
    """The forgotten domain's accuracy and the others' over coefficients, for both starts."""
    drawn, panels = study.figure(7, 3, 2)
    for axes, start, title in zip(panels, ("joint", "merge"), ("from the joint model", "in the merge"), strict=True):
        for vector, style in (("task vector", "-"), ("noise", ":")):
            found = curve(rows, start, vector)
            for column, colour in (("target", "C3"), ("others", "C0")):
                each = [study.bootstrap(list(found[c][column].values())) for c in sorted(found)]
                if each:
                    label = f"{'forgotten domain' if column == 'target' else 'other seven'}, {vector}"
                    axes.plot(sorted(found), [e.mean for e in each], style, color=colour, linewidth=1.2, label=label)
                    low, high = [e.low for e in each], [e.high for e in each]
                    axes.fill_between(sorted(found), low, high, color=colour, alpha=0.15, linewidth=0)
        axes.set_title(title, fontsize=8)
        axes.set_xlabel("coefficient of the client's task vector")
    panels[0].set_ylabel("test accuracy, %")
    panels[0].legend(frameon=False, fontsize=6)
    study.save(drawn, path)


def main() -> None:
    options = study.arguments("Subtracting what one client learned.", "negation").parse_args()
    seeds, epochs, domains = options.seeds, EPOCHS, range(len(data.DOMAINS))
    if options.quick:
        seeds, epochs, domains = 2, 1, range(1)
    tasks = {}
    for seed in range(seeds):
        for start in ("joint", "merge"):
            for domain in domains:
                tasks[study.key(f"seed-{seed}", start, str(domain))] = (start, domain, seed, epochs)
    settings = {"epochs": epochs, "subtracted": SUBTRACTED, "coefficients": COEFFICIENTS, "scales": SCALES}
    console = Console()
    rows = study.perform(tasks, work, options.out, settings, workers=options.workers, console=console)
    plot(rows, options.out / "plot.png")
    study.report(options.out, rows, tables(rows), console)


if __name__ == "__main__":
    study.command(main)
