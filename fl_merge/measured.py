"""The shape of methods that go by statistics of the clients' data; what has no statistics is averaged."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from fl_merge.errors import MergeError
from fl_merge.naming import COUNT
from fl_merge.ops.evidence import Evidence
from fl_merge.shapes import WeightedSum, plan_deltas
from fl_merge.types import BASE, CohortSpec, Output, Read, Whole


@dataclass(frozen=True)
class Needed:
    """What one merged tensor is made of.

    Args:
        statistic: the name of what each client sent.
        tensors: the model's tensors that are read, of the base and of each client.
        merge: from what the clients sent to the merged delta, of the tensor's shape.
    """

    statistic: str
    tensors: tuple[str, ...]
    merge: Callable[[Sequence[Evidence]], Tensor]


@dataclass(frozen=True)
class Measured:
    """theta = theta_0 + merge(what the clients sent), and the weighted average where that has no statistics.

    Args:
        kind: of statistics ("fisher", "gram").
        needed: from a tensor's name and the cohort to what it is made of; None for the weighted average.
    """

    kind: str
    needed: Callable[[str, CohortSpec], Needed | None]

    def plan(self, spec: CohortSpec) -> Iterator[Output]:
        """One output a tensor.

        Raises:
            MergeError: if there are no statistics at all, or none that all clients sent in one shape.
        """
        if COUNT not in spec.statistics or not any(name.startswith(f"{self.kind}/") for name in spec.statistics):
            raise MergeError(
                f"there are no statistics '{self.kind}' that all of the clients sent alike; this method needs them"
            )
        average = WeightedSum(1.0, spec.weights_N)
        for output in plan_deltas(spec, average, "tensor"):
            if output.compute is not average:
                yield output
            elif (needed := self.needed(output.name, spec)) is None:
                yield replace(output, note=f"weighted average, for want of statistics '{self.kind}'")
            else:
                yield Output(output.name, output.spec, _reads(needed, spec), Whole(_merging(output, needed, spec)))


def _reads(needed: Needed, spec: CohortSpec) -> tuple[Read, ...]:
    reads = [Read(BASE, name) for name in needed.tensors]
    for client in range(len(spec.client_ids)):
        reads += [Read(client, name) for name in needed.tensors]
        reads += [Read(client, name, "statistics") for name in (needed.statistic, COUNT)]
    return tuple(reads)


def _merging(output: Output, needed: Needed, spec: CohortSpec) -> Callable[..., Tensor]:
    at_base = needed.tensors.index(output.name)

    def merged(*read: Tensor) -> Tensor:
        size = len(needed.tensors)
        base, rest = read[:size], read[size:]
        clients = []
        for share, start in zip(spec.weights_N, range(0, len(rest), size + 2), strict=True):
            statistic, count = rest[start + size : start + size + 2]
            clients.append(Evidence(share, share / float(count), statistic, rest[start : start + size], base))
        return base[at_base].double() + needed.merge(clients).reshape(output.spec.shape)

    return merged
