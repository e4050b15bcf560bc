"""The Flower apps: a message in, a reply out, the same bytes again; and the server's side of it."""

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from digits_clients import data, model
from digits_clients.client_app import app
from digits_clients.settings import Settings
from fl_merge.flower.client import receive
from fl_merge.flower.inprocess import FIRST_NODE_ID, InProcessGrid


def answer(kind, state, partition=1, server_round=1, **run_config):
    """What client `partition` of eight replies to a train or evaluate message with this global model."""
    content = RecordDict({"arrays": ArrayRecord(state), "config": ConfigRecord({"server-round": server_round})})
    with InProcessGrid(app, 8, workers=0, run_config=run_config) as grid:
        node = FIRST_NODE_ID + partition
        (reply,) = grid.send_and_receive([grid.create_message(content, kind, node, str(server_round))])
    assert not reply.has_error(), reply.error
    return reply


@pytest.fixture(scope="module")
def base():
    return model.initial(0)


def trained(base, partition=1, server_round=1, **run_config):
    return answer("train", base, partition, server_round, **{"local-epochs": 1, **run_config})


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_training_sends_what_training_gives(base):
    reply = trained(base)
    own = data.client(1, 8)
    wanted = model.train(base, own.train, epochs=1, learning_rate=0.02, seed=(0, 1, 1))
    assert equal(receive(reply), wanted)
    metrics = next(iter(reply.content.metric_records.values()))
    assert metrics["num-examples"] == 144
    assert metrics["partition-id"] == 1
    assert 0 <= metrics["train-accuracy"] <= 1


def test_training_again_sends_the_same_and_another_round_or_seed_something_else(base):
    first = receive(trained(base))
    assert equal(first, receive(trained(base)))
    assert not equal(first, receive(trained(base, server_round=2)))
    assert not equal(first, receive(trained(base, seed=1)))


@pytest.mark.parametrize("wire", ["float32", "bfloat16", "float16"])
def test_a_model_travels_in_the_dtype_that_the_run_config_names(base, wire):
    full, sent = receive(trained(base)), receive(trained(base, **{"wire-dtype": wire}))
    dtype = getattr(torch, wire)
    assert equal({name: tensor.to(dtype) for name, tensor in sent.items()}, {n: t.to(dtype) for n, t in full.items()})


def test_evaluation_is_on_the_clients_own_held_out_test_set(base):
    reply = answer("evaluate", base, partition=3)
    accuracy, loss = model.accuracy_and_loss(base, data.client(3, 8).test)
    metrics = next(iter(reply.content.metric_records.values()))
    assert metrics["accuracy"] == pytest.approx(accuracy)
    assert metrics["loss"] == pytest.approx(loss)
    assert metrics["num-examples"] == 360
    assert metrics["partition-id"] == 3
    assert not reply.content.array_records


def test_label_skew_comes_from_the_run_config(base):
    reply = trained(base, partition=2, setting="dirichlet", alpha=0.1)
    metrics = next(iter(reply.content.metric_records.values()))
    assert metrics["num-examples"] == len(data.client(2, 8, setting="dirichlet", alpha=0.1).train)


def test_the_server_starts_from_the_pretrained_base_and_reports_every_domain(base):
    from digits_clients import server_app

    assert equal(server_app.initial({"seed": 0}), base)
    report = server_app.evaluate({}, 0, base)
    by_domain = [report[f"accuracy/{name}"] for name in data.DOMAINS]
    assert report["accuracy"] == pytest.approx(sum(by_domain) / 8)
    assert report["worst"] == min(by_domain)
    digits = server_app.evaluate({"setting": "dirichlet"}, 0, base)
    assert {key for key in digits if "/" in key} == {f"accuracy/digit-{k}" for k in range(10)}


@pytest.mark.parametrize(
    ("run_config", "problem"),
    [
        ({"wire-dtype": "int8"}, "wire-dtype: 'int8', wanted one of float32, bfloat16, float16"),
        ({"setting": "cats"}, "setting: 'cats', wanted 'domains' or 'dirichlet'"),
        ({"local-epochs": "five"}, "local-epochs: 'five', wanted a number"),
    ],
)
def test_bad_settings_are_refused_by_name(run_config, problem):
    with pytest.raises(ValueError, match=problem):
        Settings.read(run_config)
