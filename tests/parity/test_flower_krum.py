"""multi_krum is Flower's MultiKrum where that is right; where float32 makes its distances negative, ours are right."""

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy.multikrum import compute_distances, select_multikrum
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords

from fl_merge import merge
from fl_merge.methods import krum, multi_krum


def flowers(clients, examples, f, m):
    """What Flower's MultiKrum.aggregate_train does with the replies' contents."""
    contents = []
    for client, number in zip(clients, examples, strict=True):
        arrays = ArrayRecord({name: Array(tensor.numpy()) for name, tensor in client.items()})
        contents.append(RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": number})}))
    chosen = select_multikrum(contents, num_malicious_nodes=f, num_nodes_to_select=m)
    merged = aggregate_arrayrecords(chosen, "num-examples")
    return {name: torch.from_numpy(array.numpy().copy()) for name, array in merged.items()}


def models(count, bad, seed):
    draw = torch.Generator().manual_seed(seed)
    shapes = {"layer.weight": (40, 30), "layer.bias": (40,)}
    base = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    clients = [
        {
            name: tensor + (5.0 if number < bad else 0.5) * torch.randn(tensor.shape, generator=draw)
            for name, tensor in base.items()
        }
        for number in range(count)
    ]
    return base, clients


@pytest.mark.parametrize(("count", "f", "m"), [(5, 1, 1), (5, 1, 2), (8, 1, 4), (9, 3, 4), (9, 2, 5), (3, 0, 1)])
@pytest.mark.parametrize("seed", range(5))
def test_it_is_flowers(count, f, m, seed):
    base, clients = models(count, f, seed)
    examples = [10 + 7 * number for number in range(count)]
    wanted = flowers(clients, examples, f, m)
    found = merge(multi_krum(f=f, m=m), base, clients, examples)
    for name, tensor in wanted.items():
        assert float((found[name] - tensor).norm()) < 1e-6 * float(tensor.norm())


def test_where_float32_cancels_flowers_distances_are_negative_and_ours_right():
    """Models of norm 3e5 that differ by 0.1 to 1: |x|^2 + |y|^2 - 2 x.y of float32 is all rounding."""
    draw = torch.Generator().manual_seed(0)
    base = {"w": 1000.0 + torch.randn(100_000, generator=draw)}
    steps = [1, 2, 3, 20, 21, 22, 23]  # the two groups; in the second, two are in the middle of four
    clients = [{"w": base["w"] + step * 2.0**-13} for step in steps]
    records = [ArrayRecord({"w": Array(client["w"].numpy())}) for client in clients]
    theirs = compute_distances(records)
    exact = np.array([[float(((a["w"].double() - b["w"].double()) ** 2).sum()) for b in clients] for a in clients])
    assert (theirs < 0).any()
    assert np.abs(theirs - exact).max() > 10 * exact.max()

    scores = np.sort(exact, axis=1)[:, 1 : 1 + len(clients) - 2 - 2].sum(axis=1)
    assert scores.argmin() in (4, 5)
    found = merge(krum(f=2), base, clients)["w"]
    assert torch.equal(found, clients[int(scores.argmin())]["w"])
    assert not torch.equal(flowers(clients, [1] * 7, 2, 1)["w"], found)
