import torch
from torch import Tensor

from fl_merge.hyperparameters import Density, Scale
from fl_merge.method import merge_method
from fl_merge.ops.consensus import disjoint_merge, elect_sign
from fl_merge.ops.gram import sums_of_squares
from fl_merge.ops.scores import variance
from fl_merge.ops.sparsify import above_cut, keep_count
from fl_merge.shapes import Coordinate, Cuts, Slice, Sums
from fl_merge.stages import Selected


@merge_method(paper="Wan et al., 2024, arXiv:2408.07990", passes="3")
def sce(*, density: Density = 0.1, scale: Scale = 1.0) -> Coordinate:
    """Select the elements on which clients differ most, weigh clients by what they changed there, erase minorities.

    1. select: of the elements whose variance over the clients is not 0, the max(1, int(density * n)) of largest
       variance (the lower index wins a tie); all elements where no variance is above 0
    2. calculate: e_i = sum tau_i^2 / sum_j sum tau_j^2, over the selected elements of the tensor
    3. erase: s = sign(sum tau_i); 0 takes the sign that most of the tensor's elements have
    4. theta = theta_0 + scale * sum e_i tau_i / sum e_i, both over the clients whose delta has sign s

    The clients' shares of examples play no part.

    Args:
        density: fraction of the elements that is selected, in (0, 1].
        scale: multiplies the merged delta.

    mergekit takes equal e_i where the sum of mean squares is below 1e-6, which it is for most finetuned models; here
    the result is the same at any size of the deltas whose squares float32 has (1e-18 to 1e18). It gives elements whose
    sum is 0 a plus sign.
    """

    def score(deltas_NS: Tensor, weights_N: Tensor, at: Slice) -> Tensor:
        return variance(deltas_NS)[None]

    def count(numel: int, varying: int) -> int:
        return keep_count(density, varying) if varying and density < 1 else numel

    def selected(deltas_NS: Tensor, at: Slice) -> Tensor:
        threshold, last = at.joint_K[:2].tolist()
        index_S = torch.arange(at.start, at.stop, device=deltas_NS.device)
        return torch.where(above_cut(variance(deltas_NS), index_S, threshold, int(last)), deltas_NS, 0.0)

    def squares(deltas_NS: Tensor, weights_N: Tensor, at: Slice) -> Tensor:
        return sums_of_squares(selected(deltas_NS, at))

    def votes(deltas_NS: Tensor, weights_N: Tensor, at: Slice) -> Tensor:
        return elect_sign(selected(deltas_NS, at), torch.ones_like(weights_N))

    def combine(deltas_NS: Tensor, weights_N: Tensor, at: Slice) -> Tensor:
        shares_N = Selected.shares_N(at.joint_K)
        chosen_NS = selected(deltas_NS, at)
        return scale * disjoint_merge(
            chosen_NS, shares_N, "total", lambda: at.tally, normalize=True, voices_N=torch.ones_like(shares_N)
        )

    measures = Cuts(score, count, compiled="variance"), Sums(squares, compiled="kept squares")
    return Coordinate(combine, tally=votes, measures=measures, stages=Selected(scale))
