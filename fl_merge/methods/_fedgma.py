from typing import Annotated

import torch
from torch import Tensor

from fl_merge.hyperparameters import Range, Scale
from fl_merge.method import merge_method
from fl_merge.ops.combine import weighted_sum
from fl_merge.shapes import Coordinate, Elements, Slice

_ROUNDING = 1e-5
"""An agreement that is the threshold but for this counts as it: 7 of 10 equal clients against 3 agree by 0.4."""


@merge_method(paper="Tenison et al., 2022, arXiv:2201.11986", additive=True, passes="1")
def fedgma(*, threshold: Annotated[float, Range(0.0, 1.0)] = 0.4, scale: Scale = 1.0) -> Coordinate:
    """Damp the elements on whose sign the clients disagree.

    A = |sum w_i sign tau_i|;  theta = theta_0 + scale * (1 if A >= threshold else A) * sum w_i tau_i

    Args:
        threshold: the agreement from which an element is taken in full, in [0, 1]; to 1e-5.
        scale: multiplies the merged delta (the paper's server learning rate).
    """
    enough = threshold - _ROUNDING

    def combine(deltas_NS: Tensor, weights_N: Tensor, at: Slice) -> Tensor:
        agreement_S = weighted_sum(deltas_NS.sign(), weights_N).abs()
        mask_S = torch.where(agreement_S >= enough, 1.0, agreement_S)
        return scale * mask_S * weighted_sum(deltas_NS, weights_N)

    return Coordinate(combine, stages=Elements("damped", (enough,), scale, weighted=True))
