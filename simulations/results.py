"""Put the tables and plots of finished studies into docs/results.md and docs/images, as they were printed.

    python simulations/results.py [--runs runs] [--only one_shot ...]

docs/results.md has a pair of markers for each study; what is between them is replaced. The text around them is written
by hand, after looking.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import shutil
import sys
from pathlib import Path

import study

PILOT = "pilot"
PILOT_ONE_SHOT = {
    ("individual, on its own", "baseline"): 92.8,
    ("joint", "baseline"): 91.9,
    ("regmean", "default"): 82.7,
    ("wudi", "default"): 75.0,
    ("iso_c", "default"): 72.0,
    ("tsv_m", "default"): 70.0,
    ("fisher", "default"): 61.5,
    ("ensemble, mean logits", "baseline"): 60.0,
    ("task_arithmetic", "tuned"): 60.0,
    ("weighted_average", "default"): 59.0,
    ("sequential", "baseline"): 59.0,
    ("ties", "default"): 54.0,
    ("pretrained", "baseline"): 53.0,
}
PILOT_ROUNDS = {"centralised": 97.7, "iso_c": 96.6, "FedAvgM, tuned": 90.0, "FedAvg": 82.0}
"""Accuracies in % that an earlier pilot, with a base and a network of its own, led to expect."""

STUDIES = ("one_shot", "rounds", "attackers", "negation", "lora", "structure")
ROOT = Path(__file__).resolve().parents[1]


def filled(text: str, name: str, content: str) -> str:
    """The text with what is between a study's markers replaced.

    Raises:
        ValueError: if the markers are not there once each.
    """
    begin, end = f"<!-- {name}: as printed -->\n", f"<!-- end of {name} -->"
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise ValueError(f"found {len(pattern.findall(text))} pairs of markers for {name}, wanted one")
    return pattern.sub(lambda _: f"{begin}\n{content}\n\n{end}", text)


def section(name: str, folder: Path) -> str:
    """The study's settings, tables and plot, as Markdown."""
    settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    told = ", ".join(f"{key} {json.dumps(value)}" for key, value in settings.items())
    table = (folder / "table.md").read_text(encoding="utf-8").strip()
    return f"`{name}/settings.json`: {told}\n\n![{name}](images/{name}.png)\n\n{table}"


def beside_pilot(runs: Path) -> str:
    """What the pilot led to expect, and what was found."""

    def rows(name: str) -> list[study.Row]:
        with (runs / name / "raw.csv").open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    lines, one_shot, rounds = [], rows("one_shot"), rows("rounds")
    for (model, setting), expected in PILOT_ONE_SHOT.items():
        found = [100 * float(row["mean"]) for row in study.where(one_shot, model=model, setting=setting)]
        label = model if setting != "tuned" else f"{model}, scale tuned"
        lines.append(["one shot", label, f"{expected:g}", str(study.bootstrap(found))])
    for name, expected in PILOT_ROUNDS.items():
        chosen = study.where(rounds, aggregator=name, alpha="0.1", chosen="1")
        found = [100 * float(row["test"]) for row in chosen]
        lines.append(["rounds, Dirichlet 0.1", name, f"{expected:g}", str(study.bootstrap(found))])
    return study.markdown(["study", "row", "pilot %", "here %"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Put finished studies into docs/results.md.")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs"), help="where the studies' folders are (default runs/)"
    )
    parser.add_argument("--only", nargs="+", choices=STUDIES, default=list(STUDIES))
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    options = parser.parse_args()
    page = options.docs / "results.md"
    text = page.read_text(encoding="utf-8")
    (options.docs / "images").mkdir(exist_ok=True)
    for name in options.only:
        folder = options.runs / name
        if not (folder / "table.md").exists():
            sys.exit(f"{folder} has no table.md: run python simulations/{name}.py --out {folder} first")
        text = filled(text, name, section(name, folder))
        shutil.copyfile(folder / "plot.png", options.docs / "images" / f"{name}.png")
    if {"one_shot", "rounds"} <= set(options.only):
        text = filled(text, PILOT, beside_pilot(options.runs))
    page.write_text(text, encoding="utf-8")
    print(f"{page}: {', '.join(options.only)}")


if __name__ == "__main__":
    main()
