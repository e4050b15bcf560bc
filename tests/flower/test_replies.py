"""Replies as they come: whose they are, what is there at the deadline, and bytes that cannot be decoded."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterable

import pytest
import torch
from flwr.app import ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid

from fl_merge.flower import FedMerge, RunFailedError, to_record, to_tensors
from fl_merge.flower._flwr import Run, TaskIdentity
from fl_merge.flower.replies import RepliesAsTheyCome
from fl_merge.flower.watch import Watcher
from fl_merge.methods import weighted_average

BASE = {"w": torch.zeros(3)}


class RemoteGrid(Grid):
    """Answers each message with what `answer` makes of it, one id at a time, like a SuperLink."""

    def __init__(self, nodes: Iterable[int], answer: Callable[[Message], Message]) -> None:
        self.nodes = list(nodes)
        self.answer = answer
        self.pulls: list[list[str]] = []
        self._replies: dict[str, Message] = {}
        self._run = Run.create_empty(1)
        TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        return self._run

    def create_message(self, *arguments, **named) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> list[int]:
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for number, message in enumerate(messages):
            message.metadata.__dict__["_message_id"] = f"request {message.metadata.group_id} {number}"
            ids.append(message.metadata.message_id)
            self._replies[ids[-1]] = self.answer(message)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        self.pulls.append(list(message_ids))
        found = [self._replies.pop(each) for each in self.pulls[-1] if each in self._replies]
        for reply in found:
            if isinstance(reply, Exception):
                raise reply
        return found

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        raise NotImplementedError


def trained(message: Message, value: float, **metrics: float) -> Message:
    content = RecordDict({"metrics": MetricRecord({"num-examples": 1, **metrics})})
    if message.metadata.message_type == "train":
        content["arrays"] = to_record({"w": torch.full((3,), value)})
    return Message(content, reply_to=message)


class Reports(Watcher):
    def __init__(self) -> None:
        self.rounds = []

    def round_ended(self, report, model) -> None:
        self.rounds.append(report)


def run(grid: Grid, *, num_rounds: int = 1, timeout: float = 5.0, **options) -> tuple[dict, list]:
    reports = Reports()
    strategy = FedMerge(weighted_average(), fraction_evaluate=0.0, watchers=[reports], **options)
    result = strategy.start(grid, to_record(BASE), num_rounds=num_rounds, timeout=timeout)
    return to_tensors(result.arrays), reports.rounds


def test_a_reply_counts_for_the_node_it_was_fetched_for_whatever_it_says_of_itself() -> None:
    """Node 1 signs its reply as node 2's, to node 2's request: it is node 1's all the same."""

    def answer(message: Message) -> Message:
        node = message.metadata.dst_node_id
        reply = trained(message, float(node))
        if node == 1:
            reply.metadata.__dict__["_src_node_id"] = 2
            reply.metadata.__dict__["_reply_to_message_id"] = "request 1 1"
        return reply

    merged, (report,) = run(RemoteGrid([1, 2, 3], answer))
    assert torch.equal(merged["w"], torch.full((3,), 2.0))
    assert sorted(entry.client_id for entry in report.accepted) == ["1", "2", "3"]
    assert report.refused == ()


@pytest.mark.parametrize("fault", [IndexError("no child"), KeyError("Foo"), ValueError("a\nb")])
def test_a_reply_that_cannot_be_decoded_costs_its_sender_only(fault: Exception) -> None:
    def answer(message: Message):
        return fault if message.metadata.dst_node_id == 1 else trained(message, 4.0)

    merged, (report,) = run(RemoteGrid([1, 2, 3], answer))
    assert torch.equal(merged["w"], torch.full((3,), 4.0))
    assert [refusal.client_id for refusal in report.refused] == ["1"]
    assert report.refused[0].reason.startswith("client error: ")


def test_a_superlink_that_cannot_be_reached_is_no_clients_fault() -> None:
    def answer(message: Message):
        return ConnectionError("refused")

    with pytest.raises(ConnectionError):
        run(RemoteGrid([1, 2], answer))


@pytest.mark.parametrize("reason", [" ", "\n", "", "\x1c", None])
def test_an_error_without_a_reason(reason: str | None) -> None:
    def answer(message: Message) -> Message:
        if message.metadata.dst_node_id == 1:
            return Message(Error(1, reason), reply_to=message)
        return trained(message, 1.0)

    _, (report,) = run(RemoteGrid([1, 2, 3], answer))
    assert [str(refusal) for refusal in report.refused] == ["client '1': client error: no reason given"]


