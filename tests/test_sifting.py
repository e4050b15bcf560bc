"""Balances compared with limits without being worked out, beside all of them worked out by the definition."""

import numpy as np
import pytest
import torch

from fl_merge import kernels
from fl_merge.kernels.passes import Inputs
from fl_merge.kernels.rows import Rows
from fl_merge.ops.scores import balance, products, scales

SIZE = 3 * 4096 + 700
LARGEST = 0x7FFFFFFF


def spread(kind: str, clients: int) -> torch.Tensor:
    """Deltas of which few are large, some, or all: then powers of 2 and tanh bend the most."""
    generator = torch.Generator().manual_seed(clients)
    deltas_NS = torch.randn(clients, SIZE, generator=generator)
    if kind == "alike":
        shared_S = torch.sign(torch.randn(SIZE, generator=generator))
        return shared_S * (1 - 0.3 * torch.rand(clients, SIZE, generator=generator))
    return deltas_NS**5 if kind == "far" else deltas_NS


def rows_and_bits(deltas_NS: torch.Tensor, dtype: torch.dtype) -> tuple[Rows, np.ndarray]:
    """The rows of balances, and the bits of all of them by the definition."""
    module = kernels.load()
    assert module is not None
    clients = [delta_S.to(dtype) for delta_S in deltas_NS]
    deltas_NS = torch.stack(clients).float()
    largest_N, product_N = deltas_NS.abs().amax(dim=1).double(), products(deltas_NS).abs().amax(dim=1)
    known = scales(largest_N, product_N, torch.float32)
    assert not known[1]
    rows = Rows(Inputs(module, torch.zeros(SIZE, dtype=dtype), clients), "balance", known)
    return rows, balance(deltas_NS, largest_N, product_N).numpy().view(np.uint32)


@pytest.mark.parametrize("kind", ["normal", "far", "alike"])
@pytest.mark.parametrize("clients", [1, 2, 8, 60, 130])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_counts_are_those_of_all_balances(dtype, clients, kind):
    rows, bits_NS = rows_and_bits(spread(kind, clients), dtype)
    sorted_NS = np.sort(bits_NS, axis=1)
    for lower, upper in ((0.795, 0.805), (0.9, 0.9), (0.6, 0.99), (0.98, None)):
        low_N = sorted_NS[:, int(lower * SIZE)]
        high_N = sorted_NS[:, int(upper * SIZE)] if upper else np.full(clients, LARGEST, np.uint32)
        found = rows.between(0, SIZE, low_N, high_N, room=SIZE, expected=SIZE)
        assert found.complete_R.all()
        for n in range(clients):
            inside_S = (low_N[n] <= bits_NS[n]) & (bits_NS[n] <= high_N[n])
            assert found.above_R[n] == (bits_NS[n] > high_N[n]).sum()
            assert found.between_R[n] == inside_S.sum()
            assert found.marks_RX[n].tolist() == [int(inside_S[:start].sum()) for start in found.starts_X]
            written_M = found.found_RM[n, : found.used_R[n]]
            wanted_M = bits_NS[n][inside_S] if low_N[n] != high_N[n] else []
            assert np.array_equal(np.sort(written_M), np.sort(wanted_M))


def test_rows_in_any_order_and_twice():
    rows, bits_NS = rows_and_bits(spread("normal", 4), torch.bfloat16)
    chosen = [2, 0, 2]
    low_R, high_R = (np.sort(bits_NS[chosen], axis=1)[:, int(part * SIZE)].copy() for part in (0.7, 0.75))
    low_R[2] = high_R[2]
    found = rows.some(chosen).between(0, SIZE, low_R, high_R, room=SIZE, expected=SIZE)
    for r, n in enumerate(chosen):
        assert found.above_R[r] == (bits_NS[n] > high_R[r]).sum()
        assert found.between_R[r] == ((low_R[r] <= bits_NS[n]) & (bits_NS[n] <= high_R[r])).sum()


def test_few_balances_are_worked_out():
    from fl_merge.kernels import sifting

    rows, bits_NS = rows_and_bits(spread("normal", 8), torch.bfloat16)
    limits_2N = np.sort(bits_NS, axis=1)[:, [int(0.795 * SIZE), int(0.805 * SIZE)]].T.copy()
    bound_2N, every_N = np.empty((2, 8), np.float32), np.arange(8)
    base, base_code, models_N, codes_N, kind, numbers_2N = rows._scored
    assert sifting.bounds_of(codes_N, kind, numbers_2N, every_N, *limits_2N, bound_2N)
    scratch, used_N, above_N = sifting.room_to_sift(8, 8, 4096), np.zeros(8, np.int64), np.zeros(8, np.int64)
    where = base, base_code, models_N, codes_N, numbers_2N, 0, every_N
    sifting.sift(*where, bound_2N, scratch, used_N, above_N)
    assert (used_N < 0.06 * 4096).all()
    for n in range(8):
        found_M = scratch[3][n, : used_N[n]].view(np.uint32)
        bits_S = bits_NS[n, :4096]
        assert above_N[n] + (found_M > limits_2N[1, n]).sum() == (bits_S > limits_2N[1, n]).sum()
        assert above_N[n] > 0.15 * 4096
        assert np.isin(found_M[found_M > 0], bits_S).all()


@pytest.mark.parametrize("limit", [0, 1, 1 << 20])
def test_limits_near_0_have_no_bounds(limit):
    """There float32 has few digits, or none: all balances are worked out."""
    from fl_merge.kernels import sifting

    rows, _ = rows_and_bits(spread("normal", 2), torch.float32)
    _, _, _, codes_N, kind, numbers_2N = rows._scored
    low_N, high_N = np.full(2, limit, np.uint32), np.full(2, LARGEST, np.uint32)
    assert not sifting.bounds_of(codes_N, kind, numbers_2N, np.arange(2), low_N, high_N, np.empty((2, 2), np.float32))
