from collections.abc import Mapping
from typing import Annotated

from fl_merge.hyperparameters import Density, Range, Scale
from fl_merge.method import merge_method
from fl_merge.shapes import Coordinate
from fl_merge.stages import KeepMiddle, Stages


@merge_method(
    paper="Davari and Belilovsky, 2023, arXiv:2312.06795", identity={"density": 1.0}, additive=True, passes="2"
)
def breadcrumbs(
    *,
    density: Density | Mapping[str, Density] = 0.143,
    gamma: Annotated[float, Range(0.0, 1.0)] = 0.007,
    scale: Scale = 1.0,
) -> Coordinate:
    """Drop the largest and the smallest elements of each delta, and take the weighted sum of what is left.

    theta = theta_0 + scale * sum w_i m_i tau_i;  of a tensor's n elements in order of magnitude, m_i drops the first
    int(gamma * n) and keeps the max(1, int(density * n)) that follow (the lower index is first among equal ones)

    Args:
        density: fraction of the elements that is kept, in (0, 1]; for all clients or by client id.
        gamma: fraction that is dropped as outliers, in [0, 1]; where density and gamma are more than 1 together, less.
        scale: multiplies the merged delta.

    The defaults are the paper's: the largest 0.7 % and the smallest 85 % are dropped; its sum is not weighted.
    mergekit drops all of a tensor with fewer than 1 / gamma elements: it cuts a list at -0. Here that drops nothing.
    """
    return Stages(KeepMiddle(density, gamma), scale=scale).coordinate()
