"""Where the updates of a round are kept until they are merged: in memory, on disk, or as a running sum."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from fl_merge.hyperparameters import whole_number
from fl_merge.model import GlobalModel
from fl_merge.naming import expected_bytes
from fl_merge.rounds import asked_statistics
from fl_merge.running import RunningSum, running_factor
from fl_merge.running_products import RunningProducts, held_rank
from fl_merge.spill import Spill
from fl_merge.store import MemorySource
from fl_merge.types import MergeMethod

SPILL_ABOVE_BYTES = 10**9
"""More bytes of updates in a round than this are kept on disk unless the operator says otherwise."""


@dataclass(frozen=True)
class Keeping:
    """`FedMerge`'s arguments of these names, and what follows from them.

    Args:
        method: that merges.
        spill_folder, max_spill_bytes, spill_above_bytes, running_sum: see `FedMerge`.

    Raises:
        RecipeError: for a value that is out of range, or a running sum of a method that is none.
    """

    method: MergeMethod
    spill_folder: Path | None
    max_spill_bytes: int | None
    spill_above_bytes: int | None
    running_sum: bool

    def __post_init__(self) -> None:
        whole_number("max_spill_bytes", 1 if self.max_spill_bytes is None else self.max_spill_bytes, 1)
        whole_number("spill_above_bytes", 0 if self.spill_above_bytes is None else self.spill_above_bytes, 0)
        if self.running_sum and held_rank(self.method) is None:
            running_factor(self.method)  # or it is refused

    def spill(self, clients: int, model: GlobalModel) -> Spill | contextlib.nullcontext[None]:
        """Where the updates of a round of so many clients are kept; None for in memory."""
        specs = model.specs()
        statistics = expected_bytes(specs, asked_statistics(self.method))
        num_bytes = clients * (sum(spec.nbytes for spec in specs.values()) + statistics)
        if self.spill_folder is None and (self.spill_above_bytes is None or num_bytes <= self.spill_above_bytes):
            return contextlib.nullcontext()
        return Spill(self.spill_folder, self.max_spill_bytes, clients)

    def sum_in(
        self, spill: Spill | None, model: GlobalModel, seed: int, server_round: int
    ) -> RunningSum | RunningProducts | None:
        """The running sum that takes the place of updates on disk, if there is to be one; of adapters always."""
        if self.running_sum and (rank := held_rank(self.method)) is not None:
            return RunningProducts(rank, MemorySource(model.master(), {}))
        if spill is None or not self.running_sum:
            return None
        base = MemorySource(model.sent, model.tied)
        return RunningSum(self.method, base, spill.open(), seed=seed, round_number=server_round)
