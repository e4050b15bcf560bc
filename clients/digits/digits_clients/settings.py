"""The run config of the digits app, read once and with its defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from fl_merge.errors import RecipeError

WIRE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Settings:
    """What a run may set in `[tool.flwr.app.config]` or with `--run-config`, in kebab-case.

    Args:
        setting: "domains" (eight transforms) or "dirichlet" (label skew).
        alpha: the label skew of "dirichlet", see `digits_clients.data.label_mixes`.
        local_epochs: passes over a client's own images in a round.
        learning_rate: of a client's gradient descent.
        batch_size: images a gradient step.
        seed: of the split, the pretraining and every client's training.
        wire_dtype: in which a client sends its model: a key of `WIRE_DTYPES`.
        statistics_examples: how many of its images a client uses for statistics that the method asks for.
        balance_coefficient: of the load-balancing loss, where the model is a mixture of experts.
    """

    setting: str = "domains"
    alpha: float = 0.5
    local_epochs: int = 5
    learning_rate: float = 0.02
    batch_size: int = 32
    seed: int = 0
    wire_dtype: torch.dtype = torch.float32
    statistics_examples: int = 256
    balance_coefficient: float = 0.01

    @classmethod
    def read(cls, run_config: Mapping[str, object]) -> Settings:
        """The settings of a Flower run config; keys that are not ours are left alone (the server's live beside them).

        Raises:
            RecipeError: for a wire dtype or a setting that does not exist.
        """
        wire = str(run_config.get("wire-dtype", "float32"))
        if wire not in WIRE_DTYPES:
            raise RecipeError(f"wire-dtype: {wire!r}, wanted one of {', '.join(WIRE_DTYPES)}")
        setting = str(run_config.get("setting", cls.setting))
        if setting not in ("domains", "dirichlet"):
            raise RecipeError(f"setting: {setting!r}, wanted 'domains' or 'dirichlet'")

        def number(key: str, default: float) -> float:
            value = run_config.get(key, default)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise RecipeError(f"{key}: {value!r}, wanted a number")
            return value

        return cls(
            setting=setting,
            alpha=float(number("alpha", cls.alpha)),
            local_epochs=int(number("local-epochs", cls.local_epochs)),
            learning_rate=float(number("learning-rate", cls.learning_rate)),
            batch_size=int(number("batch-size", cls.batch_size)),
            seed=int(number("seed", cls.seed)),
            wire_dtype=WIRE_DTYPES[wire],
            statistics_examples=int(number("statistics-examples", cls.statistics_examples)),
            balance_coefficient=float(number("balance-coefficient", cls.balance_coefficient)),
        )
