import functools

import torch
from torch import Tensor

from fl_merge.hyperparameters import Density, Scale
from fl_merge.method import merge_method
from fl_merge.ops.consensus import Election, disjoint_merge, elect_sign
from fl_merge.ops.sparsify import keep_count, largest_cutoff, trim_to_largest
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
        return trim_to_largest(deltas_NS, at.scope_start, at.survey_NK)

    def elected(deltas_NS: Tensor, weights_N: Tensor, at: Slice) -> Tensor:
        return elect_sign(trim(deltas_NS, at), weights_N, election)

    def combine(deltas_NS: Tensor, weights_N: Tensor, at: Slice) -> Tensor:
        trimmed_NS = trim(deltas_NS, at)
        return scale * disjoint_merge(trimmed_NS, weights_N, election, lambda: at.tally, normalize=normalize)

    return Coordinate(combine, survey=functools.partial(_cutoff, density), tally=elected, scope=scope)


def _cutoff(density: float, delta_S: Tensor) -> Tensor:
    """(2,) float64: the threshold, and the index of the last element just on it that is kept."""
    return torch.tensor(largest_cutoff(delta_S, keep_count(density, delta_S.numel())), dtype=torch.float64)
