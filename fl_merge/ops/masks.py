"""One merged delta for all clients, and masks that say which part of it is whose. Suffixes: N clients, S elements."""

from __future__ import annotations

import torch
from torch import Tensor

from fl_merge.ops.combine import weighted_sum


def largest_delta(deltas_NS: Tensor) -> Tensor:
    """For each element the delta of largest magnitude, that of the first client among equal ones.

    Marczak et al., 2024, arXiv:2407.06322.

    Args:
        deltas_NS: (N, S), a floating dtype.
    """
    largest_S = deltas_NS[0]
    for delta_S in deltas_NS[1:]:
        largest_S = torch.where(delta_S.abs() > largest_S.abs(), delta_S, largest_S)
    return largest_S


def own_mask(delta_S: Tensor, merged_S: Tensor, threshold: float) -> Tensor:
    """Where a client's delta is larger than `threshold` times what the merged delta has beside it: its TALL mask.

    |tau_i| > threshold * |merged - tau_i|      (Wang et al., 2024, arXiv:2405.07813)

    Args:
        delta_S, merged_S: any shapes that broadcast.

    Returns:
        Booleans in that shape.
    """
    return delta_S.abs() > (merged_S - delta_S).abs() * threshold


def consensus_delta(deltas_NS: Tensor, weights_N: Tensor, scale: float, threshold: float, at_least: int) -> Tensor:
    """The scaled sum, where at least so many clients' masks have it; 0 elsewhere.

    Args:
        deltas_NS: (N, S), a floating dtype.
        weights_N: (N,), float64: the factors of the sum.
        scale: of the sum, before the masks are taken.
        threshold: as for `own_mask`.
        at_least: how many masks.
    """
    merged_S = weighted_sum(deltas_NS, weights_N) * scale
    votes_S = own_mask(deltas_NS, merged_S[None], threshold).sum(dim=0)
    return torch.where(votes_S >= at_least, merged_S, 0.0)


def unified_delta(deltas_NS: Tensor) -> Tensor:
    """For each element the largest magnitude among the deltas that have the sign of the sum (Huang et al., 2024).

    Args:
        deltas_NS: (N, S), a floating dtype. Where the sum is 0 the result is 0.
    """
    ones_N = torch.ones(len(deltas_NS), dtype=torch.float64)
    sign_S = weighted_sum(deltas_NS, ones_N).sign()
    return sign_S * torch.clamp(deltas_NS * sign_S, min=0.0).amax(dim=0) + 0.0
