"""Everything that numba compiles, in one module: importing it is what costs time."""

from fl_merge.kernels.blocks import BLOCK
from fl_merge.kernels.counting import (
    count_magnitudes,
    largest_magnitude,
    magnitudes_between,
    nth_equal,
    sample_magnitudes,
)
from fl_merge.kernels.elements import combine_elements
from fl_merge.kernels.gram import gram
from fl_merge.kernels.merging import prune_combine, uniform, weighted_sum
from fl_merge.kernels.ranking import keep_ranked

__all__ = [
    "BLOCK",
    "combine_elements",
    "count_magnitudes",
    "gram",
    "keep_ranked",
    "largest_magnitude",
    "magnitudes_between",
    "nth_equal",
    "prune_combine",
    "sample_magnitudes",
    "uniform",
    "weighted_sum",
]
