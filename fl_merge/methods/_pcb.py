import torch
from torch import Tensor

from fl_merge.hyperparameters import Density, Scale
from fl_merge.method import merge_method
from fl_merge.ops.combine import weighted_sum
from fl_merge.ops.scores import balance, products, shares
from fl_merge.ops.sparsify import keep_count, trim_to_largest
from fl_merge.shapes import Balanced, Coordinate, Cuts, Maxima, Slice


@merge_method(paper="Du et al., 2024, arXiv:2410.02396", identity={"density": 1.0}, passes="3")
def pcb(*, density: Density = 0.2, scale: Scale = 1.0) -> Coordinate:
    """Weigh each element by its size within its client and its agreement with all; keep the highest weights.

    beta_i = exp(N (a_i^2 - 1)) * max(tanh(b_i), 0),  a_i = |tau_i| / max |tau_i|,
    b_i = tau_i sum_j tau_j / max |tau_i sum_j tau_j|, both maxima over the tensor
    theta = theta_0 + scale * sum m_i beta_i tau_i / sum m_i beta_i;  m_i keeps the max(1, int(density * n)) elements of
    largest beta_i (the lower index wins a tie); an element that nobody keeps stays the base's

    The clients' shares of examples play no part.

    Args:
        density: fraction of each client's elements that is kept, in (0, 1].
        scale: multiplies the merged delta.

    The paper's formula with the tanh of the authors' code. Their code works on the whole model at once, clips the
    outermost 0.01 % of the elements, shifts each client's scores so that the lowest kept one is 0, and does not divide
    b_i by its maximum, so that it depends on the size of the deltas.
    """

    def maxima(deltas_NS: Tensor, weights_N: Tensor, at: Slice) -> Tensor:
        return torch.cat([deltas_NS.abs().amax(dim=1).double(), products(deltas_NS).abs().amax(dim=1)])

    def scores(deltas_NS: Tensor, weights_N: Tensor, at: Slice) -> Tensor:
        count = len(deltas_NS)
        return balance(deltas_NS, at.joint_K[:count], at.joint_K[count : 2 * count])

    def combine(deltas_NS: Tensor, weights_N: Tensor, at: Slice) -> Tensor:
        cuts_N2 = Balanced.cutoffs_N2(at.joint_K, len(deltas_NS))
        kept_NS = trim_to_largest(scores(deltas_NS, weights_N, at), at.start, cuts_N2)
        return scale * weighted_sum(shares(kept_NS) * deltas_NS, torch.ones_like(weights_N))

    def count(numel: int, positive: int) -> int:
        return keep_count(density, numel)

    measures = Maxima(maxima, compiled="products"), Cuts(scores, count, compiled="balance")
    return Coordinate(combine, measures=measures, stages=Balanced(scale))
