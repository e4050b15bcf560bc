"""FedNova: on paper, against its objective, and what clients must report."""

import pytest
import torch

from fl_merge import MergeError, UpdateError, clip_norm, merge, partition, server_optimizer
from fl_merge.method import sends
from fl_merge.methods import fednova, ties, weighted_average
from fl_merge.model import GlobalModel
from fl_merge.rounds import Round
from fl_merge.store import MemorySource
from fl_merge.types import CohortSpec, TensorSpec, Update

BASE = {"w": torch.zeros(2), "n": torch.tensor(3)}


def client(*values):
    return {"w": torch.tensor(values), "n": torch.tensor(3)}


def steps(**number):
    return {name: {"local-steps": count} for name, count in number.items()}


def test_on_paper():
    """Shares 1/4 and 3/4, steps 2 and 6: mean 5; 5 * (1/4 * 8 / 2 + 3/4 * 12 / 6) = 12.5 where the average is 11."""
    clients = {"a": client(8.0, 0.0), "b": client(12.0, 0.0)}
    weights = {"a": 1.0, "b": 3.0}
    assert merge(fednova(), BASE, clients, weights, metrics=steps(a=2, b=6))["w"].tolist() == [12.5, 0.0]
    assert merge(fednova(scale=2.0), BASE, clients, weights, metrics=steps(a=2, b=6))["w"].tolist() == [25.0, 0.0]
    assert merge(weighted_average(), BASE, clients, weights)["w"].tolist() == [11.0, 0.0]


def test_with_equal_steps_it_is_the_average():
    clients = {"a": client(0.1, 0.7), "b": client(-0.3, 0.2)}
    found = merge(fednova(), BASE, clients, [1.0, 2.0], metrics=steps(a=9, b=9.0))
    assert torch.equal(found["w"], merge(weighted_average(), BASE, clients, [1.0, 2.0])["w"])


def test_clients_with_more_steps_do_not_move_the_optimum():
    """Pulled to 0 in one step and to 1 in ten, with equal weight: the end is 1/2, and with the average 0.87 or more."""
    targets, made = {"a": 0.0, "b": 1.0}, {"a": 1, "b": 10}
    ends = {}
    for method in (fednova(), weighted_average()):
        x = torch.zeros(1)
        for _ in range(600):
            clients = {c: {"x": target + (x - target) * 0.99 ** made[c]} for c, target in targets.items()}
            x = merge(method, {"x": x}, clients, metrics=steps(**made))["x"]
        ends[method.name] = float(x)
    assert ends["fednova"] == pytest.approx(0.5, abs=0.02)
    assert ends["weighted_average"] > 0.85


def test_what_a_method_needs_is_known_through_wrappers():
    assert sends(fednova()) == sends(clip_norm(fednova(), quantile=0.5)) == ("steps",)
    assert sends(server_optimizer(partition([("*", ties())], otherwise=fednova()), "adam")) == ("steps",)
    assert sends(ties()) == ()


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ({}, "metric 'local-steps' is missing, wanted the whole number of local steps, 1 to 1,000,000"),
        ({"local-steps": 0}, "metric 'local-steps' is 0, wanted"),
        ({"local-steps": -3}, "metric 'local-steps' is -3, wanted"),
        ({"local-steps": 2.5}, "metric 'local-steps' is 2.5, wanted"),
        ({"local-steps": float("nan")}, "metric 'local-steps' is nan, wanted"),
        ({"local-steps": float("inf")}, "metric 'local-steps' is inf, wanted"),
        ({"local-steps": 10**30}, "metric 'local-steps' is 1000000000000000000000000000000, wanted"),
        ({"local-steps": [3]}, "metric 'local-steps' is [3], wanted"),
    ],
)
def test_a_client_that_does_not_say_is_refused_and_the_round_goes_on(metrics, message):
    model = GlobalModel.of(BASE)
    collected = Round(1, model, fednova(), ("0", "1", "2"))
    reports = {"0": {"local-steps": 2}, "1": metrics, "2": {"local-steps": 4}}
    for name, reported in reports.items():
        collected.offer(name, lambda n=name, r=reported: Update(n, 1.0, MemorySource(client(1.0, 2.0)), r))
    made, report = collected.merge()
    assert [refusal.client_id for refusal in report.refused] == ["1"]
    assert report.refused[0].reason.startswith(message)
    assert made is not None
    assert report.merge.clients == ("0", "2")
    other = Round(1, model, weighted_average(), ("1",), min_replies=1)
    assert other.offer("1", lambda: Update("1", 1.0, MemorySource(client(1.0, 2.0)), metrics)) is None
    with pytest.raises(UpdateError, match=r"^client '1': metric 'local-steps' is"):
        merge(fednova(), BASE, {"1": client(1.0, 2.0)}, metrics={"1": metrics})


def test_a_cohort_without_reports_is_refused():
    with pytest.raises(MergeError, match=r"^fednova: clients report their number of steps as 'local-steps'; found"):
        list(fednova().plan(CohortSpec({"w": TensorSpec((2,), torch.float32)}, ("0",), (1.0,))))
