"""A whole server in process: `Strategy.start` on a Grid whose replies are made when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from uuid import uuid4

from benchmarks.engine_worker import Job, Work
from benchmarks.work_merge import model_folders


def server(job: Job, folder: Path, out: Path) -> Callable[[], Work]:
    """FedMerge's or FedAvg's `start`, with real messages.

    job: `strategy`, `clients`, `rounds`, `spill` (whether updates are kept on disk).

    A client's reply is its model as Flower's arrays, made from the base and one change that all clients share, each by
    a factor of its own, one tensor at a time: making it costs no memory beside the reply. The base and that change are
    there before the clock starts, as is the initial record.
    """
    from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
    from flwr.serverapp import Grid
    from flwr.serverapp.strategy import FedAvg, Strategy

    from fl_merge import kernels
    from fl_merge.flower import FedMerge
    from fl_merge.flower._flwr import Run, TaskIdentity
    from fl_merge.flower.records import to_record
    from fl_merge.store import load

    kernels.load()
    base_folder, clients = model_folders(job, folder)
    base, client = load(base_folder), load(clients[0])
    for name, tensor in client.items():
        tensor.sub_(base[name])

    class Replies(Grid):
        """Makes a reply when it is pulled, and keeps none."""

        def __init__(self) -> None:
            self._asked: dict[str, Message] = {}
            self.set_run(Run.create_empty(1))

        def set_run(self, run: Run) -> None:
            self._run = run
            TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, run.run_id, 1

        @property
        def run(self) -> Run:
            return self._run

        def create_message(
            self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
        ) -> Message:
            return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

        def get_node_ids(self) -> list[int]:
            return list(range(2, 2 + job["clients"]))

        def push_messages(self, messages: Iterable[Message]) -> list[str]:
            ids = []
            for message in messages:
                message.metadata.__dict__["_message_id"] = str(uuid4())
                ids.append(message.metadata.message_id)
                self._asked[ids[-1]] = message
            return ids

        def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
            return [self._reply(self._asked.pop(each)) for each in message_ids if each in self._asked]

        def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
            return self.pull_messages(self.push_messages(messages))

        def _reply(self, request: Message) -> Message:
            factor = request.metadata.dst_node_id / job["clients"]
            arrays = {}
            for name, tensor in base.items():
                arrays[name] = to_record({name: tensor + factor * client[name]})[name]
            metrics = MetricRecord({"num-examples": 1})
            return Message(RecordDict({"arrays": ArrayRecord(arrays), "metrics": metrics}), reply_to=request)

    def fresh() -> Work:
        options: dict[str, Any] = {"fraction_evaluate": 0.0}
        if job["strategy"] == "FedMerge":
            options |= {"spill_folder": out} if job["spill"] else {"spill_above_bytes": None}
            strategy: Strategy = FedMerge("weighted_average", **options)
        else:
            strategy = FedAvg(**options)
        initial = [to_record(base)]  # given away, as a ServerApp does: who keeps it has one model more

        def work() -> object:
            result = strategy.start(Replies(), initial.pop(), num_rounds=job["rounds"])
            if not result.arrays or not result.train_metrics_clientapp:
                raise RuntimeError("no round made a model")
            return result

        return work

    return fresh
