"""Known faults of reference implementations, some mended since: what the faulty rule does, and that ours does not.

Each test states the faulty rule in a few lines of its own, shows on a worked example what it gives, and then what ours
gives. Others stand with their methods: float32 distances that make Flower's Krum scores negative (test_flower_krum.py)
and its Bulyan blind (test_flower_robust.py), SCE's weights that turn uniform for small deltas
(methods/test_sce_pcb.py), draws that depend on what else is merged (methods/test_dare.py).
"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fl_merge import merge
from fl_merge.methods import (
    breadcrumbs,
    breadcrumbs_ties,
    della,
    della_linear,
    fisher,
    model_stock,
    ties,
    weighted_average,
)
from fl_merge.statistics import collect


def of_one_client(method, delta, **options):
    """What a method makes of one client's delta, from a base of zeros."""
    delta = torch.as_tensor(delta)
    return merge(method, {"w": torch.zeros_like(delta)}, [{"w": delta}], **options)["w"]


# TIES keeping k + 1 ---------------------------------------------------------------------------------------------------


def kept_above_the_smallest_that_is_dropped(delta, density):
    """The faulty rule: the threshold is the (n - k)th smallest magnitude, which is to be dropped, and `>=` keeps it."""
    size = delta.numel()
    threshold = delta.abs().kthvalue(size - int(density * size)).values
    return delta.abs() >= threshold


def kept_above_the_smallest_that_is_kept(delta, density):
    """With the right threshold, `>=` still keeps every element that is equal to it."""
    size = delta.numel()
    threshold = delta.abs().kthvalue(size - int(density * size) + 1).values
    return delta.abs() >= threshold


def test_ties_keeps_k_and_not_one_more():
    """A density of 0.2 of ten elements is two of them: 9 and -8."""
    delta = torch.tensor([1.0, -2.0, 9.0, 3.0, -8.0, 4.0, -5.0, 6.0, 7.0, 0.5])
    assert delta[kept_above_the_smallest_that_is_dropped(delta, 0.2)].tolist() == [9.0, -8.0, 7.0]
    assert of_one_client(ties(density=0.2), delta).tolist() == [0, 0, 9.0, 0, -8.0, 0, 0, 0, 0, 0]


def test_ties_keeps_k_of_equal_magnitudes_the_first_of_them():
    """Two of ten: 3 and the first of the six elements of magnitude 2."""
    delta = torch.tensor([1.0, -2.0, 2.0, 3.0, -2.0, 2.0, 2.0, 1.0, -2.0, 1.0])
    assert int(kept_above_the_smallest_that_is_dropped(delta, 0.2).sum()) == 7
    assert int(kept_above_the_smallest_that_is_kept(delta, 0.2).sum()) == 7
    assert of_one_client(ties(density=0.2), delta).tolist() == [0, -2.0, 0, 3.0, 0, 0, 0, 0, 0, 0]


@given(st.integers(1, 300), st.floats(0, 1, exclude_min=True), st.integers(0, 10_000), st.booleans())
def test_ties_keeps_exactly_k_for_every_size_and_density(size, density, seed, equal):
    """k = max(1, int(density n)), with magnitudes that are all different and with three of them."""
    draw = torch.Generator().manual_seed(seed)
    delta = torch.randint(1, 4, (size,), generator=draw).float() if equal else torch.rand(size, generator=draw) + 0.1
    delta *= torch.randint(0, 2, (size,), generator=draw).mul(2).sub(1)
    assert int((of_one_client(ties(density=density), delta) != 0).sum()) == max(1, int(density * size))


@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_ties_keeps_exactly_k_of_a_tensor_in_many_slices(scope):
    """300 000 elements of three magnitudes: nearly all of them are equal to the threshold or above it."""
    delta = torch.randint(1, 4, (300_000,), generator=torch.Generator().manual_seed(5)).float()
    assert int(kept_above_the_smallest_that_is_kept(delta, 0.2).sum()) > 90_000
    found = of_one_client(ties(density=0.2, scope=scope), delta, slice_elements=16384)
    assert int((found != 0).sum()) == 60_000
    assert set(found.unique().tolist()) == {0.0, 3.0}
    places = (delta == 3.0).nonzero()[:60_000]
    assert bool((found[places] == 3.0).all()), "the lower index wins"


# Breadcrumbs emptying small tensors -----------------------------------------------------------------------------------


def cut_from_behind(delta, density, gamma):
    """The faulty rule: the largest are cut off a sorted list by a slice that ends at -top, and -0 is the beginning."""
    top = int(gamma * delta.numel())
    bottom = delta.numel() - int(density * delta.numel()) - top
    kept = delta.abs().argsort()[bottom:-top]
    return torch.zeros_like(delta).scatter(0, kept, delta[kept])


@pytest.mark.parametrize("method", [breadcrumbs, breadcrumbs_ties])
def test_breadcrumbs_of_a_small_tensor_are_not_nothing(method):
    """Of ten elements a gamma of 0.05 drops none as outliers, and a density of 0.3 keeps three."""
    delta = torch.tensor([1.0, -2.0, 9.0, 3.0, -8.0, 4.0, -5.0, 6.0, 7.0, 0.5])
    assert cut_from_behind(delta, 0.3, 0.05).tolist() == [0.0] * 10
    assert of_one_client(method(density=0.3, gamma=0.05), delta).tolist() == [0, 0, 9.0, 0, -8.0, 0, 0, 0, 7.0, 0]
    # where something is dropped as an outlier the two rules are one
    wanted = cut_from_behind(delta, 0.3, 0.1)
    assert torch.equal(of_one_client(method(density=0.3, gamma=0.1), delta), wanted)
    assert int((wanted != 0).sum()) == 3


