"""Compiled kernels equal their torch definitions, bit for bit."""

from __future__ import annotations

import logging
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fl_merge import METHODS, kernels, merge
from fl_merge.ops.combine import add_scaled_delta, weighted_sum
from fl_merge.ops.consensus import disjoint_merge, elect_sign
from fl_merge.ops.draws import stream_key, uniform
from fl_merge.ops.sparsify import keep_count, largest_cutoff, trim_to_largest

SIZES = [1, 2, 3, 1023, 1024, 1025, 40_000]
SPECIAL = [0.0, -0.0, 1e-45, -1e-45, 1.5, -1.5, 1.5, -1.5, 1e30, -1e30]
"""Zeros of both signs, denormals, equal magnitudes, the largest that pass the check."""


@pytest.fixture(autouse=True)
def restored():
    """Whatever a test loads or switches off, the next one finds as it was."""
    before = kernels._tried, kernels._module, kernels._elements
    yield
    kernels._tried, kernels._module, kernels._elements = before


def both(compute):
    """What `compute` gives by the definitions and by the kernels, as bits."""
    kernels._tried, kernels._module = True, None
    defined = compute()
    kernels._tried = False
    assert kernels.load() is not None
    compiled = compute()
    return bits(defined), bits(compiled)


def bits(value):
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(value.shape), value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(value, dict):
        return {name: bits(tensor) for name, tensor in value.items()}
    return value


def deltas_of(size: int, dtype: torch.dtype = torch.float32, clients: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(size)
    deltas_NS = torch.randn(clients, size, generator=generator, dtype=torch.float64).to(dtype)
    special = torch.tensor(SPECIAL, dtype=dtype)[:size]
    for client in range(clients):
        deltas_NS[client, : len(special)] = special.roll(client)
    return deltas_NS


WEIGHTS = torch.tensor([0.1, 0.3, 0.05, 0.35, 0.2], dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", SIZES)
def test_every_kernel_equals_its_definition(size, dtype):
    deltas_NS = deltas_of(size, dtype)
    cutoffs = torch.tensor([largest_cutoff(delta_S, keep_count(0.4, size)) for delta_S in deltas_NS])
    for compute in (
        lambda: weighted_sum(deltas_NS, WEIGHTS),
        lambda: elect_sign(deltas_NS, WEIGHTS),
        lambda: disjoint_merge(deltas_NS, WEIGHTS, "total", lambda: 1, normalize=True),
        lambda: disjoint_merge(deltas_NS, WEIGHTS, "total", lambda: -1, normalize=False),
        lambda: trim_to_largest(deltas_NS, 0, cutoffs.double()),
        lambda: [largest_cutoff(delta_S, keep_count(0.4, size)) for delta_S in deltas_NS],
        lambda: uniform(stream_key(1, 2, "a"), size, 3 * size),
    ):
        defined, compiled = both(compute)
        assert defined == compiled


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", SIZES)
def test_a_delta_is_added_the_same_by_kernel_and_definition(size, dtype):
    base_S = deltas_of(size, torch.float64)[0]
    client_S = deltas_of(size)[1].clamp(-6e4, 6e4).to(dtype)

    def added():
        total_S = base_S * 0.5
        add_scaled_delta(total_S, base_S, client_S, 0.3)
        return total_S

    defined, compiled = both(added)
    assert defined == compiled


@given(
    st.lists(st.sampled_from([*SPECIAL, 2.0, 3.0, -3.0, 0.25]), min_size=1, max_size=40),
    st.floats(0.001, 1.0),
)
def test_selection_by_counting_is_selection_by_sorting(values, density):
    delta_S = torch.tensor(values)
    count = keep_count(density, len(values))
    defined, compiled = both(lambda: largest_cutoff(delta_S, count))
    assert defined == compiled
    order = sorted(range(len(values)), key=lambda i: (-abs(np.float32(values[i])), i))
    kept = trim_to_largest(delta_S[None], 0, torch.tensor([compiled], dtype=torch.float64))[0]
    assert {i for i in order[:count] if values[i] != 0} == {i for i, value in enumerate(kept.tolist()) if value != 0}


def test_deltas_that_cancel_take_the_tensors_majority():
    deltas_NS = torch.tensor([[1.0, 2.0], [-1.0, 2.0]])
    half = torch.tensor([0.5, 0.5], dtype=torch.float64)
    defined, compiled = both(lambda: disjoint_merge(deltas_NS, half, "total", lambda: 1, normalize=True))
    assert defined == compiled == bits(torch.tensor([1.0, 2.0]))


@pytest.mark.parametrize("name", list(METHODS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_method_gives_the_same_bits_with_and_without_kernels(name, dtype):
    generator = torch.Generator().manual_seed(3)
    base = {
        "a": torch.randn(40_000, generator=generator).to(dtype),
        "b": torch.randn(7, 5, generator=generator).to(dtype),
    }
    clients = [
        {key: tensor + (0.1 * torch.randn(tensor.shape, generator=generator)).to(dtype) for key, tensor in base.items()}
        for _ in range(3)
    ]
    defined, compiled = both(lambda: merge(name, base, clients, weights=[1, 2, 3], seed=7))
    assert defined == compiled


def test_small_merges_do_not_load_them():
    code = (
        "import sys, torch; from fl_merge import merge; z = torch.zeros(1000); "
        "merge('ties', {'a': z}, [{'a': z + 1}, {'a': z - 2}]); print('numba' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_without_numba_there_is_one_notice_and_the_definitions_serve(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "fl_merge.kernels.compiled", None)
    monkeypatch.delattr(kernels, "compiled", raising=False)
    kernels._tried, kernels._module = False, None
    with caplog.at_level(logging.WARNING, "fl_merge"):
        assert kernels.load() is None
        assert kernels.load() is None
    assert len(caplog.records) == 1
    assert "without compiled kernels" in caplog.text
    assert weighted_sum(torch.ones(2, 3), torch.tensor([0.5, 0.5], dtype=torch.float64)).tolist() == [1.0] * 3


def test_they_can_be_switched_off(monkeypatch):
    monkeypatch.setenv("FL_MERGE_NO_KERNELS", "1")
    kernels._tried, kernels._module = False, None
    assert kernels.load() is None


def test_numba_that_finds_no_place_for_its_cache_is_one_notice_too(monkeypatch, caplog):
    """On a read-only machine numba raises a RuntimeError while it is decorating, not an ImportError."""
    import numba

    def no_locator(*arguments, **options):
        raise RuntimeError("cannot cache function: no locator available")

    monkeypatch.delitem(sys.modules, "fl_merge.kernels.compiled", raising=False)
    monkeypatch.delattr(kernels, "compiled", raising=False)
    monkeypatch.setattr(numba, "njit", no_locator)
    kernels._tried, kernels._module = False, None
    with caplog.at_level(logging.WARNING, "fl_merge"):
        assert kernels.load() is None
    assert "no locator available" in caplog.text
