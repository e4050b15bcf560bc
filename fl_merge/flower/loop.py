"""The rounds of a run: Flower's loop, from any round on."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

logger = logging.getLogger("flwr")

Evaluate = Callable[[int, ArrayRecord], MetricRecord | None]


def run_rounds(
    strategy: Strategy,
    grid: Grid,
    model: Callable[[], ArrayRecord],
    rounds: range,
    *,
    timeout: float,
    train_config: ConfigRecord | None = None,
    evaluate_config: ConfigRecord | None = None,
    evaluate_fn: Evaluate | None = None,
    on_evaluation: Callable[[int, MetricRecord], None] | None = None,
) -> Result:
    """Train, aggregate and evaluate in each round as Flower's `Strategy.start` does, which knows no first round.

    Nothing here keeps a model for longer than a call: what is the global model is for `model` to say.

    Args:
        strategy: whose `configure_` and `aggregate_` methods are called with the true number of the round.
        grid: that sends the messages.
        model: gives the global model.
        rounds: their numbers. Before round 1 the initial model is evaluated as round 0.
        timeout: seconds to wait for the replies of a phase.
        train_config, evaluate_config: sent to clients.
        evaluate_fn: the server's own evaluation.
        on_evaluation: told of what it found.

    Returns:
        The metrics by round; the arrays are left empty.
    """
    result, started = Result(), time.monotonic()

    def evaluate(number: int) -> None:
        found = evaluate_fn(number, model()) if evaluate_fn is not None else None
        if found is not None:
            logger.info("round %d, evaluated by the server: %s", number, found)
            result.evaluate_metrics_serverapp[number] = found
            if on_evaluation is not None:
                on_evaluation(number, found)

    if rounds.start == 1:
        evaluate(0)
    for number in rounds:
        logger.info("")
        logger.info("[ROUND %s/%s]", number, rounds[-1])
        messages = strategy.configure_train(number, model(), train_config or ConfigRecord(), grid)
        _, metrics = strategy.aggregate_train(number, grid.send_and_receive(messages, timeout=timeout))
        del messages
        if metrics is not None:
            logger.info("\t└──> Aggregated MetricRecord: %s", metrics)
            result.train_metrics_clientapp[number] = metrics

        messages = strategy.configure_evaluate(number, model(), evaluate_config or ConfigRecord(), grid)
        metrics = strategy.aggregate_evaluate(number, grid.send_and_receive(messages, timeout=timeout))
        del messages
        if metrics is not None:
            logger.info("\t└──> Aggregated MetricRecord: %s", metrics)
            result.evaluate_metrics_clientapp[number] = metrics
        evaluate(number)
    logger.info("")
    logger.info("rounds %s to %s took %.2f s", rounds.start, rounds.stop - 1, time.monotonic() - started)
    return result
