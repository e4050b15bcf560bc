"""TIES (Yadav et al., 2023): the paper's three steps on paper, and the options."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fl_merge import merge
from fl_merge.methods import ties

ZERO = {"w": torch.zeros(5)}
WEIGHTS = [2.0, 1.0, 1.0]
DELTAS = [[4.0, -1.0, 2.0, 0.5, 0.0], [-3.0, 5.0, 1.0, 0.0, 0.0], [-2.0, 1.0, -6.0, 0.0, 0.0]]


def merged(method, deltas, weights=None, base=None):
    base = base or {"w": torch.zeros(len(deltas[0]))}
    clients = [{"w": base["w"] + torch.tensor(delta)} for delta in deltas]
    return merge(method, base, clients, weights)["w"].tolist()


def test_the_three_steps_by_hand():
    # trimmed to 2 of 5:  4 . 2 . .    -3 5 . . .    -2 . -6 . .
    # weights 1/2 1/4 1/4, totals:  0.75  1.25  -0.5  0  0
    # disjoint means:  4 (client 0 alone)  5  -6  nobody  nobody
    assert merged(ties(density=0.4), DELTAS, WEIGHTS) == [4.0, 5.0, -6.0, 0.0, 0.0]
    assert merged(ties(density=0.4, scale=0.5), DELTAS, WEIGHTS) == [2.0, 2.5, -3.0, 0.0, 0.0]


def test_the_mean_is_weighted_over_those_that_agree():
    # untrimmed: element 2 has totals 2/2 + 1/4 - 6/4 = -0.25; element 1: -1/2 + 5/4 + 1/4 = 1 -> (5/4 + 1/4) / (1/2)
    assert merged(ties(density=1.0), DELTAS, WEIGHTS) == [4.0, 3.0, -6.0, 0.5, 0.0]


def test_without_normalize_it_is_the_sum_over_those_that_agree():
    assert merged(ties(density=1.0, normalize=False), DELTAS, WEIGHTS) == [2.0, 1.5, -1.5, 0.25, 0.0]


def test_election_by_frequency():
    # signs: + - -, - + +, + + -: the larger magnitude does not matter; (2/2 + 1/4) / (3/4) = 5/3
    found = merged(ties(density=1.0, election="frequency"), DELTAS, WEIGHTS)
    assert found == pytest.approx([-2.5, 3.0, 5 / 3, 0.5, 0.0], rel=1e-6)


def test_the_base_is_added():
    base = {"w": torch.tensor([10.0, 20.0, 30.0, 40.0, 50.0])}
    assert merged(ties(density=0.4), DELTAS, WEIGHTS, base) == [14.0, 25.0, 24.0, 40.0, 50.0]


@pytest.mark.parametrize(("others", "winner"), [([1.0, 1.0, -1.0], 2.0), ([-1.0, -1.0, 1.0], -4.0), ([1.0, -1.0], 2.0)])
def test_a_conflict_that_sums_to_zero_takes_the_tensors_majority_sign(others, winner):
    """Weights 2/3 and 1/3: the first element's total is 2/3 * 2 - 1/3 * 4 = 0. An undecided majority counts as plus."""
    deltas = [[2.0, *others], [-4.0, *others]]
    assert merged(ties(density=1.0), deltas, [2.0, 1.0]) == [winner, *others]


def test_the_majority_is_that_of_the_whole_tensor_when_it_is_cut_into_slices():
    """60,000 elements: the draw is in the first slice, the minus signs are in the later ones."""
    delta_S = torch.full((60_000,), -1.0)
    delta_S[:20_000] = 1.0
    a_S, b_S = delta_S.clone(), delta_S.clone()
    a_S[0], b_S[0] = 1.0, -1.0
    clients = [{"w": a_S}, {"w": b_S}]
    for slice_elements in (16384, 10**9):
        result = merge(ties(density=1.0), {"w": torch.zeros(60_000)}, clients, slice_elements=slice_elements)
        assert result["w"][0] == -1.0
        assert torch.equal(result["w"][1:], delta_S[1:])


few = st.sampled_from([-2.0, -1.0, -0.5, 0.5, 1.0, 2.0])


@given(
    st.lists(st.lists(few, min_size=12, max_size=12), min_size=1, max_size=4),
    st.integers(1, 11),
    st.floats(0.05, 1.0),
)
def test_scope_model_is_trimming_the_concatenated_delta(deltas, cut, density):
    """Many equal magnitudes: the lower index wins, in the order of the tensors' names."""
    # With these weights no total is 0: a draw would take the majority of each tensor, which is not the whole's.
    weights = [1.0, 2.3, 5.1, 11.7][: len(deltas)]
    parts = {"b.bias": slice(0, cut), "c.weight": slice(cut, 12)}
    whole = torch.tensor(merged(ties(density=density), deltas, weights))
    clients = [{name: torch.tensor(delta)[part] for name, part in reversed(parts.items())} for delta in deltas]
    base = {name: torch.zeros(len(range(12)[part])) for name, part in reversed(parts.items())}
    result = merge(ties(density=density, scope="model"), base, clients, weights)
    assert list(result) == ["c.weight", "b.bias"]
    assert torch.equal(torch.cat([result["b.bias"], result["c.weight"]]), whole)


def test_scope_model_counts_exactly_over_float32_and_float64_tensors():
    generator = torch.Generator().manual_seed(0)
    for dtypes in ((torch.float32, torch.float64), (torch.float64, torch.float32)):
        for density in (0.003, 0.11, 0.31, 0.9):
            client = {n: torch.randn(200, generator=generator, dtype=d) for n, d in zip("ab", dtypes, strict=True)}
            base = {name: torch.zeros_like(tensor) for name, tensor in client.items()}
            result = merge(ties(density=density, scope="model"), base, [client])
            assert sum(int((tensor != 0).sum()) for tensor in result.values()) == int(density * 400)


def test_scope_model_keeps_more_of_the_tensor_that_moved_more():
    base = {"a": torch.zeros(4), "b": torch.zeros(4)}
    client = {"a": torch.tensor([1.0, 2.0, 3.0, 4.0]), "b": torch.tensor([5.0, 6.0, 7.0, 8.0])}
    by_tensor = merge(ties(density=0.5), base, [client])
    by_model = merge(ties(density=0.5, scope="model"), base, [client])
    assert [by_tensor[name].tolist() for name in base] == [[0, 0, 3, 4], [0, 0, 7, 8]]
    assert [by_model[name].tolist() for name in base] == [[0, 0, 0, 0], [5, 6, 7, 8]]
