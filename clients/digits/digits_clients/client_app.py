"""A Flower client that finetunes the global model on its own digits."""

from __future__ import annotations

from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from digits_clients import mixture, model
from digits_clients.data import Client, client
from digits_clients.settings import Settings
from fl_merge.flower.client import architecture_of, collect_if_asked, receive, reply, trained_of

app = ClientApp()


def _own_data(context: Context, settings: Settings) -> tuple[int, Client]:
    """This node's partition-id and its data."""
    partition, of = int(context.node_config["partition-id"]), int(context.node_config["num-partitions"])
    return partition, client(partition, of, setting=settings.setting, alpha=settings.alpha, seed=settings.seed)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Finetune for `local-epochs`; (seed, round, partition) order the batches, so a rerun sends the same bytes."""
    settings = Settings.read(context.run_config)
    partition, own = _own_data(context, settings)
    server_round = int(message.content["config"]["server-round"])
    sent, top_k = receive(message), mixture.top_k_of(architecture_of(message))
    state = model.train(
        sent,
        own.train,
        epochs=settings.local_epochs,
        learning_rate=settings.learning_rate,
        batch_size=settings.batch_size,
        seed=(settings.seed, server_round, partition),
        only=trained_of(message, sent),
        balance=settings.balance_coefficient,
        top_k=top_k,
    )
    accuracy, loss = model.accuracy_and_loss(state, own.train, top_k)
    steps = settings.local_epochs * model.steps_an_epoch(len(own.train), settings.batch_size)
    metrics: dict[str, Any] = {"train-accuracy": accuracy, "train-loss": loss, "partition-id": partition}
    metrics |= {"local-steps": steps, **model.expert_load(state, own.train, top_k)}
    batches = [(own.train.images_BHW, own.train.labels_B)]
    statistics = collect_if_asked(message, model.network(state, top_k), batches, settings.statistics_examples)
    return reply(message, state, len(own.train), metrics, dtype=settings.wire_dtype, statistics=statistics)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """The global model's accuracy and loss on this client's held-out test set, with the number of its domain."""
    settings = Settings.read(context.run_config)
    partition, own = _own_data(context, settings)
    state, top_k = receive(message), mixture.top_k_of(architecture_of(message))
    accuracy, loss = model.accuracy_and_loss(state, own.test, top_k)
    metrics: dict[str, Any] = {"accuracy": accuracy, "loss": loss, "partition-id": partition}
    metrics |= model.expert_load(state, own.test, top_k)
    return reply(message, None, len(own.test), metrics)
