import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fl_merge.ops.interpolate import (
    ALMOST_PARALLEL,
    PARALLEL,
    karcher_mean,
    normalized_mean,
    slerp_fold,
    slerp_weights,
    stock_ratio,
)

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


# --- several merges at once ------------------------------------------------------------------------------------------


def points(coefficients_N, vectors_NS):
    return (torch.as_tensor(coefficients_N) @ torch.as_tensor(vectors_NS)).numpy()


def drawn(seed, count, size=9):
    draw = np.random.default_rng(seed)
    weights = draw.uniform(0.1, 1, count)
    return torch.as_tensor(draw.normal(size=(count, size))), torch.as_tensor(weights / weights.sum())


@given(st.integers(2, 5), st.integers(0, 10_000), st.booleans())
def test_folds_of_several_merges_are_those_of_each(count, seed, linear_lengths):
    sets = [drawn(seed + i, count)[0] for i in range(4)]
    weights_N = drawn(seed, count)[1]
    gram_VNN = torch.stack([vectors_NS @ vectors_NS.T for vectors_NS in sets])
    found_VN = slerp_fold(gram_VNN, weights_N, PARALLEL, linear_lengths=linear_lengths)
    for gram_NN, found_N in zip(gram_VNN, found_VN, strict=True):
        assert torch.equal(slerp_fold(gram_NN, weights_N, PARALLEL, linear_lengths=linear_lengths), found_N)


@given(st.floats(0, 1), st.integers(0, 10_000))
def test_linear_lengths_are_linear(share, seed):
    vectors_NS = drawn(seed, 2)[0]
    weights_N = torch.tensor([1 - share, share], dtype=F64)
    coefficients_N = slerp_fold(vectors_NS @ vectors_NS.T, weights_N, PARALLEL, linear_lengths=True)
    lengths_N = vectors_NS.norm(dim=1)
    assert np.linalg.norm(points(coefficients_N, vectors_NS)) == pytest.approx(float(weights_N @ lengths_N), rel=1e-9)
    # and the direction is that of the arc between the directions
    arc = folded((vectors_NS / lengths_N[:, None]).numpy(), weights_N.tolist())
    cosine = arc @ points(coefficients_N, vectors_NS) / (np.linalg.norm(arc) * float(weights_N @ lengths_N))
    assert cosine == pytest.approx(1.0, abs=1e-9)


# --- means on the sphere ---------------------------------------------------------------------------------------------


def karcher(vectors_NS, weights_N, iterations=200, tolerance=1e-12):
    gram_NN = vectors_NS @ vectors_NS.T
    return points(karcher_mean(gram_NN, weights_N, iterations, tolerance), vectors_NS)


def log_map(point, unit):
    cosine = np.clip(point @ unit, -1, 1)
    tangent = unit - cosine * point
    length = np.linalg.norm(tangent)
    return tangent * (math.acos(cosine) / length) if length > 0 else tangent


@given(st.integers(2, 6), st.integers(0, 10_000))
def test_the_karcher_mean_is_where_the_logarithms_cancel(count, seed):
    """That defines it: the gradient of the sum of squared angles is zero. The vectors are in one half-space."""
    vectors_NS, weights_N = drawn(seed, count)
    vectors_NS = vectors_NS + 2.0
    found = karcher(vectors_NS, weights_N)
    lengths_N = vectors_NS.norm(dim=1).numpy()
    assert np.linalg.norm(found) == pytest.approx(float(weights_N.numpy() @ lengths_N), rel=1e-9)
    point = found / np.linalg.norm(found)
    units = vectors_NS.numpy() / lengths_N[:, None]
    gradient = sum(w * log_map(point, unit) for w, unit in zip(weights_N.numpy(), units, strict=True))
    assert np.linalg.norm(gradient) < 1e-7


@given(st.floats(0.05, 0.95), st.integers(0, 10_000))
def test_the_karcher_mean_of_two_directions_is_their_slerp(share, seed):
    vectors_NS = drawn(seed, 2)[0]
    vectors_NS = vectors_NS / vectors_NS.norm(dim=1, keepdim=True)
    weights_N = torch.tensor([1 - share, share], dtype=F64)
    np.testing.assert_allclose(
        karcher(vectors_NS, weights_N), folded(vectors_NS.numpy(), weights_N.tolist()), atol=1e-7
    )


def test_the_karcher_mean_by_hand():
    """Three unit vectors at 0, 30 and 90 degrees on a circle: their mean is at 40 degrees."""
    angles = np.deg2rad([0.0, 30.0, 90.0])
    vectors_NS = torch.tensor(np.stack([np.cos(angles), np.sin(angles)], axis=1))
    found = karcher(vectors_NS, torch.full((3,), 1 / 3, dtype=F64))
    assert math.degrees(math.atan2(found[1], found[0])) == pytest.approx(40.0, abs=1e-9)
    assert np.linalg.norm(found) == pytest.approx(1.0, rel=1e-12)


def test_the_iterations_stop_at_their_number_and_at_their_tolerance():
    vectors_NS, weights_N = drawn(3, 4)
    gram_NN = vectors_NS @ vectors_NS.T
    steps = [karcher_mean(gram_NN, weights_N, n, 0.0) for n in (1, 2, 3, 200)]
    far = [float((step - steps[-1]).norm()) for step in steps[:-1]]
    assert far[0] > far[1] > far[2] > 0
    torch.testing.assert_close(karcher_mean(gram_NN, weights_N, 200, 100.0), normalized_mean(gram_NN, weights_N))


