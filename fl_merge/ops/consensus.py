"""Electing a sign for each element. Suffixes: N clients, S elements."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from fl_merge.ops.combine import directed, disjoint_mean, disjoint_sum, weighted_sum

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
        return directed(deltas_NS, weights_N).sign().sum(dim=0).sign()
    return weighted_sum(deltas_NS, weights_N).sign()


def disjoint_merge(
    deltas_NS: Tensor,
    weights_N: Tensor,
    election: Election,
    tally: Callable[[], int],
    *,
    normalize: bool,
    voices_N: Tensor | None = None,
) -> Tensor:
    """Elect a sign for each element, then average (or sum) the deltas that have it: steps 2 and 3 of TIES.

    Args:
        deltas_NS: (N, S), trimmed.
        weights_N: (N,), float64.
        election: as `elect_sign`.
        tally: gives the sum of the whole tensor's elected signs; asked only if an element's deltas cancel exactly.
        normalize: the mean over the clients with the elected sign, or else the sum.
        voices_N: (N,), float64: the weights in the election; None for `weights_N`.

    Returns:
        (S,), in the dtype of the deltas.
    """
    sign_S = elect_sign(deltas_NS, weights_N if voices_N is None else voices_N, election)
    if ((sign_S == 0) & (deltas_NS != 0).any(dim=0)).any():
        sign_S = settle_draws(sign_S, tally())
    return (disjoint_mean if normalize else disjoint_sum)(deltas_NS, weights_N, sign_S)


def settle_draws(sign_S: Tensor, tally: int) -> Tensor:
    """The elected signs with 0 replaced by the majority sign of the tensor (+1 if the majority is itself undecided).

    Args:
        sign_S: (S,), -1, 0 or 1.
        tally: the sum of the whole tensor's elected signs.
    """
    majority = 1.0 if tally >= 0 else -1.0
    return sign_S.masked_fill(sign_S == 0, majority)
