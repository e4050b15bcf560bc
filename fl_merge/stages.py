"""The family of TIES and DARE: prune each client's delta, elect a sign for each element, add what agrees with it.

A method of this family is data, `Stages`. Its torch definition is put together here from `ops`; where compiled kernels
are loaded, the executor runs all stages in one pass instead, with the same result.

Suffixes: N clients, S elements.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fl_merge.errors import MergeError
from fl_merge.ops.combine import weighted_sum
from fl_merge.ops.consensus import Election, disjoint_merge, elect_sign
from fl_merge.ops.sparsify import (
    keep_by_chance,
    keep_count,
    keep_length,
    largest_cutoff,
    middle_counts,
    middle_cutoffs,
    rank_chances,
    trim_to_largest,
    trim_to_middle,
)
from fl_merge.shapes import Coordinate, ScopeName, Slice, Sums
from fl_merge.types import CohortSpec

Densities = float | Mapping[str, float]
"""A density for all clients, or one for each by its id."""

Rescale = bool | Literal["l1"]
"""Whether what is kept by chance is divided by that chance; "l1": rescaled to the whole delta's L1 norm instead."""


@dataclass(frozen=True)
class _Prune:
    """What is kept of each delta.

    Args:
        density: fraction of the elements that is kept.
    """

    density: Densities

    def densities(self, spec: CohortSpec) -> list[float]:
        """The density of each client.

        Raises:
            MergeError: if densities are given by client, and not for this one.
        """
        if not isinstance(self.density, Mapping):
            return [self.density] * len(spec.client_ids)
        for client_id in spec.client_ids:
            if client_id not in self.density:
                named = ", ".join(f"'{other}'" for other in self.density) or "none"
                raise MergeError(f"density names no client '{client_id}' (it names {named})")
        return [self.density[client_id] for client_id in spec.client_ids]

    def density_of(self, client_id: str) -> float:
        """The density of one client."""
        return self.density[client_id] if isinstance(self.density, Mapping) else self.density


@dataclass(frozen=True)
class KeepLargest(_Prune):
    """Keep the max(1, int(density * n)) elements of largest magnitude of a delta's n, the lower index winning a tie."""


@dataclass(frozen=True)
class KeepMiddle(_Prune):
    """Drop the int(gamma * n) elements of largest magnitude, then keep the max(1, int(density * n)) next ones."""

    gamma: float


@dataclass(frozen=True)
class KeepRandom(_Prune):
    """Keep each element with probability `density`, and rescale what is kept."""

    rescale: Rescale


@dataclass(frozen=True)
class KeepRanked(_Prune):
    """Keep each element with a probability that is linear in its magnitude's rank, and rescale what is kept."""

    epsilon: float
    rescale: Rescale


@dataclass(frozen=True)
class Stages:
    """theta = theta_0 + scale * combine(prune(deltas)).

    Args:
        prune: what is kept of each delta; None for all of it.
        election: how the sign of each element is elected ("total" or "frequency"); None to add what all clients say.
        normalize: after an election: the mean over the clients with the elected sign, or else their sum.
        scale: multiplies the merged delta.
    """

    prune: KeepLargest | KeepMiddle | KeepRandom | KeepRanked | None
    election: Election | None = None
    normalize: bool = True
    scale: float = 1.0

    def coordinate(self, scope: ScopeName = "tensor") -> Coordinate:
        """The method: its definition, and these stages beside it.

        Args:
            scope: of `KeepLargest`: whether each tensor is trimmed for itself, or the whole model by one threshold.
        """
        prune = self.prune
        norms = isinstance(prune, KeepRandom | KeepRanked) and prune.rescale == "l1"
        return Coordinate(
            self._combine,
            surveys=self._cutoffs if isinstance(prune, KeepLargest | KeepMiddle) else None,
            tally=self._elected if self.election is not None else None,
            measures=(Sums(self._norms),) if norms else (),
            scope=scope,
            stages=self,
            rows=isinstance(prune, KeepRanked),
            check=None if prune is None else lambda spec: _discard(prune.densities(spec)),
        )

    def _pruned(self, deltas_NS: Tensor, at: Slice) -> Tensor:
        if isinstance(self.prune, KeepLargest):
            return trim_to_largest(deltas_NS, at.scope_start, at.survey_NK)
        if isinstance(self.prune, KeepMiddle):
            return trim_to_middle(deltas_NS, at.scope_start, at.survey_NK)
        if isinstance(self.prune, KeepRandom | KeepRanked):
            kept_NS = self._kept(deltas_NS, at, rescale=self.prune.rescale is True)
            return keep_length(kept_NS, at.joint_K.reshape(2, -1)) if self.prune.rescale == "l1" else kept_NS
        return deltas_NS

    def _kept(self, deltas_NS: Tensor, at: Slice, *, rescale: bool) -> Tensor:
        prune = self.prune
        assert isinstance(prune, KeepRandom | KeepRanked)
        density_N = prune.densities(at.spec)
        if isinstance(prune, KeepRandom):
            return at.keep_random(deltas_NS, density_N, rescale=rescale)
        chance_NS = rank_chances(deltas_NS, at.row, density_N, prune.epsilon)
        return keep_by_chance(deltas_NS, at.uniform_NS(), chance_NS, rescale=rescale)

    def _norms(self, deltas_NS: Tensor, weights_N: Tensor, at: Slice) -> Tensor:
        """(2 N,) float64: the L1 norm of each delta, and of what is kept of it."""
        kept_NS = self._kept(deltas_NS, at, rescale=False)
        return torch.cat([vectors_NS.abs().sum(dim=1, dtype=torch.float64) for vectors_NS in (deltas_NS, kept_NS)])

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

    def _cutoffs(self, client_id: str) -> Callable[[Tensor], Tensor]:
        """From a client's delta to the threshold and the index of the last element just on it that is kept; the same
        for what is above the middle comes first."""
        prune = self.prune
        assert isinstance(prune, KeepLargest | KeepMiddle)
        density = prune.density_of(client_id)

        def found(delta_S: Tensor) -> Tensor:
            if isinstance(prune, KeepMiddle):
                counts = middle_counts(density, prune.gamma, delta_S.numel())
                return torch.tensor(middle_cutoffs(delta_S, *counts), dtype=torch.float64)
            return torch.tensor(largest_cutoff(delta_S, keep_count(density, delta_S.numel())), dtype=torch.float64)

        return found


@dataclass(frozen=True)
class Selected:
    """Elements on which clients differ most, an election among equals, and a mean by what each client changed there.

    For a method whose definition is written out. The joint numbers are the cut of the variances, and then the sum of
    squares of each client's selected elements.

    Args:
        scale: multiplies the merged delta.
    """

    scale: float

    @staticmethod
    def shares_N(joint_K: Tensor) -> Tensor:
        """(N,) float64: each client's part in all squares; 1 if there are none."""
        squares_N = joint_K[2:]
        return squares_N / squares_N.sum() if squares_N.sum() > 0 else torch.ones_like(squares_N)


def _discard(_: object) -> None:
    """For what is computed because it may raise."""
