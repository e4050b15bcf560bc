"""The properties of every method for adapters: identities, gauge, order and threads; a new one is in by being there."""

import pytest
import torch
from battery import identity_variants, settings_text
from random_adapters import PREFIX, adapter, config, distance, of_adapter, products, tensors

from fl_merge import METHODS, build
from fl_merge.adapters import Adapter, merge_adapters
from fl_merge.running_products import RunningProducts
from fl_merge.types import Update

ENTRIES = [entry for entry in METHODS.values() if entry.merges == "adapters"]

ONES = [
    *((entry.name, settings) for entry in ENTRIES for settings in identity_variants(entry)),
    ("lora_svd", {"energy": 1.0}),
    ("lora_svd", {"tolerance": 0.0}),
]
"""With which one adapter comes back: of every entry its identity with every choice. test_every_method_on_products.py
has the same for each method inside of lora_merge."""

ALL = [
    *ONES,
    *(
        ("lora_merge", {"method": method, "space": space})
        for space in ("full", "knots", "core")
        for method in ("ties", "dare_linear", "slerp", "tsv_m")
    ),
]


def ids(cases):
    return [f"{name}-{settings_text(settings)}" for name, settings in cases]


PATTERNS = [
    {},
    {"use_rslora": True},
    {"rank_pattern": {"up": 7}, "alpha_pattern": {r"layers\.1\.down": 2}},
    {"use_rslora": True, "rank_pattern": {"up": 2}, "alpha_pattern": {"up": 16}},
]


def with_patterns(name, seed, settings):
    ranks = {"layers.0.up": settings["rank_pattern"]["up"]} if "rank_pattern" in settings else None
    return Adapter.of(name, config(**settings), tensors(seed, ranks=ranks))


def test_all_are_tried():
    assert {name for name, _ in ONES} == {entry.name for entry in ENTRIES}


@pytest.mark.parametrize("patterns", PATTERNS, ids=["plain", "rslora", "patterns", "both"])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(("name", "settings"), ONES, ids=ids(ONES))
def test_identical_adapters_give_that_adapter(name, settings, count, patterns):
    one = with_patterns("x", 1, patterns)
    clients = {str(i): one for i in range(count)}
    merged = merge_adapters(build(name, **settings), clients, [1.0 + i for i in range(count)], threads=1)
    assert distance(products(merged.tensors), of_adapter(one)) < 1e-6
    assert not any(tensor.any() for tensor in merged.residual.values() if tensor.numel()), "nothing is left over"


@pytest.mark.parametrize("patterns", PATTERNS, ids=["plain", "rslora", "patterns", "both"])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_identical_adapters_as_a_running_sum_give_that_adapter(count, patterns):
    """Seven of them are more than is held at once: what is cut on the way is zero but for rounding."""
    one = with_patterns("x", 1, patterns)
    running = RunningProducts(7, one.plain)
    for client in range(count):
        running.add(Update(str(client), 1.0 + client, one.plain))
    total = running.total().tensors
    assert distance(products({name: total.read(name) for name in total.specs()}), of_adapter(one)) < 1e-6


@pytest.mark.parametrize(("name", "settings"), ALL, ids=ids(ALL))
def test_order_and_threads_do_not_matter(name, settings):
    """Where a factor is frozen the clients have it in common."""
    clients = {"9": adapter("9", 1), "10": adapter("10", 2), "11": adapter("11", 3)}
    frozen = {"A": "lora_B", "B": "lora_A"}.get(settings.get("share"))
    if frozen is not None:
        common = {key: tensor for key, tensor in tensors(1).items() if frozen in key}
        clients = {key: Adapter.of(key, config(), {**tensors(int(key)), **common}) for key in clients}
    method = build(name, **settings)
    weights = {"9": 3.0, "10": 1.0, "11": 2.0}
    wanted = merge_adapters(method, clients, weights, threads=1)
    for order, threads in [(["11", "10", "9"], 3), (["10", "9", "11"], 2), (["9", "11", "10"], 1)]:
        found = merge_adapters(method, {key: clients[key] for key in order}, weights, threads=threads)
        assert found.manifest == wanted.manifest
        for key, tensor in wanted.tensors.items():
            assert torch.equal(found.tensors[key], tensor), key


def turned(one, seed):
    """The same products by other factors: (B Q, Q^T A), then one factor large and the other small."""
    draw = torch.Generator().manual_seed(seed)
    found = {}
    for name in one:
        if name.endswith("lora_A.weight"):
            b = name.replace("lora_A", "lora_B")
            q, _ = torch.linalg.qr(torch.randn(len(one[name]), len(one[name]), generator=draw, dtype=torch.float64))
            found[name] = (q.T @ one[name].double() / 7.0).float()
            found[b] = (one[b].double() @ q * 7.0).float()
    return found


INVARIANT = [
    ("lora_stack", {}),
    ("lora_svd", {"rank": 3}),
    *(
        ("lora_merge", {"method": method, "settings": settings, "space": space, "rank": 12})
        for space in ("full", "knots", "core")
        for method, settings in [
            ("ties", {"density": 1.0}),
            ("fedgma", {}),
            ("slerp", {}),
            ("weighted_average", {}),
            ("task_arithmetic", {"scale": 0.3, "normalize": False}),
        ]
    ),
]


@pytest.mark.parametrize(("name", "settings"), INVARIANT, ids=lambda value: str(value))
def test_the_result_does_not_depend_on_how_a_client_splits_its_product(name, settings):
    plain = [tensors(seed) for seed in (1, 2, 3)]
    other = [plain[0], turned(plain[1], 5), turned(plain[2], 6)]
    results = []
    for each in (plain, other):
        adapters = [Adapter.of(str(i), config(), one) for i, one in enumerate(each)]
        results.append(products(merge_adapters(build(name, **settings), adapters, [3, 1, 2]).tensors))
    assert distance(results[1], results[0]) < 1e-5


def test_the_mean_of_factors_does_depend_on_it():
    """What the documentation says of FedIT: the same adapters, split otherwise, average to something else."""
    plain = [tensors(1), tensors(2)]
    other = [plain[0], turned(plain[1], 5)]
    results = [
        products(
            merge_adapters(
                "lora_factor_mean", [Adapter.of(str(i), config(), one) for i, one in enumerate(each)]
            ).tensors
        )
        for each in (plain, other)
    ]
    assert distance(results[1], results[0]) > 0.5


def test_values_are_not_modified_and_float64_stays():
    given = tensors(1, dtype=torch.float64)
    before = {name: tensor.clone() for name, tensor in given.items()}
    merged = merge_adapters("lora_stack", [Adapter.of("a", config(), given), adapter("b", 2, dtype=torch.float64)])
    assert all(torch.equal(given[name], before[name]) for name in given)
    assert {tensor.dtype for tensor in merged.tensors.values()} == {torch.float64}
    assert f"{PREFIX}layers.0.q.lora_A.weight" in merged.tensors
