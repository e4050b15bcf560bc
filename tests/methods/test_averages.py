"""Weighted average, task arithmetic, FedGMA: on paper."""

import itertools

import pytest
import torch

from fl_merge import MergeError, merge, partition
from fl_merge.methods import fedgma, task_arithmetic, weighted_average

BASE = {"w": torch.tensor([1.0, 2.0, 3.0])}
A = {"w": torch.tensor([3.0, 2.0, 1.0])}
B = {"w": torch.tensor([1.0, 6.0, 7.0])}


def test_weighted_average_by_hand():
    assert merge(weighted_average(), BASE, [A, B])["w"].tolist() == [2.0, 4.0, 4.0]
    assert merge(weighted_average(), BASE, [A, B], weights=[3, 1])["w"].tolist() == [2.5, 3.0, 2.5]
    assert merge(weighted_average(), BASE, {"b": B, "a": A}, weights={"a": 30, "b": 10})["w"].tolist() == [
        2.5,
        3.0,
        2.5,
    ]


def test_task_arithmetic_adds_by_share():
    assert merge(task_arithmetic(), BASE, [A, B], [3, 1])["w"].tolist() == [2.5, 3.0, 2.5]
    assert merge(task_arithmetic(scale=2.0), BASE, [A, B], [3, 1])["w"].tolist() == [4.0, 4.0, 2.0]


def test_task_arithmetic_negates():
    """A single client with scale -1: the base less what the client learned."""
    assert merge(task_arithmetic(scale=-1.0), BASE, [A])["w"].tolist() == [-1.0, 2.0, 5.0]


def test_task_arithmetic_without_normalize_is_the_raw_sum():
    assert merge(task_arithmetic(normalize=False), BASE, [A, B], [3, 1])["w"].tolist() == [3.0, 6.0, 5.0]
    assert merge(task_arithmetic(normalize=False, scale=0.5), BASE, [A, B])["w"].tolist() == [2.0, 4.0, 4.0]


def test_coefficients_by_client_are_taken_as_they_are():
    # a's is given, b keeps its share of 1/4
    forget_a = task_arithmetic(coefficients={"a": -1.0})
    assert merge(forget_a, BASE, {"a": A, "b": B}, {"a": 3, "b": 1})["w"].tolist() == [-1.0, 3.0, 6.0]
    # with a raw sum b keeps 1; the scale multiplies both
    forget_a = task_arithmetic(coefficients={"a": -1.0}, normalize=False, scale=0.5)
    assert merge(forget_a, BASE, {"a": A, "b": B})["w"].tolist() == [0.0, 4.0, 6.0]


def test_adding_and_then_negating_gives_the_base():
    added = merge(task_arithmetic(), BASE, [A])
    moved_as_a = {"w": added["w"] + (A["w"] - BASE["w"])}
    assert torch.equal(merge(task_arithmetic(scale=-1.0), added, [moved_as_a])["w"], BASE["w"])


def test_a_coefficient_for_an_absent_client_is_refused():
    with pytest.raises(MergeError) as caught:
        merge(task_arithmetic(coefficients={"c": -1.0}), BASE, {"a": A, "b": B})
    assert str(caught.value) == (
        "task_arithmetic: coefficients name client 'c', which has no usable update here (clients: a, b)"
    )


def test_coefficients_cannot_be_changed_from_outside():
    given = {"a": -1.0}
    method = task_arithmetic(coefficients=given)
    given["a"] = 5.0
    assert merge(method, BASE, {"a": A})["w"].tolist() == [-1.0, 2.0, 5.0]
    with pytest.raises(TypeError):
        method.parameters["coefficients"]["a"] = 2.0


def test_fedgma_by_hand():
    base = {"w": torch.zeros(4)}
    clients = [{"w": torch.tensor(d)} for d in ([2.0, 2.0, -1.0, 0.0], [4.0, -4.0, -1.0, 0.0], [6.0, 3.0, -1.0, 4.0])]
    # weights 1/2 1/4 1/4;  agreement 1, 1/2, 1, 1/4;  sums 3.5, 0.75, -1, 1
    assert merge(fedgma(threshold=0.6), base, clients, [2, 1, 1])["w"].tolist() == [3.5, 0.375, -1.0, 0.25]
    assert merge(fedgma(threshold=0.5), base, clients, [2, 1, 1])["w"].tolist() == [3.5, 0.75, -1.0, 0.25]
    assert merge(fedgma(threshold=0.0, scale=2.0), base, clients, [2, 1, 1])["w"].tolist() == [7.0, 1.5, -2.0, 2.0]


def test_an_agreement_that_is_the_threshold_is_enough_whoever_agrees():
    """7 of 10 equal clients against 3: 0.4, but sums of tenths in float32 are now above and now below it."""
    against = list(itertools.combinations(range(10), 3))
    deltas = torch.ones(10, len(against))
    for place, clients in enumerate(against):
        deltas[list(clients), place] = -1.0
    found = merge(fedgma(threshold=0.4), {"w": torch.zeros(len(against))}, [{"w": delta} for delta in deltas])["w"]
    assert torch.allclose(found, torch.tensor(0.4), atol=1e-6)


def test_a_method_for_some_tensors_and_another_for_the_rest():
    base = {"norm.w": torch.zeros(1), "mlp.w": torch.zeros(1), "norm.b": torch.zeros(1)}
    client = {name: torch.ones(1) for name in base}
    rules = partition([("*.b", task_arithmetic(scale=5.0)), ("norm*", task_arithmetic(scale=3.0))], weighted_average())
    result = merge(rules, base, [client, client])
    assert {name: float(tensor) for name, tensor in result.items()} == {"norm.w": 3.0, "mlp.w": 1.0, "norm.b": 5.0}
    assert list(result) == list(base)
