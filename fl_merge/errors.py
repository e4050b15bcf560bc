"""The exceptions of fl_merge, sorted by who must act.

    FlMergeError
      RecipeError (also a ValueError)   whoever wrote the recipe: unknown method, value out of range; at construction
      UpdateError                       one client: its update is dropped and recorded, the round goes on
        TensorMismatchError             a tensor is missing, extra, or has another shape or dtype than the base's
        NonFiniteError                  NaN or infinity
        DecodeError                     bytes that are not what they claim to be
        WeightError                     a number of examples that is no weight
        StatisticsError                 statistics that are missing, do not fit the base, or cannot be what they should
        MetricError                     a metric that the method needs is missing, or no such number
      MergeError                        the operator: nothing left to merge, quorum missed, two outputs with one name

A message says where, what was found and what was wanted.
"""

from __future__ import annotations

import math


def one_line(text: str, limit: int = 300) -> str:
    """Text from elsewhere, fit for a log: one line, nothing unprintable, not endless."""
    line = " ".join("".join(char if char.isprintable() else " " for char in text).split())
    return line if len(line) <= limit else line[: limit - 3] + "..."


def counted(count: int, thing: str, things: str | None = None) -> str:
    """A number and what there is of it: 1 model, 2 models; the plural is given where it is no more than an s."""
    return f"{count} {thing if count == 1 else things or f'{thing}s'}"


class FlMergeError(Exception):
    """Any error that fl_merge raises on purpose."""


class RecipeError(FlMergeError, ValueError):
    """A method, a parameter or a rule that does not exist or is out of range."""


class MergeError(FlMergeError):
    """A merge that cannot give a model."""

    @classmethod
    def of_value(cls, tensor: str, largest: float, dtype: str) -> MergeError:
        """A merged value has no place in the dtype in which it is written.

        Args:
            tensor: its name.
            largest: the largest magnitude among the values; NaN counts as infinite.
            dtype: as torch names it.
        """
        magnitude = math.inf if math.isnan(largest) else largest
        return cls(
            f"tensor '{tensor}': a merged value of magnitude {magnitude:g} does not fit "
            f"{dtype.removeprefix('torch.')}; lower the method's scale"
        )


class UpdateError(FlMergeError):
    """One client's update cannot be used.

    Args:
        problem: what was found and what was wanted.
        client_id: whose update it is; None where the reader does not know yet.
        tensor: the tensor's name, where the problem is with one tensor.
    """

    def __init__(self, problem: str, *, client_id: str | None = None, tensor: str | None = None) -> None:
        super().__init__(problem)
        self.problem = problem
        self.client_id = client_id
        self.tensor = tensor

    def of_client(self, client_id: str) -> UpdateError:
        """The same error with the client's id filled in."""
        return type(self)(self.problem, client_id=client_id, tensor=self.tensor)

    def __str__(self) -> str:
        where = [f"client '{self.client_id}'"] if self.client_id is not None else []
        where += [f"tensor '{self.tensor}'"] if self.tensor is not None else []
        return f"{', '.join(where)}: {self.problem}" if where else self.problem


class TensorMismatchError(UpdateError):
    """A tensor is missing, extra, or has another shape or dtype than the base's."""


class NonFiniteError(UpdateError):
    """A tensor holds NaN or infinity."""


class DecodeError(UpdateError):
    """Bytes are not what their header says."""


class WeightError(UpdateError):
    """The number of examples is missing, not finite, not positive or beyond the limit."""


class StatisticsError(UpdateError):
    """Statistics that a method needs are missing, do not fit the base, or have values that no such statistic has."""


class MetricError(UpdateError):
    """A metric that the merge method needs is missing, or not what it is to be."""
