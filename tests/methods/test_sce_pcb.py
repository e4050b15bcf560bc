"""SCE (Wan et al., 2024) and PCB-merging (Du et al., 2024), on paper."""

import math

import pytest
import torch

from fl_merge import merge
from fl_merge.kernels.series import MANY
from fl_merge.methods import pcb, sce
from fl_merge.ops.scores import balance, shares, variance


def merged(method, *deltas, **options):
    base = {"w": torch.zeros(len(deltas[0]))}
    return merge(method, base, [{"w": torch.tensor(delta)} for delta in deltas], **options)["w"]


def test_sce_by_hand():
    # variances: 4 0.25 0 16 -> of three that vary int(0.7 * 3) = 2 are selected: elements 3 and 0
    # squares there: 9 + 25 and 1 + 9 -> shares 34/44, 10/44;  signs: + (3, -1), + (5, -3)
    deltas = [3.0, 2.0, 1.0, 5.0], [-1.0, 1.0, 1.0, -3.0]
    assert merged(sce(density=0.7), *deltas).tolist() == [3.0, 0.0, 0.0, 5.0]
    # all elements: squares 39 and 12; where both agree the mean is weighted by these
    wanted = [3.0, (39 * 2 + 12) / 51, 1.0, 5.0]
    assert merged(sce(density=1.0), *deltas).tolist() == pytest.approx(wanted, rel=1e-6)


def test_sce_takes_everything_where_nothing_varies():
    assert merged(sce(density=0.1), [1.0, -2.0, 3.0], [1.0, -2.0, 3.0]).tolist() == [1.0, -2.0, 3.0]


@pytest.mark.parametrize("size", [1e-5, 1.0, 1e5])
def test_sce_is_the_same_at_any_size_of_the_deltas(size):
    """mergekit's weights turn uniform when the mean squares sum to less than 1e-6: then 1.5 would come out here."""
    deltas = [2.0 * size, 0.0], [1.0 * size, 0.5 * size]
    found = merged(sce(density=1.0), *deltas) / size
    shares = [4.0, 1.25]
    assert found.tolist() == pytest.approx([(shares[0] * 2 + shares[1] * 1) / sum(shares), 0.5], rel=1e-5)


def test_the_variance_is_that_over_clients():
    deltas_NS = torch.randn(5, 1000, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(variance(deltas_NS), deltas_NS.var(dim=0, unbiased=False), rtol=1e-5)
    same_NS = torch.full((3, 4), 0.1)
    assert variance(same_NS).tolist() == [0.0] * 4


@pytest.mark.parametrize("count", [2, 3, 8, MANY, MANY + 1, 2000])
@pytest.mark.parametrize("apart", [0.0, 1.0, 1e4])
def test_the_variance_is_right_where_the_first_client_is_far_from_the_others(count, apart):
    """Differences are taken from the first: then their mean is nearly all of them, and little is left."""
    deltas_NS = torch.randn(count, 300, generator=torch.Generator().manual_seed(0))
    deltas_NS[0] += apart
    wanted_S = deltas_NS.double().var(dim=0, unbiased=False)
    assert torch.allclose(variance(deltas_NS).double(), wanted_S, rtol=1e-4)


def test_a_variance_beyond_float32_is_infinite_and_a_single_client_has_none():
    assert variance(torch.tensor([[1e20, 1.0], [-1e20, 1.0]])).tolist() == [math.inf, 0.0]
    assert variance(torch.tensor([[3.0, -4.0]])).tolist() == [0.0, 0.0]


def test_pcb_by_hand():
    deltas = [[2.0, 1.0], [-1.0, 1.0]]
    # a: 1 .5 | 1 1   sums: 1 2   products: 2 2 | -1 2, as parts of the largest: 1 1 | -.5 1
    beta = [[math.tanh(1), math.exp(2 * (0.25 - 1)) * math.tanh(1)], [0.0, math.tanh(1)]]
    wanted = [2.0, 1.0]
    assert merged(pcb(density=1.0), *deltas).tolist() == pytest.approx(wanted, rel=1e-6)
    deltas[1][1] = 3.0
    # a: 1 .5 | 1/3 1   sums: 1 4   products: 2 4 | -1 12, as parts: .5 1 | -1/12 1
    beta = [math.exp(2 * (0.25 - 1)) * math.tanh(1), math.tanh(1)]
    mean = (beta[0] * 1 + beta[1] * 3) / sum(beta)
    assert merged(pcb(density=1.0), *deltas).tolist() == pytest.approx([2.0, mean], rel=1e-6)
    # half of each: client 0 keeps its first element (tanh .5 > .22 tanh 1), client 1 its second
    assert merged(pcb(density=0.5), *deltas).tolist() == pytest.approx([2.0, 3.0], rel=1e-6)


@pytest.mark.parametrize("method", [pcb(), sce()], ids=str)
def test_the_same_at_any_size_in_slices_or_not(method):
    generator = torch.Generator().manual_seed(1)
    deltas = [torch.randn(50_000, generator=generator) for _ in range(4)]
    base = {"w": torch.zeros(50_000)}
    whole = merge(method, base, [{"w": delta} for delta in deltas])["w"]
    assert 1000 < int((whole != 0).sum()) < 50_000
    for slice_elements in (16384, 10**9):
        again = merge(method, base, [{"w": delta} for delta in deltas], slice_elements=slice_elements, threads=1)["w"]
        assert torch.equal(again, whole)
    small = merge(method, base, [{"w": delta * 2.0**-20} for delta in deltas])["w"]
    assert torch.allclose(small * 2.0**20, whole, rtol=1e-5)


def test_pcb_takes_many_clients():
    deltas = [torch.randn(100, generator=torch.Generator().manual_seed(seed)).tolist() for seed in range(100)]
    found = merged(pcb(), *deltas)
    assert torch.isfinite(found).all()
    assert int((found != 0).sum()) > 10


@pytest.mark.parametrize("power", [-100, 80])
def test_pcb_at_sizes_whose_squares_float32_does_not_have(power):
    deltas = [torch.randn(200, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    found, wanted = (merged(pcb(), *((delta * scale).tolist() for delta in deltas)) for scale in (2.0**power, 1.0))
    assert int((wanted != 0).sum()) > 20
    assert torch.equal(found * 2.0**-power, wanted)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-6), (torch.float64, 2e-10)])
