"""Breadcrumbs (Davari and Belilovsky, 2023): outliers and small elements go, counted exactly."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fl_merge import MergeError, merge
from fl_merge.methods import breadcrumbs, breadcrumbs_ties, dare_linear, della, ties
from fl_merge.ops.sparsify import middle_counts


def merged(method, *deltas, weights=None):
    base = {"w": torch.zeros(len(deltas[0]))}
    return merge(method, base, [{"w": torch.tensor(delta)} for delta in deltas], weights)["w"].tolist()


def test_by_hand():
    delta = [5.0, -4.0, 0.5, 3.0, -2.0, 1.0, 0.1, -0.2, 6.0, -7.0]
    # gamma 0.2 drops -7 and 6, density 0.3 keeps the next three: 5, -4, 3
    assert merged(breadcrumbs(density=0.3, gamma=0.2), delta) == [5.0, -4.0, 0, 3.0, 0, 0, 0, 0, 0, 0]


def test_of_equal_ones_the_first_are_the_largest():
    assert merged(breadcrumbs(density=0.4, gamma=0.2), [1.0, -1.0, 1.0, -1.0, 1.0]) == [0, -1.0, 1.0, 0, 0]


@pytest.mark.parametrize("method", [breadcrumbs, breadcrumbs_ties])
def test_small_tensors_are_not_emptied(method):
    """An upper count of 0 drops nothing: mergekit's slice to -0 keeps nothing of a tensor with fewer than 1 / gamma."""
    for size in range(1, 20):
        delta = [float(i + 1) for i in range(size)]
        found = merged(method(density=0.5, gamma=0.05), delta)
        kept = max(1, size // 2)
        assert [value != 0 for value in found] == [False] * (size - kept) + [True] * kept


@given(st.integers(1, 3000), st.floats(0.001, 1.0), st.floats(0.0, 1.0))
def test_counts(numel, density, gamma):
    dropped, kept = middle_counts(density, gamma, numel)
    assert kept == max(1, int(density * numel))
    assert 0 <= dropped <= int(gamma * numel)
    assert dropped == int(gamma * numel) or dropped + kept == numel
    assert dropped + kept <= numel


@given(
    st.lists(st.sampled_from([-3.0, -1.0, -0.5, 0.5, 1.0, 2.0]), min_size=1, max_size=30),
    st.floats(0.05, 1),
    st.floats(0, 1),
)
def test_it_is_what_sorting_gives(values, density, gamma):
    dropped, kept = middle_counts(density, gamma, len(values))
    order = sorted(range(len(values)), key=lambda i: (-abs(values[i]), i))
    stays = set(order[dropped : dropped + kept])
    found = merged(breadcrumbs(density=density, gamma=gamma), values)
    assert found == [value if i in stays else 0.0 for i, value in enumerate(values)]


def test_signs_are_elected_among_what_is_left():
    deltas = [[9.0, 2.0, -1.0, 0.1], [-9.0, -1.0, -3.0, 0.1]]
    # 9 and -9 are outliers; two of the rest are kept: 2 -1 and -1 -3
    assert merged(breadcrumbs_ties(density=0.5, gamma=0.25), *deltas) == [0, 2.0, -2.0, 0]
    assert merged(breadcrumbs_ties(density=0.5, gamma=0.25, normalize=False), *deltas) == [0, 1.0, -2.0, 0]
    assert merged(breadcrumbs(density=0.5, gamma=0.25), *deltas) == [0, 0.5, -2.0, 0]


@pytest.mark.parametrize("method", [ties, breadcrumbs, dare_linear, della])
def test_densities_by_client(method):
    """Each client is pruned as it would be alone with its density; a client that is not named is refused."""
    generator = torch.Generator().manual_seed(1)
    base = {"w": torch.zeros(400)}
    clients = {name: {"w": torch.randn(400, generator=generator)} for name in ("3", "20", "x")}
    densities = {"3": 0.25, "20": 0.5, "x": 0.75}
    for name, client in clients.items():
        others = {other: base for other in clients if other != name}
        normalize = {} if method in (breadcrumbs, dare_linear) else {"normalize": False}
        found = merge(method(density=densities, **normalize), base, {name: client} | others, seed=3)["w"]
        alone = merge(method(density=densities[name], **normalize), base, {name: client} | others, seed=3)["w"]
        assert torch.equal(found, alone)
        assert abs(int((found != 0).sum()) - 400 * densities[name]) <= 45
    with pytest.raises(MergeError, match=r"density names no client 'x' \(it names '3', '20'\)"):
        merge(method(density={"3": 0.25, "20": 0.5}), base, clients)
