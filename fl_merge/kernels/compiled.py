"""Everything that numba compiles, in one module: importing it is what costs time."""

from fl_merge.kernels.counting import (
    bracket,
    count_magnitudes,
    largest_magnitude,
    magnitudes_between,
    nth_equal,
    nth_largest,
    sample_magnitudes,
)
from fl_merge.kernels.merging import prune_combine, uniform, vectors, weighted_sum

__all__ = [
    "bracket",
    "count_magnitudes",
    "largest_magnitude",
    "magnitudes_between",
    "nth_equal",
    "nth_largest",
    "prune_combine",
    "sample_magnitudes",
    "uniform",
    "vectors",
    "weighted_sum",
]