@pytest.mark.parametrize("clients", [1, 8, 60])
def test_balances_are_those_of_the_formula(dtype, error, clients):
    """Up to one factor for all; the error of the exponent grows with the clients, as that of any float32 would."""
    deltas_NS = torch.randn(clients, 20_000, generator=torch.Generator().manual_seed(4)).to(dtype)
    deltas_NS[:, :100] *= 1e-3
    wide_NS = deltas_NS.double()
    product_NS = wide_NS * deltas_NS.sum(dim=0).double()
    largest_N, product_N = wide_NS.abs().amax(dim=1), product_NS.abs().amax(dim=1)
    size_NS, agreement_NS = wide_NS / largest_N[:, None], product_NS / product_N[:, None]
    wanted_NS = torch.exp(clients * (size_NS**2 - 1)) * torch.tanh(agreement_NS).clamp(min=0)
    found_NS = balance(deltas_NS, largest_N, product_N).double()
    sure_NS = agreement_NS.abs() > 1e-2  # of sums that all but cancel float32 has fewer digits
    assert torch.equal(found_NS > 0, wanted_NS > 0) or clients > 1
    assert ((found_NS > 0) == (wanted_NS > 0))[sure_NS].all()
    ratio_M = (found_NS / wanted_NS)[sure_NS & (wanted_NS > 0)]
    assert len(ratio_M) > 1000
    assert float(ratio_M.max() / ratio_M.min()) - 1 < 2 * error * (1 + clients / 5)


def test_shares_by_hand():
    balances_NS = torch.tensor([[1.0, 3.0, 0.0, 1e-37], [3.0, 0.0, 0.0, 0.0]]) * 2.0**70
    assert shares(balances_NS).tolist() == [[0.25, 1.0, 0.0, 1.0], [0.75, 0.0, 0.0, 0.0]]
    assert shares(torch.tensor([[1e-38], [1e-39]])).tolist() == [[0.0], [0.0]]


def test_an_element_that_one_client_alone_keeps_is_that_clients():
    deltas = [torch.randn(5000, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    found_S = merged(pcb(density=0.02), *(delta.tolist() for delta in deltas))
    moved_S = found_S != 0
    alone_S = sum((found_S == delta).int() for delta in deltas) == 1
    assert int(moved_S.sum()) > 100
    assert int((moved_S & alone_S).sum()) > 0.8 * int(moved_S.sum())
