"""What a client, or the server for its evaluation, does with a model that it was sent: rebuild, train, evaluate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from language_clients import base, lora, routing, weights
from language_clients.corpus import Document
from language_clients.settings import Settings
from language_clients.tokens import Tokenizer, windows
from language_clients.training import bits_per_byte, finetune


@dataclass(frozen=True)
class Local:
    """A model that is ready to be used, and its tokenizer.

    Args:
        model: of transformers, or of peft round one.
        tokenizer: from documents to tokens.
        settings: of the run.
        adapted: whether it is trained and sent as an adapter.
    """

    model: Any
    tokenizer: Tokenizer
    settings: Settings
    adapted: bool = False

    def finetune(self, documents: Sequence[Document], key: object) -> float:
        """Train on the documents as the settings say; the last steps' loss in nats a token."""
        settings = self.settings
        return finetune(
            self.model,
            self.tokenizer(documents),
            steps=settings.local_steps,
            batch_size=settings.batch_size,
            length=settings.sequence_length,
            learning_rate=settings.learning_rate,
            key=key,
        )

    def bits_per_byte(self, documents: Sequence[Document]) -> tuple[float, float]:
        """Bits per byte of the documents, and on how many bytes they were measured."""
        return bits_per_byte(
            self.model,
            self.tokenizer(documents),
            length=self.settings.sequence_length,
            limit=self.settings.evaluation_bytes,
            num_bytes=self.tokenizer.num_bytes,
        )

    def expert_load(self, documents: Sequence[Document]) -> dict[str, list[float]]:
        """The metric `expert-load` on the documents, of a mixture of experts; none of any other model."""
        if not routing.is_mixture(self.model):
            return {}
        length, limit = self.settings.sequence_length, self.settings.evaluation_bytes
        return {"expert-load": routing.expert_load(self.model, self.tokenizer(documents), length=length, limit=limit)}

    def inputs(self, documents: Sequence[Document]) -> Iterator[Tensor]:
        """Sequences of the documents, one at a time, for statistics."""
        length, limit = self.settings.sequence_length, self.settings.evaluation_bytes
        for ids_L, _ in windows(self.tokenizer(documents), length=length, limit=limit):
            yield ids_L[None, :-1]

    def num_sequences(self, documents: Sequence[Document]) -> int:
        """How many sequences the documents are: a client's number of examples."""
        return max(1, len(self.tokenizer(documents)) // self.settings.sequence_length)

    def tensors(self) -> dict[str, Tensor]:
        """What is sent: all weights, or the adapter's."""
        return lora.take(self.model) if self.adapted else weights.tensors_of(self.model)


def with_weights(settings: Settings, tensors: Mapping[str, Tensor], config: Any = None) -> Local:
    """The model with these weights.

    Args:
        settings: of the run.
        tensors: all weights.
        config: of transformers; by default that of the base.

    Raises:
        ValueError: if the tensors do not fit the model.
    """
    found = base.config(settings) if config is None else config
    return Local(weights.model_of(found, tensors), base.tokenizer(settings), settings)


def with_adapter(settings: Settings, rank: int, alpha: float, adapter: Mapping[str, Tensor] | None = None) -> Local:
    """The base with an adapter of this rank and alpha: an untrained one, or what was received (see `lora.put`).

    Raises:
        ValueError: if the adapter does not fit the base.
    """
    model = lora.wrap(base.load(settings), rank=rank, alpha=alpha, targets=settings.adapter_targets, seed=settings.seed)
    if adapter is not None:
        lora.put(model, adapter)
    return Local(model, base.tokenizer(settings), settings, adapted=True)
