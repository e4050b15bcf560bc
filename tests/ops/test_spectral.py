"""Singular triplets, polar factors, and what the spectral methods make of them."""

import pytest
import torch

from fl_merge.ops.solve import solve_ridged, weighted_solution
from fl_merge.ops.spectral import (
    calibrated,
    isotropic,
    isotropic_common_and_specific,
    least_interference,
    merge_triplets,
    polar,
    top_triplets,
    triplets,
    triplets_each,
)


def close(found, wanted, tolerance=1e-12):
    assert found.shape == wanted.shape
    assert float((found - wanted).abs().max()) <= tolerance * max(1.0, float(wanted.abs().max()))


def with_values(values, rows, columns, generator, dtype=torch.float64):
    """A matrix with these singular values."""
    left, _ = torch.linalg.qr(torch.randn(rows, len(values), dtype=torch.float64, generator=generator))
    right, _ = torch.linalg.qr(torch.randn(columns, len(values), dtype=torch.float64, generator=generator))
    return ((left * torch.tensor(values, dtype=torch.float64)) @ right.T).to(dtype)


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6, 6), (1, 4), (4, 1), (1, 1), (90, 40)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
def test_triplets_are_those_of_a_singular_value_decomposition(shape, dtype, tolerance, generator):
    matrix = torch.randn(shape, generator=generator).to(dtype)
    found = triplets(matrix)
    close(found.matrix(), matrix.double(), tolerance)
    close(found.values_K, torch.linalg.svdvals(matrix.double()), tolerance)
    for basis in (found.left_RK, found.right_CK):
        close(basis.T @ basis, torch.eye(min(shape), dtype=torch.float64), tolerance)


