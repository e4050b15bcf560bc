"""The picture of `fl-merge inspect`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fl_merge.errors import RecipeError
from fl_merge.offline.inspection import Group


def plot(labels: Sequence[str], groups: Sequence[Group], path: Path) -> None:
    """Three panels over the layers: norms of the deltas, mean cosine and sign conflicts, sparsity.

    Raises:
        RecipeError: without matplotlib, or for a place or kind of file that cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise RecipeError("--plot needs matplotlib: pip install 'fl-merge[plots]'") from None
    layers = groups[:-1]
    figure = Figure(figsize=(max(6.0, 0.35 * len(layers)), 8.0), layout="constrained")
    FigureCanvasAgg(figure)
    norms, signs, sparsity = figure.subplots(3, 1, sharex=True)
    places = list(range(len(layers)))
    for number, label in enumerate(labels):
        norms.plot(places, [group.norms_N[number] for group in layers], marker="o", label=label)
        sparsity.plot(places, [group.sparsity(number) for group in layers], marker="o", label=label)
    norms.set_ylabel("norm of the delta")
    norms.legend(fontsize="small")
    cosines = [group.mean_cosine for group in layers]
    signs.plot(places, [float("nan") if c is None else c for c in cosines], marker="o", label="mean cosine")
    signs.plot(places, [group.conflict for group in layers], marker="s", label="sign conflicts")
    signs.set_ylabel("agreement")
    signs.legend(fontsize="small")
    sparsity.set_ylabel("share of zeros")
    sparsity.set_xticks(places, [group.name for group in layers], rotation=60, ha="right")
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise RecipeError(f"--plot: cannot write '{path}': {error}") from None
