"""weighted_average is Flower's own FedAvg."""

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

from fl_merge.flower import FedMerge
from fl_merge.flower.inprocess import InProcessGrid
from fl_merge.methods import weighted_average

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """A plain Flower client: move the model by a step that is its own, report its loss."""
    draw = np.random.default_rng(int(context.node_config["partition-id"]))
    arrays = {name: array.numpy() for name, array in message.content["arrays"].items()}
    moved = {}
    for name, values in arrays.items():
        step = np.asarray(draw.normal(0, 0.1, values.shape), dtype=values.dtype)
        moved[name] = Array(np.asarray(values + step))
    examples = 10 + 7 * int(context.node_config["partition-id"])
    metrics = MetricRecord(
        {"num-examples": examples, "loss": float(draw.random()), "curve": [1.0, float(draw.random())]}
    )
    return Message(RecordDict({"arrays": ArrayRecord(moved), "metrics": metrics}), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Report the mean square of the model's elements (their mean is near 0, where FedAvg's own rounding is seen)."""
    mean = float(np.mean(np.square(message.content["arrays"]["layer.weight"].numpy(), dtype=np.float64)))
    examples = 1 + int(context.node_config["partition-id"])
    metrics = MetricRecord({"num-examples": examples, "mean": mean, "node": float(context.node_id)})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)


def initial():
    draw = np.random.default_rng(99)
    return ArrayRecord(
        {
            "layer.weight": Array(draw.normal(size=(40, 30)).astype(np.float32)),
            "layer.bias": Array(draw.normal(size=40)),
            "scale": Array(np.array(0.5, dtype=np.float32)),
        }
    )


@pytest.fixture(scope="module")
def results():
    """Three rounds with five clients under each strategy."""
    found = []
    for strategy in (FedAvg(), FedMerge(weighted_average())):
        with InProcessGrid(app, 5, workers=0) as grid:
            found.append(strategy.start(grid, initial(), num_rounds=3))
    return found


def test_the_models_are_equal_to_1e_6(results):
    flowers, ours = ({name: array.numpy() for name, array in result.arrays.items()} for result in results)
    assert list(ours) == list(flowers)
    start = {name: array.numpy() for name, array in initial().items()}
    for name in flowers:
        assert ours[name].dtype == start[name].dtype
        moved = np.linalg.norm(flowers[name] - start[name])
        assert moved > 0.01 * np.sqrt(start[name].size)
        assert np.linalg.norm(ours[name] - flowers[name]) < 1e-6 * np.linalg.norm(flowers[name])


def test_the_metrics_are_equal(results):
    flowers, ours = results
    for mine, theirs in (
        (ours.train_metrics_clientapp, flowers.train_metrics_clientapp),
        (ours.evaluate_metrics_clientapp, flowers.evaluate_metrics_clientapp),
    ):
        assert list(mine) == list(theirs) == [1, 2, 3]
        for number in mine:
            assert set(mine[number]) == set(theirs[number])
            for key in mine[number]:
                assert mine[number][key] == pytest.approx(theirs[number][key], rel=1e-6, abs=1e-8), key
    assert set(ours.train_metrics_clientapp[1]) == {"loss", "curve"}
