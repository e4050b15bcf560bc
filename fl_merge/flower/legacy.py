"""FedMerge for deployments on Flower's older API: `flwr.server.strategy` and clients that are `NumPyClient`s."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from flwr.app import Array, ArrayRecord
from flwr.common import EvaluateIns, EvaluateRes, FitIns, FitRes, Parameters, Scalar
from flwr.server.client_manager import ClientManager
from flwr.server.client_proxy import ClientProxy
from flwr.server.strategy import FedAvg, Strategy

from fl_merge.check import MAX_NUM_EXAMPLES, check_num_examples
from fl_merge.codecs import Numpy, npy_header
from fl_merge.errors import DecodeError, RecipeError, TensorMismatchError, WeightError, one_line
from fl_merge.flower.records import RecordSource, to_record, views
from fl_merge.flower.strategy import RunFailedError
from fl_merge.hyperparameters import in_range
from fl_merge.method import as_method
from fl_merge.model import GlobalModel
from fl_merge.phases import Schedule
from fl_merge.rounds import Round, asked_statistics, average_metrics
from fl_merge.types import MergeMethod, Update, client_order

logger = logging.getLogger("flwr")

Failure = tuple[ClientProxy, Any] | BaseException
MetricsFunction = Callable[[list[tuple[int, dict[str, Scalar]]]], dict[str, Scalar]]


class LegacyFedMerge(Strategy):
    """A strategy of the older API that merges as `FedMerge` does.

        strategy = LegacyFedMerge(ties(density=0.2), parameter_names=list(model.state_dict()))

    Updates are checked and merged by the same code as FedMerge's, with the same result. Sampling, evaluation and the
    configuration of clients are the older `FedAvg`'s, whose arguments are taken as they are.

    The older API tells a strategy neither the parameters' names nor the number of rounds. Give both: then rules by name
    work, the one for `num_batches_tracked` among them, and a run that made no model fails.

    Args:
        method: a merge method, such as `ties(density=0.2)`, or its name for the defaults.
        parameter_names: of the arrays that clients send, in order; "0", "1", ... if left out.
        initial_parameters: the model to start from; if left out, one client is asked for it.
        num_rounds: of the run; after that many without a model, `RunFailedError` is raised. None: never.
        min_replies: usable updates that a round needs; by default all sampled less the tolerated failures, at least 2.
        max_failures: the tolerated failures, as a fraction of the sampled clients; `accept_failures=False` is 0.
        max_num_examples: the largest number of examples that is believed.
        seed: of the methods' draws.
        fedavg: any other argument of `flwr.server.strategy.FedAvg`: `fraction_fit`, `min_fit_clients`, `evaluate_fn`,
            `on_fit_config_fn`, `fit_metrics_aggregation_fn` and so on. Without a function for metrics, each one's mean
            over the clients that sent it as a number is taken, weighted by their examples.

    Raises:
        RecipeError: for an argument that is out of range, or a method that does not fit `initial_parameters`.
        TypeError: for an argument that FedAvg does not have.
    """

    def __init__(
        self,
        method: MergeMethod | str,
        *,
        parameter_names: Sequence[str] | None = None,
        initial_parameters: Parameters | None = None,
        num_rounds: int | None = None,
        min_replies: int | None = None,
        max_failures: float = 0.5,
        max_num_examples: float = MAX_NUM_EXAMPLES,
        seed: int = 0,
        **fedavg: Any,
    ) -> None:
        in_range("num_rounds", 1 if num_rounds is None else num_rounds, 1)
        in_range("min_replies", 1 if min_replies is None else min_replies, 1)
        in_range("max_failures", max_failures, 0.0, 1.0)
        in_range("max_num_examples", max_num_examples, 0.0, open_low=True)
        names = None if parameter_names is None else tuple(parameter_names)
        if names is not None and len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise RecipeError(f"parameter_names: '{twice}' is there twice")
        fit_metrics: MetricsFunction = fedavg.pop("fit_metrics_aggregation_fn", None) or mean_metrics
        fedavg["evaluate_metrics_aggregation_fn"] = fedavg.get("evaluate_metrics_aggregation_fn") or mean_metrics
        self.method = as_method(method)
        if isinstance(self.method, Schedule):
            raise RecipeError(
                "found a schedule of phases, of which clients of the older API could not be told; wanted one method, "
                "or FedMerge"
            )
        if kinds := asked_statistics(self.method):
            raise RecipeError(
                f"{self.method} needs statistics {', '.join(map(repr, kinds))} of the clients, which clients of the "
                "older API cannot send; wanted a method that goes by models alone, or FedMerge"
            )
        self.num_rounds = num_rounds
        self.min_replies = min_replies
        self.max_failures = max_failures if fedavg.get("accept_failures", True) else 0.0
        self.max_num_examples = max_num_examples
        self.seed = seed
        self._fedavg = FedAvg(initial_parameters=initial_parameters, **fedavg)
        self._fit_metrics = fit_metrics
        self._given_names = names
        self._model: GlobalModel | None = None
        self._parameters: Parameters | None = None  # what `_model` was sent as
        self._sampled: tuple[str, ...] = ()
        self._merged_rounds = 0
        if initial_parameters is not None:
            self._adopt(initial_parameters)

    def initialize_parameters(self, client_manager: ClientManager) -> Parameters | None:
        """The initial parameters, if they were given."""
        return self._fedavg.initialize_parameters(client_manager)

    def configure_fit(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, FitIns]]:
        """The sampled clients and what they are asked.

        Raises:
            RecipeError: if the parameters are not as many as `parameter_names`, or the method does not fit them.
            RunFailedError: in round `num_rounds`, if no client can be asked and no round made a model.
        """
        self._adopt(parameters)
        asked = self._fedavg.configure_fit(server_round, parameters, client_manager)
        self._sampled = tuple(client.cid for client, _ in asked)
        if not asked:
            self._round_failed(server_round, "no clients could be sampled")
        return asked

    def aggregate_fit(
        self, server_round: int, results: list[tuple[ClientProxy, FitRes]], failures: list[Failure]
    ) -> tuple[Parameters | None, dict[str, Scalar]]:
        """Check the results, merge the usable ones, and log the rest.

        Returns:
            The new parameters and the round's metrics; None and {} if the round failed: the old model then stands.

        Raises:
            RunFailedError: after round `num_rounds`, if none made a model.
        """
        if self._model is None:
            raise RecipeError("aggregate_fit before configure_fit: there is no global model yet")
        collected = Round(
            server_round,
            self._model,
            self.method,
            self._sampled,
            min_replies=self.min_replies,
            max_failures=self.max_failures,
            seed=self.seed,
            max_num_examples=self.max_num_examples,
        )
        for client, result in results:
            collected.offer(client.cid, partial(self._read, client.cid, result))
        answered = {client.cid for client, _ in results}
        for client_id, reason in _reasons(failures, [cid for cid in self._sampled if cid not in answered]).items():
            collected.refuse(client_id, reason)

        model, report = collected.merge()
        logger.info("aggregate_fit: %d usable replies, %d refused", len(report.accepted), len(report.refused))
        for refusal in report.refused:
            logger.warning("\trefused: %s", refusal)
        if model is None:
            self._round_failed(server_round, str(report.failure))
            return None, {}
        self._merged_rounds += 1
        self._model = model
        names = self._names(len(model.sent))
        sent = to_record({name: model.sent[name] for name in names}, encoded=model.encoded)
        self._parameters = Parameters([sent[name].data for name in names], Numpy.tag)
        by_client = {client.cid: result for client, result in results}
        accepted = sorted((entry.client_id for entry in report.accepted), key=client_order)
        usable = [by_client[client_id] for client_id in accepted]
        return self._parameters, self._fit_metrics([(result.num_examples, result.metrics) for result in usable])

    def configure_evaluate(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, EvaluateIns]]:
        """The sampled clients and what they are asked."""
        return self._fedavg.configure_evaluate(server_round, parameters, client_manager)

    def aggregate_evaluate(
        self, server_round: int, results: list[tuple[ClientProxy, EvaluateRes]], failures: list[Failure]
    ) -> tuple[float | None, dict[str, Scalar]]:
        """The mean loss and the metrics of the clients whose loss and number of examples are usable."""
        usable = []
        for client, result in results:
            try:
                check_num_examples(result.num_examples, self.max_num_examples)
                if not math.isfinite(result.loss):
                    raise WeightError(f"loss is {result.loss}, wanted a finite number")
                usable.append((client, result))
            except WeightError as error:
                logger.warning("aggregate_evaluate: refused: %s", error.of_client(client.cid))
        return self._fedavg.aggregate_evaluate(server_round, usable, failures)

    def evaluate(self, server_round: int, parameters: Parameters) -> tuple[float, dict[str, Scalar]] | None:
        """What `evaluate_fn` makes of the model, if there is one."""
        return self._fedavg.evaluate(server_round, parameters)

    def _adopt(self, parameters: Parameters) -> None:
        """Make `parameters` the global model, unless they are what the model was sent as."""
        if parameters is self._parameters:
            return
        if self._given_names is not None and len(parameters.tensors) != len(self._given_names):
            raise RecipeError(
                f"parameter_names: found {len(self._given_names)} names, the model has {len(parameters.tensors)} arrays"
            )
        names = self._names(len(parameters.tensors))
        model = GlobalModel.initial(views(_record(names, parameters)), self.method)
        self._model, self._parameters = model, parameters

    def _names(self, count: int) -> tuple[str, ...]:
        return self._given_names or tuple(str(index) for index in range(count))

    def _read(self, client_id: str, result: FitRes) -> Update:
        arrays = len(result.parameters.tensors)
        if self._model is not None and arrays != len(self._model.sent):
            raise TensorMismatchError(f"{arrays} arrays, the model has {len(self._model.sent)}")
        num_examples = check_num_examples(result.num_examples, self.max_num_examples)
        record = _record(self._names(arrays), result.parameters)
        return Update(client_id, num_examples, RecordSource(record), _numbers(result.metrics))

    def _round_failed(self, server_round: int, why: str) -> None:
        logger.error("round %d made no model, the old one stands: %s", server_round, why)
        if server_round == self.num_rounds and self._merged_rounds == 0:
            raise RunFailedError(f"no round of {server_round} made a model; the last one: {why}")


def mean_metrics(reports: list[tuple[int, dict[str, Scalar]]]) -> dict[str, Scalar]:
    """Each metric's mean over the clients that sent it as a finite number, weighted by their numbers of examples."""
    means = average_metrics({str(i): (weight, _numbers(metrics)) for i, (weight, metrics) in enumerate(reports)})
    return {name: mean for name, mean in means.items() if not isinstance(mean, list)}


