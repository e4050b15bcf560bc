"""The rows of a new router.

Suffixes: E experts, H hidden units.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fl_merge.ops.draws import uniform

ROUTER_STD = 0.02


def random_rows(key: int, experts: int, hidden: int) -> Tensor:
    """Small normal rows, a function of the key alone.

    Returns:
        (E, H) float32 of standard deviation 0.02.
    """
    draws_S = uniform(key, 0, experts * hidden) + 2.0**-33  # inside (0, 1)
    normal_S = torch.erfinv(2.0 * draws_S - 1.0) * math.sqrt(2.0)
    return (ROUTER_STD * normal_S).to(torch.float32).view(experts, hidden)


def hidden_rows(means_EH: Tensor) -> Tensor:
    """Rows that point from the mean of all domains to each domain's mean hidden state, of length 1.

    row_e = (h_e - mean h) / ||h_e - mean h||

    What all domains have in common would add the same to every expert's score, so it is left out. Domains that are
    alike to the last bit get rows of zeros.

    Args:
        means_EH: (E, H), one row a domain.

    Returns:
        (E, H) float32.
    """
    wide_EH = means_EH.to(torch.float64)
    apart_EH = wide_EH - wide_EH.mean(0)
    norms_E1 = apart_EH.norm(dim=1, keepdim=True)
    return torch.where(norms_E1 > 0, apart_EH / norms_E1, 0.0).to(torch.float32)
