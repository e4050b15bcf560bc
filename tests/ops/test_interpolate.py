import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fl_merge.ops.interpolate import ALMOST_PARALLEL, slerp_fold, slerp_weights

F64 = torch.float64


def folded(vectors, weights):
    """The point itself, from its coefficients."""
    vectors_NS = torch.as_tensor(np.array(vectors), dtype=F64)
    coefficients_N = slerp_fold(vectors_NS @ vectors_NS.T, torch.tensor(weights, dtype=F64))
    return (coefficients_N @ vectors_NS).numpy()


def test_a_right_angle_by_hand():
    root = math.sqrt(0.5)
    assert slerp_weights(0.0, 0.5) == pytest.approx((root, root), rel=1e-15)
    assert slerp_weights(0.0, 1 / 3) == pytest.approx((math.sqrt(3) / 2, 0.5), rel=1e-15)
    assert folded([[1, 0], [0, 1]], [2.0, 1.0]) == pytest.approx([math.sqrt(3) / 2, 0.5], rel=1e-15)


@given(st.floats(-1, 1))
def test_the_ends_are_the_two_models(cosine):
    assert slerp_weights(cosine, 0.0) == (1.0, 0.0)
    assert slerp_weights(cosine, 1.0) == (0.0, 1.0)


@given(st.floats(-1, 1))
def test_half_way_neither_is_preferred(cosine):
    keep, add = slerp_weights(cosine, 0.5)
    assert keep == add


@given(st.floats(-ALMOST_PARALLEL, ALMOST_PARALLEL), st.floats(0, 1))
def test_a_point_on_the_arc_has_the_length_of_its_ends(cosine, t):
    keep, add = slerp_weights(cosine, t)
    assert keep**2 + add**2 + 2 * keep * add * cosine == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("cosine", [0.9996, 1.0, 1.0 + 1e-12, -0.9996, -1.0, math.nan])
def test_almost_parallel_or_opposite_is_a_straight_line(cosine):
    assert slerp_weights(cosine, 0.25) == (0.75, 0.25)


def test_the_line_and_the_arc_meet_where_one_takes_over():
    assert slerp_weights(0.99951, 0.25) == pytest.approx(slerp_weights(0.99949, 0.25), rel=1e-3)
    assert slerp_weights(0.9995, 0.25) != (0.75, 0.25)


@given(st.integers(2, 6), st.integers(0, 10_000))
def test_a_fold_is_arcs_one_after_another(count, seed):
    draw = np.random.default_rng(seed)
    vectors, weights = draw.normal(size=(count, 9)), draw.uniform(0.1, 1, count)
    point = vectors[0]
    for k in range(1, count):
        t = weights[k] / weights[: k + 1].sum()
        cosine = point @ vectors[k] / np.linalg.norm(point) / np.linalg.norm(vectors[k])
        angle = math.acos(cosine)
        point = (math.sin((1 - t) * angle) * point + math.sin(t * angle) * vectors[k]) / math.sin(angle)
    np.testing.assert_allclose(folded(vectors, weights), point, rtol=0, atol=1e-12 * np.linalg.norm(vectors))


@given(st.integers(2, 6), st.integers(0, 10_000))
def test_vectors_of_one_length_fold_to_that_length(count, seed):
    draw = np.random.default_rng(seed)
    vectors = draw.normal(size=(count, 9))
    vectors *= 3 / np.linalg.norm(vectors, axis=1, keepdims=True)
    assert np.linalg.norm(folded(vectors, draw.uniform(0.1, 1, count))) == pytest.approx(3.0, rel=1e-9)


def test_a_vector_without_a_direction_is_joined_by_a_line():
    assert folded([[0, 0], [2, 0]], [1.0, 3.0]).tolist() == [1.5, 0.0]
    assert folded([[0, 0], [0, 0]], [1.0, 1.0]).tolist() == [0.0, 0.0]


def test_one_vector_is_itself():
    assert folded([[3.0, -4.0]], [0.2]).tolist() == [3.0, -4.0]
