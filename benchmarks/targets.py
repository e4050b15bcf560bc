"""What the engine is to reach, and whether it did in this run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.measure import Measured
from benchmarks.report import Sheet, speed
from benchmarks.rows import SERVER_CLIENTS, memory_label, server_label
from benchmarks.scaling import Slopes

MB = 10**6

SAME = 1.1
"""Speeds that are meant to be equal may differ by this factor: repetitions differ by as much."""

MOST_EXTRA = 400
"""MB of anonymous memory of a merge of files, above the imported interpreter's."""

ALLOWED = 0.1
"""Memory that is meant not to grow may grow by this part of the limit that it has."""


@dataclass(frozen=True)
class Limit:
    """A target of one number.

    Args:
        text: what is to hold.
        value: what was measured; None leaves the target out.
        most: the value is to be no more than this.
        least: and no less than this.
        unit: behind the value, as a format.
    """

    text: str
    value: float | None
    most: float = float("inf")
    least: float = float("-inf")
    unit: str = "{:.2f}"

    @property
    def met(self) -> bool:
        return self.value is not None and self.least <= self.value <= self.most


def sheet(limits: list[Limit], where: str) -> Sheet:
    """The targets that this run could measure."""
    found = Sheet(f"targets, {where}", ("target", "measured", "met"))
    for limit in limits:
        if limit.value is not None:
            found.rows.append((limit.text, limit.unit.format(limit.value), "yes" if limit.met else "NO"))
    return found


def of_files(results: Mapping[str, Measured], models: int, dtype: str) -> list[Limit]:
    """Walls against the floor's, and memory."""
    floor = results.get(f"floor, files, {models} models")
    limits = []
    for most, methods in (
        (2.5, ("weighted_average", "task_arithmetic", "slerp")),
        (4.0, ("ties", "dare_linear", "dare_ties", "karcher", "model_stock")),
        (5.0, ("nuslerp", "multislerp", "krum", "multi_krum", "geometric_median", "centered_clipping")),
        (5.0, ("median", "trimmed_mean", "bulyan", "magmax", "emr", "consensus", "fedgma", "sce", "pcb")),
        (6.0, ("breadcrumbs", "breadcrumbs_ties", "della", "della_linear")),
    ):
        for method in methods:
            mine = results.get(f"files: {method}")
            beneath = mine.floor or floor if mine else None
            value = mine.wall / beneath.wall if mine and beneath else None
            limits.append(Limit(f"{dtype}, files, {method}: <= {most} x floor", value, most, unit="{:.2f} x"))
    extras = [mine.extra for label, mine in results.items() if label.startswith("files: ") and mine.extra is not None]
    largest = max(extras) / MB if extras else None
    return [
        *limits,
        Limit(f"{dtype}, files, any method: extra memory <= {MOST_EXTRA} MB", largest, MOST_EXTRA, unit="{:.0f} MB"),
    ]


def of_flower(results: Mapping[str, Measured]) -> list[Limit]:
    """FedMerge's weighted average beside FedAvg, and the dtypes beside one another."""

    def ours(wire: str) -> Measured | None:
        return results.get(f"FedMerge(weighted_average()), {wire}")

    first, theirs = ours("float32"), results.get("FedAvg, float32")
    ratio = theirs.wall / first.wall if first and theirs else None
    models = first.extra / first.more["model_bytes"] if first and first.extra is not None else None
    limits = [
        Limit("float32 replies in memory: >= 4 x as fast as FedAvg", ratio, least=4.0, unit="{:.2f} x"),
        Limit("float32 replies in memory: extra memory <= 1.1 models", models, 1.1, unit="{:.2f} models"),
    ]
    for wire in ("float16", "bfloat16"):
        mine = ours(wire)
        same = speed(mine) / speed(first) if mine and first else None
        text = f"{wire} replies: GB/s of float32's (at least 1 / {SAME})"
        limits.append(Limit(text, same, least=1 / SAME, unit="{:.2f} x"))
        for key, which in (("error_mean", "mean"), ("error_max", "largest")):
            error = mine.more[key] if mine else None
            limits.append(Limit(f"{wire} replies: {which} error <= 1.05 x the rounded mean's", error, 1.05))
    return limits


def of_server(results: Mapping[str, Measured], model_bytes: int) -> list[Limit]:
    """Peak memory of whole servers with updates on disk."""

    def peak(clients: int, rounds: int) -> int | None:
        found = results.get(server_label(clients, rounds))
        return found.extra if found else None

    few, many = SERVER_CLIENTS
    room = (1.5 * model_bytes + 300 * MB) / MB
    peaks = [found for clients in SERVER_CLIENTS for rounds in (1, 2) if (found := peak(clients, rounds)) is not None]
    text = f"server, {few} and {many} clients of {model_bytes / MB:.0f} MB: peak <= 1.5 models + 300 MB ({room:.0f} MB)"
    limits = [Limit(text, max(peaks) / MB if peaks else None, room, unit="{:.0f} MB")]
    allowed = ALLOWED * room
    for title, one, other in (
        (f"{many} clients above {few}, 1 round", (few, 1), (many, 1)),
        (f"{many} clients above {few}, 2 rounds", (few, 2), (many, 2)),
        (f"2 rounds above 1, {few} clients", (few, 1), (few, 2)),
        (f"2 rounds above 1, {many} clients", (many, 1), (many, 2)),
    ):
        before, after = peak(*one), peak(*other)
        value = (after - before) / MB if before is not None and after is not None else None
        limits.append(Limit(f"server: peak of {title}: <= {allowed:.0f} MB", value, allowed, unit="{:.0f} MB"))
    return limits


def of_scaling(slopes: Mapping[str, Slopes]) -> list[Limit]:
    """Cost linear in the models moved and in their size."""
    limits = []
    for name, found in slopes.items():
        if name != "floor":
            limits.append(Limit(f"{name}: exponent in models moved 1.0 ± 0.1", found.moved, 1.1, 0.9))
            limits.append(Limit(f"{name}: exponent in size 1.0 ± 0.1", found.size, 1.1, 0.9))
    return limits


def of_memory(results: Mapping[str, Measured], method: str, counts: tuple[int, int]) -> list[Limit]:
    """Memory of a file merge that does not grow with the number of models."""
    extras = [results[label].extra for count in counts if (label := memory_label(method, count)) in results]
    known = [extra for extra in extras if extra is not None]
    if len(known) != len(counts):
        return []
    few, many = counts
    allowed = ALLOWED * MOST_EXTRA
    text = f"{method}, files, {few} and {many} models: extra memory <= {MOST_EXTRA} MB"
    growth = f"{method}, files: extra memory with {many} models above {few}: <= {allowed:.0f} MB"
    return [
        Limit(text, max(known) / MB, MOST_EXTRA, unit="{:.0f} MB"),
        Limit(growth, (known[1] - known[0]) / MB, allowed, unit="{:.0f} MB"),
    ]
