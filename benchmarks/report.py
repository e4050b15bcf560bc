"""Tables of what was measured, on the terminal and as Markdown, and the numbers that are derived for them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.measure import Floor, Measured
from benchmarks.rows import Row

UNSTABLE = 0.5
"""The spread, (slowest - fastest) / median, from which a row's ratios say little."""

BEGIN, END = "<!-- tables, as printed -->", "<!-- end of tables -->"
"""Marks in a Markdown file between which the tables are replaced."""

console = Console(width=max(140, Console().width), highlight=False)


@dataclass
class Sheet:
    """A table: a title, headings, rows of cells, and lines beneath it."""

    title: str
    headings: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Report:
    """Prints as things come, and keeps them for a Markdown file.

    Args:
        command: how the run was started.
        path: of the Markdown file, or None.
    """

    def __init__(self, command: str, path: Path | None) -> None:
        self._path = path
        self._pieces = [f"`{command}`"]

    def line(self, text: str) -> None:
        """A paragraph."""
        console.print(text, soft_wrap=True, markup=False)
        console.print()
        self._pieces.append(text.replace("\n", "  \n"))

    def table(self, sheet: Sheet) -> None:
        """A table and its notes."""
        table = Table(box=None, pad_edge=False, header_style="bold")
        for number, heading in enumerate(sheet.headings):
            table.add_column(heading, justify="right" if number else "left", no_wrap=True)
        for row in sheet.rows:
            table.add_row(*row)
        console.print(sheet.title, style="italic", soft_wrap=True, markup=False)
        console.print(table)
        for note in sheet.notes:
            console.print(note, soft_wrap=True, markup=False)
        console.print()
        self._pieces.append(markdown(sheet))

    def save(self) -> None:
        """Write the Markdown file, if one was asked for; what stands there outside the marks stays."""
        if self._path is None:
            return
        text = "\n\n".join(self._pieces) + "\n"
        old = self._path.read_text(encoding="utf-8") if self._path.exists() else ""
        before, begun, rest = old.partition(BEGIN)
        _, ended, after = rest.partition(END)
        if begun and ended:
            text = f"{before}{BEGIN}\n{text}{END}{after}"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(text, encoding="utf-8")


def markdown(sheet: Sheet) -> str:
    """A table as Markdown: a bold title, the rows, and the notes as paragraphs."""

    def line(cells: Sequence[str]) -> str:
        filled = [*cells, *[""] * (len(sheet.headings) - len(cells))]
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in filled) + " |"

    rule = "|" + "|".join("---" if number == 0 else "---:" for number in range(len(sheet.headings))) + "|"
    lines = [line(sheet.headings), rule, *(line(row) for row in sheet.rows)]
    return "\n\n".join([f"**{sheet.title}**", "\n".join(lines), *sheet.notes])


# --- tables ----------------------------------------------------------------------------------------------------------

TIMES = ("wall s", "best s", "spread", "runs", "CPU s", "extra MB")


def times(mine: Measured) -> tuple[str, ...]:
    """The cells under `TIMES`."""
    extra = "" if mine.extra is None else f"{mine.extra / 1e6:.0f}"
    return (f"{mine.wall:.3f}", f"{mine.best:.3f}", f"{mine.spread:.0%}", str(mine.runs), f"{mine.cpu:.3f}", extra)


def side_by_side(title: str, rows: Sequence[Row], results: Mapping[str, Measured]) -> Sheet:
    """Rows with their ratios to the floor (as it was before each repetition, where it was measured there) and, for a
    peer's, to ours."""
    sheet = Sheet(title, ("work", *TIMES, "floor s", "x floor", "CPU x floor", "x ours", "CPU x ours"))
    for row in rows:
        mine = results.get(row.label)
        if mine is None:
            sheet.rows.append((row.label, "failed"))
            continue
        floor = mine.floor or results.get(row.floor or "")
        against = (*ratios(mine, floor), *ratios(mine, results.get(row.against or "")))
        sheet.rows.append((row.label, *times(mine), f"{floor.wall:.3f}" if floor else "", *against))
    sheet.notes += unstable(rows, results)
    return sheet


def flower_sheet(title: str, rows: Sequence[Row], results: Mapping[str, Measured], refused: Mapping[str, str]) -> Sheet:
    """Strategies: beside the times the speed over the replies' bytes, memory in models, and a mean's error."""
    sheet = Sheet(title, ("strategy", *TIMES, "models", "GB/s", "x ours", "mean error", "largest error"))
    for row in rows:
        mine = results.get(row.label)
        if mine is None:
            sheet.rows.append((row.label, "refuses" if row.label in refused else "failed"))
            continue
        models = "" if mine.extra is None else f"{mine.extra / mine.more['model_bytes']:.2f}"
        found = [f"{mine.more[key]:.2f}" if key in mine.more else "" for key in ("error_mean", "error_max")]
        ratio, _ = ratios(mine, results.get(row.against or ""))
        sheet.rows.append((row.label, *times(mine), models, f"{speed(mine):.2f}", ratio, *found))
    sheet.notes += unstable(rows, results)
    sheet.notes += [f"{label} refuses: {why}" for label, why in refused.items()]
    return sheet


def plain(title: str, heading: str, rows: Sequence[Row], results: Mapping[str, Measured]) -> Sheet:
    """Times and memory only."""
    sheet = Sheet(title, (heading, *TIMES))
    for row in rows:
        mine = results.get(row.label)
        sheet.rows.append((row.label, *(("failed",) if mine is None else times(mine))))
    return sheet


def unstable(rows: Sequence[Row], results: Mapping[str, Measured]) -> list[str]:
    """A note that names the rows whose repetitions are far apart."""
    labels = [row.label for row in rows if row.label in results and results[row.label].spread > UNSTABLE]
    return [f"Unstable (spread over {UNSTABLE:.0%}), not to be quoted: {'; '.join(labels)}"] if labels else []


# --- numbers ---------------------------------------------------------------------------------------------------------


def ratios(mine: Measured, other: Measured | Floor | None) -> tuple[str, str]:
    """Of walls and of CPU seconds, as text; empty without another row."""
    if other is None:
        return "", ""
    return f"{mine.wall / other.wall:.1f}", f"{mine.cpu / other.cpu:.1f}" if other.cpu > 0 else ""


def speed(mine: Measured) -> float:
    """GB of replies a second."""
    return float(mine.more["bytes"]) / mine.wall / 1e9


def exponent(points: Sequence[tuple[float, float]]) -> float | None:
    """The slope of log y over log x, by least squares; None if there is none."""
    if len({x for x, _ in points}) < 2 or any(y <= 0 for _, y in points):
        return None
    fit = statistics.linear_regression([math.log(x) for x, _ in points], [math.log(y) for _, y in points])
    return fit.slope


def number(value: float | None) -> str:
    """An exponent in two digits."""
    return "" if value is None else f"{value:.2f}"
