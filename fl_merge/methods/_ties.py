from collections.abc import Mapping

from fl_merge.hyperparameters import Density, Scale
from fl_merge.method import merge_method
from fl_merge.ops.consensus import Election
from fl_merge.shapes import Coordinate, ScopeName
from fl_merge.stages import KeepLargest, Stages


@merge_method(paper="Yadav et al., 2023, arXiv:2306.01708", identity={"density": 1.0}, additive=True, passes="2")
def ties(
    *,
    density: Density | Mapping[str, Density] = 0.2,
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
        density: fraction of the elements that is kept, in (0, 1]; for all clients or by client id.
        scale: multiplies the merged delta.
        normalize: if false, step 3 is the sum without the division.
        scope: "tensor": trim tensor by tensor (as mergekit and PEFT); "model": one threshold over the whole delta
            (as the authors' code).
        election: "total": by weighted sum; "frequency": by the number of clients.

    mergekit gives elements whose sum is 0 a plus sign, and may keep other elements than the first among equal ones.
    """

    return Stages(KeepLargest(density), election, normalize, scale).coordinate(scope)
