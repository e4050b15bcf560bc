"""A round of a federation without any transport: who is taken in, who is refused, when there is a model."""

import math

import pytest
import torch

from fl_merge import MergeError, RecipeError, merge
from fl_merge.errors import DecodeError
from fl_merge.methods import dare_linear, task_arithmetic, ties, weighted_average
from fl_merge.model import GlobalModel
from fl_merge.rounds import Refusal, Round, average_metrics, quorum
from fl_merge.store import MemorySource
from fl_merge.types import Update

BASE = {"w": torch.tensor([1.0, 2.0]), "steps": torch.tensor(0)}
NAMES = ("1", "2", "3", "4")


def update(client_id, values=(3.0, 4.0), num_examples=10.0, **metrics):
    tensors = {"w": torch.tensor(values), "steps": torch.tensor(1)}
    return Update(client_id, num_examples, MemorySource(tensors), metrics)


def a_round(method=None, sampled=NAMES, base=BASE, **options):
    return Round(1, GlobalModel.of(base), method or weighted_average(), sampled, **options)


def offer(collected, client_id, **changes):
    return collected.offer(client_id, lambda: update(client_id, **changes))


# --- who is taken in -------------------------------------------------------------------------------------------------


def test_the_round_merges_what_it_accepted_and_says_so():
    collected = a_round()
    assert offer(collected, "2", values=(1.0, 8.0), num_examples=30.0, loss=0.5) is None
    assert offer(collected, "1", num_examples=10.0, loss=0.7) is None
    refusal = offer(collected, "3", values=(math.nan, 1.0))
    assert refusal == Refusal("3", "element 0 is nan, wanted finite numbers", "w")
    assert str(refusal) == "client '3', tensor 'w': element 0 is nan, wanted finite numbers"
    model, report = collected.merge()
    assert model.sent["w"].tolist() == [1.5, 7.0]
    assert (report.round_number, report.sampled, report.failure) == (1, NAMES, None)
    assert [(a.client_id, a.num_examples, dict(a.metrics), a.num_bytes) for a in report.accepted] == [
        ("2", 30.0, {"loss": 0.5}, 16),
        ("1", 10.0, {"loss": 0.7}, 16),
    ]
    assert report.refused == (refusal, Refusal("4", "no reply before the deadline"))
    assert report.merge.clients == ("1", "2")
    assert report.merge.weights == (0.25, 0.75)
    assert report.seconds > 0


def test_the_result_is_the_merge_of_the_accepted_alone():
    for method in (weighted_average(), ties(density=0.5), dare_linear(density=0.5)):
        with_bad, without = a_round(method), a_round(method, sampled=("1", "2", "4"))
        for client_id in ("1", "2", "4"):
            for collected in (with_bad, without):
                offer(collected, client_id, values=(float(client_id), 5.0))
        offer(with_bad, "3", values=(1.0, math.inf))
        assert torch.equal(with_bad.merge()[0].sent["w"], without.merge()[0].sent["w"])


def test_whoever_was_not_asked_is_refused():
    collected = a_round()
    assert str(offer(collected, "9")) == "client '9': was not asked in this round"
    for client_id in NAMES:
        offer(collected, client_id)
    model, report = collected.merge()
    assert model.sent["w"].tolist() == [3.0, 4.0]
    assert report.refused == (Refusal("9", "was not asked in this round"),)


def test_the_first_reply_counts():
    collected = a_round()
    for client_id in NAMES:
        assert offer(collected, client_id) is None
    assert str(offer(collected, "1", values=(99.0, 99.0))) == "client '1': replied twice; the first reply counts"
    assert str(collected.refuse("1", "client error: lost")) == "client '1': replied twice; the first reply counts"
    model, report = collected.merge()
    assert model.sent["w"].tolist() == [3.0, 4.0]
    assert [entry.client_id for entry in report.accepted] == list(NAMES)
    assert report.refused == ()


def test_a_second_reply_does_not_make_good_a_bad_first_one():
    collected = a_round()
    first = offer(collected, "1", values=(math.nan, 1.0))
    assert str(offer(collected, "1")) == "client '1': replied twice; the first reply counts"
    assert collected.refuse("1", "again").reason == "again"
    for client_id in NAMES[1:]:
        offer(collected, client_id)
    _, report = collected.merge()
    assert report.refused == (first,)


