"""SLERP (Shoemake, 1985): arcs of weights or of deltas, tensor by tensor or of the whole model."""

import math

import pytest
import torch

from fl_merge import merge
from fl_merge.methods import slerp, weighted_average

ZERO = {"w": torch.zeros(2, dtype=torch.float64)}
X = {"w": torch.tensor([2.0, 0.0], dtype=torch.float64)}
Y = {"w": torch.tensor([0.0, 2.0], dtype=torch.float64)}


def test_a_right_angle_by_hand():
    # t = w_2 / (w_1 + w_2) = 1/3 of 90 degrees
    found = merge(slerp(), ZERO, [X, Y], weights=[2, 1])["w"].tolist()
    assert found == pytest.approx([2 * math.cos(math.pi / 6), 2 * math.sin(math.pi / 6)], rel=1e-15)


def test_on_weights_and_on_deltas():
    base = {"w": torch.tensor([10.0, 10.0], dtype=torch.float64)}
    clients = [{"w": base["w"] + client["w"]} for client in (X, Y)]
    on_deltas = merge(slerp(on="deltas"), base, clients)["w"].tolist()
    assert on_deltas == pytest.approx([10 + math.sqrt(2)] * 2, rel=1e-14)
    # (12, 10) and (10, 12): half way along the arc of the circle that both are on
    on_weights = merge(slerp(on="weights"), base, clients)["w"].tolist()
    assert on_weights == pytest.approx([math.hypot(12, 10) / math.sqrt(2)] * 2, rel=1e-14)


def test_on_weights_the_base_does_not_matter():
    for seed in range(3):
        base = {"w": torch.randn(2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))}
        found = merge(slerp(), base, [X, Y])["w"].tolist()
        assert found == pytest.approx([math.sqrt(2)] * 2, rel=1e-14)


def test_nearly_parallel_weights_are_joined_by_a_line(generator):
    base = {"w": torch.randn(1000, generator=generator)}
    near = [{"w": base["w"] + 0.01 * torch.randn(1000, generator=generator)} for _ in range(2)]
    assert torch.equal(merge(slerp(), base, near, [3, 1])["w"], merge(weighted_average(), base, near, [3, 1])["w"])
    # their deltas are at a right angle, nearly
    arc, line = merge(slerp(on="deltas"), base, near)["w"] - base["w"], merge("weighted_average", base, near)["w"]
    assert float(arc.norm() / (line - base["w"]).norm()) == pytest.approx(math.sqrt(2), rel=0.1)


def test_more_than_two_are_folded_in_the_order_of_their_ids():
    z = {"w": torch.tensor([-2.0, 0.5], dtype=torch.float64)}
    clients = {"2": X, "10": Y, "9": z}
    weights = {"2": 1.0, "10": 3.0, "9": 2.0}
    pair = merge(slerp(), ZERO, [X, z], [1, 2])
    wanted = merge(slerp(), ZERO, [pair, Y], [3, 3])["w"].tolist()
    assert merge(slerp(), ZERO, clients, weights)["w"].tolist() == pytest.approx(wanted, rel=1e-13)
    other_order = merge(slerp(), ZERO, [merge(slerp(), ZERO, [X, Y], [1, 3]), z], [4, 2])["w"].tolist()
    assert other_order != pytest.approx(wanted, rel=1e-3)


def test_one_angle_for_the_whole_model():
    """Tensor a is at a right angle, tensor b is equal: together the angle's cosine is 4 / 8."""
    base = {"a": torch.zeros(2, dtype=torch.float64), "b": torch.zeros(1, dtype=torch.float64)}
    two = torch.tensor([2.0], dtype=torch.float64)
    clients = [{"a": X["w"], "b": two}, {"a": Y["w"], "b": two}]
    by_tensor = merge(slerp(), base, clients)
    assert by_tensor["a"].tolist() == pytest.approx([math.sqrt(2)] * 2)
    assert by_tensor["b"].tolist() == [2.0]
    share = math.sin(math.pi / 6) / math.sin(math.pi / 3)
    by_model = merge(slerp(scope="model"), base, clients)
    assert by_model["a"].tolist() == pytest.approx([2 * share] * 2)
    assert by_model["b"].tolist() == pytest.approx([4 * share])


def test_a_client_that_is_all_zeros_or_opposite():
    assert merge(slerp(), X, [ZERO, X], [1, 3])["w"].tolist() == [1.5, 0.0]
    assert merge(slerp(), X, [{"w": -X["w"]}, X], [1, 3])["w"].tolist() == [1.0, 0.0]
