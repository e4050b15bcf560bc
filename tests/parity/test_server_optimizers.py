"""Server optimizers on top of weighted_average are Flower's own FedAvgM, FedAdam, FedYogi and FedAdagrad."""

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAdagrad, FedAdam, FedAvgM, FedYogi

from fl_merge import adagrad, adam, momentum, server_optimizer, yogi
from fl_merge.flower import FedMerge
from fl_merge.flower.inprocess import InProcessGrid
from fl_merge.methods import weighted_average

ROUNDS = 5
app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Pull the model toward a target of the client's own, with noise of (client, round)."""
    partition, number = int(context.node_config["partition-id"]), int(message.content["config"]["server-round"])
    moved = {}
    for name, array in message.content["arrays"].items():
        values = array.numpy()
        target = np.random.default_rng(partition).normal(size=values.shape)
        noise = np.random.default_rng((partition, number)).normal(size=values.shape)
        moved[name] = Array(np.asarray(values + 0.3 * (target - values) + 0.05 * noise, dtype=np.float32))
    metrics = MetricRecord({"num-examples": 10 + 7 * partition})
    return Message(RecordDict({"arrays": ArrayRecord(moved), "metrics": metrics}), reply_to=message)


def initial():
    draw = np.random.default_rng(99)
    return ArrayRecord(
        {
            "layer.weight": Array(draw.normal(size=(40, 30)).astype(np.float32)),
            "layer.bias": Array(draw.normal(size=40).astype(np.float32)),
            "scale": Array(np.array([0.5], dtype=np.float32)),
        }
    )


def run(strategy):
    """The model after every round."""
    models = []

    def remember(number, arrays):
        models.append({name: array.numpy() for name, array in arrays.items()})
        return MetricRecord()

    with InProcessGrid(app, 4, workers=0) as grid:
        strategy.start(grid, initial(), num_rounds=ROUNDS, evaluate_fn=remember)
    return models


PAIRS = {
    "momentum": (momentum(lr=0.7, beta=0.6), lambda: FedAvgM(server_learning_rate=0.7, server_momentum=0.6)),
    "momentum of nothing": (momentum(lr=0.7, beta=0.0), lambda: FedAvgM(server_learning_rate=0.7)),
    "adam": (adam(), FedAdam),
    "adam with other settings": (
        adam(lr=0.03, beta_1=0.5, beta_2=0.8, tau=0.01),
        lambda: FedAdam(eta=0.03, beta_1=0.5, beta_2=0.8, tau=0.01),
    ),
    "yogi": (yogi(), FedYogi),
    "yogi with other settings": (
        yogi(lr=0.05, beta_1=0.3, beta_2=0.6, tau=0.1),
        lambda: FedYogi(eta=0.05, beta_1=0.3, beta_2=0.6, tau=0.1),
    ),
    "adagrad": (adagrad(), FedAdagrad),
    "adagrad with other settings": (adagrad(lr=0.02, tau=0.03), lambda: FedAdagrad(eta=0.02, tau=0.03)),
}


@pytest.mark.parametrize("which", PAIRS)
def test_every_round_is_flowers_to_1e_6(which):
    optimizer, flowers = PAIRS[which]
    theirs = run(flowers())
    ours = run(FedMerge(server_optimizer(weighted_average(), optimizer), fraction_evaluate=0.0))
    assert len(theirs) == len(ours) == ROUNDS + 1
    for number, (their, our) in enumerate(zip(theirs, ours, strict=True)):
        for name in their:
            distance = np.linalg.norm(our[name] - their[name])
            assert distance <= 1e-6 * np.linalg.norm(their[name]), (number, name)
    moved = [np.linalg.norm(ours[k + 1]["layer.weight"] - ours[k]["layer.weight"]) for k in range(ROUNDS)]
    assert min(moved) > 0.01
