"""The compiled passes equal their torch definitions, bit for bit."""

from __future__ import annotations

import logging
import math
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fl_merge import METHODS, build, kernels, merge
from fl_merge.cutoffs import Part, largest_cutoffs
from fl_merge.errors import MergeError
from fl_merge.kernels.networks import sorting_network
from fl_merge.kernels.passes import Inputs, largest_magnitude
from fl_merge.kernels.rows import Rows, largest_of_products
from fl_merge.kernels.series import MANY
from fl_merge.methods import (
    breadcrumbs,
    breadcrumbs_ties,
    bulyan,
    consensus,
    dare_linear,
    dare_ties,
    della,
    della_linear,
    emr,
    fedgma,
    magmax,
    median,
    pcb,
    sce,
    slerp,
    task_arithmetic,
    ties,
    trimmed_mean,
    weighted_average,
)
from fl_merge.ops.draws import stream_key, uniform
from fl_merge.ops.gram import BLOCK, gram_partials
from fl_merge.ops.scores import products
from fl_merge.ops.sparsify import keep_by_chance, keep_count, keep_largest, largest_cutoff, rank_chances, rank_line

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


METHODS_AND_SETTINGS = [
    weighted_average(),
    task_arithmetic(scale=-0.7, normalize=False),
    ties(density=0.3),
    ties(density=0.1, normalize=False, scale=1.7, election="frequency"),
    ties(density=1.0),
    ties(density=0.4, scope="model"),
    dare_linear(density=0.3),
    dare_linear(density=1.0, rescale=False, scale=-2.5),
    dare_ties(density=0.6),
    dare_ties(density=0.2, normalize=False, rescale=False, election="frequency"),
    slerp(),
    slerp(on="deltas", scope="model"),
    ties(density={"0": 0.1, "1": 0.9, "2": 0.5, "3": 1.0, "4": 0.2}),
    dare_ties(density={"0": 0.1, "1": 0.9, "2": 0.5, "3": 1.0, "4": 0.2}, rescale="l1"),
    median(),
    trimmed_mean(beta=0.3),
    trimmed_mean(beta=0.0),
    bulyan(f=0),
    magmax(scale=-0.7),
    emr(),
    consensus(scale=0.7, threshold=0.6),
    consensus(normalize=True, at_least=1),
    fedgma(threshold=0.6, scale=1.3),
    della(density=0.4, epsilon=0.6),
    della_linear(density={"0": 0.3, "1": 0.7, "2": 0.5, "3": 1.0, "4": 0.4}, rescale="l1"),
    della(density=0.6, rescale=False, normalize=False),
    breadcrumbs(density=0.3, gamma=0.05),
    breadcrumbs(density=0.3, gamma=0.000001),
    breadcrumbs_ties(density={"0": 0.1, "1": 0.9, "2": 0.5, "3": 1.0, "4": 0.2}, gamma=0.1),
    sce(density=0.3, scale=1.3),
    sce(density=1.0),
    sce(density=0.00001),
    pcb(density=0.3, scale=0.7),
    pcb(density=1.0),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def models(dtype: torch.dtype, sizes: dict[str, tuple[int, ...]], clients: int = 4, coarse: bool = False):
    """A base and clients; coarse ones have few different deltas, so that many are equal and many cancel."""
    generator = torch.Generator().manual_seed(3)
    base = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in sizes.items()}

    def step(shape):
        noise = torch.randn(shape, generator=generator)
        return noise.round() * 0.25 if coarse else 0.1 * noise

    updates = [{name: (tensor + step(tensor.shape)).to(dtype) for name, tensor in base.items()} for _ in range(clients)]
    return base, updates


@pytest.mark.parametrize("method", METHODS_AND_SETTINGS, ids=str)
@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_method_gives_the_same_bits_with_and_without_kernels(method, dtype, coarse):
    base, updates = models(dtype, {"a": (70_001,), "b": (7, 5), "scalar": (), "empty": (0, 3), "one": (1,)}, 4, coarse)
    defined, compiled = both(lambda: merge(method, base, updates, weights=[1, 2, 3, 1], seed=7))
    assert defined == compiled