def _record(names: Sequence[str], parameters: Parameters) -> ArrayRecord:
    """The older API's list of arrays as a record by name. What each array is comes from its own header."""
    arrays = {}
    for name, data in zip(names, parameters.tensors, strict=True):
        try:
            shape, _, dtype, _ = npy_header(data)
        except DecodeError as error:
            raise DecodeError(error.problem, tensor=name) from None
        label = dtype.newbyteorder("=").name
        arrays[name] = Array(dtype=label, shape=shape, stype=parameters.tensor_type, data=data)
    return ArrayRecord(arrays)


def _numbers(metrics: Mapping[str, Scalar]) -> dict[str, float | int | list[float] | list[int]]:
    return {
        name: value for name, value in metrics.items() if isinstance(value, int | float) and not isinstance(value, bool)
    }


def _reasons(failures: Sequence[Failure], silent: Sequence[str]) -> dict[str, str]:
    """Why the clients that gave no result gave none, as far as is known. An exception does not say whose it is."""
    causes = list(dict.fromkeys(_first_line(failure) for failure in failures if isinstance(failure, BaseException)))
    unnamed = causes[0] if len(causes) == 1 else f"one of {causes}"
    reasons = dict.fromkeys(silent, f"client error: {unnamed}") if causes else {}
    for failure in failures:
        if isinstance(failure, tuple):
            reasons[failure[0].cid] = f"client error: {failure[1].status.message}"
    return reasons


def _first_line(error: BaseException) -> str:
    return one_line(str(error).strip().partition("\n")[0]) or type(error).__name__
