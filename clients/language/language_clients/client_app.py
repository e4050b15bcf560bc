"""A Flower client that finetunes a causal language model on its own text: all weights, or a LoRA adapter."""

from __future__ import annotations

from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fl_merge.errors import RecipeError
from fl_merge.exchange import FITTED, SHARE, TRAINS
from fl_merge.flower.client import (
    architecture_of,
    collect_if_asked,
    exchanges_adapter,
    receive,
    receive_adapter,
    reply,
    trained_of,
)
from fl_merge.flower.records import EXCHANGE_KEY, to_record, to_tensors
from language_clients import corpus, local, lora, weights
from language_clients.settings import Settings

app = ClientApp()

KEPT = "lora-kept"
"""Factors of the adapter that do not travel, in the node's state."""

PHASED = ("local-steps", "batch-size", "sequence-length", "learning-rate")
"""What the server may set for the rounds of a phase (`config` of a phase in a recipe)."""


def _own_text(context: Context, settings: Settings) -> tuple[int, corpus.Client]:
    """This node's partition-id and its text: the files of `text-folder` in its node config, or its part of a domain."""
    partition, of = int(context.node_config["partition-id"]), int(context.node_config["num-partitions"])
    folder = str(context.node_config.get("text-folder", ""))
    if folder:
        return partition, corpus.client_of_folder(folder, train_bytes=settings.train_bytes)
    return partition, corpus.client(partition, of, seed=settings.seed, train_bytes=settings.train_bytes)


def _received(message: Message, context: Context, settings: Settings, partition: int) -> local.Local:
    """The global model, or the base with the global adapter in this client's rank and scaling.

    Which of the two is for the server to say where a run begins with adapters and goes on with the model that they are
    folded into. Factors that do not travel (`lora-share`) are the client's own, from its last round.

    Raises:
        RecipeError: if an adapter is wanted of a client that has no rank for one.
    """
    if not exchanges_adapter(message, settings.uses_adapters):
        told = architecture_of(message)
        return local.with_weights(settings, receive(message), weights.config_of(told) if told else None)
    if not settings.uses_adapters:
        raise RecipeError(f"adapter-rank: 0, and the server exchanges adapters ({EXCHANGE_KEY}); wanted a rank >= 1")
    rank, alpha = settings.rank(partition), settings.alpha(partition)
    here = local.with_adapter(settings, rank, alpha)
    kept = context.state.array_records.get(KEPT)
    about = message.content["config"]
    # What a method for adapters sends says whether it is fitted; others average factors in the scaling of the clients.
    adapter = receive(message)
    if FITTED in about:
        adapter = receive_adapter(message, here.tensors(), alpha / rank) | lora.residual(adapter)
    lora.put(here.model, {**adapter, **(to_tensors(kept) if kept is not None else {})})
    return here


@app.train()
def train(message: Message, context: Context) -> Message:
    """Finetune for `local-steps`; (seed, round, partition) choose the text of each step, so a rerun sends the same."""
    about = message.content["config"]
    settings = Settings.read({**context.run_config, **{key: about[key] for key in PHASED if key in about}})
    partition, own = _own_text(context, settings)
    here = _received(message, context, settings, partition)
    statistics = None
    if here.adapted:
        lora.train_only(here.model, str(about.get(TRAINS, "AB")))
    else:
        weights.train_only(here.model, trained_of(message, here.tensors()))
    loss = here.finetune(own.train, (settings.seed, int(about["server-round"]), partition))
    bits, _ = here.bits_per_byte(own.validation)
    metrics: dict[str, Any] = {"train-loss": loss, "bits-per-byte": bits, "partition-id": partition}
    metrics |= here.expert_load(own.validation)
    tensors = here.tensors()
    if here.adapted:
        rank, alpha = settings.rank(partition), settings.alpha(partition)
        metrics |= {"lora-rank": rank, "lora-alpha": alpha, "lora-scalings": alpha / rank}
        everything, tensors = tensors, lora.shared(tensors, str(about.get(SHARE, "AB")))
        if len(tensors) < len(everything):
            context.state[KEPT] = to_record({n: t for n, t in everything.items() if n not in tensors})
    else:
        statistics = collect_if_asked(message, here.model, here.inputs(own.train), samples=1)
    number = here.num_sequences(own.train)
    return reply(message, tensors, number, metrics, dtype=settings.wire_dtype, statistics=statistics)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """The global model's bits per byte on this client's held-out test documents, weighted by their bytes."""
    settings = Settings.read(context.run_config)
    partition, own = _own_text(context, settings)
    here = _received(message, context, settings, partition)
    bits, measured = here.bits_per_byte(own.test)
    metrics = {"bits-per-byte": bits, "partition-id": partition, **here.expert_load(own.test)}
    return reply(message, None, int(measured), metrics)
