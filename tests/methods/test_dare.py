"""DARE (Yu et al., 2023): unbiased, and each client's draws are its own."""

import math

import pytest
import torch

from fl_merge import merge
from fl_merge.execute import execute
from fl_merge.methods import dare_linear, dare_ties, ties, weighted_average
from fl_merge.store import MemorySink, MemorySource
from fl_merge.types import Cohort, Update

DRAWS = 500
DELTA_S = torch.randn(300, generator=torch.Generator().manual_seed(8))
ZERO = {"w": torch.zeros(300)}


@pytest.fixture(scope="module")
def draws():
    """The merge of one client under 500 seeds, by density."""
    return {
        density: torch.stack(
            [merge(dare_linear(density=density), ZERO, [{"w": DELTA_S}], seed=seed)["w"] for seed in range(DRAWS)]
        )
        for density in (0.1, 0.5)
    }


@pytest.mark.parametrize("density", [0.1, 0.5])
def test_the_mean_over_many_draws_is_the_delta(draws, density):
    error_S = draws[density].double().mean(0) - DELTA_S.double()
    standard_error_S = DELTA_S.double().abs() * math.sqrt((1 - density) / density / DRAWS)
    # The sum over the elements, in the direction of the delta, has the standard errors of its independent terms.
    assert abs(float((error_S * DELTA_S.sign()).sum())) < 3 * float(standard_error_S.square().sum().sqrt())
    # One element in 370 is beyond 3 standard errors by chance: of 300, more than 5 would be no chance.
    assert int((error_S.abs() > 3 * standard_error_S).sum()) <= 5


@pytest.mark.parametrize("density", [0.1, 0.5])
def test_the_kept_fraction_is_the_density(draws, density):
    kept = draws[density] != 0
    trials = kept.numel()
    assert abs(int(kept.sum()) - density * trials) < 3 * math.sqrt(trials * density * (1 - density))
    # No element and no seed is special.
    for counts, n in ((kept.sum(0), DRAWS), (kept.sum(1), 300)):
        assert float((counts - density * n).abs().max()) < 4.5 * math.sqrt(n * density * (1 - density))


def test_what_is_kept_is_divided_by_the_density(draws):
    kept = draws[0.5] != 0
    assert torch.equal(draws[0.5][kept], (2 * DELTA_S).expand(DRAWS, -1)[kept])
    plain_S = merge(dare_linear(density=0.5, rescale=False), ZERO, [{"w": DELTA_S}], seed=3)["w"]
    assert torch.equal(plain_S, draws[0.5][3] / 2)


def test_a_lower_density_keeps_a_subset():
    few, many = (merge(dare_linear(density=d, rescale=False), ZERO, [{"w": DELTA_S}])["w"] != 0 for d in (0.2, 0.6))
    assert 0 < int(few.sum()) < int(many.sum())
    assert torch.equal(few & many, few)


@pytest.mark.parametrize("slice_elements", [16384, 32768])
def test_the_draw_does_not_depend_on_the_slicing(slice_elements):
    base, client = {"w": torch.zeros(100_000)}, {"w": torch.ones(100_000)}
    whole = merge(dare_linear(density=0.3), base, [client], slice_elements=10**9)["w"]
    assert 0.29 < float((whole != 0).double().mean()) < 0.31
    assert torch.equal(merge(dare_linear(density=0.3), base, [client], slice_elements=slice_elements)["w"], whole)


def kept_of(client_id, others, *, seed=1, tensor="w", round_number=1):
    """Which elements of one client are kept while others, who did not move, take part."""
    base = {tensor: torch.zeros(300)}
    moved = {tensor: torch.ones(300)}
    updates = [Update(client_id, 3.0, MemorySource(moved)), *(Update(o, 2.0, MemorySource(base)) for o in others)]
    sink = MemorySink()
    execute(dare_linear(density=0.5), Cohort(MemorySource(base), tuple(updates), seed, round_number), sink)
    return (sink.tensors[tensor] != 0).tolist()


def test_a_clients_draw_does_not_depend_on_who_else_took_part():
    alone = kept_of("17", [])
    assert 100 < sum(alone) < 200
    assert kept_of("17", ["3"]) == alone
    assert kept_of("17", ["3", "18", "zebra"]) == alone


def test_a_draw_depends_on_seed_round_client_and_tensor():
    changes = [{}, {"seed": 2}, {"round_number": 2}, {"tensor": "v"}]
    draws = [tuple(kept_of("17", [], **change)) for change in changes] + [tuple(kept_of("18", []))]
    assert len(set(draws)) == len(draws)
    for draw in draws[1:]:  # unrelated, not shifted copies: about half of the elements agree
        assert 100 < sum(a == b for a, b in zip(draws[0], draw, strict=True)) < 200


CLIENTS = [{"w": torch.tensor([4.0, -1.0, 2.0])}, {"w": torch.tensor([-3.0, 5.0, 1.0])}]


def test_at_density_one_nothing_is_dropped():
    base = {"w": torch.zeros(3)}
    for ours, wanted in ((dare_linear, weighted_average()), (dare_ties, ties(density=1.0))):
        assert torch.equal(merge(ours(density=1.0), base, CLIENTS)["w"], merge(wanted, base, CLIENTS)["w"])


def test_dare_ties_elects_among_what_is_kept():
    """Each element is one of the four results that the two draws can have, and each of the four happens."""
    base = {"w": torch.zeros(3)}
    # a and b doubled; the sign of the larger wins, and the mean is over those that have it
    possible = {(True, True): 8.0, (True, False): 8.0, (False, True): -6.0, (False, False): 0.0}
    seen = set()
    for seed in range(40):
        kept = tuple(
            bool(merge(dare_linear(density=0.5), base, {i: CLIENTS[int(i)]}, seed=seed)["w"][0]) for i in ("0", "1")
        )
        assert merge(dare_ties(density=0.5), base, CLIENTS, seed=seed)["w"][0] == possible[kept]
        seen.add(kept)
    assert seen == set(possible)
