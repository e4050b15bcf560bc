"""A Flower client that finetunes the global model on its own digits."""

from __future__ import annotations

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from digits_clients import model
from digits_clients.data import Client, client
from digits_clients.settings import Settings
from fl_merge.flower.client import collect_if_asked, receive, reply, trained_of

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
    sent = receive(message)
    state = model.train(
        sent,
        own.train,
        epochs=settings.local_epochs,
        learning_rate=settings.learning_rate,
        batch_size=settings.batch_size,
        seed=(settings.seed, server_round, partition),
        only=trained_of(message, sent),
    )
    accuracy, loss = model.accuracy_and_loss(state, own.train)
    steps = settings.local_epochs * model.steps_an_epoch(len(own.train), settings.batch_size)
    metrics = {"train-accuracy": accuracy, "train-loss": loss, "partition-id": partition, "local-steps": steps}
    batches = [(own.train.images_BHW, own.train.labels_B)]
    statistics = collect_if_asked(message, model.network(state), batches, settings.statistics_examples)
    return reply(message, state, len(own.train), metrics, dtype=settings.wire_dtype, statistics=statistics)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """The global model's accuracy and loss on this client's held-out test set, with the number of its domain."""
    settings = Settings.read(context.run_config)
    partition, own = _own_data(context, settings)
    accuracy, loss = model.accuracy_and_loss(receive(message), own.test)
    return reply(message, None, len(own.test), {"accuracy": accuracy, "loss": loss, "partition-id": partition})
