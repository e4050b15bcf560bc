"""The run config of the language app, read once and with its defaults."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from fl_merge.errors import RecipeError

WIRE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Settings:
    """What a run may set in `[tool.flwr.app.config]` or with `--run-config`, in kebab-case.

    Args:
        model: a Hugging Face name or a folder; "" for the byte-level model that is pretrained here.
        layers, hidden, pretraining_steps: of that byte-level model.
        cache_folder: where it is kept; "" for `~/.cache/fl_merge`, or what $FL_MERGE_CACHE names.
        adapter_ranks: LoRA ranks by partition, in turn; (0,) trains all weights.
        adapter_alphas: LoRA alphas by partition, in turn.
        adapter_targets: names of the modules that get an adapter, or ("all-linear",).
        local_steps: gradient steps of a client in a round.
        batch_size: sequences a step.
        sequence_length: tokens a sequence.
        learning_rate: of a client's AdamW.
        train_bytes: of text that a client trains on, at most; 0 for all that it has.
        evaluation_bytes: of text that each domain is evaluated on, at most.
        wire_dtype: in which a client sends its arrays: a key of `WIRE_DTYPES`.
        seed: of the split, the pretraining and every client's training.
    """

    model: str = ""
    layers: int = 4
    hidden: int = 128
    pretraining_steps: int = 700
    cache_folder: str = ""
    adapter_ranks: tuple[int, ...] = (0,)
    adapter_alphas: tuple[float, ...] = (16.0,)
    adapter_targets: tuple[str, ...] = ("all-linear",)
    local_steps: int = 30
    batch_size: int = 8
    sequence_length: int = 128
    learning_rate: float = 1e-3
    train_bytes: int = 200_000
    evaluation_bytes: int = 16_384
    wire_dtype: torch.dtype = torch.bfloat16
    seed: int = 0

    @classmethod
    def read(cls, run_config: Mapping[str, object]) -> Settings:
        """The settings of a Flower run config; keys that are not ours are left alone (the server's live beside them).

        Raises:
            RecipeError: naming the key, for a value of the wrong kind or out of range.
        """

        def number(key: str, default: float, low: float) -> float:
            value = run_config.get(key, default)
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value < math.inf:
                raise RecipeError(f"{key}: {value!r}, wanted a number >= {low:g}")
            return value

        def listed(key: str, default: str, low: float) -> list[float]:
            value = run_config.get(key, default)
            try:
                numbers = [float(part) for part in str(value).split(",")]
            except ValueError:
                numbers = []
            if isinstance(value, bool) or not numbers or not all(low <= entry < math.inf for entry in numbers):
                raise RecipeError(
                    f"{key}: {value!r}, wanted a number >= {low:g}, or several by partition as in '4,8,16'"
                )
            return numbers

        wire = str(run_config.get("wire-dtype", "bfloat16"))
        if wire not in WIRE_DTYPES:
            raise RecipeError(f"wire-dtype: {wire!r}, wanted one of {', '.join(WIRE_DTYPES)}")
        ranks = listed("adapter-rank", "0", 0)
        if any(rank != int(rank) for rank in ranks) or (len(ranks) > 1 and min(ranks) < 1):
            found = run_config.get("adapter-rank")
            raise RecipeError(f"adapter-rank: {found!r}, wanted whole numbers >= 1, or 0 alone to train all weights")
        alphas = listed("adapter-alpha", "16", 0)
        if min(alphas) == 0:
            raise RecipeError(f"adapter-alpha: {run_config.get('adapter-alpha')!r}, wanted numbers > 0")
        targets = tuple(part.strip() for part in str(run_config.get("adapter-targets", "all-linear")).split(","))
        return cls(
            model=str(run_config.get("model", cls.model)),
            layers=int(number("layers", cls.layers, 1)),
            hidden=int(number("hidden", cls.hidden, 8)),
            pretraining_steps=int(number("pretraining-steps", cls.pretraining_steps, 0)),
            cache_folder=str(run_config.get("cache-folder", cls.cache_folder)),
            adapter_ranks=tuple(int(rank) for rank in ranks),
            adapter_alphas=tuple(alphas),
            adapter_targets=targets,
            local_steps=int(number("local-steps", cls.local_steps, 1)),
            batch_size=int(number("batch-size", cls.batch_size, 1)),
            sequence_length=int(number("sequence-length", cls.sequence_length, 2)),
            learning_rate=float(number("learning-rate", cls.learning_rate, 1e-12)),
            train_bytes=int(number("train-bytes", cls.train_bytes, 0)),
            evaluation_bytes=int(number("evaluation-bytes", cls.evaluation_bytes, 1)),
            wire_dtype=WIRE_DTYPES[wire],
            seed=int(number("seed", cls.seed, 0)),
        )

    @property
    def uses_adapters(self) -> bool:
        """Whether clients train and send LoRA adapters in place of all weights."""
        return self.adapter_ranks != (0,)

    def rank(self, partition: int) -> int:
        """The LoRA rank of the client with that partition-id."""
        return self.adapter_ranks[partition % len(self.adapter_ranks)]

    def alpha(self, partition: int) -> float:
        """Its LoRA alpha."""
        return self.adapter_alphas[partition % len(self.adapter_alphas)]
