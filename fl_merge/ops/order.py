"""Order statistics over clients, element by element. Suffixes: N clients, S elements."""

from __future__ import annotations

import torch
from torch import Tensor

from fl_merge.ops.robust import krum_scores


def median(values_NS: Tensor) -> Tensor:
    """The median over clients; of an even number the mean of the two in the middle.

    Args:
        values_NS: (N, S), a floating dtype.

    Returns:
        (S,), in the same dtype.
    """
    sorted_NS = values_NS.sort(dim=0).values
    count = len(sorted_NS)
    if count % 2:
        return sorted_NS[count // 2] + 0.0  # one sign for zeros, whichever came first
    return 0.5 * (sorted_NS[count // 2 - 1] + sorted_NS[count // 2]) + 0.0


def trimmed_mean(values_NS: Tensor, cut: int) -> Tensor:
    """The mean over clients without the `cut` smallest and the `cut` largest values, added from the smallest on.

    Args:
        values_NS: (N, S), a floating dtype; N > 2 * cut.
    """
    sorted_NS = values_NS.sort(dim=0).values
    return _mean_of(sorted_NS[cut : len(sorted_NS) - cut])


def mean_around_median(values_NS: Tensor, count: int) -> Tensor:
    """The mean over the `count` clients whose values are nearest to the median (of two equally near the smaller one).

    Args:
        values_NS: (N, S), a floating dtype.
        count: 1 to N.
    """
    sorted_NS = values_NS.sort(dim=0).values
    middle_S = median(values_NS)
    first_S = torch.zeros(values_NS.shape[1], dtype=torch.int64, device=values_NS.device)
    for left in range(len(sorted_NS), count, -1):
        # The nearest ones are neighbours in order: the farther of the two ends goes.
        low_S = sorted_NS.gather(0, first_S[None])[0]
        high_S = sorted_NS.gather(0, first_S[None] + (left - 1))[0]
        first_S = first_S + ((middle_S - low_S) > (high_S - middle_S))
    return _mean_of(torch.stack([sorted_NS.gather(0, first_S[None] + at)[0] for at in range(count)]))


def _mean_of(sorted_NS: Tensor) -> Tensor:
    total_S = sorted_NS[0] + 0.0
    for value_S in sorted_NS[1:]:
        total_S = total_S + value_S
    return total_S / len(sorted_NS)


def select_by_krum(gram_NN: Tensor, tolerated: int, count: int, *, repeated: bool) -> list[int]:
    """The `count` clients of lowest Krum score, the first in order winning a tie.

    Args:
        gram_NN: (N, N), float64: inner products of the deltas.
        tolerated: f, as for `ops.robust.krum_scores`; where few are left, one neighbour at least is looked at.
        repeated: take one at a time, and score the rest anew without it; else all by their first score.

    Returns:
        Their places, in order.
    """
    left = list(range(len(gram_NN)))
    if not repeated:
        scores = _scores(gram_NN, tolerated)
        return sorted(sorted(left, key=lambda place: scores[place])[:count])
    chosen: list[int] = []
    while len(chosen) < count:
        scores = _scores(gram_NN[left][:, left], tolerated)
        chosen.append(left.pop(scores.index(min(scores))))
    return sorted(chosen)


def _scores(gram_NN: Tensor, tolerated: int) -> list[float]:
    scores_N = krum_scores(gram_NN, min(tolerated, len(gram_NN) - 3)) if len(gram_NN) > 1 else torch.zeros(1)
    return [float(score) for score in scores_N]
