"""The server of the digits app: fl_merge's own, given where the model starts and how to judge it between rounds."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from digits_clients import model
from digits_clients.data import validation_examples
from digits_clients.settings import Settings
from fl_merge.flower.server_app import make_server_app


def initial(run_config: Mapping[str, object]) -> dict[str, Tensor]:
    """The pretrained network that round 1 starts from."""
    return model.initial(Settings.read(run_config).seed)


def evaluate(run_config: Mapping[str, object], server_round: int, state: Mapping[str, Tensor]) -> dict[str, float]:
    """Accuracies in [0, 1] on the server's own validation images, never on a client's test set.

    Returns:
        `accuracy/<domain>` for each domain (each digit, under label skew), their mean `accuracy`, their lowest `worst`.
    """
    settings = Settings.read(run_config)
    parts = validation_examples(settings.setting, settings.seed)
    accuracies = {name: model.accuracy(state, examples) for name, examples in parts.items()}
    return {
        "accuracy": sum(accuracies.values()) / len(accuracies),
        "worst": min(accuracies.values()),
        **{f"accuracy/{name}": accuracy for name, accuracy in accuracies.items()},
    }


app = make_server_app(initial=initial, evaluate=evaluate)
