"""nearswap, arcee_fusion, passthrough, ram: on paper."""

import math

import pytest
import torch

from fl_merge import MergeError, merge
from fl_merge.methods import arcee_fusion, nearswap, passthrough, ram

BASE = {"w": torch.tensor([1.0, 2.0, 3.0, 4.0])}


def client(*delta):
    return {"w": BASE["w"] + torch.tensor(delta)}


def test_nearswap_takes_small_changes_and_bounds_large_ones():
    one = client(0.25, -0.25, 2.0, -2.0)
    assert merge(nearswap(t=0.5), BASE, [one])["w"].tolist() == [1.25, 1.75, 3.5, 3.5]
    two = client(0.0, 0.25, -2.0, -2.0)
    assert merge(nearswap(t=0.5), BASE, [one, two])["w"].tolist() == [1.125, 2.0, 3.0, 3.5]


def test_nearswap_is_the_interpolation_that_it_is_defined_as(generator):
    base = torch.randn(1000, generator=generator, dtype=torch.float64)
    other = base + 0.01 * torch.randn(1000, generator=generator, dtype=torch.float64)
    share = (0.005 / (base - other).abs()).clamp(0, 1)
    found = merge(nearswap(t=0.005), {"w": base}, [{"w": other}])["w"]
    torch.testing.assert_close(found, share * other + (1 - share) * base, rtol=0, atol=1e-15)


def test_ram_averages_over_those_that_changed_an_element():
    clients = [client(1.0, 1.0, 0.0, 1e-6), client(3.0, 0.0, 0.0, 0.0), client(0.0, 0.0, 0.0, 2e-6)]
    assert merge(ram(), BASE, clients)["w"].tolist() == [3.0, 3.0, 3.0, 4.0]
    weighted = merge(ram(scale=0.5), BASE, clients, [1, 3, 4])["w"].tolist()  # (1 + 9) / 4 of the first element
    assert weighted == [1 + 0.5 * 2.5, 2.5, 3.0, 4.0]


def test_passthrough_multiplies_the_weights():
    one = client(1.0, 0.0, 0.0, 0.0)
    assert torch.equal(merge(passthrough(), BASE, [one])["w"], one["w"])
    assert merge(passthrough(scale=0.5), BASE, [one])["w"].tolist() == [1.0, 1.0, 1.5, 2.0]
    assert merge(passthrough(scale=-1.0), BASE, [one])["w"].tolist() == [-2.0, -2.0, -3.0, -4.0]


def test_passthrough_of_two_is_refused():
    with pytest.raises(MergeError, match=r"^passthrough\(scale=1.0\): found 2 clients, wanted 1$"):
        merge(passthrough(), BASE, [BASE, BASE])


def test_arcee_fusion_keeps_the_outliers():
    """Two rows: the second moves by a shift, which its softmax does not see; of the first the largest is kept."""
    base = {"w": torch.zeros(2, 4)}
    moved = {"w": torch.tensor([[8.0, 0.1, -0.2, 0.1], [3.0, 3.0, 3.0, 3.0]])}
    # in units of the first row's divergence: 0 0 0 0 .1 .1 .2 8: quartiles 0, 0, .1 and the threshold .15
    found = merge(arcee_fusion(), base, [moved])["w"]
    assert found.tolist() == [[8.0, 0.0, pytest.approx(-0.2), 0.0], [0.0] * 4]


def test_arcee_fusion_of_several_is_the_average_of_each():
    draw = torch.Generator().manual_seed(0)
    base = {"w": torch.randn(20, 30, generator=draw)}
    clients = [{"w": base["w"] + 0.1 * torch.randn(20, 30, generator=draw)} for _ in range(2)]
    alone = [merge(arcee_fusion(), base, [each])["w"] - base["w"] for each in clients]
    assert all(0.02 < float((delta != 0).double().mean()) < 0.2 for delta in alone)
    both = merge(arcee_fusion(), base, clients, [1, 3])["w"] - base["w"]
    torch.testing.assert_close(both, 0.25 * alone[0] + 0.75 * alone[1], rtol=0, atol=1e-6)


def test_arcee_fusion_of_a_tensor_without_dimensions_takes_the_change():
    assert float(merge(arcee_fusion(), {"w": torch.tensor(1.0)}, [{"w": torch.tensor(math.pi)}])["w"]) == pytest.approx(
        math.pi
    )
