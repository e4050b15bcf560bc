"""`aggregate_train` of Flower's strategies and of FedMerge, on replies in memory. For engine_worker.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.engine_worker import Job, Work
from benchmarks.work_merge import model_folders

SLICE = 1 << 20
"""Elements whose errors are computed at a time."""


def flower(job: Job, folder: Path, out: Path) -> Callable[[], tuple[Work, Any]]:
    """A strategy's `aggregate_train`; the replies' bytes and, for a mean, its error are found out afterwards.

    job: `strategy` (FedMerge or one of Flower's), its `settings`, `method` (of FedMerge), `dtype` (of the replies).

    FedMerge keeps updates in memory here (`spill_above_bytes=None`), as Flower's strategies do.
    """
    import torch
    from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
    from flwr.serverapp import strategy as flower_strategies

    from fl_merge import build, kernels
    from fl_merge.flower import FedMerge
    from fl_merge.flower._flwr import TaskIdentity
    from fl_merge.flower.records import RecordSource, to_record
    from fl_merge.store import SafetensorsSource

    if job["strategy"] == "FedMerge":
        kernels.load()
    base, clients = model_folders(job, folder)
    dtype = getattr(torch, job["dtype"])

    def record(path: Path) -> Any:
        source = SafetensorsSource(path)
        return to_record({name: source.read(name) for name in source.specs()}, dtype)

    class Nodes:
        """As much of a Grid as sampling needs."""

        def get_node_ids(self) -> list[int]:
            return list(range(1, len(clients) + 1))

    nodes: Any = Nodes()
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1
    model, contents = record(base), [record(path) for path in clients]

    def fresh() -> tuple[Work, Any]:
        ours = FedMerge(build(job["method"] or "weighted_average"), spill_above_bytes=None)
        requests = list(ours.configure_train(1, model, ConfigRecord(), nodes))
        if len(requests) != len(clients):
            raise RuntimeError(f"{len(requests)} requests for {len(clients)} clients")
        theirs = getattr(flower_strategies, job["strategy"], None)  # which has no FedMerge
        chosen = ours if theirs is None else theirs(**job["settings"])
        replies = []
        for request, content in zip(requests, contents, strict=True):
            arrays = ArrayRecord(dict(content))  # FedMedian takes the arrays out of the replies
            answer = RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 1})})
            replies.append(Message(answer, reply_to=request))

        def work() -> Any:
            arrays, _ = chosen.aggregate_train(1, replies)
            if not arrays:
                raise RuntimeError(f"{job['strategy']} made no model")
            return arrays

        return work, found

    def found(arrays: Any) -> dict[str, Any]:
        size = sum(len(array.data) for content in contents for array in content.values())
        more = {"bytes": size, "model_bytes": size / len(contents)}
        return more | (errors(arrays) if job["mean"] else {})

    def errors(arrays: Any) -> dict[str, Any]:
        """Largest and mean distance from the mean in float64, over those of that mean rounded to the replies' dtype."""
        result, sources = RecordSource(arrays), [RecordSource(content) for content in contents]
        sums, largest = [0.0, 0.0], [0.0, 0.0]
        for name, spec in result.specs().items():
            flat_S = result.read(name).reshape(-1)
            inputs = [source.read(name).reshape(-1) for source in sources]
            for start in range(0, spec.numel, SLICE):
                piece = slice(start, start + SLICE)
                mean_S = torch.stack([each[piece].double() for each in inputs]).sum(0) / len(inputs)
                for index, values_S in enumerate((flat_S[piece], mean_S.to(dtype))):
                    off_S = (values_S.double() - mean_S).abs()
                    sums[index] += float(off_S.sum())
                    largest[index] = max(largest[index], float(off_S.max()))
        written = {str(spec.dtype).removeprefix("torch.") for spec in result.specs().values()}
        return {
            "error_mean": sums[0] / sums[1],
            "error_max": largest[0] / largest[1],
            "written": ", ".join(sorted(written)),
        }

    return fresh
