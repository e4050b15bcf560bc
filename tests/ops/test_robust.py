import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fl_merge.ops.robust import centered_clip, geometric_median, krum_scores, mean_of_best, squared_distances

F64 = torch.float64


def drawn(seed, count, size=7):
    draw = np.random.default_rng(seed)
    weights = draw.uniform(0.1, 1, count)
    return torch.as_tensor(draw.normal(size=(count, size))), torch.as_tensor(weights / weights.sum())


def gram(vectors_NS):
    return vectors_NS @ vectors_NS.T


@given(st.integers(1, 7), st.integers(0, 10_000))
def test_distances_are_those_of_the_vectors(count, seed):
    vectors_NS, _ = drawn(seed, count)
    wanted_NN = torch.cdist(vectors_NS, vectors_NS) ** 2
    torch.testing.assert_close(squared_distances(gram(vectors_NS)), wanted_NN, rtol=0, atol=1e-12)


def test_krum_scores_by_hand():
    """On a line at 0, 1, 2, 4, 20 with f = 1: two nearest others each."""
    line_NS = torch.tensor([[0.0], [1.0], [2.0], [4.0], [20.0]], dtype=F64)
    assert krum_scores(gram(line_NS), 1).tolist() == [1 + 4, 1 + 1, 1 + 4, 4 + 9, 16**2 + 18**2]
    assert krum_scores(gram(line_NS), 0).tolist() == [
        1 + 4 + 16,
        1 + 1 + 9,
        1 + 4 + 4,
        4 + 9 + 16,
        16**2 + 18**2 + 19**2,
    ]


def test_the_best_are_averaged_by_their_weights():
    scores_N = torch.tensor([3.0, 1.0, 1.0, 2.0], dtype=F64)
    weights_N = torch.tensor([0.4, 0.1, 0.3, 0.2], dtype=F64)
    assert mean_of_best(scores_N, weights_N, 1).tolist() == [0, 1, 0, 0]  # of equal scores the first
    assert mean_of_best(scores_N, weights_N, 2).tolist() == pytest.approx([0, 0.25, 0.75, 0])
    assert mean_of_best(scores_N, weights_N, 3).tolist() == pytest.approx([0, 1 / 6, 1 / 2, 1 / 3])


def weiszfeld(vectors_NS, weights_N, iterations, smoothing):
    """On the vectors themselves."""
    point_S = weights_N @ vectors_NS
    for _ in range(iterations):
        share_N = weights_N / (vectors_NS - point_S).norm(dim=1).clamp(min=smoothing)
        point_S = share_N @ vectors_NS / share_N.sum()
    return point_S


@given(st.integers(1, 6), st.integers(0, 10_000), st.sampled_from([1e-5, 1.0]))
def test_the_geometric_median_is_weiszfelds_iteration_on_the_vectors(count, seed, smoothing):
    vectors_NS, weights_N = drawn(seed, count)
    coefficients_N = geometric_median(gram(vectors_NS), weights_N, 4, smoothing)
    assert float(coefficients_N.sum()) == pytest.approx(1.0, rel=1e-12)
    wanted_S = weiszfeld(vectors_NS, weights_N, 4, smoothing)
    torch.testing.assert_close(coefficients_N @ vectors_NS, wanted_S, rtol=0, atol=1e-9)


def test_the_geometric_median_goes_to_the_minimum_of_the_sum_of_distances():
    """Of a triangle with equal weights: the point that sees each side under 120 degrees."""
    triangle_NS = torch.tensor([[0.0, 0.0], [4.0, 0.0], [1.0, 3.0]], dtype=F64)
    weights_N = torch.full((3,), 1 / 3, dtype=F64)
    point_S = geometric_median(gram(triangle_NS), weights_N, 2000, 1e-9) @ triangle_NS
    towards_NS = triangle_NS - point_S
    towards_NS = towards_NS / towards_NS.norm(dim=1, keepdim=True)
    assert gram(towards_NS)[[0, 0, 1], [1, 2, 2]].tolist() == pytest.approx([-0.5] * 3, abs=1e-6)


def test_a_far_vector_hardly_moves_the_geometric_median():
    vectors_NS, _ = drawn(0, 6)
    weights_N = torch.full((6,), 1 / 6, dtype=F64)
    moved = []
    for far in (1e3, 1e6):
        vectors_NS[5] = far
        moved.append(geometric_median(gram(vectors_NS), weights_N, 50, 1e-5) @ vectors_NS)
    assert float((moved[1] - moved[0]).norm()) < 1e-2
    assert float(moved[1].norm()) < 5


def clipped(vectors_NS, weights_N, radius, iterations):
    point_S = torch.zeros(vectors_NS.shape[1], dtype=F64)
    for _ in range(iterations):
        away_NS = vectors_NS - point_S
        shares_N = weights_N * (radius / away_NS.norm(dim=1)).clamp(max=1.0)
        point_S = point_S + shares_N @ away_NS
    return point_S


@given(st.integers(1, 6), st.integers(0, 10_000), st.floats(0.1, 10.0), st.integers(1, 4))
def test_centered_clipping_is_that_on_the_vectors(count, seed, radius, iterations):
    vectors_NS, weights_N = drawn(seed, count)
    found_S = centered_clip(gram(vectors_NS), weights_N, radius, iterations) @ vectors_NS
    wanted_S = clipped(vectors_NS, weights_N, radius, iterations)
    torch.testing.assert_close(found_S, wanted_S, rtol=0, atol=1e-9)


def test_centered_clipping_by_hand():
    """Deltas (3, 4), (0, 1), 0 clipped to 1: (0.6, 0.8), (0, 1), 0."""
    vectors_NS = torch.tensor([[3.0, 4.0], [0.0, 1.0], [0.0, 0.0]], dtype=F64)
    weights_N = torch.tensor([0.5, 0.25, 0.25], dtype=F64)
    found_S = centered_clip(gram(vectors_NS), weights_N, 1.0, 1) @ vectors_NS
    assert found_S.tolist() == pytest.approx([0.3, 0.4 + 0.25])
    assert centered_clip(gram(vectors_NS), weights_N, 5.0, 1).tolist() == weights_N.tolist()
