"""Adapters without a model: configurations and factors made up for tests."""

import torch

from fl_merge.adapters import Adapter

PREFIX = "base_model.model."
SIZES = {"layers.0.q": (40, 30), "layers.0.up": (64, 30), "layers.1.down": (30, 64)}


def config(rank=4, alpha=8, **settings):
    return {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": ["q", "up", "down"], **settings}


def tensors(seed, rank=4, dtype=torch.float32, sizes=SIZES, ranks=None):
    draw = torch.Generator().manual_seed(seed)
    found = {}
    for module, (outputs, inputs) in sizes.items():
        r = (ranks or {}).get(module, rank)
        found[f"{PREFIX}{module}.lora_A.weight"] = torch.randn(r, inputs, generator=draw).to(dtype)
        found[f"{PREFIX}{module}.lora_B.weight"] = torch.randn(outputs, r, generator=draw).to(dtype)
    return found


def adapter(name, seed, rank=4, alpha=8, dtype=torch.float32, sizes=SIZES, ranks=None, **settings):
    if ranks:
        settings = {"rank_pattern": dict(ranks), **settings}
    return Adapter.of(name, config(rank, alpha, **settings), tensors(seed, rank, dtype, sizes, ranks))


def products(tensors):
    """The product of each module's plain factors, float64."""
    return {
        name.removesuffix(".lora_A.weight"): tensors[name.replace("lora_A", "lora_B")].double() @ a.double()
        for name, a in tensors.items()
        if name.endswith("lora_A.weight")
    }


def of_adapter(adapter):
    return products({name: adapter.plain.read(name) for name in adapter.plain.specs()})


def weighted(parts, weights):
    """The weighted sum of what adapters add, by module or parameter; what one does not have is zeros."""
    found: dict = {}
    for part, weight in zip(parts, weights, strict=True):
        for name, product in part.items():
            found[name] = found.get(name, 0) + weight * product
    return found


def combined(adapters, shares):
    return weighted([of_adapter(adapter) for adapter in adapters], shares)


def distance(found, wanted):
    """The relative Frobenius distance over all modules or parameters."""
    assert found.keys() == wanted.keys(), found.keys() ^ wanted.keys()
    apart = sum(float((found[name].double() - wanted[name].double()).square().sum()) for name in wanted)
    return (apart / sum(float(tensor.double().square().sum()) for tensor in wanted.values())) ** 0.5
