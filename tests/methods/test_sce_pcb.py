"""SCE (Wan et al., 2024) and PCB-merging (Du et al., 2024), on paper."""

import math

import pytest
import torch

from fl_merge import merge
from fl_merge.methods import pcb, sce
from fl_merge.ops.scores import variance


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
