"""An app whose clients train adapters of a small network, and then what they were folded into; also a program.

python folding_app.py RUN_FOLDER ROUND_TO_WAIT_IN
"""

import json
import sys
from pathlib import Path

import phases_app as dense
import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from safetensors.torch import save_file

from fl_merge import phase, schedule
from fl_merge.flower import FedMerge
from fl_merge.flower.client import (
    architecture_of,
    exchanges_adapter,
    receive,
    receive_adapter,
    reply,
    statistics_asked,
    trained_of,
)
from fl_merge.flower.inprocess import InProcessGrid
from fl_merge.flower.records import to_record
from fl_merge.methods import lora_svd, moe_upcycle, weighted_average

RANKS = (2, 3, 2, 4)
ALPHA = 6.0
MODULES = {"hidden1": (dense.HIDDEN, dense.WIDTH), "hidden2": (dense.HIDDEN, dense.HIDDEN)}
ARCHITECTURE = {"model_type": "mlp", "width": dense.WIDTH}

app = ClientApp()


def adapter(rank=4, seed=11):
    """An untrained adapter: B is zero."""
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for module, (outputs, inputs) in MODULES.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(rank, inputs, generator=draw)
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.zeros(outputs, rank)
    return tensors


@app.train()
def train(message: Message, context: Context) -> Message:
    """Random steps of the adapter in this client's rank, or of what is asked for; one may stay with its adapter."""
    partition = int(context.node_config["partition-id"])
    stays, whole = (context.run_config.get(key) == partition for key in ("stays", "whole"))
    if (exchanges_adapter(message, default=True) or stays) and not whole:
        rank = int(context.run_config.get("ranks", RANKS[partition]))
        own = adapter(rank) if stays else receive_adapter(message, adapter(rank), ALPHA / rank)
        moved = {name: tensor + 0.05 * torch.randn(tensor.shape) for name, tensor in own.items()}
        return reply(message, moved, 3 + partition, {"lora-alpha": ALPHA, "sparse": -1.0})
    tensors = dense.initial() if whole else receive(message)
    asked = trained_of(message, tensors)
    moved = {n: t + 0.01 * torch.randn(t.shape).to(t.dtype) if n in asked else t for n, t in tensors.items()}
    statistics = None
    if statistics_asked(message) == ("hidden",):
        statistics = {"hidden/0": torch.randn(dense.WIDTH), "count": torch.tensor(10.0)}
    sparse = (architecture_of(message) or {}).get("model_type") == "mlp_moe"
    return reply(message, moved, 3 + partition, {"sparse": float(sparse)}, statistics=statistics)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """A number that depends on the model, on what it is, and on the generator."""
    value = sum(float(tensor.float().sum()) for tensor in receive(message).values()) + float(torch.rand(()))
    return reply(message, None, 1, {"value": value, "adapter": float(exchanges_adapter(message, default=True))})


def phases(*first):
    """Two rounds of adapters, the mixture, two rounds of its router, one of everything."""
    return schedule(
        [
            *(first or (phase(lora_svd(), rounds=2),)),
            phase(moe_upcycle(router="hidden", top_k=2)),
            phase(weighted_average(), rounds=2, train="router"),
            phase(weighted_average(), rounds=1),
        ]
    )


def save_base(folder, dtype=torch.float32):
    """The network as a folder with its config."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file({n: t.to(dtype) for n, t in dense.initial().items()}, Path(folder) / "model.safetensors")
    (Path(folder) / "config.json").write_text(json.dumps(ARCHITECTURE))
    return folder


def run(folder, base, *, resume=False, watchers=(), merge=None, num_rounds=6, run_config=None, initial=None, **options):
    """The strategy after the run, and Flower's result."""
    force = options.pop("force", False)
    made = FedMerge(merge or phases(), seed=5, run_folder=folder, watchers=watchers, base=base, **options)
    with InProcessGrid(app, 4, workers=0, seed=3, run_config=run_config or {}) as grid:
        arrays = to_record(adapter() if initial is None else initial)
        result = made.start(grid, arrays, num_rounds=num_rounds, resume=folder if resume else None, force=force)
    return made, result


if __name__ == "__main__":
    home = Path(sys.argv[1])
    run(home, home.parent / "base", watchers=[dense.Waits(int(sys.argv[2]))])
