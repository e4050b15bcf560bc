"""Which nodes are asked: waiting for enough of them, and drawing among them."""

from __future__ import annotations

import logging
import random
import time

from flwr.serverapp import Grid
from flwr.serverapp.exception import AggregationError

from fl_merge.errors import MergeError, RecipeError
from fl_merge.method import methods_in
from fl_merge.types import MergeMethod

logger = logging.getLogger("flwr")


class RunFailedError(MergeError, AggregationError):
    """A run that made no model, or never found enough nodes to begin; Flower ends it as failed."""


def sample(
    grid: Grid,
    draw: str,
    fraction: float,
    *,
    at_least: int,
    at_least_connected: int,
    phase: str,
    seconds: float,
) -> list[int]:
    """Nodes for one phase of one round: a function of `draw` and of who is connected.

    Args:
        grid: that knows who is connected.
        draw: what seeds the draw.
        fraction: of the connected nodes that are sampled.
        at_least: so many are sampled at least.
        at_least_connected: and so many are waited for.
        phase: "train" or "evaluate", for messages.
        seconds: how long enough nodes are waited for.

    Returns:
        Node ids, ascending.

    Raises:
        RunFailedError: if there are too few when the time is up.
        RecipeError: if there are too few and no more can come.
    """
    deadline = time.monotonic() + seconds
    told = 0.0
    while True:
        connected = sorted(grid.get_node_ids())
        size = max(int(len(connected) * fraction), at_least)
        wanted = max(at_least_connected, size)
        if len(connected) >= wanted:
            break
        if getattr(grid, "nodes_are_fixed", False):
            raise RecipeError(
                f"{counted(len(connected), 'client is', 'clients are')} simulated, the strategy wants at least "
                f"{wanted} (min_available_nodes, min_{phase}_nodes): simulate more, or lower these"
            )
        if time.monotonic() >= deadline:
            raise RunFailedError(
                f"{counted(len(connected), 'node', 'nodes')} connected in {seconds:g} s (node_timeout), wanted {wanted}"
            )
        if time.monotonic() - told > 10:
            told = time.monotonic()
            logger.info("waiting for nodes: %d connected, %d wanted", len(connected), wanted)
        time.sleep(0.5)
    chosen = random.Random(draw).sample(connected, size)
    logger.info("configure_%s: sampled %d nodes of %d", phase, len(chosen), len(connected))
    return sorted(chosen)


def require_quorum(sampled: int, needed: int) -> None:
    """Refuse a round that needs more replies than nodes are sampled.

    Raises:
        RecipeError: if it does.
    """
    if needed > sampled:
        raise RecipeError(
            f"{counted(sampled, 'node is', 'nodes are')} sampled and a round needs {needed} usable replies "
            "(min_replies): no round could succeed; sample more nodes or lower min_replies"
        )


def require_cohort(method: MergeMethod, sampled: int) -> None:
    """Refuse to let so many clients train for a method that does not merge so many.

    Raises:
        RecipeError: saying how many it takes and why.
    """
    try:
        for part in methods_in(method):
            part.require_cohort(sampled)
    except MergeError as error:
        raise RecipeError(f"{error}; sample other numbers of nodes, or merge otherwise") from None


def log_settings(
    method: object, sampling: dict[str, tuple[float, int]], at_least: int, needed: object, weighted_by: str, seed: int
) -> None:
    """Say how a run will merge, and whom it will ask."""
    asked = " | ".join(f"{phase} {share:.2f} (at least {fewest})" for phase, (share, fewest) in sampling.items())
    logger.info("\t├──> Merge method: %s", method)
    logger.info("\t├──> Sampling: %s | of at least %d nodes", asked, at_least)
    logger.info("\t├──> Usable replies that a round needs: %s", needed)
    logger.info("\t└──> Weighted by: '%s'; seed %d", weighted_by, seed)


def counted(number: int, one: str, many: str) -> str:
    """A number with its noun."""
    return f"{number} {one if number == 1 else many}"