def test_an_update_that_cannot_be_read_is_refused_with_the_readers_reason():
    def unreadable():
        raise DecodeError("11 bytes, wanted 12", tensor="w")

    assert str(a_round().offer("1", unreadable)) == "client '1', tensor 'w': 11 bytes, wanted 12"


def test_whatever_reading_an_update_raises_costs_that_update_only(caplog):
    """A client chooses its bytes: what they make a parser raise must not end the run. The traceback is in the log."""

    def broken():
        raise ZeroDivisionError("by\nbytes")

    assert str(a_round().offer("1", broken)) == "client '1': cannot be read: ZeroDivisionError: by bytes"
    assert "Traceback" in caplog.text


def test_the_largest_number_of_examples_is_the_operators():
    collected = a_round(max_num_examples=100)
    assert str(offer(collected, "1", num_examples=101)) == (
        "client '1': number of examples is 101, wanted a number > 0 and <= 100"
    )


# --- the quorum ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sampled", "min_replies", "max_failures", "wanted"),
    [
        (8, None, 0.5, 4),
        (9, None, 0.5, 5),
        (8, None, 0.0, 8),
        (8, None, 0.13, 7),
        (8, None, 1.0, 2),
        (3, None, 0.5, 2),
        (2, None, 0.5, 2),
        (1, None, 0.5, 2),
        (8, 1, 0.0, 1),
        (8, 8, 1.0, 8),
    ],
)
def test_how_many_replies_are_needed(sampled, min_replies, max_failures, wanted):
    assert quorum(sampled, min_replies, max_failures) == wanted


@pytest.mark.parametrize(
    ("options", "usable", "enough"), [({}, 2, True), ({}, 1, False), ({"min_replies": 3}, 2, False)]
)
def test_with_fewer_there_is_no_model_and_the_report_says_why(options, usable, enough):
    collected = a_round(**options)
    for client_id in NAMES[:usable]:
        offer(collected, client_id)
    model, report = collected.merge()
    assert (model is not None) == (report.merge is not None) == enough
    wanted = options.get("min_replies", 2)
    found = "1 usable reply" if usable == 1 else f"{usable} usable replies"
    problem = f"{found} of 4 clients, wanted at least {wanted} (min_replies)"
    assert report.failure == (None if enough else problem)
    assert len(report.refused) == 4 - usable


def test_one_clients_model_is_taken_only_if_the_operator_asks_for_it():
    collected = a_round(min_replies=1)
    offer(collected, "2")
    assert collected.merge()[0].sent["w"].tolist() == [3.0, 4.0]


def test_a_merge_that_fails_makes_no_model_and_the_report_says_why():
    collected = a_round(task_arithmetic(coefficients={"3": -1.0}))
    for client_id in ("1", "2", "4"):
        offer(collected, client_id)
    model, report = collected.merge()
    assert model is None
    assert report.failure == (
        "task_arithmetic: coefficients name client '3', which has no usable update here (clients: 1, 2, 4)"
    )


# --- the float32 master ----------------------------------------------------------------------------------------------


