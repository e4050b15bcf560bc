"""Federated learning in which model merging is the aggregation."""

from fl_merge import methods
from fl_merge.clipping import clip_norm
from fl_merge.errors import FlMergeError, MergeError, RecipeError, UpdateError
from fl_merge.hyperparameters import in_range
from fl_merge.merging import merge
from fl_merge.method import METHODS, build, merge_method, partition
from fl_merge.optimizers import adagrad, adam, momentum, server_optimizer, yogi
from fl_merge.phases import phase, schedule
from fl_merge.recipe import Recipe
from fl_merge.shapes import Coordinate, Matrix, Slice, Span
from fl_merge.tuning import Tuner, auto_scale

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "Coordinate",
    "FlMergeError",
    "Matrix",
    "MergeError",
    "Recipe",
    "RecipeError",
    "Slice",
    "Span",
    "Tuner",
    "UpdateError",
    "adagrad",
    "adam",
    "auto_scale",
    "build",
    "clip_norm",
    "in_range",
    "merge",
    "merge_method",
    "methods",
    "momentum",
    "partition",
    "phase",
    "schedule",
    "server_optimizer",
    "yogi",
]
