"""DELLA (Deep et al., 2024): the larger, the more likely kept; unbiased; rows of one element are kept."""

import math

import pytest
import torch

from fl_merge import RecipeError, merge
from fl_merge.methods import dare_linear, della, della_linear, ties, weighted_average
from fl_merge.ops.sparsify import rank_chances

DRAWS = 400


def test_chances_by_hand():
    # two rows of three; magnitudes 3 1 2 and 5 5 4 (equal ones share their mean place)
    deltas_NS = torch.tensor([[3.0, -1.0, 2.0, -5.0, 5.0, 4.0]])
    found = rank_chances(deltas_NS, 3, [0.5], 0.2)
    assert found.tolist() == [pytest.approx([0.6, 0.4, 0.5, 0.55, 0.55, 0.4])]


def places(deltas_RC):
    """The place of each magnitude within its row, by comparing all with all: those whose exponent and first five bits
    behind the point agree are equal, and so is all that is 1023 such steps or more below the row's largest."""
    significand_RC, exponent_RC = torch.frexp(deltas_RC.abs())
    steps_RC = exponent_RC * 32 + ((2 * significand_RC - 1) * 32).floor()
    steps_RC = steps_RC.maximum(steps_RC.amax(dim=1, keepdim=True) - 1023)
    one_RCC, other_RCC = steps_RC[:, :, None], steps_RC[:, None, :]
    return (other_RCC > one_RCC).sum(dim=2) + ((other_RCC == one_RCC).sum(dim=2) - 1) / 2


@pytest.mark.parametrize("kind", ["normal", "two decades apart", "coarse", "equal", "an outlier", "tiny"])
def test_chances_are_linear_in_the_place(kind):
    deltas_RC = torch.randn(5, 301, generator=torch.Generator().manual_seed(6))
    if kind == "two decades apart":
        deltas_RC[:, ::2] *= 100
    elif kind == "coarse":
        deltas_RC = deltas_RC.round()
        deltas_RC[deltas_RC == 0] = 0.5
    elif kind == "equal":
        deltas_RC = deltas_RC.sign() * 0.3
    elif kind == "an outlier":
        deltas_RC[:, 7] = 1e6
    elif kind == "tiny":
        deltas_RC *= 1e-30
    found_RC = rank_chances(deltas_RC.reshape(1, -1), 301, [0.5], 0.4).reshape(5, 301).double()
    wanted_RC = 0.7 - 0.4 * places(deltas_RC).double() / 300
    assert torch.allclose(found_RC, wanted_RC, atol=1e-6, rtol=0)
    assert torch.allclose(found_RC.sum(dim=1), torch.tensor(0.5 * 301).double(), atol=1e-4, rtol=0)


def test_chances_are_near_those_of_exact_ranks():
    """Of normal deltas: within a hundredth of epsilon, half of what the fullest class has of them."""
    delta_S = torch.randn(20_000, generator=torch.Generator().manual_seed(6))
    rank_S = delta_S.abs().argsort(descending=True).argsort().double()
    found_S = rank_chances(delta_S[None], 20_000, [0.5], 0.2)[0].double()
    assert float((found_S - (0.6 - 0.2 * rank_S / 19_999)).abs().max()) < 0.2 / 100


def test_the_smallest_chances_are_those_of_a_draw():
    """Where density - epsilon / 2 is 0 but for rounding, an element is kept by the smallest draw, not divided by 0."""
    deltas_NS = torch.tensor([[4.0, 2.0, 1.0]])
    found_NS = rank_chances(deltas_NS, 3, [0.1], 0.2 - 1e-12)
    assert found_NS[0, 2] == 2.0**-32
    assert rank_chances(deltas_NS, 3, [1e-12], 0.0).tolist() == [[2.0**-32] * 3]


def test_rows_of_one_element_are_kept():
    """mergekit divides 0 by 0 there."""
    base = {"column": torch.zeros(50, 1), "scalar": torch.tensor(0.0), "one": torch.zeros(1)}
    client = {name: torch.full_like(tensor, 2.5) for name, tensor in base.items()}
    for method in (della(density=0.3), della_linear(density=0.3)):
        assert all(torch.equal(merge(method, base, [client])[name], client[name]) for name in base)


