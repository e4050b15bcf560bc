"""Pruning deltas: by magnitude or by chance. Suffixes: N clients, S elements."""

from __future__ import annotations

import torch
from torch import Tensor


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


def keep_random(deltas_NS: Tensor, uniform_NS: Tensor, density: float, *, rescale: bool) -> Tensor:
    """The deltas with each element kept with probability `density`; kept ones divided by it if `rescale`.

    With the division the expected result is the delta itself (DARE; Yu et al., 2023, arXiv:2311.03099).

    Args:
        deltas_NS: (N, S), a floating dtype.
        uniform_NS: (N, S), float64 draws from [0, 1).
        density: in (0, 1].
        rescale: whether to divide what is kept by `density`.
    """
    kept_NS = torch.where(uniform_NS < density, deltas_NS, 0.0)
    return kept_NS / density if rescale else kept_NS