DATA_FREE = [name for name, entry in METHODS.items() if entry.merges == "models" and not entry.sends]


@pytest.mark.parametrize("name", DATA_FREE)
def test_every_registered_method_does_at_its_defaults(name):
    base, updates = models(torch.float32, {"a": (200, 200), "b": (40_000,)}, build(name).clients.nearest(3))
    weights = range(1, 1 + len(updates))
    defined, compiled = both(lambda: merge(name, base, updates, weights=list(weights), seed=7))
    assert defined == compiled


@pytest.mark.parametrize("size", [1, 2, 31, 33, 63, 65, 511, 512, 513, 16_383, 16_384, 16_385, 32_769])
@pytest.mark.parametrize("method", [ties(density=0.2), dare_ties(density=0.5), sce(density=0.4), pcb()], ids=str)
def test_odd_sizes(method, size):
    base, updates = models(torch.bfloat16, {"a": (size,)}, 5, coarse=True)
    defined, compiled = both(lambda: merge(method, base, updates, seed=1))
    assert defined == compiled


@pytest.mark.parametrize("count", [1, 2, MANY, MANY + 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_variances_over_one_client_and_over_many(count, dtype):
    base, updates = models(dtype, {"a": (1300,)}, count, coarse=True)
    updates[0]["a"][:40] = 3e29
    defined, compiled = both(lambda: merge(sce(density=0.4), base, updates, seed=1))
    assert defined == compiled


@pytest.mark.parametrize("method", METHODS_AND_SETTINGS, ids=str)
def test_slices_and_threads_change_no_bit(method):
    base, updates = models(torch.bfloat16, {"a": (5 * 16_384 + 77,), "b": (1000,)}, 4, coarse=True)
    assert kernels.load() is not None
    results = [
        bits(merge(method, base, updates, seed=7, threads=threads, slice_elements=slice_elements))
        for threads, slice_elements in [(1, None), (2, 16_384), (3, 16_384), (2, 32_768), (1, 49_152)]
    ]
    assert all(result == results[0] for result in results)


@pytest.mark.parametrize(
    "method",
    [weighted_average(), ties(density=0.3), dare_linear(density=0.5), sce(density=0.4), pcb(), median()],
    ids=str,
)
def test_clients_in_other_dtypes_places_and_orders(method):
    """A float16 and a float64 client of a bfloat16 base, a transposed one, an 8-bit one, one at an odd address."""
    base, updates = models(torch.float32, {"a": (300, 70)}, 5)
    base = {"a": base["a"].bfloat16()}
    odd = torch.frombuffer(bytearray(1 + 21_000 * 4), dtype=torch.uint8)
    odd[1:] = updates[4]["a"].view(-1).view(torch.uint8)
    misaligned = torch.frombuffer(odd.numpy().data, dtype=torch.float32, offset=1, count=21_000).view(300, 70)
    given_updates = [
        {"a": updates[0]["a"].half()},
        {"a": updates[1]["a"].double() + 1e-12},
        {"a": updates[2]["a"].T.contiguous().T},
        {"a": updates[3]["a"].to(torch.float8_e4m3fn)},
        {"a": misaligned},
    ]
    defined, compiled = both(lambda: merge(method, base, given_updates, seed=3))
    assert defined == compiled


@pytest.mark.parametrize("method", METHODS_AND_SETTINGS, ids=str)
def test_zeros_denormals_and_the_largest_values(method):
    base = {"w": torch.tensor([*SPECIAL, *SPECIAL])}
    updates = [{"w": torch.tensor([*SPECIAL, *SPECIAL]).roll(shift)} for shift in (0, 1, 3, 5)]
    defined, compiled = both(lambda: merge(method, base, updates, seed=3))
    assert defined == compiled


def cutoffs(kernel_module, base_S, clients, count, piece=16_384):
    parts = [Part(Rows(Inputs(kernel_module, base_S, clients)), 0)]
    return largest_cutoffs(parts, [(client, count) for client in range(len(clients))], map, piece)


def kept_by(cut, delta_S):
    return keep_largest(delta_S, torch.arange(delta_S.numel()), float(cut[0]), int(cut[1]))


@given(
    st.lists(st.sampled_from([*SPECIAL, 2.0, 3.0, -3.0, 0.25]), min_size=1, max_size=40),
    st.floats(0.001, 1.0),
)
def test_selection_by_counting_is_selection_by_sorting(values, density):
    delta_S = torch.tensor(values)
    count = keep_count(density, len(values))
    module = kernels.load()
    assert module is not None
    cut = cutoffs(module, torch.zeros_like(delta_S), [delta_S], count)[0]
    order = sorted(range(len(values)), key=lambda i: (-abs(np.float32(values[i])), i))
    kept = kept_by(cut, delta_S)
    assert {i for i in order[:count] if values[i] != 0} == {i for i, value in enumerate(kept.tolist()) if value != 0}


@pytest.mark.parametrize("density", [0.001, 0.2, 0.5, 0.9, 0.99999])
@pytest.mark.parametrize("kind", ["normal", "coarse", "sparse", "equal", "sorted", "one row is large", "two scales"])
def test_samples_that_mislead_change_nothing(kind, density):
    """What is found by a sample, whatever the sample is like, is what sorting finds."""
    size = 200_003
    delta_S = torch.randn(size, generator=torch.Generator().manual_seed(1))
    if kind == "coarse":
        delta_S = delta_S.round()
    elif kind == "sparse":
        delta_S *= torch.rand(size, generator=torch.Generator().manual_seed(2)) < 0.01
    elif kind == "equal":
        delta_S = torch.full((size,), 0.5)
    elif kind == "sorted":
        delta_S = delta_S.sort().values
    elif kind == "one row is large":
        delta_S[1000:60_000] *= 1000
    elif kind == "two scales":
        delta_S[::2] *= 1e-8
    module = kernels.load()
    assert module is not None
    count = keep_count(density, size)
    for cut in cutoffs(module, torch.zeros(size), [delta_S, delta_S], count):
        wanted = kept_by(largest_cutoff(delta_S, count), delta_S)
        assert torch.equal(kept_by(cut, delta_S), wanted)
        assert int((wanted != 0).sum()) <= count


def test_what_is_written_down_of_a_delta_has_a_limit(monkeypatch):
    """Half of the elements do not move: all of them are on the cut. Beyond the limit histograms find it."""
    size = 300_000
    delta_S = torch.randn(size, generator=torch.Generator().manual_seed(1))
    delta_S[:150_000] = 0
    module = kernels.load()
    assert module is not None
    parts = [Part(Rows(Inputs(module, torch.zeros(size), [delta_S, delta_S])), 0)]
    kept = []
    between = Rows.between
    monkeypatch.setattr(Rows, "between", lambda *args: kept.append(found := between(*args)) or found)
    for room in (1 << 24, 20_000):
        monkeypatch.setattr("fl_merge.cutoffs._ROOM", room)
        kept.clear()
        count = keep_count(0.5, size) - 3
        for cut in largest_cutoffs(parts, [(0, count), (1, count)], map, 65_536):
            assert torch.equal(kept_by(cut, delta_S), kept_by(largest_cutoff(delta_S, count), delta_S))
        assert sum(int(found.used_R.sum()) for found in kept) <= 2 * room
    assert len(kept) > len(range(0, size, 65_536))  # it was gone through again


def test_nothing_is_compiled_while_a_merge_runs(monkeypatch):
    """All passes are compiled when they are loaded, with the notice: a merge may not meet new types of arguments."""
    module = kernels.load()
    assert module is not None
    passes = [getattr(module, name) for name in module.__all__ if hasattr(getattr(module, name), "signatures")]
    known = [len(each.signatures) for each in passes]
    monkeypatch.setattr("fl_merge.kernels.rows.ROOM", -4_000)  # hardly any: what is between does not find it at once
    draw = torch.Generator().manual_seed(0)
    base = {"w": torch.randn(70_000, generator=draw).bfloat16(), "m": torch.randn(300, 70, generator=draw).bfloat16()}
    updates = [{name: tensor + 0.1 * torch.randn(tensor.shape).bfloat16() for name, tensor in base.items()}] * 5
    for method in METHODS_AND_SETTINGS:
        for slice_elements in (16_384, None):
            merge(method, base, updates, slice_elements=slice_elements)
    assert [len(each.signatures) for each in passes] == known


def test_a_draws_value_that_does_not_fit_is_no_error_if_the_other_sign_wins():
    base = {"w": torch.tensor([65472.0, *[0.0] * 9]).half()}
    updates = [{"w": torch.tensor([value, *[-1.0] * 9]).half()} for value in (65504.0, 65440.0)]
    defined, compiled = both(lambda: merge(ties(density=1.0, scale=3.0), base, updates))
    assert defined == compiled
    updates = [{"w": torch.tensor([value, *[1.0] * 9]).half()} for value in (65504.0, 65440.0)]
    messages = []
    for module in (None, kernels.load()):
        kernels._tried, kernels._module = True, module
        with pytest.raises(MergeError, match="magnitude 65568 does not fit float16") as raised:
            merge(ties(density=1.0, scale=3.0), base, updates)
        messages.append(str(raised.value))
    assert messages[0] == messages[1]


def test_addresses_are_taken_of_what_can_be_read_through_them_only():
    module = kernels.load()
    assert module is not None
    good_S = torch.zeros(10)
    for bad_S in (
        torch.zeros(9),
        torch.zeros(20)[::2],
        torch.zeros(10, device="meta"),
        torch.zeros(10).to(torch.int32),
    ):
        with pytest.raises(ValueError, match=r"elements|cannot be read"):
            Inputs(module, good_S, [bad_S])
        with pytest.raises(ValueError, match="is no place for 10 elements"):
            Inputs(module, good_S, [good_S]).weighted_sum(1.0, [1.0], 0, 10, bad_S)


def test_numba_that_cannot_compile_or_keep_is_noticed_when_the_passes_are_loaded(monkeypatch, caplog):
    def full_disk(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fl_merge.kernels.rows.warm_up", full_disk)
    kernels._tried, kernels._module = False, None
    with caplog.at_level(logging.WARNING, "fl_merge"):
        assert kernels.load() is None
    assert "No space left" in caplog.text


def test_what_was_compiled_is_thrown_away_when_a_part_has_changed():
    from fl_merge.kernels import blocks, merging

    stamp = merging.weighted_sum._cache._cache_file._source_stamp
    assert stamp[1] == blocks._PARTS


def test_elements_behind_three_gigabytes(tmp_path):
    """Places are 64-bit: the last elements of a tensor of 3.3 GB, nearly all of which is a hole in the file."""
    size = 3_300_000_000 // 2
    arrays = []
    for name in ("base", "one", "two"):
        path = tmp_path / name
        with open(path, "wb") as file:
            file.truncate(2 * size)
        arrays.append(np.memmap(path, dtype=np.uint16, mode="r+"))
    tail = 5000
    base_S, updates = models(torch.bfloat16, {"a": (tail,)}, 2)
    for array, values in zip(arrays, [base_S["a"], *(update["a"] for update in updates)], strict=True):
        array[-tail:] = values.view(torch.uint16).numpy()
    tensors = [torch.from_numpy(array).view(torch.bfloat16) for array in arrays]
    module = kernels.load()
    assert module is not None
    inputs = Inputs(module, tensors[0], tensors[1:])
    out_S = torch.empty(tail, dtype=torch.bfloat16)
    inputs.weighted_sum(1.0, [0.5, 0.5], size - tail, size, out_S)
    assert bits(out_S) == bits(merge(weighted_average(), base_S, updates)["a"])
    cut = torch.tensor([[0.05, size - 2500.0]] * 2, dtype=torch.float64)
    inputs.prune_combine(
        torch.tensor([0.5, 0.5]), cutoffs_N2=cut, election="total", start=size - tail, stop=size, out_S=out_S
    )
    near = Inputs(module, base_S["a"], [update["a"] for update in updates])
    near_S = torch.empty_like(out_S)
    cut[:, 1] -= size - tail
    near.prune_combine(torch.tensor([0.5, 0.5]), cutoffs_N2=cut, election="total", start=0, stop=tail, out_S=near_S)
    assert bits(out_S) == bits(near_S)
    keys = [stream_key("a"), stream_key("b")]
    inputs.prune_combine(
        torch.tensor([0.5, 0.5]), keys_N=keys, density_N=[0.5] * 2, start=size - tail, stop=size, out_S=out_S
    )
    kept = torch.stack([uniform(key, size - tail, size) < 0.5 for key in keys])
    deltas = torch.stack([update["a"].float() - base_S["a"].float() for update in updates]) * kept
    assert bits(out_S) == bits((base_S["a"].float() + (deltas[0] * 0.5 + deltas[1] * 0.5)).bfloat16())


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_magnitude(dtype):
    module = kernels.load()
    assert module is not None
    values_S = torch.tensor([0.5, -3.0, 1e-3, -0.0], dtype=dtype)
    assert largest_magnitude(module, values_S, 0, 4) == 3.0
    assert largest_magnitude(module, values_S, 2, 4) == float(values_S[2])
    assert largest_magnitude(module, values_S, 3, 3) == 0.0
    assert largest_magnitude(module, values_S / 0, 0, 3) == float("inf")
    assert np.isnan(largest_magnitude(module, values_S * float("nan"), 0, 3))


def test_draws():
    defined, compiled = both(lambda: uniform(stream_key(1, 2, "a"), 7, 3001))
    assert defined == compiled


def test_small_merges_do_not_load_them():
    code = (
        "import sys, torch; from fl_merge import merge; z = torch.zeros(1000); "
        "merge('ties', {'a': z}, [{'a': z + 1}, {'a': z - 2}]); print('numba' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_a_processor_without_float16_is_noticed_and_not_the_end_of_the_process():
    code = "from fl_merge import kernels; print(kernels.load())"
    environment = os.environ | {"NUMBA_CPU_NAME": "generic"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == "None\n"
    assert "does not convert float16" in done.stderr


def test_without_numba_there_is_one_notice_and_the_definitions_serve(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "fl_merge.kernels.compiled", None)
    monkeypatch.delattr(kernels, "compiled", raising=False)
    kernels._tried, kernels._module = False, None
    with caplog.at_level(logging.WARNING, "fl_merge"):
        assert kernels.load() is None
        assert kernels.load() is None
    assert len(caplog.records) == 1
    assert "without compiled kernels" in caplog.text
    assert merge("weighted_average", {"a": torch.zeros(3)}, [{"a": torch.ones(3)}])["a"].tolist() == [1.0] * 3


def test_they_can_be_switched_off(monkeypatch):
    monkeypatch.setenv("FL_MERGE_NO_KERNELS", "1")
    kernels._tried, kernels._module = False, None
    assert kernels.load() is None


def test_numba_that_finds_no_place_for_its_cache_is_one_notice_too(monkeypatch, caplog):
    """On a read-only machine numba raises a RuntimeError while it is decorating, not an ImportError."""
    import numba

    def no_locator(*arguments, **options):
        raise RuntimeError("cannot cache function: no locator available")

    for name in ("compiled", "counting", "merging", "blocks"):
        monkeypatch.delitem(sys.modules, f"fl_merge.kernels.{name}", raising=False)
        monkeypatch.delattr(kernels, name, raising=False)
    monkeypatch.setattr(numba, "njit", no_locator)
    kernels._tried, kernels._module = False, None
    with caplog.at_level(logging.WARNING, "fl_merge"):
        assert kernels.load() is None
    assert "no locator available" in caplog.text


def test_loading_that_takes_long_says_why(monkeypatch, caplog):
    from fl_merge.kernels import rows

    monkeypatch.delenv("FL_MERGE_NO_KERNELS", raising=False)
    monkeypatch.setattr(kernels, "NOTICE_AFTER", 0.05)
    monkeypatch.setattr(rows, "warm_up", lambda _: time.sleep(0.5))
    kernels._tried, kernels._module = False, None
    with caplog.at_level(logging.WARNING, logger="fl_merge"):
        assert kernels.load() is not None
    assert [record.message for record in caplog.records if "the first time on a machine" in record.message]


@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 400),
    st.sampled_from(["few", "near", "all", "equal", "magnitudes"]),
    st.floats(0.0, 1.0),
)
def test_the_value_at_a_rank_is_that_of_sorting(seed, size, kind, where):
    draw = np.random.default_rng(seed)
    values_M = {
        "few": lambda: draw.integers(0, 5, size),
        "near": lambda: draw.integers(10**6, 10**6 + 3000, size),
        "all": lambda: draw.integers(0, 2**32 - 1, size),
        "equal": lambda: np.full(size, 7),
        "magnitudes": lambda: np.abs(draw.standard_normal(size)).astype(np.float32).view(np.uint32),
    }[kind]().astype(np.uint32)
    rank = 1 + round(where * (size - 1))
    module = kernels.load()
    assert module is not None
    other = 1 + size // 3
    found_2N = np.zeros((2, 1), np.uint32)
    module.select_two(values_M[None], np.zeros(1, np.int64), np.array([[rank], [other]]), found_2N)
    assert found_2N[:, 0].tolist() == [np.sort(values_M)[size - each] for each in (rank, other)]
    limits = np.array([values_M.min()]), np.array([values_M.max()])
    none_R, marks_RX = np.zeros(1, np.int64), np.zeros((1, 1), np.int64)
    bits_R, block_R, nth_R = np.zeros(1, np.uint32), np.zeros(1, np.int64), np.zeros(1, np.int64)
    module.find_cuts(
        np.array([rank]), *limits, values_M[None], none_R, np.array([size]), marks_RX, bits_R, block_R, nth_R
    )
    assert bits_R[0] == np.sort(values_M)[size - rank]
    assert (block_R[0], nth_R[0]) == (0, rank - np.count_nonzero(values_M > bits_R[0]))


def test_a_cut_through_tensors_too_short_to_be_sampled():
    draw = torch.Generator().manual_seed(4)
    base = [torch.zeros(40) for _ in range(900)]
    client = [torch.randn(40, generator=draw) for _ in range(900)]
    module = kernels.load()
    assert module is not None
    parts = [
        Part(Rows(Inputs(module, base_S, [client_S])), 40 * place)
        for place, (base_S, client_S) in enumerate(zip(base, client, strict=True))
    ]
    (found_2,) = largest_cutoffs(parts, [(0, 5000)], map, 1 << 15)
    assert tuple(found_2.tolist()) == largest_cutoff(torch.cat(client), 5000)


def test_sorting_networks_sort():
    """A network that sorts zeros and ones sorts everything (Knuth): all of these up to 10 values, and random ones."""
    for count in range(1, 11):
        for bits_of_all in range(1 << count):
            assert_sorts([bits_of_all >> at & 1 for at in range(count)])
    draw = np.random.default_rng(0)
    for count in (11, 16, 17, 31, 64, 100):
        for _ in range(50):
            assert_sorts(draw.integers(0, 2, count).tolist())


def assert_sorts(values):
    found = list(values)
    for one, two in sorting_network(len(values)).tolist():
        assert one < two
        found[one], found[two] = min(found[one], found[two]), max(found[one], found[two])
    assert found == sorted(values)


@pytest.mark.parametrize("clients", [*range(1, 18), 40])
@pytest.mark.parametrize("method", [median(), bulyan(f=0), trimmed_mean(beta=0.0), magmax()], ids=str)
def test_any_number_of_clients(method, clients):
    base, updates = models(torch.bfloat16, {"a": (3000,)}, clients, coarse=True)
    defined, compiled = both(lambda: merge(method, base, updates))
    assert defined == compiled


@pytest.mark.parametrize("clients", [1, 2, 40, 135])
@pytest.mark.parametrize("power", [0, -60, -133, 80])
def test_balances_of_any_number_of_clients_and_any_size(clients, power):
    """So many clients that powers of 2 are beyond float32, so small deltas that their reciprocals are; both with one
    client that has not moved and one that is larger than all others."""
    base, updates = models(torch.float32, {"a": (1500,)}, clients, coarse=True)
    base["a"].zero_()
    for update in updates:
        update["a"] *= 2.0**power
    updates[-1]["a"].mul_(1000.0 if power else 0.0)
    defined, compiled = both(lambda: merge(pcb(density=0.4), base, updates))
    assert defined == compiled


def test_products_that_only_float64_has():
    """Of such tensors no product is passed over by its float32."""
    for power in (-140, -70, 70, 110):
        deltas = torch.randn(3, 5000, generator=torch.Generator().manual_seed(2)) * 2.0**power
        module = kernels.load()
        found_K = largest_of_products(Inputs(module, torch.zeros(5000), list(deltas)), 0, 5000)
        wanted_N = products(deltas).abs().amax(dim=1)
        assert torch.equal(found_K, torch.cat([deltas.abs().amax(dim=1).double(), wanted_N]))
        assert wanted_N.float().isinf().any() or (wanted_N.float() < 1e-38).any()


@pytest.mark.parametrize("method", [bulyan(f=1), bulyan(f=2), trimmed_mean(beta=0.2)], ids=str)
@pytest.mark.parametrize("coarse", [False, True])
def test_robust_methods_with_attackers(method, coarse):
    base, updates = models(torch.float32, {"a": (130, 129), "b": (77,)}, 12, coarse)
    updates[3]["a"] += 100.0
    updates[7]["b"] -= 1e20
    defined, compiled = both(lambda: merge(method, base, updates))
    assert defined == compiled


@pytest.mark.parametrize("on", ["deltas", "weights"])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 9])
@pytest.mark.parametrize("size", [1, 15, 1024, 1025, 5000, 16_384, 40_000])
def test_inner_products_are_added_in_the_order_of_their_definition(size, count, on):
    base, updates = models(torch.bfloat16, {"a": (size,)}, count)
    compiled = kernels.load()
    assert compiled is not None
    found_XNN = torch.empty(math.ceil(size / BLOCK), count, count, dtype=torch.float64)
    Inputs(compiled, base["a"], [update["a"] for update in updates]).gram(on, 0, size, found_XNN)
    vectors_NS = torch.stack([update["a"].float() - (base["a"].float() if on == "deltas" else 0) for update in updates])
    assert torch.equal(found_XNN, gram_partials(vectors_NS))


@pytest.mark.parametrize(
    "shape",
    [
        (7, 1),
        (700, 2),
        (9, 16),
        (9, 17),
        (50, 49),
        (40, 64),
        (40, 65),
        (9, 79),
        (9, 144),
        (3, 5001),
        (1, 40_000),
        (6, 3, 5, 5),
        (301,),
        (1,),
        (0, 5),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("coarse", [False, True])
def test_ranks_within_rows_of_any_length(shape, dtype, coarse):
    base, updates = models(dtype, {"a": shape}, 3, coarse)
    defined, compiled = both(lambda: merge(della(density=0.5, epsilon=0.9), base, updates, seed=4))
    assert defined == compiled


@pytest.mark.parametrize("row", [33, 301])
@pytest.mark.parametrize(
    "kind", ["one is large", "few differ", "half are zero", "geometric", "denormal", "zero", "all equal", "huge"]
)
def test_ranks_of_magnitudes_that_are_not_spread_over_their_range(kind, row):
    """Most of a row is in few classes, or in the last one, or in all of them."""
    noise = torch.randn(3, 40, row, generator=torch.Generator().manual_seed(5))
    if kind == "one is large":
        noise[..., 7] = 1e20
    elif kind == "few differ":
        noise = noise.round()
    elif kind == "half are zero":
        noise[torch.rand(noise.shape, generator=torch.Generator().manual_seed(6)) < 0.5] = 0.0
    elif kind == "geometric":
        noise = torch.exp2(20 * noise)
    elif kind == "denormal":
        noise *= 1e-44
    elif kind == "zero":
        noise *= 0
    elif kind == "all equal":
        noise = noise.sign()
    elif kind == "huge":
        noise *= 1e28
    base = {"a": torch.zeros(40, row)}
    updates = [{"a": each} for each in noise]
    for method in (della_linear(density=0.5, epsilon=0.9), della(density=0.5, epsilon=0.3, election="frequency")):
        defined, compiled = both(lambda method=method: merge(method, base, updates, seed=4))
        assert defined == compiled


@pytest.mark.parametrize("density", [1e-9, 1e-4, 0.999, 1.0])
@pytest.mark.parametrize("rescale", [True, False, "l1"])
def test_ranks_at_the_least_and_the_greatest_chances(density, rescale):
    """Below 2^-8 a chance of float32 is no whole number of draws; at 1 every draw keeps."""
    base, updates = models(torch.float32, {"a": (300, 301)}, 3)
    for epsilon in (0.0, 1.9 * min(density, 1 - density)):
        method = della_linear(density=density, epsilon=epsilon, rescale=rescale)
        defined, compiled = both(lambda method=method: merge(method, base, updates, seed=4))
        assert defined == compiled


def test_ranks_in_pieces_and_threads():
    """Pieces are whole rows; draws that nobody wins are kept apart by piece."""
    base, updates = models(torch.bfloat16, {"a": (130, 333), "b": (9001,), "c": (2000, 7)}, 4, True)
    method = della(density={"0": 0.3, "1": 1.0, "2": 0.5, "3": 0.6}, epsilon=0.3)
    defined, compiled = both(
        lambda: [
            merge(method, base, updates, seed=4, slice_elements=size, threads=threads)
            for size, threads in ((16_384, 1), (16_384, 3), (10**9, 2))
        ]
    )
    assert [bits(each) for each in defined] == [bits(each) for each in compiled]
    assert bits(defined[0]) == bits(defined[1]) == bits(defined[2])


@pytest.mark.parametrize("row", [40, 80])
def test_ranks_where_a_difference_is_infinite(row):
    """Of finite numbers of opposite signs: nothing else is in its class, and what is far below is in the last."""
    base_S = torch.full((160,), 3e38)
    client_S = base_S.clone()
    client_S[5] = -3e38
    client_S[100:] *= torch.linspace(0.5, 1.0, 60)
    module = kernels.load()
    assert module is not None
    delta_1S = (client_S - base_S)[None]
    assert delta_1S.isinf().any()
    out_S, weights_N = torch.empty(160), torch.ones(1, dtype=torch.float64)
    ranks = {"row": row, "keys_N": [7], "lines_N2": [rank_line(0.5, 0.4, row)], "divisor_N": None}
    Inputs(module, base_S, [client_S]).rank_combine(weights_N, **ranks, start=0, stop=160, out_S=out_S)
    drawn_S = np.empty(160)
    module.uniform(np.uint64(7), 0, drawn_S)
    chance_1S = rank_chances(delta_1S, row, [0.5], 0.4)
    wanted_1S = keep_by_chance(delta_1S, torch.from_numpy(drawn_S)[None], chance_1S, rescale=True)
    assert bits(out_S) == bits(base_S + wanted_1S[0])
