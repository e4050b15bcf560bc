"""What a merge will read, write and hold in memory, from its plan alone."""

from __future__ import annotations

import heapq
import os
from dataclasses import dataclass

from fl_merge.execute import PIECE_ELEMENTS, SLICE_ELEMENTS, WAITING
from fl_merge.offline.plan import OfflinePlan
from fl_merge.shapes import Coordinate, Copy, Matrix, Span
from fl_merge.store import SafetensorsSink
from fl_merge.types import BASE, Output, TensorSpec, Whole, compute_dtype

FIXED = 300 * 10**6
"""Python, torch and the compiled passes."""


@dataclass(frozen=True)
class Estimate:
    """In bytes, but for the number of tensors. Files are mapped: what is read of them is not counted.

    Args:
        tensors: of the merged model.
        read, written: of tensors, each counted once.
        memory: the most that the process holds at a time, roughly, mapped files aside.
    """

    tensors: int
    read: int
    written: int
    memory: int


def estimate(plan: OfflinePlan, threads: int | None = None) -> Estimate:
    """What running a plan takes."""
    cohort = plan.cohort()
    spec = cohort.spec()
    outputs = list(plan.plan(spec))
    sources = {BASE: cohort.base} | {place: update.tensors for place, update in enumerate(cohort.updates)}
    read: dict[tuple[int, str], int] = {}
    for target_part in plan.parts:
        for target in target_part.targets:
            for place in {target_part.choice.base, *target_part.choice.clients}:
                ref = target_part.models[place]
                number = list(plan.models).index(ref)
                read[number, target.stored[place]] = plan.models[ref].source.specs()[target.stored[place]].nbytes
    workers = threads or os.cpu_count() or 1
    held = heapq.nlargest(workers, (_held(output, len(sources)) + _room(output) for output in outputs))
    waiting = heapq.nlargest(WAITING, map(_room, outputs))
    written = sum(output.spec.nbytes for output in outputs)
    return Estimate(len(outputs), sum(read.values()), written, FIXED + sum(held) + sum(waiting))


def _room(output: Output) -> int:
    """Bytes of an output that is filled in memory and then written."""
    return output.spec.nbytes if output.spec.nbytes <= SafetensorsSink.whole_bytes else 0


def _held(output: Output, models: int) -> int:
    """Bytes that one worker holds for an output, at most."""
    if isinstance(output.compute, Copy) or not output.spec.is_floating:
        return min(output.spec.numel, SLICE_ELEMENTS) * output.spec.dtype.itemsize
    wide = TensorSpec(output.spec.shape, compute_dtype(output.spec.dtype)).nbytes
    whole = isinstance(output.compute, Matrix | Whole)
    if isinstance(output.compute, Coordinate):
        whole = output.compute.survey is not None and output.compute.stages is None
    if whole:
        return wide * (2 * len(output.reads) + 2)
    sliced = SLICE_ELEMENTS * 8 * (2 * len(output.reads) + 2)
    noted = PIECE_ELEMENTS * 8 if isinstance(output.compute, Coordinate | Span) else 0
    return min(sliced + noted, wide * (4 * len(output.reads) + 4))
