from collections.abc import Mapping
from typing import Annotated

from fl_merge.hyperparameters import Density, Range, Scale
from fl_merge.method import merge_method
from fl_merge.ops.consensus import Election
from fl_merge.shapes import Coordinate
from fl_merge.stages import KeepMiddle, Stages


@merge_method(
    paper="Davari and Belilovsky, 2023, arXiv:2312.06795", identity={"density": 1.0}, additive=True, passes="2"
)
def breadcrumbs_ties(
    *,
    density: Density | Mapping[str, Density] = 0.143,
    gamma: Annotated[float, Range(0.0, 1.0)] = 0.007,
    scale: Scale = 1.0,
    normalize: bool = True,
    election: Election = "total",
) -> Coordinate:
    """Drop the largest and the smallest elements of each delta, then elect signs and average as TIES does.

    The dropping of `breadcrumbs`, then steps 2 and 3 of `ties`.

    Args:
        density: fraction of the elements that is kept, in (0, 1]; for all clients or by client id.
        gamma: fraction that is dropped as outliers, in [0, 1]; where density and gamma are more than 1 together, less.
        scale: multiplies the merged delta.
        normalize: if false, the last step is the sum without the division.
        election: "total": by weighted sum; "frequency": by the number of clients.

    mergekit drops all of a tensor with fewer than 1 / gamma elements: see `breadcrumbs`.
    """
    return Stages(KeepMiddle(density, gamma), election, normalize, scale).coordinate()
