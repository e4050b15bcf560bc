"""What a ClientApp needs: read the global model, send a trained one. Both know bfloat16.

    @app.train()
    def train(message: Message, context: Context) -> Message:
        model.load_state_dict(receive(message))
        ...
        return reply(message, model.state_dict(), num_examples=len(data), dtype="bfloat16")

Methods that need statistics of the clients' data (`regmean`, `fisher`) ask for them in the round's config; one argument
answers: `reply(..., statistics=collect_if_asked(message, model, batches))`.

Clients that use Flower's own `to_torch_state_dict` and `ArrayRecord` work as well, in the dtypes that numpy has.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from torch import Tensor, nn

from fl_merge.errors import DecodeError
from fl_merge.exchange import FITTED, fit
from fl_merge.flower.records import (
    ARCHITECTURE_KEY,
    EXCHANGE_KEY,
    STATISTICS_KEY,
    STATISTICS_RECORD,
    TRAIN_KEY,
    to_record,
    to_tensors,
)
from fl_merge.phases import ALL, trained_names
from fl_merge.statistics import collect


def receive(message: Message) -> dict[str, Tensor]:
    """The global model that the server sent.

    Raises:
        DecodeError: if the message does not hold exactly one ArrayRecord of tensors.
    """
    records = [record for record in message.content.values() if isinstance(record, ArrayRecord)]
    if len(records) != 1:
        raise DecodeError(f"message with {len(records)} ArrayRecords, wanted one")
    return to_tensors(records[0])


def receive_adapter(
    message: Message, own: Mapping[str, Tensor], scalings: Mapping[str, float] | float
) -> dict[str, Tensor]:
    """The global adapter in the client's own ranks and scalings, ready for `set_peft_model_state_dict`.

    A server that merges adapters (`FedMerge(lora_svd())`) sends a client that it knows the adapter as it is to be
    loaded, and one that it does not know yet in plain factors, which are fitted here.

    Args:
        message: from the server.
        own: what `get_peft_model_state_dict` gives of the client's model; of one with adapted fused experts, that taken
            apart (`fl_merge.adapters.experts_apart`).
        scalings: alpha / rank (rsLoRA: over its square root), for all modules or by module. They go into the reply's
            metrics as `lora-scalings`: one number, or one a module in order of name.

    Raises:
        DecodeError: as `receive`.
        MergeError: if the adapter is not one of the client's modules.
    """
    tensors = receive(message)
    config = message.content.config_records.get("config")
    if config is not None and config.get(FITTED, False):
        return {name: tensors.get(name, tensor) for name, tensor in own.items()}
    return fit(tensors, own, scalings)


def reply(
    message: Message,
    tensors: Mapping[str, Tensor] | None,
    num_examples: int,
    metrics: Mapping[str, Any] | None = None,
    dtype: torch.dtype | str | None = None,
    weighted_by_key: str = "num-examples",
    statistics: Mapping[str, Tensor] | None = None,
) -> Message:
    """The reply to a train or evaluate message.

    Args:
        message: what is replied to.
        tensors: the trained model's state dict, of which what the server asked for is sent (`trained_of`: all, but in
            rounds that train a part); None for an evaluation.
        num_examples: the client's weight.
        metrics: numbers to report beside it.
        dtype: send floating tensors in this dtype ("bfloat16" halves the uplink of float32); None as they are.
        weighted_by_key: the name of the number of examples, as the strategy has it.
        statistics: what `collect_if_asked` gave; None or empty for none.
    """
    content = RecordDict({"metrics": MetricRecord({**(metrics or {}), weighted_by_key: num_examples})})
    if tensors is not None:
        asked = trained_of(message, tensors)
        content["arrays"] = to_record({name: tensors[name] for name in asked}, dtype)
    if statistics:
        content[STATISTICS_RECORD] = to_record(statistics)
    return Message(content, reply_to=message)


def architecture_of(message: Message) -> dict[str, Any] | None:
    """The config of the model that the server sent; None from a server that does not know it.

    A run may change its model between two rounds (`fl_merge.phases`), so a client builds it from this each time.
    """
    text = _said(message, ARCHITECTURE_KEY)
    return dict(json.loads(text)) if text else None


def exchanges_adapter(message: Message, default: bool) -> bool:
    """Whether the message holds a LoRA adapter, and wants one back, or the whole model.

    A run may begin with adapters and go on with the model that they were folded into (`fl_merge.phases`).

    Args:
        message: from the server.
        default: what holds for a server that does not say, because it does the same in all rounds.
    """
    said = _said(message, EXCHANGE_KEY)
    return said == "adapter" if said else default


def trained_of(message: Message, names: Iterable[str]) -> list[str]:
    """Of the model's tensors those that the client is to train and to send; all, if the server says nothing of it.

    Args:
        message: to train, from the server.
        names: of the model's tensors, as the server calls them.

    Raises:
        RecipeError: for a part that the model does not have.
    """
    text = _said(message, TRAIN_KEY)
    return trained_names(tuple(text.split(",")) if text else ALL, names)


def _said(message: Message, key: str) -> str:
    """What the server says under a key of the message's config; empty for nothing."""
    configs = (record for record in message.content.values() if isinstance(record, ConfigRecord))
    return next((str(record[key]) for record in configs if record.get(key)), "")


def statistics_asked(message: Message) -> tuple[str, ...]:
    """The kinds of statistics that the server's method needs ("fisher", "gram", "hidden"); often none."""
    text = _said(message, STATISTICS_KEY)
    return tuple(text.split(",")) if text else ()


def collect_if_asked(
    message: Message,
    model: nn.Module | Callable[[], nn.Module],
    batches: Iterable[Any],
    max_examples: int = 256,
    **options: Any,
) -> dict[str, Tensor] | None:
    """The statistics that the server asks for, for `reply`; None if it asks for none, and then nothing is computed.

    Args:
        message: to train, from the server.
        model: trained, under the names that the client sends; or a function that gives it.
        batches, max_examples, options: as for `fl_merge.statistics.collect`.
    """
    asked = statistics_asked(message)
    if not asked:
        return None
    module = model if isinstance(model, nn.Module) else model()
    return collect(module, batches, asked, max_examples, **options)