def drift(dtype, master):
    """After 50 rounds of two clients who move by 0.001 each: how far the model is from where it should be."""
    start = torch.linspace(0.5, 2.0, 64)
    base = {"w": start.to(dtype)}
    wanted = base["w"].double()
    model = GlobalModel.of(base)
    for number in range(1, 51):
        step = 0.001 * (1 if number % 10 else -1)
        wanted = wanted + step
        tensors = {"w": model.sent["w"].float() + step}
        collected = Round(number, model, weighted_average(), ("1", "2"))
        for client_id in ("1", "2"):
            assert collected.offer(client_id, lambda i=client_id, t=tensors: Update(i, 1.0, MemorySource(t))) is None
        model, _ = collected.merge()
        assert model.sent["w"].dtype == dtype
        if not master:
            model = GlobalModel.of(model.sent)
    return float((model.tensors()["w"].double() - wanted).abs().max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_with_a_master_small_deltas_add_up_over_rounds(dtype):
    """0.001 is less than half a step of bfloat16 near 1: without a master the model never moves."""
    half_a_step = 2.0 * torch.finfo(dtype).eps / 2
    assert drift(dtype, master=True) <= half_a_step + 1e-6
    assert drift(dtype, master=False) > 4 * drift(dtype, master=True)


def test_what_clients_are_sent_is_the_master_rounded():
    values = torch.tensor([1.0, 1.001, -3.14159, 1e-3])
    model = GlobalModel.of({"w": values}, dtypes={"w": torch.bfloat16})
    assert torch.equal(model.sent["w"], values.bfloat16())
    assert torch.equal(model.master()["w"], values)
    assert torch.equal(model.tensors()["w"], values.bfloat16())
    assert model.specs()["w"].dtype == torch.bfloat16


def test_a_narrower_wire_and_the_bases_dtype_outside():
    values = torch.tensor([1.0, 1.001, -3.14159])
    model = GlobalModel.of({"w": values, "steps": torch.tensor(7)}, wire=torch.bfloat16)
    assert model.sent["w"].dtype == torch.bfloat16
    assert model.sent["steps"].dtype == torch.int64
    assert torch.equal(model.tensors()["w"], values)
    collected = Round(1, model, weighted_average(), ("1", "2"), wire=torch.bfloat16)
    for client_id in ("1", "2"):
        tensors = {"w": model.sent["w"].float() + 0.25, "steps": torch.tensor(9)}
        collected.offer(client_id, lambda i=client_id, t=tensors: Update(i, 1.0, MemorySource(t)))
    after, _ = collected.merge()
    assert after.sent["w"].dtype == torch.bfloat16
    assert torch.equal(after.tensors()["w"], values + 0.25)  # the delta on top of what clients were not sent
    assert after.tensors()["steps"] == 7


def test_if_nobody_moves_the_master_stays():
    values = torch.tensor([1.0, 1.001, -3.14159, 1e-30])
    model = GlobalModel.of({"w": values}, wire=torch.bfloat16)
    for _ in range(3):
        updates = tuple(Update(i, 1.0, MemorySource(dict(model.sent))) for i in ("1", "2", "3"))
        model, _ = model.merged(weighted_average(), updates, seed=0, round_number=1, wire=torch.bfloat16)
        assert torch.equal(model.master()["w"], values)


def test_a_model_that_does_not_fit_what_it_is_sent_in():
    with pytest.raises(MergeError, match=r"^tensor 'w': the model does not fit float16$"):
        GlobalModel.of({"w": torch.tensor([1.0, 70000.0])}, wire=torch.float16)
    collected = a_round(
        task_arithmetic(scale=3.0), base={"w": torch.tensor([1.0, 40000.0]).half(), "steps": torch.tensor(0)}
    )
    for client_id in NAMES:
        offer(collected, client_id, values=(1.0, 60000.0))
    model, report = collected.merge()
    assert model is None
    assert report.failure == "tensor 'w': the model does not fit float16"


def test_one_client_cannot_fail_a_float16_round_with_a_number_that_float16_does_not_have():
    base = {"w": torch.tensor([1.0, 2.0]).half(), "steps": torch.tensor(0)}
    collected = a_round(base=base)
    assert str(offer(collected, "1", values=(1e6, 2.0))) == (
        "client '1', tensor 'w': element 0 is 1000000.0, wanted numbers that float16 has"
    )
    for client_id in NAMES[1:]:
        offer(collected, client_id)
    assert collected.merge()[0].sent["w"].tolist() == [3.0, 4.0]


def test_tied_weights_stay_tied():
    base = {"embed": torch.zeros(2), "head": torch.zeros(2)}
    model = GlobalModel.of(base, tied={"head": "embed"})
    tensors = {"embed": torch.ones(2), "head": torch.full((2,), 5.0)}
    updates = tuple(Update(i, 1.0, MemorySource(tensors)) for i in ("1", "2"))
    after, _ = model.merged(weighted_average(), updates, seed=0, round_number=1)
    assert after.sent["embed"].tolist() == after.sent["head"].tolist() == [1.0, 1.0]
    assert after.tied == {"head": "embed"}


def test_the_draws_are_those_of_the_round():
    """The seed and the round's number: merge() outside a federation is round 0."""
    base = {"w": torch.zeros(200)}
    client = {"w": torch.ones(200)}
    updates = (Update("1", 1.0, MemorySource(client)),)
    drawn = [
        GlobalModel.of(base).merged(dare_linear(), updates, seed=seed, round_number=number)[0].sent["w"]
        for seed, number in ((0, 1), (0, 2), (1, 1), (0, 1))
    ]
    assert torch.equal(drawn[0], drawn[3])
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    plain = merge(dare_linear(), base, {"1": client})["w"]
    zeroth, _ = GlobalModel.of(base).merged(dare_linear(), updates, seed=0, round_number=0)
    assert torch.equal(zeroth.sent["w"], plain)


# --- metrics ---------------------------------------------------------------------------------------------------------


def test_metrics_are_averaged_by_examples_over_those_who_sent_them():
    reports = {"1": (1.0, {"loss": 1.0, "seen": 4}), "2": (3.0, {"loss": 2.0, "curve": [1.0, 3.0]})}
    assert average_metrics(reports) == {"loss": 1.75, "seen": 4.0, "curve": [1.0, 3.0]}


def test_metrics_that_are_not_numbers_do_not_spoil_the_average():
    reports = {
        "1": (1.0, {"loss": math.nan, "huge": 10**400, "curve": [1.0, 2.0], "all_bad": math.inf}),
        "2": (1.0, {"loss": 2.0, "huge": 5, "curve": [3.0, math.inf]}),
    }
    assert average_metrics(reports) == {"loss": 2.0, "huge": 5.0, "curve": [1.0, 2.0]}


def test_metrics_of_different_forms_are_left_out():
    reports = {"1": (1.0, {"a": [1.0], "b": [1.0, 2.0], "c": 3.0}), "2": (1.0, {"a": 1.0, "b": [1.0], "c": 5.0})}
    assert average_metrics(reports) == {"c": 4.0}
    assert average_metrics({}) == {}
    assert average_metrics({"1": (1.0, {"empty": []})}) == {"empty": []}


# --- the model that a run starts from --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tensors", "tied", "message"),
    [
        ({}, {}, "the initial model has no arrays"),
        ({"a": torch.tensor([math.nan])}, {}, "the initial model is not finite: tensor 'a'"),
        ({"a": torch.ones(2)}, {"b": "a"}, "tied: the model has no tensor 'b'"),
        ({"a": torch.ones(2)}, {"a": "a"}, "tied: 'a' is not a second name of the tensor 'a'"),
        (dict.fromkeys("abc", torch.ones(2)), {"a": "b", "b": "c"}, "tied: 'a' is not a second name of the tensor 'b'"),
        ({"a": torch.ones(2), "b": torch.ones(3)}, {"a": "b"}, "tied: 'a' is not a second name of the tensor 'b'"),
    ],
)
def test_an_initial_model_that_no_run_can_start_from(tensors, tied, message):
    with pytest.raises(RecipeError, match=message):
        GlobalModel.initial(tensors, weighted_average(), tied=tied)


def test_a_client_that_parts_tied_weights_is_refused():
    model = GlobalModel.initial(dict.fromkeys(("embed", "head"), torch.zeros(2)), ties(), tied={"head": "embed"})
    collected = Round(1, model, ties(), ("1", "2"))
    parted = Update("1", 1.0, MemorySource({"embed": torch.ones(2), "head": torch.full((2,), 9.0)}, {}))
    assert str(collected.offer("1", lambda: parted)) == (
        "client '1', tensor 'head': differs from 'embed', to which it is tied in the base"
    )


def test_a_method_that_fails_costs_the_round_and_not_the_server():
    from fl_merge import Coordinate

    def combine(deltas_NS, weights_N, at):
        raise RuntimeError("no luck")

    model = GlobalModel.of({"a": torch.zeros(2)})
    collected = Round(1, model, Coordinate(combine), ("1", "2"))
    for client_id in ("1", "2"):
        collected.offer(client_id, lambda each=client_id: Update(each, 1.0, MemorySource({"a": torch.ones(2)})))
    merged, report = collected.merge()
    assert merged is None
    assert report.failure.endswith("failed: RuntimeError: no luck")
