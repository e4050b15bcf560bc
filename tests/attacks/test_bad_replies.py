"""Eight clients, one of which misbehaves: the run goes on, and the round's bytes are those of the other seven."""

import io
import logging
import math
import sys

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fl_merge.execute import execute
from fl_merge.flower import FedMerge
from fl_merge.flower.client import receive, reply
from fl_merge.flower.inprocess import InProcessGrid
from fl_merge.flower.records import to_record
from fl_merge.flower.strategy import RunFailedError
from fl_merge.flower.watch import Watcher
from fl_merge.methods import dare_ties, ties, weighted_average
from fl_merge.store import MemorySink, MemorySource
from fl_merge.types import Cohort, Update

BAD = 1003
NODES = [1000 + i for i in range(8)]
METHODS = {"weighted_average": weighted_average(), "ties": ties(density=0.3), "dare_ties": dare_ties(density=0.5)}


def initial_model():
    draw = torch.Generator().manual_seed(4)
    return {
        "w": torch.randn(40, 25, generator=draw),
        "b": torch.randn(25, generator=draw),
        "half": torch.randn(16, generator=draw).bfloat16(),
        "steps": torch.tensor(0),
    }


def trained(model, node_id):
    """What a well-behaved client makes of the model."""
    draw = torch.Generator().manual_seed(node_id)
    moved = {}
    for name, tensor in model.items():
        step = 0.1 * torch.randn(tensor.shape, generator=draw)
        moved[name] = (tensor.float() + step).to(tensor.dtype) if tensor.is_floating_point() else tensor + 1
    return moved


def examples(node_id):
    return 10 + node_id % 7


def app_with(misbehave, rounds=(1, 2, 3)):
    """A ClientApp whose client BAD hands its honest reply to `misbehave` before sending it."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        node = context.node_id
        honest = reply(message, trained(receive(message), node), examples(node), {"loss": 0.5})
        if node == BAD and message.content["config"]["server-round"] in rounds:
            return misbehave(honest)
        return honest

    return app


class Reports(Watcher):
    def __init__(self):
        self.rounds = []

    def round_ended(self, report, model):
        self.rounds.append(report)


def run(
    method, misbehave, *, num_rounds=1, nodes=8, rounds=(1, 2, 3), timeout=60.0, grid_class=InProcessGrid, **options
):
    """The strategy, the result and the rounds' reports."""
    reports = Reports()
    options = {"fraction_evaluate": 0.0, "seed": 11, "watchers": [reports]} | options
    strategy = FedMerge(method, **options)
    with grid_class(app_with(misbehave, rounds), nodes, workers=0) as grid:
        result = strategy.start(grid, to_record(initial_model()), num_rounds=num_rounds, timeout=timeout)
    return strategy, result, reports.rounds


def merged_by_the_core(method, nodes, round_number=1, model=None):
    """The merge of these clients' honest updates, computed without Flower and without the others."""
    model = model or initial_model()
    updates = tuple(Update(str(n), float(examples(n)), MemorySource(trained(model, n))) for n in nodes)
    sink = MemorySink()
    execute(method, Cohort(MemorySource(model), updates, seed=11, round=round_number), sink)
    return bytes_of(to_record(sink.tensors))


def bytes_of(record):
    return {name: (array.dtype, array.shape, array.data) for name, array in record.items()}


OTHERS = [node for node in NODES if node != BAD]
WITHOUT = {name: merged_by_the_core(method, OTHERS) for name, method in METHODS.items()}
WITH = {name: merged_by_the_core(method, NODES) for name, method in METHODS.items()}


def test_the_eighth_client_would_change_every_floating_tensor():
    """Otherwise the comparisons below would say nothing."""
    for name in METHODS:
        changed = {tensor for tensor in WITH[name] if WITH[name][tensor] != WITHOUT[name][tensor]}
        assert changed == {"w", "b", "half"}


@pytest.mark.parametrize("name", METHODS)
def test_without_an_attack_all_eight_are_merged(name):
    _, result, [report] = run(METHODS[name], lambda honest: honest)
    assert bytes_of(result.arrays) == WITH[name]
    assert report.refused == ()


# --- the ways to misbehave -------------------------------------------------------------------------------------------


def fail(error):
    def misbehave(honest):
        raise error

    return misbehave


def tensor(name, change):
    """Send another tensor under a name (None: leave it out)."""

    def misbehave(honest):
        record = honest.content["arrays"]
        new = change(to_tensor(record[name])) if name in record else change(None)
        if new is None:
            del record[name]
        else:
            record[name] = to_record({name: new})[name]
        return honest

    return misbehave


