"""What clients are told in a round: the config of its messages."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from fl_merge.flower.records import ARCHITECTURE_KEY, EXCHANGE_KEY, STATISTICS_KEY, TRAIN_KEY
from fl_merge.phases import Phase
from fl_merge.rounds import asked_statistics

logger = logging.getLogger("flwr")


def told(
    config: ConfigRecord,
    server_round: int,
    phase: Phase,
    architecture: Mapping[str, Any],
    *,
    train: bool,
    exchange: str = "",
) -> ConfigRecord:
    """The config of one round's messages.

    Args:
        config: what the strategy's user says.
        server_round: from 1.
        phase: to which the round belongs.
        architecture: of the model that is sent; empty for not known.
        train: whether it goes with a message to train.
        exchange: "adapter" or "weights", of a run that has both.
    """
    settings = config.copy()
    for key, value in phase.config.items():
        settings[key] = value
    settings["server-round"] = server_round
    if architecture:
        settings[ARCHITECTURE_KEY] = json.dumps(architecture, sort_keys=True)
    if exchange:
        settings[EXCHANGE_KEY] = exchange
    statistics = asked_statistics(phase.method)
    if train and statistics:
        settings[STATISTICS_KEY] = ",".join(statistics)
    if train and not phase.trains_all:
        settings[TRAIN_KEY] = ",".join(phase.train)
    return settings


def asked_for(phase: Phase, architecture: Mapping[str, Any], exchange: str = "") -> str:
    """What clients were asked for, in words, for one whose tensors do not fit; empty if that is nothing special."""
    parts = []
    if exchange and phase.trains_all:
        parts.append(f"{'an adapter' if exchange == 'adapter' else 'all weights'} ({EXCHANGE_KEY})")
    if not phase.trains_all:
        parts.append(f"{', '.join(phase.train)} alone ({TRAIN_KEY})")
    if architecture:
        parts.append(f"a model of family '{architecture.get('model_type')}' ({ARCHITECTURE_KEY})")
    return f"the message's config asks for {' of '.join(parts)}" if parts else ""


def content_for(
    sent_to: Callable[[str], tuple[ArrayRecord, dict[str, bool | str]]],
    settings: ConfigRecord,
    arrays_key: str,
    config_key: str,
) -> Callable[[int], RecordDict]:
    """From a node's id to the content of its message; one content for all that are sent the same.

    Args:
        sent_to: from a client's id to the model that it is sent, and what is said of it (`CarriedModel.sent_to`).
        settings: what `told` gave.
        arrays_key, config_key: names of the records.
    """
    shared: dict[int, RecordDict] = {}  # of clients that are sent the same model: all, but of adapters

    def content(node: int) -> RecordDict:
        arrays, about = sent_to(str(node))
        if id(arrays) not in shared:
            config = settings.copy()
            for key, value in about.items():
                config[key] = value
            shared[id(arrays)] = RecordDict({arrays_key: arrays, config_key: config})
        return shared[id(arrays)]

    return content
