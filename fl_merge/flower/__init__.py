"""Flower: the strategy, the ready ServerApp, helpers for clients, and an engine that runs apps in this process."""

from fl_merge.flower.client import collect_if_asked, receive, reply, statistics_asked
from fl_merge.flower.records import to_record, to_tensors
from fl_merge.flower.strategy import FedMerge, RunFailedError
from fl_merge.flower.watch import Watcher, watching

__all__ = [
    "FedMerge",
    "RunFailedError",
    "Watcher",
    "collect_if_asked",
    "receive",
    "reply",
    "statistics_asked",
    "to_record",
    "to_tensors",
    "watching",
]
