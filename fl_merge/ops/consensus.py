"""Electing a sign for each element. Suffixes: N clients, S elements."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from fl_merge.ops.combine import weighted_sum

Election = Literal["total", "frequency"]


def elect_sign(deltas_NS: Tensor, weights_N: Tensor, election: Election = "total") -> Tensor:
    """The sign of each element on which the clients agree most.

    Args:
        deltas_NS: (N, S), a floating dtype.
        weights_N: (N,), float64.
        election: "total": the sign of the weighted sum (Yadav et al., 2023, arXiv:2306.01708);
            "frequency": the sign that more clients have, whatever their weights and magnitudes.

    Returns:
        (S,), -1, 0 or 1 in the dtype of the deltas; 0 where neither sign wins.
    """
    if election == "frequency":
        return deltas_NS.sign().sum(dim=0).sign()
    return weighted_sum(deltas_NS, weights_N).sign()


def settle_draws(sign_S: Tensor, tally: int) -> Tensor:
    """The elected signs with 0 replaced by the majority sign of the tensor (+1 if the majority is itself undecided).

    Args:
        sign_S: (S,), -1, 0 or 1.
        tally: the sum of the whole tensor's elected signs.
    """
    majority = 1.0 if tally >= 0 else -1.0
    return sign_S.masked_fill(sign_S == 0, majority)
