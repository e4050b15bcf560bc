"""Selecting what is important in one delta, by the distribution of its elements. Suffix: S elements (any shape)."""

from __future__ import annotations

import torch
from torch import Tensor

_FLOOR = 1e-8
"""Added to probabilities before their logarithm."""


def divergence_importance(base_S: Tensor, delta_S: Tensor) -> Tensor:
    """|delta| times the divergence of the softmax of its row after the change from that before.

    |tau| * KL(softmax(theta_0 + tau) || softmax(theta_0)), the softmax and KL over the last dimension

    Args:
        base_S, delta_S: of one shape, floating.

    Returns:
        That shape, float64, >= 0 but for rounding.
    """
    if base_S.ndim == 0:
        return torch.zeros((), dtype=torch.float64)
    base_S, delta_S = base_S.double(), delta_S.double()
    after_S, before_S = (each_S.softmax(dim=-1) + _FLOOR for each_S in (base_S + delta_S, base_S))
    return delta_S.abs() * (after_S * (after_S / before_S).log()).sum(dim=-1, keepdim=True)


def outlier_threshold(values_S: Tensor) -> float:
    """median + 1.5 (third quartile - first quartile), quartiles being elements: number int(q (n - 1)) of n in order.

    Args:
        values_S: any shape with at least one element.
    """
    values_S = values_S.reshape(-1)
    first, median, third = (
        float(values_S.kthvalue(1 + int(part * (values_S.numel() - 1))).values) for part in (0.25, 0.5, 0.75)
    )
    return median + 1.5 * (third - first)
