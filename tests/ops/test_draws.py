import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fl_merge.ops.draws import stream_key, uniform

MANY = 200_000


@given(st.integers(0, 2**64 - 1), st.integers(0, 500), st.integers(0, 500))
def test_any_slice_is_that_of_the_whole(key, start, length):
    whole_S = uniform(key, 0, 1000)
    assert torch.equal(uniform(key, start, start + length), whole_S[start : start + length])


def test_it_is_splitmix64():
    """The first outputs for seed 0 that the generator's authors publish, their halves as fractions of 2^32."""
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    halves = [half for output in published for half in (output & 0xFFFFFFFF, output >> 32)]
    assert uniform(0, 0, 6).tolist() == [half * 2.0**-32 for half in halves]


def test_far_elements_can_be_drawn_alone():
    assert uniform(7, 2**40, 2**40 + 2).shape == (2,)
    assert not torch.equal(uniform(7, 2**40, 2**40 + 2), uniform(7, 0, 2))


@pytest.mark.parametrize("key", [0, 1, stream_key(0, 1, "1000", "layers.0.weight"), 2**64 - 1])
def test_the_draws_are_uniform(key):
    draws = uniform(key, 0, MANY).numpy()
    assert draws.dtype == np.float64
    assert draws.min() >= 0
    assert draws.max() < 1
    assert abs(draws.mean() - 1 / 2) < 4 * math.sqrt(1 / 12 / MANY)
    assert abs(draws.var() - 1 / 12) < 4 * math.sqrt(1 / 180 / MANY)
    # Kolmogorov-Smirnov: the largest gap between the two distribution functions, at about 1 in 10,000
    gap = np.abs(np.sort(draws) - (np.arange(MANY) + 0.5) / MANY).max()
    assert gap < 2.23 / math.sqrt(MANY)
    # chi-square over 256 cells: mean 255, standard deviation sqrt(510)
    counts = np.bincount((draws * 256).astype(int), minlength=256)
    expected = MANY / 256
    assert abs(((counts - expected) ** 2 / expected).sum() - 255) < 4 * math.sqrt(510)


def test_neighbouring_draws_are_independent():
    draws = uniform(3, 0, MANY).numpy() - 0.5
    for lag in (1, 2, 64, 16384):
        correlation = np.mean(draws[:-lag] * draws[lag:]) * 12
        assert abs(correlation) < 4 / math.sqrt(MANY - lag)


def test_streams_of_different_keys_are_uncorrelated():
    parts = [(0, 1, "1", "w"), (1, 1, "1", "w"), (0, 2, "1", "w"), (0, 1, "2", "w"), (0, 1, "1", "v"), (0, 11, "", "w")]
    draws = np.stack([uniform(stream_key(*part), 0, MANY).numpy() for part in parts])
    correlation = np.corrcoef(draws) - np.eye(len(parts))
    assert np.abs(correlation).max() < 4.5 / math.sqrt(MANY)


def test_keys_of_different_parts_are_different():
    parts = [(0, 1), (1, 0), ("0", 1), (0, "1"), (0, 1, ""), ("a", "b"), ("ab",), ("", "ab")]
    assert len({stream_key(*part) for part in parts}) == len(set(map(repr, parts)))
    assert stream_key(3, 1, "12", "w") == stream_key(3, 1, "12", "w")
    assert 0 <= stream_key("x") < 2**64
