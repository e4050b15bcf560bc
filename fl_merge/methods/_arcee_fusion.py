import torch
from torch import Tensor

from fl_merge.method import merge_method
from fl_merge.ops.combine import weighted_sum
from fl_merge.ops.fusion import divergence_importance, outlier_threshold
from fl_merge.shapes import Tensorwise


@merge_method(paper="Arcee, 2024; mergekit: Goddard et al., 2024, arXiv:2403.13257", identity=None, additive=True)
def arcee_fusion() -> Tensorwise:
    """Take over the elements of a delta whose importance is far above that of most others.

    importance = |tau| * KL(softmax(theta_i) || softmax(theta_0)), softmax and KL over each row;
    an element is kept if its importance is at least median + 1.5 (third quartile - first quartile) of its tensor's;
    theta = theta_0 + sum w_i (kept tau_i)

    So one client gives the base with some of its changes, not its model: that is what it is for.

    mergekit takes one model beside the base; more clients are averaged here, each with its own selection. Importance is
    computed in float64, and quartiles are exact (mergekit draws a million elements of larger tensors). A tensor's
    deltas are in memory as a whole.
    """

    def merge(base_S: Tensor, deltas_NS: Tensor, weights_N: Tensor) -> Tensor:
        return weighted_sum(torch.stack([_important(base_S, delta_S) for delta_S in deltas_NS]), weights_N)

    return Tensorwise(merge)


def _important(base_S: Tensor, delta_S: Tensor) -> Tensor:
    importance_S = divergence_importance(base_S, delta_S)
    return torch.where(importance_S >= outlier_threshold(importance_S), delta_S, 0.0)