# DELLA on rows of one element -----------------------------------------------------------------------------------------


def chances_by_rank(row, density, epsilon):
    """The faulty rule: the ranks 0 to n - 1 are divided by n - 1."""
    rank = row.abs().argsort().argsort().double()
    return density - epsilon / 2 + epsilon * rank / (row.numel() - 1)


@pytest.mark.parametrize("method", [della, della_linear])
def test_della_keeps_rows_of_one_element(method):
    assert chances_by_rank(torch.tensor([3.0, -1.0, 2.0]), 0.5, 0.2).tolist() == pytest.approx([0.6, 0.4, 0.5])
    assert math.isnan(chances_by_rank(torch.tensor([3.0]), 0.5, 0.2))
    for shape in ((7, 1), (1,), ()):
        delta = torch.full(shape, 3.0)
        for seed in range(5):
            assert torch.equal(of_one_client(method(density=0.5, epsilon=0.2), delta, seed=seed), delta)


# Model Stock at a negative cosine -------------------------------------------------------------------------------------


def stock(deltas):
    """The faulty rule: t = N c / (1 + (N - 1) c) for any mean cosine c."""
    count = len(deltas)
    pairs = [(a, b) for a in range(count) for b in range(a)]
    cosine = sum(float(torch.cosine_similarity(deltas[a], deltas[b], dim=0)) for a, b in pairs) / len(pairs)
    t = count * cosine / (1 + (count - 1) * cosine)
    return t, t * sum(deltas) / count


def test_model_stock_does_not_step_away_from_the_clients():
    """Two deltas with a cosine of -0.6: t = -1.2 / 0.4 = -3, three times as far as their mean on the other side."""
    deltas = [torch.tensor([1.0, 0.0]), torch.tensor([-0.6, 0.8])]
    t, faulty = stock(deltas)
    assert t == pytest.approx(-3.0, rel=1e-5)
    assert faulty.tolist() == pytest.approx([-0.6, -1.2], rel=1e-5)
    base = {"w": torch.tensor([10.0, 20.0])}
    clients = [{"w": base["w"] + delta} for delta in deltas]
    assert torch.equal(merge(model_stock(), base, clients)["w"], base["w"])
    # near c = -1 / (N - 1) it is without bound
    assert abs(stock([torch.tensor([1.0, 0.0]), torch.tensor([-0.999999, 0.0014])])[0]) > 1e5
    # where the deltas agree the two rules are one: c = 0.6, t = 1.2 / 1.6
    deltas = [torch.tensor([1.0, 0.0]), torch.tensor([0.6, 0.8])]
    t, wanted = stock(deltas)
    assert t == pytest.approx(0.75)
    found = merge(model_stock(), {"w": torch.zeros(2)}, [{"w": delta} for delta in deltas])["w"]
    assert found.tolist() == pytest.approx(wanted.tolist(), rel=1e-5)


# Fisher information as the square of a batch's gradient ---------------------------------------------------------------


def squared_gradient_of_the_batch(model, inputs):
    """The faulty rule: the gradients of the examples are added up, at the classes that the model holds for the most
    likely, and the square is taken of the sum: what points in opposite directions cancels first."""
    log_p = model(inputs).log_softmax(dim=1)
    (gradient,) = torch.autograd.grad(log_p[:, 0].sum(), [model.weight])
    return gradient.square()


def test_fisher_is_the_sum_of_squares_and_not_the_square_of_a_sum():
    """Two classes, logits 0, inputs 2 and -2: gradients of log p_0 by w_0 of +1 and -1, whose sum is 0.

    By definition each example gives sum_c p_c (x (1 - p))^2 = 4 / 4 = 1.
    """
    model = nn.Linear(1, 2, bias=False)
    nn.init.zeros_(model.weight)
    inputs = torch.tensor([[2.0], [-2.0]])
    assert squared_gradient_of_the_batch(model, inputs).tolist() == [[0.0], [0.0]]
    found = collect(model, [inputs], "fisher")
    assert found["fisher/weight"].tolist() == [[2.0], [2.0]]


def test_a_client_whose_gradients_cancel_is_heard():
    """Merged with a client that has seen zeros only, it is this client's model, and not the average."""
    model = nn.Linear(1, 2, bias=False)
    nn.init.zeros_(model.weight)
    sent = [collect(model, [inputs], "fisher") for inputs in (torch.tensor([[2.0], [-2.0]]), torch.zeros(2, 1))]
    base = {"weight": torch.zeros(2, 1)}
    clients = [{"weight": torch.tensor([[1.0], [2.0]])}, {"weight": torch.tensor([[5.0], [6.0]])}]
    found = merge(fisher(), base, clients, statistics=sent)["weight"]
    assert torch.allclose(found, clients[0]["weight"], atol=1e-4)
    assert not torch.allclose(found, merge(weighted_average(), base, clients)["weight"], atol=1.0)
