"""The server of the language app: fl_merge's own, given where the model starts and how to judge it between rounds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fl_merge.adapters import BaseModel
from fl_merge.errors import RecipeError
from fl_merge.exchange import PLAIN
from fl_merge.flower.records import ARCHITECTURE_KEY
from fl_merge.flower.server_app import make_server_app
from language_clients import base, corpus, local, lora, weights
from language_clients.settings import Settings


def initial(run_config: Mapping[str, object]) -> dict[str, Tensor]:
    """What round 1 starts from: the base's weights in its own dtype, or an untrained adapter of the largest rank."""
    settings = Settings.read(run_config)
    if not settings.uses_adapters:
        return weights.tensors_of(base.load(settings, "auto"))
    rank = max(settings.adapter_ranks)
    return local.with_adapter(settings, rank, settings.alpha(settings.adapter_ranks.index(rank))).tensors()


def evaluate(
    run_config: Mapping[str, object], server_round: int, state: Mapping[str, Tensor]
) -> dict[str, float | list[float]]:
    """Bits per byte on the server's own validation documents, never on a client's test documents.

    Returns:
        `bits-per-byte/<domain>` for each of the clients' domains and for the public one, the mean over the clients'
        `bits-per-byte`, and the largest of them `worst`; of a mixture of experts `expert-load/<domain>` too, each
        expert's share of the choices.
    """
    settings = Settings.read(run_config)
    if lora.is_adapter(state):
        here = _adapted(settings, run_config, state)
    else:
        told = json.loads(str(run_config.get(ARCHITECTURE_KEY, "{}")))
        here = local.with_weights(settings, state, weights.config_of(told) if told else None)
    parts = corpus.validation_documents(settings.seed)
    bits = {domain: here.bits_per_byte(documents)[0] for domain, documents in parts.items()}
    private = [bits[domain] for domain in corpus.DOMAINS]
    return {
        "bits-per-byte": sum(private) / len(private),
        "worst": max(private),
        **{f"bits-per-byte/{domain}": value for domain, value in bits.items()},
        **{
            f"{key}/{domain}": load_E
            for domain, documents in parts.items()
            for key, load_E in here.expert_load(documents).items()
        },
    }


def architecture(run_config: Mapping[str, object]) -> dict[str, Any]:
    """The base's config, from which clients build the model; none where they train adapters of the base."""
    settings = Settings.read(run_config)
    return {} if settings.uses_adapters else weights.plain(base.config(settings))


def whole_base(run_config: Mapping[str, object]) -> BaseModel:
    """The base with its config, into which adapters are folded where a run goes on with all weights.

    Raises:
        RecipeError: if clients have no rank for adapters.
    """
    settings = Settings.read(run_config)
    if not settings.uses_adapters:
        raise RecipeError("adapter-rank: 0, and the first phase merges adapters; wanted a rank >= 1")
    return BaseModel(
        lambda: weights.tensors_of(base.load(settings, "auto")), weights.plain(base.config(settings)), "the base"
    )


def _adapted(settings: Settings, run_config: Mapping[str, object], adapter: Mapping[str, Tensor]) -> local.Local:
    """The base with the global adapter: plain factors of methods for adapters, else in the scaling of the clients."""
    rank = lora.rank_of(adapter)
    scaling = 1.0 if run_config.get(PLAIN) else settings.alpha(0) / settings.rank(0)
    return local.with_adapter(settings, rank, scaling * rank, adapter)


def adapter_config(run_config: Mapping[str, object]) -> dict[str, str]:
    """What stands in the adapter_config.json of the run's folder: which model the adapter is for."""
    settings = Settings.read(run_config)
    if not settings.uses_adapters:
        return {}
    return {"base_model_name_or_path": base.folder(settings), "task_type": "CAUSAL_LM"}


app = make_server_app(
    initial=initial, evaluate=evaluate, architecture=architecture, adapter_config=adapter_config, base=whole_base
)
