"""What a ClientApp needs: read the global model, send a trained one. Both know bfloat16.

    @app.train()
    def train(message: Message, context: Context) -> Message:
        model.load_state_dict(receive(message))
        ...
        return reply(message, model.state_dict(), num_examples=len(data), dtype="bfloat16")

Clients that use Flower's own `to_torch_state_dict` and `ArrayRecord` work as well, in the dtypes that numpy has.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from torch import Tensor

from fl_merge.errors import DecodeError
from fl_merge.flower.records import to_record, to_tensors


def receive(message: Message) -> dict[str, Tensor]:
    """The global model that the server sent.

    Raises:
        DecodeError: if the message does not hold exactly one ArrayRecord of tensors.
    """
    records = [record for record in message.content.values() if isinstance(record, ArrayRecord)]
    if len(records) != 1:
        raise DecodeError(f"message with {len(records)} ArrayRecords, wanted one")
    return to_tensors(records[0])


def reply(
    message: Message,
    tensors: Mapping[str, Tensor] | None,
    num_examples: int,
    metrics: Mapping[str, float | int] | None = None,
    dtype: torch.dtype | str | None = None,
    weighted_by_key: str = "num-examples",
) -> Message:
    """The reply to a train or evaluate message.

    Args:
        message: what is replied to.
        tensors: the trained model's state dict; None for an evaluation.
        num_examples: the client's weight.
        metrics: numbers to report beside it.
        dtype: send floating tensors in this dtype ("bfloat16" halves the uplink of float32); None as they are.
        weighted_by_key: the name of the number of examples, as the strategy has it.
    """
    content = RecordDict({"metrics": MetricRecord({**(metrics or {}), weighted_by_key: num_examples})})
    if tensors is not None:
        content["arrays"] = to_record(tensors, dtype)
    return Message(content, reply_to=message)
