import functools

import torch
from torch import Tensor

from fl_merge.hyperparameters import Density, Scale
from fl_merge.method import merge_method
from fl_merge.ops.combine import disjoint_mean, disjoint_sum
from fl_merge.ops.consensus import Election, elect_sign, settle_draws
from fl_merge.ops.sparsify import keep_count, keep_largest, largest_cutoff
from fl_merge.shapes import Coordinate, ScopeName, Slice


@merge_method(paper="Yadav et al., 2023, arXiv:2306.01708", identity={"density": 1.0})
def ties(
    *,
    density: Density = 0.2,
    scale: Scale = 1.0,
    normalize: bool = True,
    scope: ScopeName = "tensor",
    election: Election = "total",
) -> Coordinate:
    """Trim each delta to its largest elements, elect a sign for each element, average the deltas that have it.

    1. keep the max(1, int(density * n)) elements of largest magnitude of a delta's n (the lower index wins a tie)
    2. s = sign(sum w_i tau_i) over the trimmed deltas; 0 takes the sign that most of the tensor's elements have
    3. theta = theta_0 + scale * sum w_i tau_i / sum w_i, both over the clients whose trimmed delta has sign s

    Args:
        density: fraction of the elements that is kept, in (0, 1].
        scale: multiplies the merged delta.
        normalize: if false, step 3 is the sum without the division.
        scope: "tensor": trim tensor by tensor (as mergekit and PEFT); "model": one threshold over the whole delta
            (as the authors' code).
        election: "total": by weighted sum; "frequency": by the number of clients.

    mergekit gives elements whose sum is 0 a plus sign, and may keep other elements than the first among equal ones.
    """

    def trim(deltas_NS: Tensor, at: Slice) -> Tensor:
        index_S = at.index_S()
        return torch.stack(
            [
                keep_largest(delta_S, index_S, threshold, int(last))
                for delta_S, (threshold, last) in zip(deltas_NS, at.survey_NK.tolist(), strict=True)
            ]
        )

    def elected(deltas_NS: Tensor, weights_N: Tensor, at: Slice) -> Tensor:
        return elect_sign(trim(deltas_NS, at), weights_N, election)

    def combine(deltas_NS: Tensor, weights_N: Tensor, at: Slice) -> Tensor:
        trimmed_NS = trim(deltas_NS, at)
        sign_S = settle_draws(elect_sign(trimmed_NS, weights_N, election), at.tally)
        merged_S = (disjoint_mean if normalize else disjoint_sum)(trimmed_NS, weights_N, sign_S)
        return scale * merged_S

    return Coordinate(combine, survey=functools.partial(_cutoff, density), tally=elected, scope=scope)


def _cutoff(density: float, delta_S: Tensor) -> Tensor:
    """(2,) float64: the threshold, and the index of the last element just on it that is kept."""
    return torch.tensor(largest_cutoff(delta_S, keep_count(density, delta_S.numel())), dtype=torch.float64)