@given(st.integers(2, 6), st.integers(0, 10_000))
def test_the_mean_in_the_tangent_plane_is_the_normalized_mean(count, seed):
    """MultiSLERP goes through the plane at the weighted mean of the directions: what it adds there sums to zero."""
    vectors_NS, weights_N = drawn(seed, count)
    lengths_N = vectors_NS.norm(dim=1)
    units, weights = (vectors_NS / lengths_N[:, None]).numpy(), weights_N.numpy()
    mean = weights @ units
    point = mean / np.linalg.norm(mean)
    in_plane = weights @ (units - (units @ point)[:, None] * point)
    assert np.linalg.norm(in_plane) < 1e-14
    found = points(normalized_mean(vectors_NS @ vectors_NS.T, weights_N), vectors_NS)
    np.testing.assert_allclose(found, point * (weights @ lengths_N.numpy()), rtol=0, atol=1e-9 * np.linalg.norm(found))


HALVES = torch.tensor([0.5, 0.5], dtype=F64)


@pytest.mark.parametrize(
    "mean", [normalized_mean, lambda gram_NN, weights_N: karcher_mean(gram_NN, weights_N, 10, 1e-5)]
)
def test_where_there_is_no_mean_direction_it_is_the_weighted_mean(mean):
    opposite = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=F64)
    assert torch.equal(mean(opposite, HALVES), HALVES)
    nothing = torch.zeros(2, 2, dtype=F64)
    assert torch.equal(mean(nothing, HALVES), HALVES)
    one_direction = torch.tensor([[1.0, 3.0], [3.0, 9.0]], dtype=F64)
    assert torch.equal(mean(one_direction, HALVES), HALVES)


def test_one_that_is_opposite_to_the_mean_has_no_logarithm():
    gram_NN = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=F64)
    weights_N = torch.tensor([0.75, 0.25], dtype=F64)
    assert torch.equal(karcher_mean(gram_NN, weights_N, 10, 1e-5), weights_N)
    assert normalized_mean(gram_NN, weights_N).tolist() == pytest.approx([1.5, 0.5])  # 1 * x_1 - 0.5 * ... = x_1


def test_a_vector_without_a_direction_shortens_the_mean():
    gram_NN = torch.diag(torch.tensor([4.0, 0.0, 4.0], dtype=F64))
    weights_N = torch.tensor([0.25, 0.5, 0.25], dtype=F64)
    wanted = [0.5 / math.sqrt(2), 0.0, 0.5 / math.sqrt(2)]  # the direction half way, of length 0.25 * 2 + 0.25 * 2
    assert normalized_mean(gram_NN, weights_N).tolist() == pytest.approx(wanted)
    assert karcher_mean(gram_NN, weights_N, 10, 1e-9).tolist() == pytest.approx(wanted)


# --- Model Stock -----------------------------------------------------------------------------------------------------


def test_model_stock_by_hand():
    """N = 3: cosines 1/2, 1/2, 1/2 -> t = 1.5 / 2; a right angle -> 0; parallel -> 1."""
    half_NN = torch.full((3, 3), 0.5, dtype=F64) + 0.5 * torch.eye(3, dtype=F64)
    lengths_N = torch.tensor([1e-9, 1.0, 1e9], dtype=F64)
    scaled_NN = half_NN * lengths_N[:, None] * lengths_N
    ones_NN = torch.ones(3, 3, dtype=F64)
    found_V = stock_ratio(torch.stack([half_NN, scaled_NN, torch.eye(3, dtype=F64), ones_NN]))
    assert found_V.tolist() == pytest.approx([0.75, 0.75, 0.0, 1.0], rel=1e-12)


def test_model_stock_stays_at_the_base_where_deltas_conflict():
    """c = -0.4 of three: N c / (1 + (N - 1) c) would be -1.2 / 0.2 = -6, far on the other side of the base."""
    gram_NN = torch.full((3, 3), -0.4, dtype=F64) + 1.4 * torch.eye(3, dtype=F64)
    assert stock_ratio(gram_NN[None]).tolist() == [0.0]


def test_model_stock_of_one_and_of_clients_that_did_not_move():
    assert stock_ratio(torch.tensor([[[4.0]], [[0.0]]], dtype=F64)).tolist() == [1.0, 1.0]
    still_NN = torch.tensor([[0.0, 0.0], [0.0, 4.0]], dtype=F64)
    assert stock_ratio(still_NN[None]).tolist() == [0.0]


def test_the_iterations_stop_where_there_is_no_step_left_at_all():
    for count in (2, 3, 4, 5):
        gram = torch.eye(count, dtype=torch.float64)
        weights = torch.full((count,), 1.0 / count, dtype=torch.float64)
        mean = karcher_mean(gram, weights, 100, 0.0)
        assert torch.allclose(mean, torch.full_like(mean, count**-0.5), rtol=1e-12, atol=0)


@pytest.mark.parametrize("first", [0.1, 0.3, 0.7, 1.1])
def test_what_cancels_to_rounding_has_no_direction(first):
    """3 parts of x and 1 of -3 x are nothing, to which the last is joined by a line."""
    values = torch.tensor([first, -3 * first, 0.7], dtype=torch.float64)
    weights = torch.tensor([0.6, 0.2, 0.2], dtype=torch.float64)
    for linear_lengths in (False, True):
        coefficients = slerp_fold(values.outer(values), weights, PARALLEL, linear_lengths=linear_lengths)
        assert float(coefficients @ values) == pytest.approx(0.2 * 0.7, rel=1e-6)