@pytest.fixture(scope="module")
def draws():
    delta = torch.randn(6, 50, generator=torch.Generator().manual_seed(2))
    base = {"w": torch.zeros(6, 50)}
    method = della_linear(density=0.5, epsilon=0.6)
    return delta, torch.stack([merge(method, base, [{"w": delta}], seed=seed)["w"] for seed in range(DRAWS)])


def test_the_kept_fraction_is_linear_in_the_rank(draws):
    delta, found = draws
    rank = delta.abs().argsort(dim=1, descending=True).argsort(dim=1)
    for place in range(50):
        chance = 0.8 - 0.6 * place / 49
        kept = int((found != 0)[:, rank == place].sum())
        trials = 6 * DRAWS
        assert abs(kept - chance * trials) < 4 * math.sqrt(trials * chance * (1 - chance))


def test_what_is_kept_is_divided_by_its_own_chance_and_the_mean_is_the_delta(draws):
    delta, found = draws
    chance = 0.8 - 0.6 * places(delta).double() / 49
    kept = found != 0
    assert torch.allclose(found[kept].double(), (delta.double() / chance).expand_as(found)[kept], rtol=1e-6)
    error = found.double().mean(0) - delta.double()
    standard_error = delta.double().abs() * ((1 - chance) / chance / DRAWS).sqrt()
    assert int((error.abs() > 3 * standard_error).sum()) <= 5
    assert abs(float((error * delta.sign()).sum())) < 3 * float(standard_error.square().sum().sqrt())


def test_epsilon_0_is_dare():
    base = {"w": torch.zeros(40, 30)}
    client = {"w": torch.randn(40, 30, generator=torch.Generator().manual_seed(3))}
    one, other = (merge(m, base, [client], seed=9)["w"] for m in (della_linear(epsilon=0.0), dare_linear()))
    assert torch.equal(one, other)


def test_at_density_one_nothing_is_dropped():
    base = {"w": torch.zeros(3)}
    clients = [{"w": torch.tensor([4.0, -1.0, 2.0])}, {"w": torch.tensor([-3.0, 5.0, 1.0])}]
    for ours, wanted in ((della_linear, weighted_average()), (della, ties(density=1.0))):
        assert torch.equal(merge(ours(density=1.0), base, clients)["w"], merge(wanted, base, clients)["w"])


@pytest.mark.parametrize("method", [dare_linear, della_linear])
def test_rescaled_to_the_l1_norm(method):
    """mergekit's way: what is kept has the length of the whole delta, in slices or not."""
    base = {"w": torch.zeros(300, 200)}
    client = {"w": torch.randn(300, 200, generator=torch.Generator().manual_seed(3))}
    length = float(client["w"].double().abs().sum())
    found = [
        merge(method(density=0.3, rescale="l1"), base, [client], slice_elements=size)["w"] for size in (16384, 10**9)
    ]
    assert torch.equal(*found)
    assert float(found[0].double().abs().sum()) == pytest.approx(length, rel=1e-6)
    plain = merge(method(density=0.3, rescale=False), base, [client])["w"]
    ratio = found[0][plain != 0] / plain[plain != 0]
    assert float(ratio.max() / ratio.min()) == pytest.approx(1.0, abs=1e-6)
    assert torch.equal(found[0] != 0, plain != 0)


@pytest.mark.parametrize("method", [della, della_linear])
def test_probabilities_outside_0_and_1_are_refused_at_construction(method):
    wanted = r"parameter 'epsilon' of \w+: found 0.5, wanted a number in \[0, 0.2\] at density 0.9"
    with pytest.raises(RecipeError, match=wanted):
        method(density=0.9, epsilon=0.5)
    with pytest.raises(RecipeError, match=r"at density 0\.1"):
        method(density={"a": 0.5, "b": 0.1}, epsilon=0.5)
    with pytest.raises(RecipeError, match=r"at density 0\.1"):
        method(density=0.1, epsilon=0.2)  # the smallest would never be kept
    method(density=1.0, epsilon=0.5)
