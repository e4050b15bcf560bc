"""Everything that numba compiles, in one module: importing it is what costs time."""

from fl_merge.kernels.counting import (
    MARKED,
    count_magnitudes,
    find_cuts,
    largest_magnitude,
    magnitudes_between,
    nth_equals,
    sample_magnitudes,
    select_two,
)
from fl_merge.kernels.elements import combine_elements
from fl_merge.kernels.gram import gram
from fl_merge.kernels.merging import prune_combine, uniform, weighted_sum
from fl_merge.kernels.ranking import rank_combine
from fl_merge.kernels.scoring import SUM_BLOCK, combine_balanced, kept_squares, largest_of_products

__all__ = [
    "MARKED",
    "SUM_BLOCK",
    "combine_balanced",
    "combine_elements",
    "count_magnitudes",
    "find_cuts",
    "gram",
    "kept_squares",
    "largest_magnitude",
    "largest_of_products",
    "magnitudes_between",
    "nth_equals",
    "prune_combine",
    "rank_combine",
    "sample_magnitudes",
    "select_two",
    "uniform",
    "weighted_sum",
]
