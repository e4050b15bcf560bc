"""What has to be known of a whole tensor before an element of it is merged: measures of all clients at once.

Nothing here depends on slices or threads: sums are partial sums over fixed blocks, added by halves.
Suffixes: N clients, S elements, K numbers, R rows of scores.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from fl_merge.cutoffs import Mapped, Part, largest_cutoffs
from fl_merge.kernels.passes import Inputs
from fl_merge.kernels.rows import Rows, kept_squares, largest_of_products
from fl_merge.ops.gram import added_by_halves
from fl_merge.ops.sparsify import largest_cutoff
from fl_merge.reading import Versions, pieces
from fl_merge.shapes import Balanced, Cuts, Maxima, Measure, Slice, Sums

At = Callable[[int, int, Tensor], Slice]
"""From a slice's first and last-plus-one element and the numbers known so far to what a measure is told of it."""


def measured(
    measures: tuple[Measure, ...],
    known_K: Tensor,
    versions: Versions,
    weights_N: Tensor,
    at: At,
    mapped: Mapped,
    *,
    step: int,
    block: int,
    piece: int,
) -> Tensor:
    """(K,) float64: the numbers that are known, and those that the measures give.

    Args:
        step: elements of a slice, a multiple of `block`.
        block: over how many elements a partial sum runs.
        piece: elements of a slice for the compiled passes.
    """
    slices = pieces(versions.numel, step)
    for measure in measures:
        before_K = known_K

        def of_blocks(place: tuple[int, int], measure: Measure = measure, known_K: Tensor = before_K) -> list[Tensor]:
            assert isinstance(measure, Sums | Maxima)
            return [
                measure.function(versions.deltas(start, stop), weights_N, at(start, stop, known_K)).double().cpu()
                for start, stop in _blocks(*place, block)
            ]

        if versions.native is not None and measure.compiled is not None:
            found_K = _compiled(measure, before_K, versions.native, mapped, piece)
        elif isinstance(measure, Cuts):
            found_K = _cuts(measure, before_K, versions, weights_N, at, mapped, slices)
        else:
            found_XK = torch.stack([each_K for found in mapped(of_blocks, slices) for each_K in found])
            found_K = added_by_halves(found_XK) if isinstance(measure, Sums) else found_XK.amax(dim=0)
        known_K = torch.cat([known_K, found_K])
    return known_K


def _compiled(measure: Measure, known_K: Tensor, native: Inputs, mapped: Mapped, piece: int) -> Tensor:
    """The same by the compiled pass that the measure names."""
    slices = pieces(native.numel, piece)
    if isinstance(measure, Maxima):
        return torch.stack(list(mapped(lambda at: largest_of_products(native, *at), slices))).amax(dim=0)
    if isinstance(measure, Sums):
        return added_by_halves(torch.cat(list(mapped(lambda at: kept_squares(native, known_K[:2], *at), slices))))
    counted = functools.partial(measure.count, native.numel)
    if measure.compiled == "variance":
        rows, wanted = Rows(native, "variance"), [(0, counted)]
        return largest_cutoffs([Part(rows, 0)], wanted, mapped, piece).reshape(-1)
    rows = Rows(native, "balance", Balanced.scales(known_K, native.clients))
    each = [(client, counted(native.numel)) for client in range(native.clients)]
    return largest_cutoffs([Part(rows, 0)], each, mapped, piece).reshape(-1)


def _blocks(start: int, stop: int, block: int) -> list[tuple[int, int]]:
    return [(begin, min(begin + block, stop)) for begin in range(start, max(stop, start + 1), block)]


def _cuts(
    cuts: Cuts,
    known_K: Tensor,
    versions: Versions,
    weights_N: Tensor,
    at: At,
    mapped: Mapped,
    slices: list[tuple[int, int]],
) -> Tensor:
    """(2 R,) float64: threshold and last index of each row of scores."""

    def scored(place: tuple[int, int]) -> Tensor:
        scores = cuts.score(versions.deltas(*place), weights_N, at(*place, known_K))
        return scores.reshape(-1, place[1] - place[0])

    scores_RS = torch.cat(list(mapped(scored, slices)), dim=1)

    def cut(row: int) -> tuple[float, int]:
        scores_S = scores_RS[row]
        count = cuts.count(scores_S.numel(), int((scores_S > 0).sum()))
        if count >= scores_S.numel():
            return 0.0, scores_S.numel() - 1
        return largest_cutoff(scores_S, count)

    return torch.tensor(list(mapped(cut, range(len(scores_RS)))), dtype=torch.float64).reshape(-1)
