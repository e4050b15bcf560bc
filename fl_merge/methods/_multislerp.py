from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from fl_merge.method import merge_method
from fl_merge.ops.interpolate import normalized_mean
from fl_merge.shapes import Span
from fl_merge.types import CohortSpec


@merge_method(
    paper="Goddard, 2025, goddard.blog; mergekit: Goddard et al., 2024, arXiv:2403.13257", additive=True, passes="2"
)
def multislerp(*, on: Literal["deltas", "weights"] = "deltas") -> Span:
    """Average the directions of the clients' deltas, and give the mean their mean length.

    theta = theta_0 + sum w_j |tau_j| * m / |m|,  m = sum w_i tau_i / |tau_i|, for each tensor

    It is defined as a mean in the plane that touches the sphere at m / |m|, brought back to the sphere. But the
    projections onto that plane sum to zero, since m is the weighted mean of what is projected: so the point is
    m / |m| itself, and that is what is computed here.

    Args:
        on: "deltas", or "weights": whole weights in place of the tau_i (then the base does not matter).

    Where the directions cancel the weighted average is taken. mergekit goes through the plane all the same, which
    gives the same but for rounding, and refuses more than two models whose directions cancel.
    """

    def mean(spec: CohortSpec, gram_NN: Tensor | None) -> Sequence[float]:
        assert gram_NN is not None
        return normalized_mean(gram_NN, torch.tensor(spec.weights_N, dtype=torch.float64)).tolist()

    return Span(mean, gram=True, on=on)
