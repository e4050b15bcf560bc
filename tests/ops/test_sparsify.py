import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fl_merge.ops.sparsify import keep_count, keep_largest, keep_random, largest_cutoff


def trimmed(delta_S, density):
    cut = largest_cutoff(delta_S, keep_count(density, delta_S.numel()))
    return keep_largest(delta_S, torch.arange(delta_S.numel()), *cut)


def kept_places(delta, count):
    """By definition: the largest magnitudes first, the lower index first among equal ones."""
    return sorted(np.lexsort((np.arange(len(delta)), -np.abs(delta)))[:count])


@given(st.floats(min_value=0, max_value=1, exclude_min=True), st.integers(1, 10_000))
def test_keep_count_is_the_density_rounded_down_but_never_none(density, numel):
    count = keep_count(density, numel)
    assert count == max(1, int(density * numel))
    assert 1 <= count <= numel
    assert keep_count(1.0, numel) == numel


def test_keep_count_by_hand():
    assert [keep_count(0.2, numel) for numel in (0, 1, 4, 5, 9, 10)] == [0, 1, 1, 1, 1, 2]
    assert keep_count(0.29, 100) == 28  # 0.29 * 100 is 28.999999999999996


def test_the_lower_index_wins_a_tie():
    delta_S = torch.tensor([1.0, -2.0, 2.0, -2.0, 0.5])
    assert largest_cutoff(delta_S, 2) == (2.0, 2)
    assert trimmed(delta_S, 0.4).tolist() == [0.0, -2.0, 2.0, 0.0, 0.0]
    assert trimmed(delta_S, 0.2).tolist() == [0.0, -2.0, 0.0, 0.0, 0.0]
    assert trimmed(delta_S, 0.8).tolist() == [1.0, -2.0, 2.0, -2.0, 0.0]


denormal = float(np.float32(1e-45))
few_magnitudes = st.sampled_from([0.0, -0.0, denormal, -denormal, 2 * denormal, 1.0, -1.0, 1.0, -1.0, 3e38, -3e38])


@given(st.lists(few_magnitudes, min_size=1, max_size=40), st.floats(0, 1, exclude_min=True))
def test_exactly_the_largest_are_kept_among_many_equal_magnitudes(values, density):
    delta_S = torch.tensor(values)
    count = max(1, int(density * len(values)))
    wanted_S = torch.zeros(len(values))
    places = kept_places(delta_S.numpy(), count)
    wanted_S[places] = delta_S[places]
    assert torch.equal(trimmed(delta_S, density), wanted_S)


@given(
    st.lists(st.sampled_from([-1.0, 1.0, denormal, 0.25]), min_size=1, max_size=60), st.floats(0, 1, exclude_min=True)
)
def test_the_count_is_exact_for_every_length_and_density(values, density):
    assert int((trimmed(torch.tensor(values), density) != 0).sum()) == max(1, int(density * len(values)))


@given(st.integers(2, 30), st.integers(1, 29), st.integers(0, 1000))
def test_a_cut_may_be_applied_in_slices(numel, at, seed):
    delta_S = torch.randint(-3, 4, (numel,), generator=torch.Generator().manual_seed(seed)).float()
    at = min(at, numel)
    cut = largest_cutoff(delta_S, keep_count(0.5, numel))
    index_S = torch.arange(numel)
    pieces = [keep_largest(delta_S[part], index_S[part], *cut) for part in (slice(0, at), slice(at, None))]
    assert torch.equal(torch.cat(pieces), keep_largest(delta_S, index_S, *cut))


@pytest.mark.parametrize("threshold", [1 + 2.0**-30, 1 - 2.0**-30, 1.0])
def test_a_threshold_that_float32_does_not_have_is_compared_exactly(threshold):
    """With one threshold over a model of float32 and float64 tensors."""
    below, above = math.nextafter(1.0, 0.0), 1.0 + 2.0**-23
    delta_S = torch.tensor([below, 1.0, -1.0, above], dtype=torch.float32)
    index_S = torch.arange(4)
    exact_S = keep_largest(delta_S.double(), index_S, threshold, 1)
    assert torch.equal(keep_largest(delta_S, index_S, threshold, 1).double(), exact_S)
    assert int((exact_S != 0).sum()) == {1 + 2.0**-30: 1, 1 - 2.0**-30: 4, 1.0: 3}[threshold]


def test_keep_random_by_hand():
    deltas_NS = torch.tensor([[1.0, 2.0, 3.0], [-4.0, 5.0, 6.0]])
    uniform_NS = torch.tensor([[0.0, 0.25, 0.9], [0.2, 0.2499, 0.3]], dtype=torch.float64)
    assert keep_random(deltas_NS, uniform_NS, 0.25, rescale=True).tolist() == [[4.0, 0.0, 0.0], [-16.0, 20.0, 0.0]]
    assert keep_random(deltas_NS, uniform_NS, 0.25, rescale=False).tolist() == [[1.0, 0.0, 0.0], [-4.0, 5.0, 0.0]]
    assert torch.equal(keep_random(deltas_NS, uniform_NS, 1.0, rescale=True), deltas_NS)
