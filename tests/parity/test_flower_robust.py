"""Median, trimmed mean and Bulyan are Flower's own, where Flower's are right."""

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import Bulyan, FedMedian, FedTrimmedAvg

from fl_merge import merge
from fl_merge.flower.inprocess import InProcessGrid
from fl_merge.methods import bulyan, median, trimmed_mean

SHAPES = {"layer.weight": (40, 30), "layer.bias": (40,), "scale": ()}


def models(clients):
    draw = np.random.default_rng(3)
    base = {name: np.asarray(draw.normal(size=shape), dtype=np.float32) for name, shape in SHAPES.items()}
    step = {name: draw.normal(0, 0.3, (clients, *shape)) for name, shape in SHAPES.items()}
    return base, [{n: np.asarray(base[n] + step[n][i], dtype=np.float32) for n in base} for i in range(clients)]


def flowers(strategy, base, clients):
    """The model after one round in which each client sends its own."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        number = int(context.node_config["partition-id"])
        arrays = ArrayRecord({name: Array(values) for name, values in clients[number].items()})
        metrics = MetricRecord({"num-examples": 10 + number})
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    initial = ArrayRecord({name: Array(values) for name, values in base.items()})
    with InProcessGrid(app, len(clients), workers=0) as grid:
        result = strategy.start(grid, initial, num_rounds=1)
    return {name: array.numpy() for name, array in result.arrays.items()}


@pytest.mark.parametrize("clients", [7, 8, 12])
@pytest.mark.parametrize(
    ("strategy", "method"),
    [
        (FedMedian(fraction_evaluate=0.0), median()),
        (FedTrimmedAvg(fraction_evaluate=0.0, beta=0.2), trimmed_mean(beta=0.2)),
        (FedTrimmedAvg(fraction_evaluate=0.0, beta=0.35), trimmed_mean(beta=0.35)),
        (Bulyan(fraction_evaluate=0.0, num_malicious_nodes=1), bulyan(f=1, selection="once")),
    ],
    ids=["median", "trimmed 0.2", "trimmed 0.35", "bulyan"],
)
def test_the_models_are_equal_to_1e_6(strategy, method, clients):
    base, moved = models(clients)
    theirs = flowers(strategy, base, moved)
    ours = merge(
        method,
        {name: torch.tensor(values) for name, values in base.items()},
        [{name: torch.tensor(values) for name, values in client.items()} for client in moved],
        weights=[10.0 + number for number in range(clients)],
    )
    for name in base:
        assert np.linalg.norm(theirs[name] - base[name]) > 0
        assert np.linalg.norm(ours[name].numpy() - theirs[name]) <= 1e-6 * np.linalg.norm(theirs[name]), name


def test_bulyan_tells_nearby_models_apart_where_flowers_distances_cancel():
    """The deltas are 1e-5 of weights near 10000: in float32 every distance that Flower computes is rounding."""
    draw = np.random.default_rng(0)
    base = {"w": np.full(2000, 10000.0, dtype=np.float32)}
    step = draw.normal(0, 0.1, (7, 2000))
    step[2] += 0.6  # the bad one
    clients = [{"w": (base["w"] + step[i]).astype(np.float32)} for i in range(7)]
    ours = merge(bulyan(f=1), {"w": torch.tensor(base["w"])}, [{"w": torch.tensor(c["w"])} for c in clients])["w"]
    good = [i for i in range(7) if i != 2]
    honest = merge(bulyan(f=0), {"w": torch.tensor(base["w"])}, [{"w": torch.tensor(clients[i]["w"])} for i in good])
    assert float((ours.double() - honest["w"].double()).norm()) < 0.1 * float(np.linalg.norm(step[2]))
    whole = np.stack([client["w"] for client in clients])
    squares = np.square(whole).sum(axis=1)
    distances = squares[:, None] + squares[None, :] - 2 * whole @ whole.T
    true = np.square(whole[:, None].astype(np.float64) - whole[None]).sum(-1)
    assert np.abs(distances - true).max() > 10 * true.max()
