"""Adapters of one large layer merged by fl_merge and by PEFT: prints a table of seconds and memory.

    python -m benchmarks.adapters [--size 4096] [--clients 10] [--rank 16]

The same factors go through `lora_svd` and `lora_stack`, and through PEFT's `add_weighted_adapter` with `svd` (which
decomposes the whole matrix) and `cat`. Making the adapters and loading the libraries are outside the clock. Ours is
the median of five runs; PEFT's `svd` is run once. "extra" is the peak of the process's memory above what it had
before, the two libraries in processes of their own.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch


def factors(size: int, clients: int, rank: int) -> list[dict[str, torch.Tensor]]:
    """One client's factors each."""
    draw = torch.Generator().manual_seed(0)
    return [
        {
            "base_model.model.w.lora_A.weight": torch.randn(rank, size, generator=draw),
            "base_model.model.w.lora_B.weight": torch.randn(size, rank, generator=draw),
        }
        for _ in range(clients)
    ]


def timed(work: Callable[[], Any], runs: int) -> tuple[float, float, Any]:
    """The median of the seconds, the megabytes that came to the peak of memory, and the last result."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for _ in range(runs):
        started = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, result


def ours(size: int, clients: int, rank: int) -> dict[str, Any]:
    """`lora_svd` and `lora_stack`, and a fingerprint of the product."""
    from fl_merge import build
    from fl_merge.adapters import Adapter, merge_adapters

    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["w"]}
    adapters = [Adapter.of(str(i), config, each) for i, each in enumerate(factors(size, clients, rank))]
    small = [Adapter.of(str(i), config, each) for i, each in enumerate(factors(64, clients, rank))]
    merge_adapters(build("lora_svd", rank=rank), small)
    found = {}
    for label, method in (("svd", build("lora_svd", rank=rank)), ("cat", build("lora_stack"))):
        seconds, extra, merged = timed(lambda method=method: merge_adapters(method, adapters), 5)
        a, b = merged.tensors.values()
        found[label] = {"seconds": seconds, "extra": extra, "print": fingerprint(b, a)}
    return found


def peft(size: int, clients: int, rank: int) -> dict[str, Any]:
    """The same by PEFT."""
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    warnings.simplefilter("ignore")

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = torch.nn.Linear(size, size, bias=False)

    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=["w"])
    model = get_peft_model(Layer(), config, adapter_name="0")
    for number, each in enumerate(factors(size, clients, rank)):
        if number:
            model.add_adapter(str(number), config)
        set_peft_model_state_dict(model, each, adapter_name=str(number))
    names, shares = [str(i) for i in range(clients)], [1 / clients] * clients
    found = {}
    for label, runs in (("cat", 5), ("svd", 1)):
        made = iter(range(runs))
        more = {"svd_rank": rank} if label == "svd" else {}

        def work(label: str = label, made: Any = made, more: dict[str, int] = more) -> str:
            name = f"{label}{next(made)}"
            model.add_weighted_adapter(names, shares, name, combination_type=label, **more)
            return name

        seconds, extra, name = timed(work, runs)
        layer = model.base_model.model.w
        mark = fingerprint(layer.lora_B[name].weight, layer.lora_A[name].weight)
        found[label] = {"seconds": seconds, "extra": extra, "print": mark}
    return found


def fingerprint(b: torch.Tensor, a: torch.Tensor) -> list[float]:
    """Some sums that the two products must share."""
    probe = torch.randn(a.shape[1], 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return (b.detach().double() @ (a.detach().double() @ probe)).norm(dim=0).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("size", 4096), ("clients", 10), ("rank", 16)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--worker", choices=["ours", "peft"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    shape = (arguments.size, arguments.clients, arguments.rank)
    if arguments.worker:
        print(json.dumps((ours if arguments.worker == "ours" else peft)(*shape)))
        return
    found = {who: worker(who, *shape) for who in ("ours", "peft")}
    print(f"a layer of {shape[0]} x {shape[0]}, {shape[1]} adapters of rank {shape[2]}, float32")
    print(f"{'':34}{'seconds':>10}{'extra MB':>12}")
    labels = {"svd": ("lora_svd", "PEFT svd"), "cat": ("lora_stack", "PEFT cat")}
    for label, names in labels.items():
        for who, name in zip(("ours", "peft"), names, strict=True):
            row = found[who][label]
            print(f"{name:34}{row['seconds']:>10.3f}{row['extra']:>12.0f}")
        pairs = zip(found["ours"][label]["print"], found["peft"][label]["print"], strict=True)
        apart = max(abs(mine / theirs - 1) for mine, theirs in pairs)
        ratio = found["peft"][label]["seconds"] / found["ours"][label]["seconds"]
        print(f"    PEFT's time over ours: {ratio:.3g}; results apart: {apart:.1e}")


def worker(who: str, size: int, clients: int, rank: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.adapters", "--worker", who]
    command += ["--size", str(size), "--clients", str(clients), "--rank", str(rank)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return dict(json.loads(done.stdout.splitlines()[-1]))


if __name__ == "__main__":
    main()
