"""An app whose clients train a small network, dense or as a mixture of experts, for tests of phases; also a program.

python phases_app.py RUN_FOLDER [resume]
"""

import sys

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fl_merge import adam, phase, schedule, server_optimizer
from fl_merge.flower import FedMerge
from fl_merge.flower.client import architecture_of, receive, reply, statistics_asked, trained_of
from fl_merge.flower.inprocess import InProcessGrid
from fl_merge.flower.records import to_record
from fl_merge.flower.watch import Watcher
from fl_merge.methods import moe_upcycle, weighted_average

WIDTH, HIDDEN = 5, 8
app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Random steps of what is asked for; a client that is told to stays on the dense network."""
    partition = int(context.node_config["partition-id"])
    tensors = receive(message)
    config = message.content["config"]
    if context.run_config.get("stays") == partition and "hidden1.weight" not in tensors:
        tensors = initial()
    asked = trained_of(message, tensors) if "hidden1.weight" in tensors or "router.weight" in tensors else tensors
    moved = {
        name: tensor + 0.01 * torch.randn(tensor.shape) if name in asked else tensor for name, tensor in tensors.items()
    }
    statistics = None
    if statistics_asked(message) == ("hidden",):
        statistics = {"hidden/0": torch.randn(WIDTH), "count": torch.tensor(10.0)}
    family = (architecture_of(message) or {}).get("model_type", "")
    metrics = {"steps": int(config.get("local-steps", 1)), "sparse": float(family == "mlp_moe")}
    if context.run_config.get("stays") == partition:
        from flwr.app import MetricRecord, RecordDict

        content = RecordDict({"arrays": to_record(moved), "metrics": MetricRecord({**metrics, "num-examples": 4})})
        return Message(content, reply_to=message)
    return reply(message, moved, 3 + partition, metrics, statistics=statistics)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """A number that depends on the model and on the generator."""
    value = sum(float(tensor.sum()) for tensor in receive(message).values()) + float(torch.rand(()))
    return reply(message, None, 1, {"value": value})


def initial() -> dict[str, torch.Tensor]:
    """A dense network."""
    draw = torch.Generator().manual_seed(7)
    shapes = {"hidden1": (HIDDEN, WIDTH), "hidden2": (HIDDEN, HIDDEN), "output": (3, HIDDEN)}
    return {
        f"{name}.{part}": torch.randn(shape if part == "weight" else shape[:1], generator=draw)
        for name, shape in shapes.items()
        for part in ("weight", "bias")
    }


def phases():
    """Two rounds, the mixture, two of the router with Adam on the server, two of everything."""
    return schedule(
        [
            phase(weighted_average(), rounds=2),
            phase(moe_upcycle(router="hidden", top_k=2)),
            phase(
                server_optimizer(weighted_average(), adam(lr=0.02)), rounds=2, train="router", config={"local-steps": 9}
            ),
            phase(server_optimizer(weighted_average(), adam(lr=0.02)), rounds=2),
        ]
    )


def run(folder, *, resume=False, watchers=(), merge=None, num_rounds=7, run_config=None, force=False, **options):
    """The strategy after the run, and Flower's result."""
    made = FedMerge(
        merge or phases(),
        seed=5,
        run_folder=folder,
        watchers=watchers,
        architecture={"model_type": "mlp", "width": WIDTH},
        **options,
    )
    with InProcessGrid(app, 4, workers=0, seed=3, run_config=run_config or {}) as grid:
        arrays = to_record(initial())
        result = made.start(grid, arrays, num_rounds=num_rounds, resume=folder if resume else None, force=force)
    return made, result


class Waits(Watcher):
    """Says that a round has begun and gives time to be killed."""

    def __init__(self, at: int) -> None:
        self.at = at

    def round_started(self, round_number: int, sampled: tuple[str, ...]) -> None:
        if round_number == self.at:
            print(f"begun {round_number}", flush=True)
            sys.stdin.read()


if __name__ == "__main__":
    run(sys.argv[1], resume=sys.argv[3:] == ["resume"], watchers=[Waits(int(sys.argv[2]))])
