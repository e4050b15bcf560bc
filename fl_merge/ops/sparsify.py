"""Pruning deltas: by magnitude or by chance. Suffixes: N clients, S elements."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

RANK_DROPPED_BITS, RANK_CLASSES = 18, 1024
"""Of `rank_classes`: bits of a float32 that are not looked at, and how many classes there are."""

LEAST_CHANCE = 2.0**-32
"""Of `rank_chances`: the smallest step of a draw."""


def keep_count(density: float, numel: int) -> int:
    """How many of `numel` elements a density keeps: max(1, int(density * numel)), and none of an empty tensor."""
    return min(numel, max(1, int(density * numel)))


def largest_cutoff(delta_S: Tensor, count: int) -> tuple[float, int]:
    """Where to cut so that exactly `count` elements of largest magnitude stay, the lower index winning a tie.

    Args:
        delta_S: (S,), S >= 1, a floating dtype, finite.
        count: 1 to S.

    Returns:
        The smallest magnitude that is kept, and the index of the last element of just that magnitude that is kept.
    """
    magnitude_S = delta_S.abs()
    threshold = magnitude_S.kthvalue(magnitude_S.numel() - count + 1).values
    still_wanted = count - int((magnitude_S > threshold).sum())
    last = torch.nonzero(magnitude_S == threshold)[still_wanted - 1]
    return float(threshold), int(last)


def keep_largest(delta_S: Tensor, index_S: Tensor, threshold: float, last: int) -> Tensor:
    """The delta with zeros where its magnitude is below the cut that `largest_cutoff` found.

    Args:
        delta_S: (S,), any slice of what the cut was found on.
        index_S: (S,), int64: the place of each element there.
        threshold, last: the cut. The threshold may be a float64 that the delta's own dtype does not have.
    """
    rounded = float(torch.tensor(threshold, dtype=delta_S.dtype))
    if rounded > threshold:
        return torch.where(delta_S.abs() >= rounded, delta_S, 0.0)
    if rounded < threshold:
        return torch.where(delta_S.abs() > rounded, delta_S, 0.0)
    magnitude_S = delta_S.abs()
    kept_S = (magnitude_S > threshold) | ((magnitude_S == threshold) & (index_S <= last))
    return torch.where(kept_S, delta_S, 0.0)


def trim_to_largest(deltas_NS: Tensor, first_index: int, cutoffs_N2: Tensor) -> Tensor:
    """A slice of every client's delta, trimmed as `keep_largest` does.

    Args:
        deltas_NS: (N, S).
        first_index: the place of the slice's first element in what the cuts were found on.
        cutoffs_N2: (N, 2), float64: threshold and last index of each client.
    """
    index_S = torch.arange(first_index, first_index + deltas_NS.shape[1], device=deltas_NS.device)
    cuts = cutoffs_N2.tolist()
    return torch.stack(
        [keep_largest(delta_S, index_S, cut, int(last)) for delta_S, (cut, last) in zip(deltas_NS, cuts, strict=True)]
    )


def middle_counts(density: float, gamma: float, numel: int) -> tuple[int, int]:
    """How many of `numel` elements are dropped as the largest, and how many of the next are kept.

    int(gamma * numel), but no more than leaves `keep_count(density, numel)` to be kept; it may be 0.
    """
    kept = keep_count(density, numel)
    return min(int(gamma * numel), numel - kept), kept


def middle_cutoffs(delta_S: Tensor, dropped: int, kept: int) -> tuple[float, int, float, int]:
    """The cuts between which the elements lie that are neither the `dropped` largest nor smaller than the next `kept`.

    Returns:
        Threshold and last index as of `largest_cutoff`, for the `dropped` largest and for the `dropped + kept` largest.
        The first are (inf, -1), which nothing is above, if none is dropped.
    """
    upper = largest_cutoff(delta_S, dropped) if dropped else (math.inf, -1)
    return *upper, *largest_cutoff(delta_S, dropped + kept)


def trim_to_middle(deltas_NS: Tensor, first_index: int, cutoffs_N4: Tensor) -> Tensor:
    """A slice of every client's delta without its largest and smallest elements (Davari et al., 2023).

    Args:
        deltas_NS, first_index: as for `trim_to_largest`.
        cutoffs_N4: (N, 4), float64: of each client, as `middle_cutoffs`.
    """
    largest_NS = trim_to_largest(deltas_NS, first_index, cutoffs_N4[:, :2])
    return torch.where(largest_NS != 0, 0.0, trim_to_largest(deltas_NS, first_index, cutoffs_N4[:, 2:]))


def above_cut(scores_S: Tensor, index_S: Tensor, threshold: float, last: int) -> Tensor:
    """Whether each score is above a cut, or just on it and not behind the index `last`.

    Args:
        scores_S: (S,), any slice of what the cut was found on, in the same dtype.
        index_S: (S,), int64: the place of each element there.
    """
    return (scores_S > threshold) | ((scores_S == threshold) & (index_S <= last))


def keep_random(deltas_NS: Tensor, uniform_NS: Tensor, density: float | Sequence[float], *, rescale: bool) -> Tensor:
    """The deltas with each element kept with probability `density`; kept ones times 1 / density if `rescale`.

    With that factor the expected result is the delta itself (DARE; Yu et al., 2023, arXiv:2311.03099).

    Args:
        deltas_NS: (N, S), a floating dtype.
        uniform_NS: (N, S), float64 draws from [0, 1).
        density: in (0, 1], for all clients or for each.
        rescale: whether to multiply what is kept by 1 / density, in the deltas' dtype.
    """
    density_N = torch.tensor(density, dtype=torch.float64, device=deltas_NS.device).expand(len(deltas_NS))
    kept_NS = torch.where(uniform_NS < density_N[:, None], deltas_NS, 0.0)
    return kept_NS * (1 / density_N).to(deltas_NS.dtype)[:, None] if rescale else kept_NS


def rank_line(density: float, epsilon: float, row: int) -> tuple[float, float]:
    """The probability of the first place of a row, and how much less it is for each half of a place: float32 values.

    1 and 0 in rows of one element, and at density 1.
    """
    if row <= 1 or density >= 1:
        return 1.0, 0.0
    line = torch.tensor([density + epsilon / 2, epsilon / (2 * (row - 1))], dtype=torch.float64).float()
    highest, step = line.tolist()
    return max(highest, LEAST_CHANCE), step


def rank_classes(deltas_SR: Tensor) -> Tensor:
    """(S, R) int32: how far each magnitude is below the largest of its row, in 32 steps for each factor of 2.

    Magnitudes of one step agree in the exponent and the first 5 bits behind the point: they are less than 1/32 apart.
    What is 1023 steps below the largest (about 2^-32 of it) or more is all in the last one.
    """
    steps_SR: Tensor = deltas_SR.abs().float().view(torch.int32) >> RANK_DROPPED_BITS
    classes_SR: Tensor = steps_SR.amax(dim=1, keepdim=True) - steps_SR
    return classes_SR.clamp(max=RANK_CLASSES - 1)


def rank_chances(deltas_NS: Tensor, row: int, density_N: Sequence[float], epsilon: float) -> Tensor:
    """The probability with which each element is kept: linear in the rank of its magnitude within its row.

    From density + epsilon / 2 for the largest to density - epsilon / 2 for the smallest (DELLA; Deep et al., 2024,
    arXiv:2406.11617). Magnitudes that `rank_classes` has in one class are equal, and equal ones share their mean place:
    the probabilities of a row add up to density * row whatever is equal there. 1 in rows of one element, and at
    density 1.

    Args:
        deltas_NS: (N, S), whole rows.
        row: how many elements a row has.

    Returns:
        (N, S), float32.
    """
    lines = [rank_line(density, epsilon, row) for density in density_N]
    highest_N, step_N = torch.tensor(lines, dtype=torch.float32, device=deltas_NS.device).unbind(1)
    if not step_N.any():
        return highest_N[:, None].expand(deltas_NS.shape)
    classes_SR = rank_classes(deltas_NS.reshape(-1, row))
    sorted_SR = classes_SR.sort(dim=1).values
    before_SR, upto_SR = (torch.searchsorted(sorted_SR, classes_SR, right=right) for right in (False, True))
    twice_NS = (before_SR + upto_SR - 1).reshape(deltas_NS.shape).float()
    chance_NS: Tensor = highest_N[:, None] - twice_NS * step_N[:, None]
    return chance_NS.clamp(min=LEAST_CHANCE)


def keep_by_chance(deltas_NS: Tensor, uniform_NS: Tensor, chance_NS: Tensor, *, rescale: bool) -> Tensor:
    """The deltas with each element kept with its own probability; kept ones times one over that if `rescale`."""
    kept_NS = torch.where(uniform_NS < chance_NS, deltas_NS, 0.0)
    return kept_NS * (1 / chance_NS.to(deltas_NS.dtype)) if rescale else kept_NS


def keep_length(kept_NS: Tensor, norms_2N: Tensor) -> Tensor:
    """What was kept of each delta, rescaled so that the whole delta's L1 norm stays.

    Args:
        kept_NS: (N, S).
        norms_2N: (2, N), float64: of the whole deltas, and of what was kept of them.

    Returns:
        (N, S); a delta of which nothing was kept is left as it is.
    """
    return kept_NS / shrinkage(norms_2N).to(kept_NS.device, kept_NS.dtype)[:, None]


def shrinkage(norms_2N: Tensor) -> Tensor:
    """(N,) float64: how much of each delta's norm was kept; 1 where nothing was."""
    before_N, after_N = norms_2N
    return torch.where((after_N > 0) & (before_N > 0), after_N / before_N, 1.0)