def to_tensor(array):
    if array.stype == "numpy.ndarray":
        return torch.from_numpy(array.numpy().copy())
    return torch.frombuffer(bytearray(array.data), dtype=torch.bfloat16).reshape(array.shape)


def element(value):
    def change(old):
        new = old.clone()
        new.view(-1)[7] = value
        return new

    return change


def array(name, **fields):
    """Change a tensor's header or bytes; a function is given the honest field."""

    def misbehave(honest):
        old = honest.content["arrays"][name]
        new = {field: getattr(old, field) for field in ("dtype", "shape", "stype", "data")}
        for field, value in fields.items():
            new[field] = value(new[field]) if callable(value) else value
        honest.content["arrays"][name] = Array(**new)
        return honest

    return misbehave


def metric(value, key="num-examples"):
    """Send another number of examples, past Flower's own check of types."""

    def misbehave(honest):
        data = honest.content["metrics"].__dict__["_data"]
        if value is None:
            del data[key]
        else:
            data[key] = value
        return honest

    return misbehave


def content(change):
    def misbehave(honest):
        change(honest.content)
        return honest

    return misbehave


def npy(values, **options):
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, values, **options)
    return buffer.getvalue()


def npy_with_header(header):
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + b"\0" * 100


class Harmful:
    """Ends the process if it is ever unpickled."""

    def __reduce__(self):
        return (sys.exit, ("unpickled",))


PICKLED = npy(np.array([Harmful()] * 25, dtype=object), allow_pickle=True)
F32_W = "(40, 25) float32"

