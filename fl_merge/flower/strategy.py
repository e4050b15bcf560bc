"""FedMerge: the strategy that stands where FedAvg stood."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from torch import Tensor

from fl_merge.adapters import BaseModel
from fl_merge.adapters.federated import require_parameters
from fl_merge.check import MAX_NUM_EXAMPLES
from fl_merge.errors import RecipeError
from fl_merge.flower.asking import content_for
from fl_merge.flower.carried import CarriedModel
from fl_merge.flower.contents import (
    Evaluations,
    MetricsFunction,
    client_of,
    log_notes,
    log_refused,
    metrics_of,
    take_in,
    without_arrays,
)
from fl_merge.flower.journal import Journal
from fl_merge.flower.keeping import SPILL_ABOVE_BYTES, Keeping
from fl_merge.flower.loop import run_rounds
from fl_merge.flower.phasing import Phasing
from fl_merge.flower.records import wire_dtype as wire_dtype_of
from fl_merge.flower.replies import RepliesAsTheyCome
from fl_merge.flower.requests import Requests
from fl_merge.flower.resume import Resumption, checkpoint_of, goes_on_in, resumption_here
from fl_merge.flower.sampling import RunFailedError, log_settings, require_cohort, require_quorum, sample
from fl_merge.flower.watch import Evaluation, Watcher, watchers_here
from fl_merge.hyperparameters import in_range, whole_number
from fl_merge.method import as_method
from fl_merge.model import GlobalModel
from fl_merge.phases import as_schedule
from fl_merge.rounds import Round, RoundReport, quorum
from fl_merge.tuning import Tuner
from fl_merge.types import MergeMethod

__all__ = ["SPILL_ABOVE_BYTES", "FedMerge", "MetricsFunction", "RunFailedError"]

logger = logging.getLogger("flwr")


class FedMerge(Strategy):
    """A Flower strategy that merges the clients' models with any merge method.

        strategy = FedMerge(ties(density=0.2))

    Each update is checked whole against the model that was sent before anything of it is used. One that does not fit
    is dropped, with client, tensor and reason in the log, and the round's result is bit for bit the one without that
    client. A round with too few usable updates fails: the old model stays. A run in which no round made a model raises
    `RunFailedError`.

    The sampling arguments are FedAvg's.

    Args:
        method: a merge method, such as `ties(density=0.2)`, or its name for the defaults; or a `schedule` of phases.
        fraction_train, fraction_evaluate: of the connected nodes that are sampled.
        min_train_nodes, min_evaluate_nodes: sampled at least.
        min_available_nodes: nodes to wait for before sampling.
        weighted_by_key: the metric that holds a client's number of examples.
        arrayrecord_key, configrecord_key: names of the records in messages to clients.
        train_metrics_aggr_fn, evaluate_metrics_aggr_fn: from the usable replies and `weighted_by_key` to the round's
            metrics; by default each metric's mean over the clients that sent it, weighted by their examples. Replies
            whose arrays are kept on disk come without them.
        min_replies: usable updates that a round needs; by default all sampled less the tolerated failures, at least 2.
        max_failures: the tolerated failures, as a fraction of the sampled nodes.
        max_num_examples: the largest number of examples that is believed.
        node_timeout: seconds to wait for enough nodes to connect.
        seed: of node sampling and of the methods' draws.
        wire_dtype: send clients the model in this floating dtype ("bfloat16"); by default in the model's own. The
            server keeps float32 either way.
        tied: names of tensors that are another name's tensor (tied weights) and are merged once with it.
        spill_folder: keep every round's updates on disk there until they are merged (see `fl_merge.spill`): the server
            then has about one model in memory, not one a client, and merges to the same bytes. None: in the system's
            temporary folder, and only in rounds above `spill_above_bytes`. A folder in memory (tmpfs) saves nothing.
        max_spill_bytes: of a round's updates on disk; each sampled client may take an equal share. None: no limit.
        spill_above_bytes: without a `spill_folder`, the sampled nodes times the model's bytes above which updates are
            kept on disk (1 GB); None for never.
        running_sum: in rounds whose updates would be kept on disk, add each to a running sum instead (see
            `fl_merge.running`): that takes 16 bytes an element of disk, however many clients there are. For methods
            whose coefficients are the clients' shares; the merged model is what it is otherwise to a last place,
            whatever the order of arrival. Adapters are then added to a product of bounded rank in every round (see
            `fl_merge.running_products`).
        tune: chooses each round how far to go along the merged delta, by a score on the server's validation data.
        architecture: the model's config (of Hugging Face's, say), which clients are sent in every round and which
            follows when a phase changes the model; None where clients know how to build it.
        base: of a schedule that begins with adapters, the model that they belong to: tensors, a safetensors file, or a
            folder, whose config.json is then the `architecture` unless one is given. `start` is given the adapter.
        run_folder: where `start` leaves a journal, the latest model and a checkpoint to resume from; None for nowhere.
        adapter_config: of a method for adapters: what else stands in their adapter_config.json, such as
            `base_model_name_or_path` and `task_type`; it goes into the adapter that the run folder holds.
        watchers: told of every round; see `fl_merge.flower.watch`.

    Raises:
        RecipeError: for an argument that is out of range.
    """

    def __init__(
        self,
        method: MergeMethod | str,
        fraction_train: float = 1.0,
        fraction_evaluate: float = 1.0,
        min_train_nodes: int = 2,
        min_evaluate_nodes: int = 2,
        min_available_nodes: int = 2,
        weighted_by_key: str = "num-examples",
        arrayrecord_key: str = "arrays",
        configrecord_key: str = "config",
        train_metrics_aggr_fn: MetricsFunction | None = None,
        evaluate_metrics_aggr_fn: MetricsFunction | None = None,
        *,
        min_replies: int | None = None,
        max_failures: float = 0.5,
        max_num_examples: float = MAX_NUM_EXAMPLES,
        node_timeout: float = 3600.0,
        seed: int = 0,
        wire_dtype: str | None = None,
        tied: Mapping[str, str] | None = None,
        spill_folder: str | Path | None = None,
        max_spill_bytes: int | None = None,
        spill_above_bytes: int | None = SPILL_ABOVE_BYTES,
        running_sum: bool = False,
        tune: Tuner | None = None,
        architecture: Mapping[str, Any] | None = None,
        base: BaseModel | Mapping[str, Tensor] | str | Path | None = None,
        run_folder: str | Path | None = None,
        adapter_config: Mapping[str, Any] | None = None,
        watchers: Sequence[Watcher] = (),
    ) -> None:
        whole_number("min_train_nodes", min_train_nodes, 0)
        whole_number("min_evaluate_nodes", min_evaluate_nodes, 0)
        whole_number("min_available_nodes", min_available_nodes, 0)
        whole_number("min_replies", 1 if min_replies is None else min_replies, 1)
        in_range("fraction_train", fraction_train, 0.0, 1.0)
        in_range("fraction_evaluate", fraction_evaluate, 0.0, 1.0)
        in_range("max_failures", max_failures, 0.0, 1.0)
        in_range("max_num_examples", max_num_examples, 0.0, open_low=True)
        in_range("node_timeout", node_timeout, 0.0)
        self.method = as_method(method)
        self.schedule = as_schedule(self.method)
        if tune is not None:
            self.schedule.require_whole_models("tune")
        folder = None if spill_folder is None else Path(spill_folder)
        self._phasing = Phasing(
            self.schedule, lambda each: Keeping(each, folder, max_spill_bytes, spill_above_bytes, running_sum)
        )
        self.fraction_train = fraction_train
        self.fraction_evaluate = fraction_evaluate
        self.min_train_nodes = min_train_nodes if fraction_train > 0 else 0
        self.min_evaluate_nodes = min_evaluate_nodes if fraction_evaluate > 0 else 0
        self.min_available_nodes = min_available_nodes
        self.weighted_by_key = weighted_by_key
        self.arrayrecord_key = arrayrecord_key
        self.configrecord_key = configrecord_key
        self.train_metrics_aggr_fn = train_metrics_aggr_fn
        self.evaluate_metrics_aggr_fn = evaluate_metrics_aggr_fn
        self.min_replies = min_replies
        self.max_failures = max_failures
        self.max_num_examples = max_num_examples
        self.node_timeout = node_timeout
        self.seed = seed
        self.wire_dtype = wire_dtype_of(wire_dtype)
        self.tied = dict(tied or {})
        self.tune = tune
        self.run_folder = run_folder
        self.adapter_config = dict(adapter_config or {})
        self.watchers = tuple(watchers)
        self._journal: tuple[Journal, ...] = ()
        self._carried = CarriedModel(
            self.method,
            self.wire_dtype,
            self.tied,
            architecture,
            None if base is None else BaseModel.of(base),
            self.adapter_config,
        )
        self._requests = Requests()
        self._merged_rounds = 0
        self._failures: list[str] = []

    @property
    def model(self) -> GlobalModel:
        """The global model, float32 master included.

        Raises:
            MergeError: before the first round.
        """
        return self._carried.model

    def summary(self) -> None:
        """Log the settings."""
        asked = {
            "train": (self.fraction_train, self.min_train_nodes),
            "evaluate": (self.fraction_evaluate, self.min_evaluate_nodes),
        }
        needed = self.min_replies or f"all less {self.max_failures:.0%}, at least 2"
        log_settings(self.method, asked, self.min_available_nodes, needed, self.weighted_by_key, self.seed)

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
        *,
        resume: str | Path | None = None,
        force: bool = False,
    ) -> Result:
        """Run the federation: the rounds of Flower's `Strategy.start`, with replies taken as they arrive.

        Args and Returns: as Flower's `Strategy.start`, and

        Args:
            resume: the folder of a run, with whose next round to go on: a run that is resumed gives the same numbers
                as one that was not stopped. `initial_arrays` then only says what the model is to look like, and
                `num_rounds` counts from the run's beginning.
            force: resume although the method, the seed or the model's tensors are not those of the run.

        Raises:
            RecipeError: if the method does not fit the model, or there is no such run to resume, before any client is
                asked.
            RunFailedError: if no round made a model.
        """
        self.schedule.require_rounds(num_rounds)
        resumption = Resumption(Path(resume), force) if resume else resumption_here()
        if self.run_folder is not None:
            self._journal = (Journal(self.run_folder, {}, resumed=goes_on_in(self.run_folder, resumption)),)
        self._carried.adopt(initial_arrays)
        del initial_arrays
        first = 1 if resumption is None else self._resume(resumption, num_rounds) + 1
        self._merged_rounds, self._failures = 0, []
        logger.info("Starting %s, rounds %d to %d:", type(self).__name__, first, num_rounds)
        self.summary()
        if self._phasing.phase(first).merges_adapters:
            require_parameters(self._carried.model.sent, self.adapter_config)
            self._tell(lambda watcher: watcher.adapter_described(self.adapter_config))
        for watcher in self._watchers():
            if first == 1:
                watcher.run_started(num_rounds, self.method)
            else:
                watcher.run_resumed(num_rounds, self.method, first - 1)
        result = run_rounds(
            self,
            RepliesAsTheyCome(grid),
            self._carried.given_out,
            range(first, num_rounds + 1),
            timeout=timeout,
            train_config=train_config,
            evaluate_config=evaluate_config,
            evaluate_fn=evaluate_fn,
            on_evaluation=self._evaluated,
        )
        if num_rounds > 0 and self.fraction_train > 0 and self._merged_rounds == 0:
            rounds = f"{num_rounds}" if first == 1 else f"{num_rounds - first + 1} since it was resumed"
            raise RunFailedError(f"no round of {rounds} made a model; the last one: {self._failures[-1]}")
        result.arrays = self._carried.given_out()
        return result

    def _resume(self, resumption: Resumption, num_rounds: int) -> int:
        """Make a checkpoint's model the global one; gives the number of the last round that is in it."""
        checkpoint = resumption.read(self.method, self.seed, self._carried.wanted_specs, num_rounds)
        self._carried.follow(checkpoint.model)
        return checkpoint.round_number

    def _watchers(self) -> tuple[Watcher, ...]:
        return (*self.watchers, *self._journal, *watchers_here())

    def _tell(self, what: Callable[[Watcher], None]) -> None:
        for watcher in self._watchers():
            what(watcher)

    def _evaluated(self, server_round: int, metrics: MetricRecord) -> None:
        self._tell(lambda watcher: watcher.server_evaluated(server_round, dict(metrics)))

    # --- training --------------------------------------------------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The messages that ask the sampled nodes to train."""
        self._carried.adopt(arrays)
        if self.fraction_train == 0.0:
            return self._requests.ask_nobody()
        self._phasing.enter(server_round, self._carried, self._tell)
        trained = self._phasing.trained(server_round, self.model)
        try:
            nodes = self._sample(grid, server_round, "train", self.fraction_train, self.min_train_nodes)
            require_quorum(len(nodes), quorum(len(nodes), self.min_replies, self.max_failures))
            require_cohort(self._phasing.phase(server_round).method, len(nodes))
            self._phasing.make_room(server_round, len(nodes), trained, grid)  # before clients train for nothing
        except (RunFailedError, RecipeError) as error:
            if self._merged_rounds == 0:
                raise
            return self._no_round(server_round, str(error))
        self._tell(lambda watcher: watcher.round_started(server_round, tuple(str(node) for node in nodes)))
        return self._messages(server_round, config, nodes, MessageType.TRAIN)

    def _no_round(self, server_round: int, why: str) -> list[Message]:
        """A round that asks nobody, because too few nodes are left: it fails, and the model stands."""
        logger.error("round %d made no model, the old one stands: %s", server_round, why)
        report = RoundReport(server_round, (), (), (), None, why, 0.0)
        self._tell(lambda watcher: watcher.round_ended(report, self.model))
        self._phasing.require_structure(server_round, why)
        return self._requests.ask_nobody()

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Check the replies, merge the usable ones, and report the rest.

        Returns:
            The new model and the round's metrics; (None, None) if the round failed: the old model then stands.
        """
        asked = self._requests.clients
        if not asked:
            return None, None
        phase, keeping = self._phasing.phase(server_round), self._phasing.keeping(server_round)
        trained = self._phasing.trained(server_round, self.model)
        contents: dict[str, RecordDict] = {}
        askers = self._requests.by_id()
        with keeping.spill(len(asked), trained) as spill:
            collected = Round(
                server_round,
                trained,
                phase.method,
                asked,
                min_replies=self.min_replies,
                max_failures=self.max_failures,
                seed=self.seed,
                max_num_examples=self.max_num_examples,
                wire=self.wire_dtype,
                spill=spill,
                running=keeping.sum_in(spill, trained, self.seed, server_round),
                tuner=self.tune,
                asked=self._phasing.asked(server_round, self.model),
            )
            keep = self.train_metrics_aggr_fn is not None  # else nobody will ask
            for message in replies:
                client_id, started = client_of(message, askers), time.perf_counter()
                refusal = take_in(collected, client_id, message, self.weighted_by_key)
                seconds = time.perf_counter() - started
                for watcher in self._watchers():
                    watcher.replied(server_round, client_id, refusal, seconds)
                if refusal is None and keep:
                    contents[client_id] = message.content if spill is None else without_arrays(message.content)
                del message  # or it would stay until the next one is there
            model, report = collected.merge()
            del collected  # and with it the updates
        log_refused(report.refused, len(report.accepted), "train")
        metrics = None
        if model is None:
            self._failures.append(f"round {server_round}: {report.failure}")
            logger.error("round %d made no model, the old one stands: %s", server_round, report.failure)
        else:
            self._merged_rounds += 1
            log_notes(report)
            model = self._phasing.whole(server_round, self.model, model)
            self._carried.follow(model)
            accepted = {entry.client_id: (entry.num_examples, entry.metrics) for entry in report.accepted}
            metrics = metrics_of(self.train_metrics_aggr_fn, contents, accepted, self.weighted_by_key)
        self._tell(lambda watcher: watcher.round_ended(report, self.model))
        if model is None:
            self._phasing.require_structure(server_round, str(report.failure))
            return None, None
        checkpoint = checkpoint_of(self.method, self.seed, server_round, model)
        self._tell(lambda watcher: watcher.checkpointed(checkpoint))
        return self._carried.record, metrics

    # --- evaluation ------------------------------------------------------------------------------------------------

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The messages that ask the sampled nodes to evaluate the global model."""
        self._carried.adopt(arrays)
        if self.fraction_evaluate == 0.0:
            return self._requests.ask_nobody()
        try:
            nodes = self._sample(grid, server_round, "evaluate", self.fraction_evaluate, self.min_evaluate_nodes)
        except RunFailedError as error:
            logger.warning("round %d is not evaluated: %s", server_round, error)
            return self._requests.ask_nobody()
        return self._messages(server_round, config, nodes, MessageType.EVALUATE)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """The metrics of the usable replies, averaged; None if there are none."""
        askers, asked = self._requests.by_id(), self._requests.clients
        found = Evaluations(list(asked), self.weighted_by_key, self.max_num_examples)
        for message in replies:
            found.take_in(client_of(message, askers), message)
        if not asked:
            return None
        metrics = found.end(self.evaluate_metrics_aggr_fn)
        refused = tuple(found.refused.values())
        evaluation = Evaluation(server_round, found.reports, refused, dict(metrics or {}))
        self._tell(lambda watcher: watcher.clients_evaluated(evaluation))
        return metrics

    # --- shared ----------------------------------------------------------------------------------------------------

    def _sample(self, grid: Grid, server_round: int, phase: str, fraction: float, at_least: int) -> list[int]:
        return sample(
            grid,
            f"{self.seed}/{server_round}/{phase}",
            fraction,
            at_least=at_least,
            at_least_connected=self.min_available_nodes,
            phase=phase,
            seconds=self.node_timeout,
        )

    def _messages(self, server_round: int, config: ConfigRecord, nodes: list[int], message_type: str) -> list[Message]:
        train = message_type == MessageType.TRAIN
        settings = self._phasing.told(config, server_round, self.model, train=train)
        content = content_for(
            lambda client: self._carried.sent_to(client, self.seed, server_round),
            settings,
            self.arrayrecord_key,
            self.configrecord_key,
        )
        return self._requests.ask(nodes, content, message_type, server_round)