def test_what_is_there_at_the_deadline_is_taken_however_long_checking_took() -> None:
    class Slow(Watcher):
        def replied(self, *event) -> None:
            time.sleep(0.1)

    grid = RemoteGrid(range(1, 9), lambda message: trained(message, 1.0))
    reports = Reports()
    strategy = FedMerge(weighted_average(), fraction_evaluate=0.0, watchers=[reports, Slow()])
    strategy.start(grid, to_record(BASE), num_rounds=1, timeout=0.25)
    assert len(reports.rounds[0].accepted) == 8


def test_replies_are_fetched_one_at_a_time() -> None:
    grid = RemoteGrid([1, 2, 3], lambda message: trained(message, 1.0))
    run(grid)
    assert all(len(pull) == 1 for pull in grid.pulls)
    assert len(grid.pulls) == 3


def test_a_request_that_could_not_be_sent_is_said_to_be_so() -> None:
    class Full(RemoteGrid):
        def push_messages(self, messages: Iterable[Message]) -> list[str]:
            return super().push_messages(messages)[1:]

    _, (report,) = run(Full([1, 2, 3], lambda message: trained(message, 1.0)))
    assert [str(refusal) for refusal in report.refused] == ["client '1': client error: the request could not be sent"]


def test_a_generator_of_messages_is_pushed() -> None:
    grid = RemoteGrid([1], lambda message: trained(message, 1.0))
    message = Message(RecordDict(), dst_node_id=1, message_type="train", group_id="1")
    assert RepliesAsTheyCome(grid).push_messages(each for each in [message]) == ["request 1 0"]


def test_losing_nodes_in_a_later_round_costs_the_round_and_not_the_run() -> None:
    grid = RemoteGrid([1, 2, 3], lambda message: trained(message, float(message.metadata.group_id)))

    class Leave(Watcher):
        def round_ended(self, report, model) -> None:
            grid.nodes = [1]

    reports = Reports()
    strategy = FedMerge(weighted_average(), fraction_evaluate=0.0, node_timeout=0.0, watchers=[reports, Leave()])
    result = strategy.start(grid, to_record(BASE), num_rounds=3, timeout=5)
    assert torch.equal(to_tensors(result.arrays)["w"], torch.full((3,), 1.0))
    assert [report.merge is not None for report in reports.rounds] == [True, False, False]
    assert reports.rounds[1].failure == "1 node connected in 0 s (node_timeout), wanted 2"


def test_too_few_nodes_from_the_start_end_the_run() -> None:
    with pytest.raises(RunFailedError, match=r"^1 node connected in 0 s \(node_timeout\), wanted 2$"):
        run(RemoteGrid([1], lambda message: trained(message, 1.0)), node_timeout=0.0)


def test_a_function_for_metrics_that_fails_costs_the_metrics_and_not_the_model() -> None:
    """One client leaves out the metric that the operator's function reads."""

    def losses(contents: list[RecordDict], weighted_by_key: str) -> MetricRecord:
        return MetricRecord({"loss": sum(next(iter(c.metric_records.values()))["loss"] for c in contents)})

    def answer(message: Message) -> Message:
        return trained(message, 1.0) if message.metadata.dst_node_id == 1 else trained(message, 1.0, loss=2.0)

    grid = RemoteGrid([1, 2, 3], answer)
    strategy = FedMerge(weighted_average(), train_metrics_aggr_fn=losses)
    arrays = to_record(BASE)
    replies = RepliesAsTheyCome(grid).send_and_receive(strategy.configure_train(1, arrays, ConfigRecord(), grid))
    merged, metrics = strategy.aggregate_train(1, replies)
    assert metrics is None
    assert torch.equal(to_tensors(merged)["w"], torch.ones(3))


def test_evaluations_by_nodes_that_were_not_asked_do_not_count() -> None:
    grid = RemoteGrid([1, 2], lambda message: trained(message, 1.0, accuracy=0.5))
    strategy = FedMerge(weighted_average())
    replies = list(
        RepliesAsTheyCome(grid).send_and_receive(strategy.configure_evaluate(1, to_record(BASE), ConfigRecord(), grid))
    )
    stranger = trained(Message(RecordDict(), dst_node_id=7, message_type="evaluate"), 1.0, accuracy=99.0)
    stranger.metadata.__dict__["_reply_to_message_id"] = "elsewhere"
    metrics = strategy.aggregate_evaluate(1, [stranger, *replies, replies[0]])
    assert dict(metrics) == {"accuracy": 0.5}