ATTACKS = {
    "raises": (fail(ValueError("no data today")), "client error: ValueError: no data today"),
    "exits": (fail(SystemExit(3)), "client error: SystemExit: 3"),
    "sends nothing": (lambda honest: None, "client error: "),
    "NaN": (tensor("w", element(math.nan)), "tensor 'w': element 7 is nan, wanted finite numbers"),
    "infinity": (tensor("b", element(math.inf)), "tensor 'b': element 7 is inf, wanted finite numbers"),
    "NaN in bfloat16": (tensor("half", element(math.nan)), "tensor 'half': element 7 is nan, wanted finite numbers"),
    "a float64 beyond float32": (
        tensor("b", lambda old: torch.full((25,), 1e300, dtype=torch.float64)),
        "tensor 'b': element 0 is 1e+300, wanted numbers that float32 has",
    ),
    "enormous": (
        tensor("b", element(-3e38)),
        "tensor 'b': element 7 is -3.0000000",
    ),
    "wrong shape": (tensor("w", lambda old: old[:39]), "tensor 'w': shape (39, 25), base has (40, 25)"),
    "transposed": (tensor("w", lambda old: old.T.contiguous()), "tensor 'w': shape (25, 40), base has (40, 25)"),
    "broadcastable shape": (tensor("w", lambda old: old[:1]), "tensor 'w': shape (1, 25), base has (40, 25)"),
    "a scalar": (tensor("b", lambda old: old[0]), "tensor 'b': shape (), base has (25,)"),
    "missing key": (tensor("b", lambda old: None), "tensor 'b': is missing"),
    "extra key": (tensor("more", lambda old: torch.ones(2)), "tensor 'more': (2,) float32 is not in the base"),
    "wrong dtype": (tensor("w", lambda old: old.int()), "tensor 'w': dtype int32, base has float32"),
    "floats for a counter": (tensor("steps", lambda old: old.float()), "tensor 'steps': dtype float32, base has int64"),
    "examples 0": (metric(0), "number of examples is 0, wanted a number > 0 and <= 1e+09"),
    "examples -10": (metric(-10), "number of examples is -10, wanted a number > 0 and <= 1e+09"),
    "examples NaN": (metric(math.nan), "number of examples is nan, wanted a number > 0 and <= 1e+09"),
    "examples infinite": (metric(math.inf), "number of examples is inf, wanted a number > 0 and <= 1e+09"),
    "examples 1e12": (metric(1e12), "number of examples is 1000000000000.0, wanted a number > 0 and <= 1e+09"),
    "examples 10**400": (
        metric(10**400),
        f"number of examples is {str(10**400)[:37]}..., wanted a number > 0 and <= 1e+09",
    ),
    "examples true": (metric(True), "number of examples is True, wanted one number"),
    "examples a list": (metric([10, 10]), "number of examples is [10, 10], wanted one number"),
    "examples missing": (metric(None), "the MetricRecord has no 'num-examples' (it has: loss)"),
    "two ArrayRecords": (content(lambda c: c.update(more=ArrayRecord({}))), "2 ArrayRecords, wanted one"),
    "no ArrayRecord": (content(lambda c: c.pop("arrays")), "0 ArrayRecords, wanted one"),
    "two MetricRecords": (content(lambda c: c.update(more=MetricRecord({}))), "2 MetricRecords, wanted one"),
    "no MetricRecord": (content(lambda c: c.pop("metrics")), "0 MetricRecords, wanted one"),
    "nothing at all": (content(lambda c: c.clear()), "0 MetricRecords, wanted one"),
    "truncated bytes": (
        array("w", data=lambda data: data[:-5]),
        f"tensor 'w': 3995 bytes of elements, wanted 4000 for {F32_W}",
    ),
    "no bytes": (array("w", data=b""), "tensor 'w': not a .npy array: "),
    "too many bytes": (
        array("w", data=lambda data: data + b"\0" * 4),
        f"tensor 'w': 4004 bytes of elements, wanted 4000 for {F32_W}",
    ),
    "truncated raw bytes": (
        array("half", data=lambda data: data[:-1]),
        "tensor 'half': 31 bytes, wanted 32 for (16,) bfloat16",
    ),
    "a .npy header with another shape": (
        array("w", data=npy(np.ones((1000, 1), np.float32))),
        f"tensor 'w': the array inside is (1000, 1) float32, announced as {F32_W}",
    ),
    "a .npy header with a broadcastable shape": (
        array("w", data=npy(np.ones((1, 25), np.float32))),
        f"tensor 'w': the array inside is (1, 25) float32, announced as {F32_W}",
    ),
    "a .npy header with a huge shape": (
        array("b", data=npy_with_header("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,)}")),
        "tensor 'b': the array inside is (1000000000000,) float32, announced as (25,) float32",
    ),
    "an announced huge shape": (
        array("b", shape=(10**12, 10**12)),
        "tensor 'b': shape (1000000000000, 1000000000000), base has (25,)",
    ),
    "an announced negative shape": (array("b", shape=(-25,)), "tensor 'b': shape (-25,) is no shape"),
    "a .npy header that numpy chokes on": (
        array("b", data=npy_with_header("{'descr': '<f4', ")),
        "tensor 'b': not a .npy array: ",
    ),
    "a .npy header that is too deep": (
        array("b", data=npy_with_header("-" * 9000 + "1")),
        "tensor 'b': not a .npy array: ",
    ),
    "a pickled object array": (
        array("b", data=PICKLED),
        "tensor 'b': the array inside is (25,) object, announced as (25,) float32",
    ),
    "an announced object array": (
        array("b", dtype="object", data=PICKLED),
        "tensor 'b': dtype 'object' is not supported",
    ),
    "an unknown encoding": (
        array("b", stype="zip"),
        "tensor 'b': encoded as 'zip', known are fl_merge.raw, numpy.ndarray",
    ),
    "an unknown dtype": (array("b", dtype="float7"), "tensor 'b': dtype 'float7' is not supported (float64, float32, "),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("attack", ATTACKS)
def test_the_round_is_that_of_the_other_seven(attack, name, caplog):
    misbehave, reason = ATTACKS[attack]
    with caplog.at_level(logging.WARNING, logger="flwr"):
        strategy, result, [report] = run(METHODS[name], misbehave)
    assert bytes_of(result.arrays) == WITHOUT[name]
    assert bytes_of(to_record(strategy.model.sent)) == WITHOUT[name]
    assert report.failure is None
    assert [entry.client_id for entry in report.accepted] == [str(node) for node in OTHERS]
    # The refusal names client, tensor and reason: in the report and, in one line, in the log.
    [refusal] = report.refused
    assert refusal.client_id == str(BAD)
    separator = ", " if reason.startswith("tensor ") else ": "
    assert str(refusal).startswith(f"client '{BAD}'{separator}{reason}")
    assert "\n" not in str(refusal)
    logged = [record.getMessage() for record in caplog.records if "refused" in record.getMessage()]
    assert logged == [f"\trefused: {refusal}"]


@pytest.mark.parametrize("attack", ["raises", "NaN", "examples 1e12", "a .npy header that numpy chokes on"])
def test_the_run_goes_on_over_rounds_and_takes_the_client_back(attack):
    """It misbehaves in the second of three rounds."""
    misbehave, _ = ATTACKS[attack]
    _, result, reports = run(METHODS["ties"], misbehave, num_rounds=3, rounds=(2,))
    assert [len(report.accepted) for report in reports] == [8, 7, 8]
    honest, _, _ = run(METHODS["ties"], lambda honest: honest, num_rounds=3)
    assert bytes_of(result.arrays) != bytes_of(to_record(honest.model.sent))
    assert set(result.train_metrics_clientapp) == {1, 2, 3}


def test_metrics_are_those_of_the_seven():
    def worse(honest):
        honest.content["metrics"]["loss"] = 99.0
        honest.content["metrics"]["num-examples"] = 0
        return honest

    _, result, _ = run(METHODS["weighted_average"], worse)
    assert dict(result.train_metrics_clientapp[1]) == {"loss": pytest.approx(0.5)}


def test_a_metric_that_is_nan_costs_the_metric_and_not_the_update():
    def unlucky(honest):
        honest.content["metrics"]["loss"] = math.nan
        return honest

    _, result, [report] = run(METHODS["weighted_average"], unlucky)
    assert report.refused == ()
    assert bytes_of(result.arrays) == WITH["weighted_average"]
    assert dict(result.train_metrics_clientapp[1]) == {"loss": pytest.approx(0.5)}


# --- who replies, and when -------------------------------------------------------------------------------------------


def one_round(method, change, *, nodes=8, **options):
    """Ask eight clients by hand, let `change` have their replies, and aggregate; also the report."""
    reports = Reports()
    strategy = FedMerge(method, seed=11, watchers=[reports], **options)
    with InProcessGrid(app_with(lambda honest: honest), nodes, workers=0) as grid:
        messages = strategy.configure_train(1, to_record(initial_model()), ConfigRecord(), grid)
        replies = grid.send_and_receive(messages)
        arrays, _ = strategy.aggregate_train(1, change(grid, replies))
    return arrays, reports.rounds[0]


def of(replies, node):
    return next(r for r in replies if r.metadata.src_node_id == node)


@pytest.mark.parametrize("name", METHODS)
def test_a_reply_that_comes_twice_counts_once(name):
    def twice(grid, replies):
        second = of(replies, BAD)
        changed = RecordDict({"arrays": to_record(initial_model()), "metrics": second.content["metrics"]})
        again = Message(changed, reply_to=FakeRequest.to(BAD))
        again.metadata.__dict__["_reply_to_message_id"] = second.metadata.reply_to_message_id
        return [*replies, second, again]

    arrays, report = one_round(METHODS[name], twice)
    assert bytes_of(arrays) == WITH[name]
    assert len(report.accepted) == 8
    assert report.refused == ()


class FakeRequest:
    """A message as a node that was not asked would have had it."""

    @staticmethod
    def to(node):
        message = Message(RecordDict(), dst_node_id=node, message_type="train", group_id="1")
        message.metadata.__dict__["_message_id"] = f"never sent to {node}"
        return message


def stranger(node, model):
    content = RecordDict({"arrays": to_record(model), "metrics": MetricRecord({"num-examples": 10})})
    return Message(content, reply_to=FakeRequest.to(node))


@pytest.mark.parametrize("name", METHODS)
def test_a_reply_from_a_node_that_was_not_asked(name):
    def intrude(grid, replies):
        return [stranger(2024, trained(initial_model(), 2024)), *replies]

    arrays, report = one_round(METHODS[name], intrude)
    assert bytes_of(arrays) == WITH[name]
    assert [str(refusal) for refusal in report.refused] == ["client '2024': was not asked in this round"]


def test_a_reply_under_another_clients_name_does_not_take_its_place():
    """It comes first, signed by a node that was asked, but answers no request of this round."""

    def impersonate(grid, replies):
        return [stranger(1005, trained(initial_model(), 2024)), *replies]

    arrays, report = one_round(METHODS["ties"], impersonate)
    assert bytes_of(arrays) == WITH["ties"]
    assert [str(refusal) for refusal in report.refused] == [
        "client '1005 (by its own account)': was not asked in this round"
    ]


@pytest.mark.parametrize("name", METHODS)
def test_a_client_that_is_silent(name):
    arrays, report = one_round(METHODS[name], lambda grid, replies: [r for r in replies if r is not of(replies, BAD)])
    assert bytes_of(arrays) == WITHOUT[name]
    assert [str(refusal) for refusal in report.refused] == [f"client '{BAD}': no reply before the deadline"]


class DeafNode(InProcessGrid):
    """Messages to one node are lost on the way."""

    def push_messages(self, messages):
        messages = list(messages)
        for message in messages:
            if message.metadata.dst_node_id == BAD:
                message.metadata.__dict__["_message_id"] = "lost"
        super().push_messages([message for message in messages if message.metadata.dst_node_id != BAD])
        return [message.metadata.message_id for message in messages]


def test_a_client_that_times_out():
    _, result, [report] = run(METHODS["dare_ties"], lambda honest: honest, grid_class=DeafNode, timeout=1.0)
    assert bytes_of(result.arrays) == WITHOUT["dare_ties"]
    assert [str(refusal) for refusal in report.refused] == [f"client '{BAD}': no reply before the deadline"]


@pytest.mark.parametrize("name", METHODS)
def test_the_order_of_replies_does_not_matter(name):
    for order in (lambda r: r[::-1], lambda r: r[3:] + r[:3]):
        arrays, _ = one_round(METHODS[name], lambda grid, replies, order=order: order(list(replies)))
        assert bytes_of(arrays) == WITH[name]


# --- when too few are left -------------------------------------------------------------------------------------------


def app_where_only(good, rounds=(1, 2, 3)):
    """In these rounds only the given nodes reply well."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        if context.node_id not in good and message.content["config"]["server-round"] in rounds:
            raise ValueError("the disk is gone")
        return reply(message, trained(receive(message), context.node_id), examples(context.node_id))

    return app


def test_when_all_clients_fail_the_run_fails_and_the_old_model_is_kept():
    reports = Reports()
    strategy = FedMerge(ties(), watchers=[reports])
    with InProcessGrid(app_where_only([]), 8, workers=0) as grid, pytest.raises(RunFailedError) as caught:
        strategy.start(grid, to_record(initial_model()), num_rounds=2)
    assert str(caught.value) == (
        "no round of 2 made a model; the last one: round 2: "
        "0 usable replies of 8 clients, wanted at least 4 (min_replies)"
    )
    assert bytes_of(to_record(strategy.model.sent)) == bytes_of(to_record(initial_model()))
    assert [len(report.refused) for report in reports.rounds] == [8, 8]
    assert str(reports.rounds[0].refused[0]) == "client '1000': client error: ValueError: the disk is gone"


@pytest.mark.parametrize(("usable", "options"), [(3, {}), (6, {"min_replies": 7}), (7, {"max_failures": 0.0})])
def test_with_too_few_usable_replies_the_old_model_is_kept_and_reported(usable, options, caplog):
    """In the second of three rounds."""
    reports = Reports()
    strategy = FedMerge(ties(), seed=11, watchers=[reports], fraction_evaluate=0.0, **options)
    sent = []

    class Listener(InProcessGrid):
        def push_messages(self, messages):
            messages = list(messages)
            sent.append(bytes_of(messages[0].content["arrays"]))
            return super().push_messages(messages)

    with Listener(app_where_only(NODES[:usable], rounds=(2,)), 8, workers=0) as grid:
        result = strategy.start(grid, to_record(initial_model()), num_rounds=3)
    needed = options.get("min_replies", 8 if options else 4)
    failure = f"{usable} usable replies of 8 clients, wanted at least {needed} (min_replies)"
    assert [report.failure for report in reports.rounds] == [None, failure, None]
    assert [report.merge is None for report in reports.rounds] == [False, True, False]
    assert f"round 2 made no model, the old one stands: {failure}" in caplog.text
    assert sent[1] == sent[2]  # the third round starts from the first one's model
    assert sent[0] != sent[1]
    assert sent[1] == merged_by_the_core(ties(), NODES)
    assert bytes_of(result.arrays) not in sent
    assert set(result.train_metrics_clientapp) == {1, 3}


def test_one_client_alone_is_never_the_model_by_accident():
    with InProcessGrid(app_where_only([1005]), 8, workers=0) as grid, pytest.raises(RunFailedError, match="1 usable"):
        FedMerge(weighted_average(), max_failures=1.0).start(grid, to_record(initial_model()), num_rounds=1)
    with InProcessGrid(app_where_only([1005]), 8, workers=0) as grid:
        strategy = FedMerge(weighted_average(), min_replies=1, fraction_evaluate=0.0)
        result = strategy.start(grid, to_record(initial_model()), num_rounds=1)
    assert bytes_of(result.arrays) == merged_by_the_core(weighted_average(), [1005])
