"""The family of TIES and DARE: prune each client's delta, elect a sign for each element, add what agrees with it.

A method of this family is data, `Stages`. Its torch definition is put together here from `ops`; where compiled kernels
are loaded, the executor runs all stages in one pass instead, with the same result.

Suffixes: N clients, S elements.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fl_merge.ops.combine import weighted_sum
from fl_merge.ops.consensus import Election, disjoint_merge, elect_sign
from fl_merge.ops.sparsify import keep_count, largest_cutoff, trim_to_largest
from fl_merge.shapes import Coordinate, ScopeName, Slice


@dataclass(frozen=True)
class KeepLargest:
    """Keep the max(1, int(density * n)) elements of largest magnitude of a delta's n, the lower index winning a tie."""

    density: float


@dataclass(frozen=True)
class KeepRandom:
    """Keep each element with probability `density`, and divide it by that if `rescale`."""

    density: float
    rescale: bool


@dataclass(frozen=True)
class Stages:
    """theta = theta_0 + scale * combine(prune(deltas)).

    Args:
        prune: what is kept of each delta; None for all of it.
        election: how the sign of each element is elected ("total" or "frequency"); None to add what all clients say.
        normalize: after an election: the mean over the clients with the elected sign, or else their sum.
        scale: multiplies the merged delta.
    """

    prune: KeepLargest | KeepRandom | None
    election: Election | None = None
    normalize: bool = True
    scale: float = 1.0

    def coordinate(self, scope: ScopeName = "tensor") -> Coordinate:
        """The method: its definition, and these stages beside it.

        Args:
            scope: of `KeepLargest`: whether each tensor is trimmed for itself, or the whole model by one threshold.
        """
        survey = self._cutoff if isinstance(self.prune, KeepLargest) else None
        tally = self._elected if self.election is not None else None
        return Coordinate(self._combine, survey=survey, tally=tally, scope=scope, stages=self)

    def _pruned(self, deltas_NS: Tensor, at: Slice) -> Tensor:
        if isinstance(self.prune, KeepLargest):
            return trim_to_largest(deltas_NS, at.scope_start, at.survey_NK)
        if isinstance(self.prune, KeepRandom):
            return at.keep_random(deltas_NS, self.prune.density, rescale=self.prune.rescale)
        return deltas_NS

    def _combine(self, deltas_NS: Tensor, weights_N: Tensor, at: Slice) -> Tensor:
        pruned_NS = self._pruned(deltas_NS, at)
        if self.election is None:
            return self.scale * weighted_sum(pruned_NS, weights_N)
        return self.scale * disjoint_merge(
            pruned_NS, weights_N, self.election, lambda: at.tally, normalize=self.normalize
        )

    def _elected(self, deltas_NS: Tensor, weights_N: Tensor, at: Slice) -> Tensor:
        assert self.election is not None
        return elect_sign(self._pruned(deltas_NS, at), weights_N, self.election)

    def _cutoff(self, delta_S: Tensor) -> Tensor:
        """(2,) float64: the threshold, and the index of the last element just on it that is kept."""
        assert isinstance(self.prune, KeepLargest)
        count = keep_count(self.prune.density, delta_S.numel())
        return torch.tensor(largest_cutoff(delta_S, count), dtype=torch.float64)
