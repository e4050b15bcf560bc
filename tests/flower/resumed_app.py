"""An app whose clients draw from the global generators, for tests that stop and resume it; also run as a program.

python resumed_app.py RUN_FOLDER NUM_ROUNDS [resume]
"""

import sys

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fl_merge import adam, server_optimizer
from fl_merge.flower import FedMerge
from fl_merge.flower.client import receive, reply
from fl_merge.flower.inprocess import InProcessGrid
from fl_merge.flower.journal import Journal
from fl_merge.flower.records import to_record
from fl_merge.flower.watch import Watcher
from fl_merge.methods import dare_linear

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Random steps: of the global generator, which the engine seeds."""
    partition = int(context.node_config["partition-id"])
    moved = {
        name: tensor + (0.01 * torch.randn(tensor.shape)).to(tensor.dtype) if tensor.is_floating_point() else tensor + 1
        for name, tensor in receive(message).items()
    }
    return reply(message, moved, 3 + partition, {"loss": float(torch.rand(()))})


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """A number that depends on the model and on the generator."""
    value = float(receive(message)["w"].float().sum() + torch.rand(()))
    return reply(message, None, 1, {"value": value})


def initial(dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """A model in bfloat16, whose master is float32, with a counter."""
    draw = torch.Generator().manual_seed(7)
    return {
        "w": torch.randn(40, 30, generator=draw).to(dtype),
        "b": torch.randn(30, generator=draw),
        "norm.num_batches_tracked": torch.tensor(0),
    }


def method():
    return server_optimizer(dare_linear(density=0.7), adam(lr=0.02))


def strategy(*watchers: Watcher, merge=None, seed=5, **options) -> FedMerge:
    """Five of eight clients a round, random pruning, Adam."""
    return FedMerge(merge or method(), fraction_train=0.625, seed=seed, watchers=watchers, **options)


def run(folder, num_rounds, *, resume=False, model=None, watchers=(), **options):
    """The strategy after the run, and Flower's result."""
    made = strategy(Journal(folder, {"resumed": resume}, resumed=resume), *watchers, **options)
    with InProcessGrid(app, 8, workers=0, seed=3) as grid:
        arrays = to_record(model or initial())
        result = made.start(grid, arrays, num_rounds=num_rounds, resume=folder if resume else None)
    return made, result


class Waits(Watcher):
    """Says when a checkpoint is there and gives time to be killed."""

    def round_started(self, round_number: int, sampled: tuple[str, ...]) -> None:
        if round_number == 4:
            print("begun 4", flush=True)
            sys.stdin.read()


if __name__ == "__main__":
    run(sys.argv[1], int(sys.argv[2]), resume=sys.argv[3:] == ["resume"], watchers=[Waits()])
