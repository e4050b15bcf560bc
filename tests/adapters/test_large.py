"""A layer of 4096 x 4096, ten adapters of rank 16: how long it takes, and that nothing of the layer's size is made."""

import time

import pytest
import torch
from random_adapters import adapter, config
from torch.utils._python_dispatch import TorchDispatchMode

from fl_merge import build
from fl_merge.adapters import Adapter, merge_adapters
from fl_merge.types import BASE, CohortSpec

SIZE, RANK, CLIENTS = 4096, 16, 10
SIZES = {"layers.0.q": (SIZE, SIZE)}


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation gives."""

    def __init__(self):
        super().__init__()
        self.elements, self.operations = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.operations += 1
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@pytest.fixture(scope="module")
def adapters():
    return [adapter(str(seed), seed, RANK, 16, sizes=SIZES) for seed in range(CLIENTS)]


def in_this_thread(method, adapters):
    """What the executor does for one module, without its threads, which a dispatch mode does not see into."""
    specs = [each.plain.specs() for each in adapters]
    cohort = CohortSpec(
        specs[0], tuple(map(str, range(len(specs)))), (1 / len(specs),) * len(specs), clients_N=tuple(specs)
    )
    for output in method.plan(cohort):
        sources = [(adapters[0 if read.source == BASE else read.source].plain, read.name) for read in output.reads]
        yield output, [source.read(name) for source, name in sources]


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("lora_svd", {"rank": RANK}),
        ("lora_svd", {"energy": 0.9}),
        ("lora_stack", {}),
        ("lora_merge", {"method": "slerp"}),
        ("lora_merge", {"method": "weighted_average"}),
        ("lora_merge", {"method": "ties", "space": "core"}),
    ],
)
def test_no_matrix_of_the_layers_size_is_made(adapters, name, settings):
    work = list(in_this_thread(build(name, **settings), adapters))
    with Largest() as largest:
        for output, tensors in work:
            assert output.compute.function(*tensors).shape == output.spec.shape
    stacked = SIZE * RANK * CLIENTS
    assert largest.operations > 20
    assert SIZE * RANK <= largest.elements <= stacked
    assert largest.elements < SIZE * SIZE // 20


def test_the_trace_would_see_one(adapters):
    a, b = (adapters[0].plain.read(name) for name in adapters[0].plain.specs())
    with Largest() as largest:
        b @ a
    assert largest.elements == SIZE * SIZE


def test_it_takes_less_than_a_second(adapters):
    method = build("lora_svd", rank=RANK)
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        merged = merge_adapters(method, adapters)
        seconds.append(time.perf_counter() - started)
    assert 0 < merged.error < 1
    assert min(seconds) < 1.0, seconds


def test_an_adapter_of_a_config_that_lists_nothing_is_merged_too():
    """PEFT's own form of a target: a pattern, which is kept where it is the same everywhere."""
    tensors = {
        "base_model.model.w.lora_A.weight": torch.ones(1, 2),
        "base_model.model.w.lora_B.weight": torch.ones(3, 1),
    }
    one = Adapter.of("a", config(1, 1, target_modules=".*w"), tensors)
    assert merge_adapters("lora_svd", [one, one]).configs["0"].config.raw["target_modules"] == ".*w"
