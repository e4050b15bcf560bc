"""Median, trimmed mean and Bulyan: what a few bad clients cannot do."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fl_merge import MergeError, RecipeError, merge
from fl_merge.methods import bulyan, median, trimmed_mean
from fl_merge.ops.order import mean_around_median, select_by_krum

values = st.floats(-100, 100, width=32)


def merged(method, deltas):
    base = {"w": torch.zeros(len(deltas[0]))}
    return merge(method, base, [{"w": torch.tensor(delta)} for delta in deltas])["w"].tolist()


@given(st.lists(values, min_size=1, max_size=12))
def test_the_median_is_the_one_in_the_middle(column):
    order = sorted(column)
    middle = (order[(len(order) - 1) // 2] + order[len(order) // 2]) / 2
    assert merged(median(), [[value] for value in column])[0] == pytest.approx(middle, rel=1e-6, abs=1e-30)


def test_trimmed_mean_by_hand():
    column = [[5.0], [1.0], [2.0], [100.0], [-50.0]]
    assert merged(trimmed_mean(beta=0.2), column) == [pytest.approx(8 / 3)]
    assert merged(trimmed_mean(beta=0.4), column) == [2.0]
    assert merged(trimmed_mean(beta=0.0), column) == [pytest.approx(58 / 5)]


@pytest.mark.parametrize(("beta", "fewest"), [(0.2, 5), (0.25, 4), (0.1, 10), (0.49, 3), (0.3, 4)])
def test_a_cohort_of_which_nobody_would_be_trimmed_is_refused(beta, fewest):
    assert int(beta * fewest) == 1
    merged(trimmed_mean(beta=beta), [[1.0]] * fewest)
    with pytest.raises(MergeError, match=f"found {fewest - 1} clients, wanted at least {fewest} "):
        merged(trimmed_mean(beta=beta), [[1.0]] * (fewest - 1))


def test_half_is_refused_at_construction():
    with pytest.raises(RecipeError, match=r"parameter 'beta' of trimmed_mean: found 0\.5, wanted"):
        trimmed_mean(beta=0.5)


@given(st.lists(values, min_size=2, max_size=11), st.data())
def test_the_values_around_the_median(column, data):
    count = data.draw(st.integers(1, len(column)))
    found = float(mean_around_median(torch.tensor(column)[:, None], count))
    order = sorted(torch.tensor(column).tolist())
    middle = float(torch.tensor(column).double().quantile(0.5))
    wanted = sorted(abs(value - middle) for value in order)[:count]
    windows = [order[at : at + count] for at in range(len(order) - count + 1)]
    # Some window of neighbours is as near as any choice can be, and it is that one's mean.
    best = [w for w in windows if sorted(abs(v - middle) for v in w) == pytest.approx(wanted, rel=1e-5, abs=1e-5)]
    assert any(found == pytest.approx(sum(w) / count, rel=1e-5, abs=1e-4) for w in best)


def krum_by_loops(points, f, count):
    """The paper's algorithm, as it is written."""
    left, chosen = list(range(len(points))), []
    while len(chosen) < count:
        scores = {}
        for i in left:
            others = sorted(float((points[i] - points[j]).square().sum()) for j in left if j != i)
            scores[i] = sum(others[: max(1, len(left) - f - 2)])
        best = min(left, key=lambda i: scores[i])
        left.remove(best)
        chosen.append(best)
    return sorted(chosen)


@pytest.mark.parametrize(("clients", "f"), [(7, 1), (9, 1), (11, 2), (12, 2), (15, 3)])
def test_selection_is_repeated_krum(clients, f):
    for seed in range(20):
        points = torch.randn(clients, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        gram = (points[:, None] * points[None]).sum(-1)
        found = select_by_krum(gram, f, clients - 2 * f, repeated=True)
        assert found == krum_by_loops(points, f, clients - 2 * f)


def test_bulyan_needs_4f_plus_3_clients():
    with pytest.raises(MergeError, match=r"found 6 clients, wanted at least 7 \(N >= 4 f \+ 3 with f = 1\)"):
        merged(bulyan(f=1), [[1.0]] * 6)
    with pytest.raises(RecipeError, match="parameter 'f' of bulyan: found -1"):
        bulyan(f=-1)


@pytest.mark.parametrize("method", [median(), trimmed_mean(beta=0.3), bulyan(f=2)], ids=str)
@pytest.mark.parametrize("attack", ["sign", "huge", "collusion"])
def test_two_bad_clients_of_eleven_cannot_move_an_element_beyond_the_good_ones(method, attack):
    generator = torch.Generator().manual_seed(4)
    good = [torch.randn(40, generator=generator) * 0.1 + 1.0 for _ in range(9)]
    mean = torch.stack(good).mean(0)
    bad = {"sign": -3 * mean, "huge": torch.full((40,), 1e6), "collusion": mean + 0.5}[attack]
    base = {"a": torch.zeros(30), "b": torch.zeros(10)}
    clients = [{"a": delta[:30], "b": delta[30:]} for delta in [*good[:4], bad, *good[4:], bad]]
    found = merge(method, base, clients)
    found = torch.cat([found["a"], found["b"]])
    every = torch.stack(good)
    assert (found >= every.min(0).values).all()
    assert (found <= every.max(0).values).all()


def test_bulyan_selects_by_the_whole_model():
    """A client that is bad in one tensor only is not chosen for the other one either."""
    generator = torch.Generator().manual_seed(4)
    clients = [{"a": torch.randn(20, generator=generator), "b": torch.randn(1, generator=generator)} for _ in range(7)]
    clients[3]["a"] += 50.0
    clients[3]["b"] = torch.tensor([0.0])
    base = {"a": torch.zeros(20), "b": torch.zeros(1)}
    points = torch.stack([torch.cat([client["a"], client["b"]]) for client in clients]).double()
    chosen = krum_by_loops(points, 1, 5)
    assert 3 not in chosen
    wanted = mean_around_median(torch.stack([clients[i]["b"] for i in chosen]), 3)
    assert torch.equal(merge(bulyan(f=1), base, clients)["b"], wanted)
