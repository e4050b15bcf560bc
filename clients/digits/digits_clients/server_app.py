"""The server of the digits app: fl_merge's own, given where the model starts and how to judge it between rounds."""

from __future__ import annotations

import json
from collections.abc import Mapping

from torch import Tensor

from digits_clients import mixture, model
from digits_clients.data import validation_examples
from digits_clients.settings import Settings
from fl_merge.flower.records import ARCHITECTURE_KEY
from fl_merge.flower.server_app import make_server_app


def initial(run_config: Mapping[str, object]) -> dict[str, Tensor]:
    """The pretrained network that round 1 starts from."""
    return model.initial(Settings.read(run_config).seed)


def evaluate(
    run_config: Mapping[str, object], server_round: int, state: Mapping[str, Tensor]
) -> dict[str, float | list[float]]:
    """Accuracies in [0, 1] on the server's own validation images, never on a client's test set.

    Returns:
        `accuracy/<domain>` for each domain (each digit, under label skew), their mean `accuracy`, their lowest `worst`;
        of a mixture of experts `expert-load/<domain>` too, each expert's share of the choices.
    """
    settings = Settings.read(run_config)
    parts = validation_examples(settings.setting, settings.seed)
    told = run_config.get(ARCHITECTURE_KEY)
    top_k = mixture.top_k_of(json.loads(str(told)) if told else None)
    accuracies = {name: model.accuracy(state, examples, top_k) for name, examples in parts.items()}
    return {
        "accuracy": sum(accuracies.values()) / len(accuracies),
        "worst": min(accuracies.values()),
        **{f"accuracy/{name}": accuracy for name, accuracy in accuracies.items()},
        **{
            f"{key}/{name}": load_E
            for name, examples in parts.items()
            for key, load_E in model.expert_load(state, examples, top_k).items()
        },
    }


def architecture(run_config: Mapping[str, object]) -> dict[str, str | int]:
    """What clients are told of the model: of the mixture that it may become, how many experts an image has."""
    return {"model_type": "mlp", "hidden_size": model.HIDDEN}


app = make_server_app(initial=initial, evaluate=evaluate, architecture=architecture)
