"""Put the tables and plots of finished studies into docs/results.md and docs/images, as they were printed.

    python simulations/results.py [--runs runs] [--only one_shot ...]

docs/results.md has a pair of markers for each study; what is between them is replaced. The text around them is written
by hand, after looking.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from pathlib import Path

STUDIES = ("one_shot", "rounds", "attackers", "negation")
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
    page.write_text(text, encoding="utf-8")
    print(f"{page}: {', '.join(options.only)}")


if __name__ == "__main__":
    main()
