"""How many examples a client needs for the statistics that `regmean` and `fisher` go by.

    python simulations/statistics_examples.py [--seeds 3] [--examples 1,2,4,8,16,32,64,128] [--markdown FILE]

Eight domains of digits, one round: each client finetunes the pretrained network on its 144 images, computes statistics
of its first so many images, and the models are merged once. The table has the mean accuracy over the eight test sets.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import track

from baselines import Population, population
from digits_clients import model
from fl_merge import build, merge
from fl_merge.statistics import collect

METHODS = {"regmean": "gram", "fisher": "fisher"}


def accuracy(people: Population, name: str, examples: int | None) -> float:
    """Mean accuracy of the merged model over the clients' test sets.

    Args:
        people: the clients.
        name: the method.
        examples: a client's, for the statistics; None for a method that needs none.
    """
    sent = None
    if examples is not None:
        sent = [
            collect(model.network(state), [client.train.images_BHW], METHODS[name], examples)
            for state, client in zip(people.finetuned, people.clients, strict=True)
        ]
    weights = [float(len(client.train)) for client in people.clients]
    state = merge(build(name), people.base, list(people.finetuned), weights, statistics=sent)
    judged = people.judge(state)
    return sum(judged.values()) / len(judged)


def table(seeds: int, examples: Sequence[int]) -> str:
    """Means and standard deviations over seeds, in percent, as Markdown."""
    console = Console(stderr=True)
    people = [population(seed=seed) for seed in track(range(seeds), "training", transient=True, console=console)]
    average = [accuracy(each, "weighted_average", None) for each in people]
    lines = ["| examples a client | regmean | fisher |", "|---|---|---|"]
    for count in track(examples, "statistics and merges", transient=True, console=console):
        found = [[accuracy(each, name, count) for each in people] for name in METHODS]
        lines.append(f"| {count} | {' | '.join(map(percent, found))} |")
    lines += ["", f"weighted_average, which needs none: {percent(average)}. Seeds: {seeds}."]
    return "\n".join(lines) + "\n"


def percent(values: Sequence[float]) -> str:
    """Mean +- standard deviation over the seeds."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{100 * statistics.mean(values):.1f} +- {100 * spread:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--examples", default="1,2,4,8,16,32,64,128")
    parser.add_argument("--markdown", type=Path, help="write the table to this file too")
    options = parser.parse_args()
    found = table(options.seeds, [int(count) for count in options.examples.split(",")])
    print(found, end="")
    if options.markdown is not None:
        options.markdown.write_text(found)


if __name__ == "__main__":
    main()
