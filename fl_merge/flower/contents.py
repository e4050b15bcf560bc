"""What stands in the replies of clients, and whose they are."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict

from fl_merge.check import check_num_examples
from fl_merge.errors import DecodeError, UpdateError, WeightError, one_line
from fl_merge.flower.records import STATISTICS_RECORD, RecordSource
from fl_merge.rounds import Refusal, Round, RoundReport, average_metrics
from fl_merge.types import Update, client_order

logger = logging.getLogger("flwr")

MetricsFunction = Callable[[list[RecordDict], str], MetricRecord]
"""From the contents of the usable replies and the key of the weights to the metrics of a round."""


def read_update(client_id: str, content: RecordDict, weighted_by_key: str, max_num_examples: float) -> Update:
    """A client's update; its tensors are decoded when they are read.

    Raises:
        UpdateError: if there is not one record of arrays (beside that of statistics) and one of metrics, with the
            number of examples.
    """
    num_examples, metrics = read_metrics(content, weighted_by_key, max_num_examples)
    arrays = {key: record for key, record in content.items() if isinstance(record, ArrayRecord)}
    measured = arrays.pop(STATISTICS_RECORD, None) if len(arrays) > 1 else None
    if len(arrays) != 1:
        raise DecodeError(f"{len(arrays)} ArrayRecords, wanted one")
    (model,) = arrays.values()
    statistics = None if measured is None else RecordSource(measured)
    return Update(client_id, num_examples, RecordSource(model), metrics, statistics)


def read_metrics(content: RecordDict, weighted_by_key: str, max_num_examples: float) -> tuple[float, dict[str, Any]]:
    """The number of examples, and the other metrics.

    Raises:
        UpdateError: if there is not one record of metrics, with a number of examples that is a weight.
    """
    records = [record for record in content.values() if isinstance(record, MetricRecord)]
    if len(records) != 1:
        raise DecodeError(f"{len(records)} MetricRecords, wanted one")
    if weighted_by_key not in records[0]:
        raise WeightError(f"the MetricRecord has no '{weighted_by_key}' (it has: {', '.join(records[0])})")
    num_examples = check_num_examples(records[0][weighted_by_key], max_num_examples)
    return num_examples, {key: value for key, value in records[0].items() if key != weighted_by_key}


def take_in(collected: Round, client_id: str, message: Message, weighted_by_key: str) -> Refusal | None:
    """Offer a reply to a round; gives why it was refused, None if it was not."""
    if message.has_error():
        return collected.refuse(client_id, f"client error: {last_line(message.error.reason)}")
    largest = collected.max_num_examples
    return collected.offer(client_id, lambda: read_update(client_id, message.content, weighted_by_key, largest))


def without_arrays(content: RecordDict) -> RecordDict:
    """The same without the model."""
    # Not by `content.array_records`: it makes the content refer to itself, and its bytes wait for the collector.
    return RecordDict({key: each for key, each in content.items() if not isinstance(each, ArrayRecord)})


def metrics_of(
    function: MetricsFunction | None,
    contents: Mapping[str, RecordDict],
    reports: Mapping[str, tuple[float, Mapping[str, Any]]],
    weighted_by_key: str,
) -> MetricRecord | None:
    """The round's metrics, clients in their order; None if the user's function cannot cope with what they sent.

    Args:
        function: the user's; None for each metric's mean.
        contents: of the usable replies by client id, for the function.
        reports: (number of examples, metrics) by client id.
        weighted_by_key: the metric that holds the number of examples, for the function.
    """
    clients = sorted(reports, key=client_order)
    if function is None:
        return MetricRecord(cast("dict[str, Any]", average_metrics({key: reports[key] for key in clients})))
    try:
        return function([contents[key] for key in clients], weighted_by_key)
    except Exception:
        logger.exception("%r failed: there are no metrics of this round", function)
        return None


class Evaluations:
    """Collects one round's evaluations. `take_in` replies as they come, then `end`.

    Args:
        asked: the clients that were asked; anyone else is refused.
        weighted_by_key: the metric that holds the number of examples.
        max_num_examples: the largest that is believed.

    Attributes:
        reports: (number of examples, metrics) by client id.
        contents: of the same replies.
        refused: the others, and why.
    """

    def __init__(self, asked: list[str], weighted_by_key: str, max_num_examples: float) -> None:
        self.reports: dict[str, tuple[float, Mapping[str, Any]]] = {}
        self.contents: dict[str, RecordDict] = {}
        self.refused: dict[str, Refusal] = {}
        self._asked = asked
        self._weighted_by_key = weighted_by_key
        self._max_num_examples = max_num_examples

    def take_in(self, client_id: str, message: Message) -> None:
        """Keep a reply's metrics, or the reason why they are of no use; of several replies the first counts."""
        if client_id in self.reports or client_id in self.refused:
            logger.warning("\trefused: client '%s': evaluated twice; the first reply counts", client_id)
            return
        try:
            if client_id not in self._asked:
                raise DecodeError("was not asked to evaluate")
            if message.has_error():
                raise DecodeError(f"client error: {last_line(message.error.reason)}")
            self.reports[client_id] = read_metrics(message.content, self._weighted_by_key, self._max_num_examples)
            self.contents[client_id] = message.content
        except UpdateError as error:
            self.refused[client_id] = Refusal(client_id, one_line(error.problem), error.tensor)

    def end(self, function: MetricsFunction | None = None) -> MetricRecord | None:
        """Nothing more comes: who was asked and did not reply is refused.

        Args:
            function: as for `metrics_of`.

        Returns:
            The round's metrics; None if there are none.
        """
        for client_id in self._asked:
            if client_id not in self.reports and client_id not in self.refused:
                self.refused[client_id] = Refusal(client_id, "no reply before the deadline")
        log_refused(tuple(self.refused.values()), len(self.reports), "evaluate")
        return metrics_of(function, self.contents, self.reports, self._weighted_by_key) if self.reports else None


def client_of(reply: Message, asked_by_id: Mapping[str, str]) -> str:
    """Who a reply is from: the node that its request went to, whatever it says of itself.

    A reply to no request of this phase is nobody's that was asked, whatever its signature. Only where nothing was sent
    through a Grid (replies made by hand) does the signature count.
    """
    about = reply.metadata
    if about.reply_to_message_id in asked_by_id:
        return asked_by_id[about.reply_to_message_id]
    signature = str(about.src_node_id)
    return f"{signature} (by its own account)" if signature in asked_by_id.values() else signature


def last_line(reason: str | None) -> str:
    """The end of a traceback, which is where it says what happened."""
    lines = [line for line in (reason or "").split("\n") if line.strip()]
    return one_line(lines[-1]) if lines else "no reason given"


def log_refused(refused: Sequence[Refusal], usable: int, phase: str) -> None:
    """Say how many replies of a phase were usable, and of each other one why it was not."""
    logger.info("aggregate_%s: %d usable replies, %d refused", phase, usable, len(refused))
    for refusal in refused:
        logger.warning("\trefused: %s", refusal)


def log_notes(report: RoundReport) -> None:
    """Say which tensors were not merged as the method says, and why: one line a reason."""
    notes = report.merge.notes if report.merge is not None else {}
    for note in dict.fromkeys(notes.values()):
        names = [name for name, why in notes.items() if why == note]
        logger.info("round %d: %s: %s", report.round_number, note, ", ".join(names))