@pytest.mark.parametrize("slow", [{1}, {1, 2, 3, 4}, {2, 5, 8}])
def test_clients_that_never_end_their_upload_do_not_hold_up_the_others(slow: set[int], monkeypatch) -> None:
    """More of them than replies are fetched at a time."""
    monkeypatch.setattr("fl_merge.flower.replies._PATIENCE", 0.1)
    monkeypatch.setattr("fl_merge.flower.replies._LAST_PATIENCE", 0.2)
    over = threading.Event()

    class Uploading(RemoteGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
            (message_id,) = message_ids
            if self.nodes[int(message_id.split()[-1])] in slow:
                over.wait(30)
            return super().pull_messages([message_id])

    started = time.monotonic()
    try:
        grid = Uploading(range(1, 9), lambda message: trained(message, float(message.metadata.dst_node_id)))
        merged, (report,) = run(grid, timeout=1.0)
        assert time.monotonic() - started < 5.0
    finally:
        over.set()
    others = set(range(1, 9)) - slow
    assert {int(entry.client_id) for entry in report.accepted} == others
    assert {(int(entry.client_id), entry.reason) for entry in report.refused} == {
        (node, "no reply before the deadline") for node in slow
    }
    assert torch.equal(merged["w"], torch.full((3,), sum(others) / len(others)))


def test_a_reply_that_comes_late_within_the_time_is_taken() -> None:
    class Later(RemoteGrid):
        since = 0.0

        def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
            (message_id,) = message_ids
            self.since = self.since or time.monotonic()
            late = message_id.endswith("1") and time.monotonic() - self.since < 0.3
            return [] if late else super().pull_messages([message_id])

    started = time.monotonic()
    _, (report,) = run(Later([1, 2, 3], lambda message: trained(message, 1.0)))
    assert [entry.client_id for entry in report.accepted] == ["1", "3", "2"]
    assert time.monotonic() - started < 3.0


def test_silent_clients_do_not_keep_the_others_from_being_looked_at(monkeypatch) -> None:
    """All are looked at before any is looked at again, however many have not answered."""
    monkeypatch.setattr("fl_merge.flower.replies._LONGEST_WAIT", 0.1)
    looks: list[int] = []

    class Silent(RemoteGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
            (message_id,) = message_ids
            number = int(message_id.split()[-1])
            looks.append(number)
            time.sleep(0.02)
            return super().pull_messages([message_id]) if number == 39 else []

    grid = Silent(range(1, 41), lambda message: trained(message, 1.0))
    sent = [Message(RecordDict(), dst_node_id=node, message_type="train", group_id="1") for node in grid.nodes]
    replies = RepliesAsTheyCome(grid).send_and_receive(sent, timeout=20.0)
    assert next(iter(replies)).metadata.reply_to_message_id == "request 1 39"
    assert sorted(looks[:40]) == list(range(40))
    replies.close()


@pytest.mark.parametrize(("spill_above", "wanted"), [(0, 1), (None, 2)])
def test_at_most_two_messages_are_in_memory_and_one_where_updates_go_to_disk(
    spill_above: int | None, wanted: int
) -> None:
    alive: list[weakref.ref] = []
    most = 0

    class Counts(RemoteGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
            nonlocal most
            found = super().pull_messages(message_ids)
            found = [trained(message, 1.0) for message in found]
            alive.extend(weakref.ref(message.content["arrays"]) for message in found)
            most = max(most, sum(each() is not None for each in alive))
            return found

    class Slow(Watcher):
        def replied(self, *event) -> None:
            time.sleep(0.02)

    gc.disable()
    try:
        grid = Counts(range(1, 13), lambda message: message)
        strategy = FedMerge(
            weighted_average(),
            fraction_evaluate=0.0,
            watchers=[Slow()],
            spill_above_bytes=spill_above,
            train_metrics_aggr_fn=None,
        )
        strategy.start(grid, to_record(BASE), num_rounds=1, timeout=5)
    finally:
        gc.enable()
    assert len(alive) == 12
    assert most == wanted