@pytest.mark.parametrize(("dtype", "small"), [(torch.float64, 1e-9), (torch.float32, 1e-3)])
def test_a_badly_conditioned_matrix_keeps_its_small_directions(dtype, small, generator):
    """Squaring would lose a value of 1e-9 beside 1 even in float64; a float32 one is above what squaring loses."""
    found = triplets(with_values([1.0, small], 30, 20, generator, dtype))
    assert found.values_K.tolist()[:2] == pytest.approx([1.0, small], rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_what_is_below_rounding_is_no_direction(dtype, generator):
    assert len(triplets(with_values([3.0, 1.0], 30, 20, generator, dtype)).values_K) == 2
    empty = triplets(torch.zeros(4, 3, dtype=dtype))
    assert len(empty.values_K) == 0
    assert torch.equal(empty.matrix(), torch.zeros(4, 3, dtype=torch.float64))


def test_the_polar_factor(generator):
    columns = torch.randn(9, 4, dtype=torch.float64, generator=generator)
    left, _, right = torch.linalg.svd(columns, full_matrices=False)
    close(polar(columns), left @ right)
    close(polar(columns.T), (left @ right).T)
    # two equal columns: on what they span, by hand: each is u / sqrt 2
    unit = columns[:, :1] / columns[:, :1].norm()
    close(polar(torch.cat([unit, unit], dim=1)), torch.cat([unit, unit], dim=1) / 2**0.5)


def test_tsv_of_orthogonal_clients_is_their_sum(generator):
    """Where nothing interferes there is nothing to make orthogonal."""
    left, _ = torch.linalg.qr(torch.randn(8, 4, dtype=torch.float64, generator=generator))
    right, _ = torch.linalg.qr(torch.randn(6, 4, dtype=torch.float64, generator=generator))
    deltas = [
        left[:, :2] @ torch.diag(torch.tensor([2.0, 1.0]).double()) @ right[:, :2].T,
        3 * left[:, 2:] @ right[:, 2:].T,
    ]
    close(merge_triplets([top_triplets(delta, 2) for delta in deltas]), deltas[0] + deltas[1])


def test_tsv_is_the_definition_with_singular_value_decompositions(generator):
    deltas = torch.randn(3, 12, 10, dtype=torch.float64, generator=generator)
    count = 10 // 3
    svds = [torch.linalg.svd(delta, full_matrices=False) for delta in deltas]

    def nearest_orthogonal(matrix):
        left, _, right = torch.linalg.svd(matrix, full_matrices=False)
        return left @ right

    left = nearest_orthogonal(torch.cat([svd.U[:, :count] for svd in svds], dim=1))
    right = nearest_orthogonal(torch.cat([svd.Vh[:count].T for svd in svds], dim=1))
    values = torch.cat([svd.S[:count] for svd in svds])
    assert triplets_each(12, 10, 3) == count
    close(merge_triplets([top_triplets(delta, count) for delta in deltas]), left @ torch.diag(values) @ right.T)


def test_tsv_of_identical_clients_is_the_truncated_delta(generator):
    delta = torch.randn(9, 8, dtype=torch.float64, generator=generator)
    close(merge_triplets([top_triplets(delta, 2)] * 4), top_triplets(delta, 2).matrix())


def test_isotropic_has_one_singular_value_their_mean(generator):
    matrix = with_values([4.0, 2.0, 1.0, 1.0], 6, 4, generator)
    assert torch.linalg.svdvals(isotropic(matrix)).tolist() == pytest.approx([2.0] * 4, rel=1e-13)
    # the same directions: U V^T is the polar factor
    close(isotropic(matrix), 2.0 * polar(matrix))
    low_rank = with_values([4.0, 2.0], 6, 5, generator)
    assert torch.linalg.svdvals(isotropic(low_rank)).tolist() == pytest.approx([3.0, 3.0, 0, 0, 0], abs=1e-13)


def test_common_and_specific_directions(generator):
    deltas = torch.randn(3, 20, 15, dtype=torch.float64, generator=generator)
    close(isotropic_common_and_specific(deltas, 1.0), isotropic(deltas.sum(dim=0)))
    # 0.6 of 15: 9 common ones, 2 of each client
    svd = torch.linalg.svd(deltas.sum(dim=0), full_matrices=False)
    left, right, values = [svd.U[:, :9]], [svd.Vh[:9].T], [svd.S[:9]]
    for delta in deltas:
        part = torch.linalg.svd(delta - left[0] @ (left[0].T @ delta), full_matrices=False)
        left, right, values = [*left, part.U[:, :2]], [*right, part.Vh[:2].T], [*values, part.S[:2]]
    wanted = torch.cat(values).mean() * polar(torch.cat(left, dim=1)) @ polar(torch.cat(right, dim=1)).T
    close(isotropic_common_and_specific(deltas, 0.6), wanted, 1e-11)


def objective(merged, deltas):
    return sum((((merged - tau) @ tau.T).square().sum() / tau.square().sum()) for tau in deltas)


@pytest.mark.parametrize("shape", [(30, 12), (9, 12), (3, 12)])
def test_the_gradient_of_wudi_is_zero(shape, generator):
    """Also where the clients' rows together do not span all inputs (3 clients of rank 3 in 12 dimensions)."""
    deltas = torch.randn(3, *shape, dtype=torch.float64, generator=generator)
    merged = least_interference(deltas, torch.full((3,), 1 / 3, dtype=torch.float64), 0.0).requires_grad_()
    (gradient,) = torch.autograd.grad(objective(merged, deltas), merged)
    (before,) = torch.autograd.grad(objective(average := deltas.mean(dim=0).requires_grad_(), deltas), average)
    assert float(gradient.abs().max()) < 1e-9 * float(before.abs().max())
    assert float(before.abs().max()) > 0.1


def test_wudi_with_a_ridge_is_at_the_minimum_of_both(generator):
    deltas = torch.randn(3, 30, 12, dtype=torch.float64, generator=generator)
    thirds = torch.full((3,), 1 / 3, dtype=torch.float64)
    merged = least_interference(deltas, thirds, 0.1).requires_grad_()
    mean_diagonal = sum((tau.T @ tau / tau.square().sum()).diagonal().mean() for tau in deltas)
    pulled = objective(merged, deltas) + 0.1 * mean_diagonal * (merged - deltas.mean(dim=0)).square().sum()
    (gradient,) = torch.autograd.grad(pulled, merged)
    assert float(gradient.abs().max()) < 1e-13


def test_calibration_by_hand():
    """Both clients have 1 in the first direction, each its own in another: the shared one is averaged."""
    deltas = torch.diag_embed(torch.tensor([[1.0, 5.0, 0.0], [1.0, 0.0, 7.0]], dtype=torch.float64))
    close(calibrated(deltas, 1.0), torch.diag(torch.tensor([1.0, 5.0, 7.0], dtype=torch.float64)))
    # a floor of 2: what one client alone has is halved, shared counts 2 and 2
    close(calibrated(deltas, 2.0), torch.diag(torch.tensor([1.0, 2.5, 3.5], dtype=torch.float64)))


def test_calibration_of_one_client_or_of_identical_ones_is_that_client(generator):
    delta = torch.randn(7, 9, dtype=torch.float64, generator=generator)
    for count in (1, 4):
        close(calibrated(delta.expand(count, 7, 9), 1.0), delta)


def test_a_singular_system_is_solved_where_it_says_something(generator):
    gram = torch.diag(torch.tensor([2.0, 0.0], dtype=torch.float64))
    right = torch.tensor([[4.0], [0.0]], dtype=torch.float64)
    assert solve_ridged(gram, right, 0.0).flatten().tolist() == pytest.approx([2.0, 0.0], rel=1e-9)
    assert solve_ridged(0 * gram, right, 0.5).flatten().tolist() == [0.0, 0.0]
    # not positive at all, as no Gram matrix is: finite, whatever it is
    assert solve_ridged(torch.tensor([[1.0, 5.0], [5.0, 1.0]]).double(), right, 0.0).isfinite().all()
    assert solve_ridged(-gram, right, 0.0).flatten().tolist() == [0.0, 0.0]


def test_without_a_ridge_it_is_the_normal_equations(generator):
    deltas = torch.randn(3, 4, 6, dtype=torch.float64, generator=generator)
    inputs = torch.randn(3, 20, 6, dtype=torch.float64, generator=generator)
    grams = [each.T @ each for each in inputs]
    found = weighted_solution(deltas, grams, deltas.mean(dim=0), 0.0)
    targets = torch.cat([each @ delta.T for each, delta in zip(inputs, deltas, strict=True)])
    close(found, torch.linalg.lstsq(torch.cat(list(inputs)), targets).solution.T, 1e-9)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_calibration_leaves_directions_of_one_client_alone(dtype, tolerance, generator):
    """The others' responses there are rounding, to which any response is large."""
    for _ in range(20):
        both = with_values([3.0, 2.0, 2.5, 1.0], 20, 15, generator)
        left, values, right = torch.linalg.svd(both, full_matrices=False)
        parts = [(left[:, own] * values[own]) @ right[own] for own in ([0, 2], [1, 3])]
        close(calibrated(torch.stack(parts).to(dtype), 1.0), both, tolerance)
