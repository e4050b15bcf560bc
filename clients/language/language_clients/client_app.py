"""A Flower client that finetunes a causal language model on its own text: all weights, or a LoRA adapter."""

from __future__ import annotations

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fl_merge.flower.client import receive, reply
from language_clients import corpus, local
from language_clients.settings import Settings

app = ClientApp()


def _own_text(context: Context, settings: Settings) -> tuple[int, corpus.Client]:
    """This node's partition-id and its text: the files of `text-folder` in its node config, or its part of a domain."""
    partition, of = int(context.node_config["partition-id"]), int(context.node_config["num-partitions"])
    folder = str(context.node_config.get("text-folder", ""))
    if folder:
        return partition, corpus.client_of_folder(folder, train_bytes=settings.train_bytes)
    return partition, corpus.client(partition, of, seed=settings.seed, train_bytes=settings.train_bytes)


def _received(message: Message, settings: Settings, partition: int) -> local.Local:
    return local.rebuilt(settings, receive(message), rank=settings.rank(partition), alpha=settings.alpha(partition))


@app.train()
def train(message: Message, context: Context) -> Message:
    """Finetune for `local-steps`; (seed, round, partition) choose the text of each step, so a rerun sends the same."""
    settings = Settings.read(context.run_config)
    partition, own = _own_text(context, settings)
    here = _received(message, settings, partition)
    server_round = int(message.content["config"]["server-round"])
    loss = here.finetune(own.train, (settings.seed, server_round, partition))
    bits, _ = here.bits_per_byte(own.validation)
    metrics: dict[str, float | int | list[float]] = {
        "train-loss": loss,
        "bits-per-byte": bits,
        "partition-id": partition,
    }
    tensors = here.tensors()
    if settings.uses_adapters:
        rank, alpha = settings.rank(partition), settings.alpha(partition)
        modules = sum(name.endswith(".lora_A.weight") for name in tensors)
        metrics |= {"lora-rank": rank, "lora-alpha": alpha, "lora-scalings": [alpha / rank] * modules}
    return reply(message, tensors, here.num_sequences(own.train), metrics, dtype=settings.wire_dtype)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """The global model's bits per byte on this client's held-out test documents, weighted by their bytes."""
    settings = Settings.read(context.run_config)
    partition, own = _own_text(context, settings)
    bits, measured = _received(message, settings, partition).bits_per_byte(own.test)
    return reply(message, None, int(measured), {"bits-per-byte": bits, "partition-id": partition})
