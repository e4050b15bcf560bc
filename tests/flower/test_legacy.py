"""The older API: `LegacyFedMerge` refuses and merges as `FedMerge` does, and drives unmodified NumPyClients."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Context, Message
from flwr.client import NumPyClient
from flwr.clientapp import ClientApp
from flwr.common import (
    Code,
    EvaluateRes,
    FitRes,
    Parameters,
    Scalar,
    Status,
    ndarrays_to_parameters,
    parameters_to_ndarrays,
)
from flwr.server import ServerApp, ServerAppComponents, ServerConfig, SimpleClientManager
from flwr.server.client_proxy import ClientProxy
from flwr.serverapp import Grid
from flwr.serverapp import ServerApp as NativeServerApp

from fl_merge import MergeError, RecipeError, merge, partition, phase, schedule
from fl_merge.flower import FedMerge, RunFailedError, reply
from fl_merge.flower.apps import run_app
from fl_merge.flower.client import receive
from fl_merge.flower.legacy import LegacyFedMerge
from fl_merge.methods import ties, weighted_average
from fl_merge.types import MergeMethod

NAMES = ("fc.weight", "fc.bias", "norm.weight", "norm.num_batches_tracked")
Arrays = list[np.ndarray]


def base() -> Arrays:
    draw = np.random.default_rng(0)
    return [
        draw.normal(size=(6, 5)).astype(np.float32),
        draw.normal(size=6).astype(np.float32),
        np.ones(6, np.float32),
        np.array(3, np.int64),
    ]


def trained(arrays: Arrays, client: int) -> Arrays:
    """What client 0, 1, ... makes of the model."""
    draw = np.random.default_rng(1 + client)
    return [
        array + (draw.normal(size=array.shape) / 10).astype(np.float32)
        if array.dtype.kind == "f"
        else np.array(array + 1 + client)
        for array in arrays
    ]


def examples(client: int) -> int:
    return 10 * (1 + client)


# --- one round by hand ---------------------------------------------------------------------------------------------


class Client(ClientProxy):
    """Never asked anything: the tests hand in what it would have answered."""

    get_properties = get_parameters = fit = evaluate = reconnect = None


Client.__abstractmethods__ = frozenset()


def clients(count: int) -> tuple[list[ClientProxy], SimpleClientManager]:
    proxies: list[ClientProxy] = [Client(str(100 + i)) for i in range(count)]
    manager = SimpleClientManager()
    for proxy in proxies:
        manager.register(proxy)
    return proxies, manager


def result(arrays: Arrays | Parameters, num_examples: int, **metrics: Scalar) -> FitRes:
    parameters = arrays if isinstance(arrays, Parameters) else ndarrays_to_parameters(arrays)
    return FitRes(Status(Code.OK, ""), parameters, num_examples, dict(metrics))


def fit_round(
    strategy: LegacyFedMerge,
    results: dict[int, FitRes],
    failures: Sequence[BaseException] = (),
    *,
    sampled: int = 4,
    server_round: int = 1,
) -> tuple[Arrays | None, dict[str, Scalar]]:
    proxies, manager = clients(sampled)
    strategy.configure_fit(server_round, ndarrays_to_parameters(base()), manager)
    pairs = [(proxies[client], answer) for client, answer in results.items()]
    parameters, metrics = strategy.aggregate_fit(server_round, pairs, list(failures))
    return (None if parameters is None else parameters_to_ndarrays(parameters)), metrics


def good(count: int) -> dict[int, FitRes]:
    return {i: result(trained(base(), i), examples(i), loss=float(i)) for i in range(count)}


def merged(method: MergeMethod, members: Sequence[int]) -> Arrays:
    """The same merge on plain tensors."""
    model = merge(
        method,
        named(base()),
        {str(100 + i): named(trained(base(), i)) for i in members},
        {str(100 + i): examples(i) for i in members},
    )
    return [model[name].numpy() for name in NAMES]


def named(arrays: Arrays) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in zip(NAMES, arrays, strict=True)}


def same(found: Arrays | None, wanted: Arrays) -> bool:
    """Equal to the bit."""
    return found is not None and [(a.dtype, a.shape, a.tobytes()) for a in found] == [
        (a.dtype, a.shape, a.tobytes()) for a in wanted
    ]


def test_merges_as_the_core_does_and_averages_metrics() -> None:
    arrays, metrics = fit_round(LegacyFedMerge(ties(density=0.2), parameter_names=NAMES), good(4))
    assert same(arrays, merged(ties(density=0.2), range(4)))
    assert metrics == {"loss": pytest.approx((0 * 10 + 1 * 20 + 2 * 30 + 3 * 40) / 100)}


def test_order_of_arrival_does_not_matter() -> None:
    strategy = LegacyFedMerge(ties(density=0.2), parameter_names=NAMES)
    arrays, _ = fit_round(strategy, dict(reversed(good(4).items())))
    assert same(arrays, merged(ties(density=0.2), range(4)))


def test_rules_by_tensor_name() -> None:
    method = partition([("norm.*", weighted_average())], otherwise=ties(density=0.2))
    arrays, _ = fit_round(LegacyFedMerge(method, parameter_names=NAMES), good(4))
    assert same(arrays, merged(method, range(4)))
    with pytest.raises(RecipeError, match=r"norm\.\*"):
        fit_round(LegacyFedMerge(method), good(4))


def with_first(array: np.ndarray, client: int = 3) -> FitRes:
    return result([array, *trained(base(), client)[1:]], examples(client))


def file_of(array: np.ndarray, **header: object) -> bytes:
    """A .npy file whose header lies."""
    stream = io.BytesIO()
    header = {"descr": array.dtype.str, "fortran_order": False, "shape": array.shape, **header}
    np.lib.format.write_array_header_1_0(stream, header)
    return stream.getvalue() + array.tobytes()


def raw(first: bytes) -> FitRes:
    parameters = ndarrays_to_parameters(trained(base(), 3))
    return result(Parameters([first, *parameters.tensors[1:]], parameters.tensor_type), examples(3))


BAD: dict[str, tuple[Callable[[], FitRes], str]] = {
    "NaN": (lambda: with_first(np.full((6, 5), np.nan, np.float32)), "'fc.weight': element 0 is nan"),
    "infinity": (lambda: with_first(np.full((6, 5), -np.inf, np.float32)), "'fc.weight': element 0 is -inf"),
    "shape": (lambda: with_first(np.zeros((6, 1), np.float32)), "'fc.weight': shape (6, 1), base has (6, 5)"),
    "dtype": (lambda: with_first(np.zeros((6, 5), np.int32)), "'fc.weight': dtype int32, base has float32"),
    "missing": (lambda: result(trained(base(), 3)[:-1], 40), "3 arrays, the model has 4"),
    "extra": (lambda: result([*trained(base(), 3), np.ones(1)], 40), "5 arrays, the model has 4"),
    "no examples": (lambda: result(trained(base(), 3), 0), "number of examples is 0"),
    "negative": (lambda: result(trained(base(), 3), -10), "number of examples is -10"),
    "too many": (lambda: result(trained(base(), 3), 10**12), "number of examples is 1000000000000"),
    "no array": (lambda: raw(b"nonsense"), "'fc.weight': not a .npy array"),
    "cut short": (lambda: raw(file_of(np.zeros((6, 5), np.float32))[:-8]), "'fc.weight': 112 bytes of elements"),
    "a huge claim": (lambda: raw(file_of(np.zeros((6, 5), np.float32), shape=(1 << 40, 5))), "base has (6, 5)"),
    "an object": (lambda: raw(file_of(np.zeros((6, 5), np.float32), descr="|O")), "dtype 'object' is not supported"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_result_is_refused_and_the_round_is_the_one_without_it(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    make, reason = BAD[kind]
    arrays, _ = fit_round(LegacyFedMerge(ties(density=0.2), parameter_names=NAMES), {**good(3), 3: make()})
    assert same(arrays, merged(ties(density=0.2), range(3)))
    refused = [line for line in flower_log(caplog) if "refused: " in line]
    assert len(refused) == 1
    assert "client '103'" in refused[0]
    assert reason in refused[0]


def test_float64_from_a_client_is_taken_and_the_model_stays_float32() -> None:
    double = [array.astype(np.float64) if array.dtype.kind == "f" else array for array in trained(base(), 3)]
    strategy = LegacyFedMerge("weighted_average", parameter_names=NAMES)
    arrays, _ = fit_round(strategy, {**good(3), 3: result(double, examples(3))})
    assert same(arrays, merged(weighted_average(), range(4)))


def test_too_few_usable_results_keep_the_old_model(caplog: pytest.LogCaptureFixture) -> None:
    strategy = LegacyFedMerge("ties")
    failures = [ValueError("no GPU\nTraceback ..."), ValueError("no GPU\nTraceback ...")]
    bad = with_first(np.full((6, 5), np.nan, np.float32), 1)
    assert fit_round(strategy, {0: good(1)[0], 1: bad}, failures) == (None, {})
    log = "\n".join(flower_log(caplog))
    assert "client '102': client error: no GPU" in log
    assert "client '103': client error: no GPU" in log
    assert "round 1 made no model, the old one stands: 1 usable reply of 4 clients" in log


def test_refusing_failures_altogether() -> None:
    strategy = LegacyFedMerge("ties", accept_failures=False)
    assert fit_round(strategy, good(3), [ValueError("no GPU")]) == (None, {})
    assert fit_round(strategy, good(4))[0] is not None


def test_a_run_without_a_model_fails_after_its_last_round() -> None:
    strategy = LegacyFedMerge("ties", num_rounds=2)
    assert fit_round(strategy, good(1), server_round=1) == (None, {})
    with pytest.raises(RunFailedError, match="no round of 2 made a model"):
        fit_round(strategy, good(1), server_round=2)


def test_arguments_are_checked_at_construction() -> None:
    initial = ndarrays_to_parameters(base())
    with pytest.raises(RecipeError, match="found 2 names, the model has 4 arrays"):
        LegacyFedMerge("ties", parameter_names=("a", "b"), initial_parameters=initial)
    with pytest.raises(RecipeError, match="'a' is there twice"):
        LegacyFedMerge("ties", parameter_names=("a", "b", "a", "c"))
    with pytest.raises(RecipeError, match=r"^regmean\(.*\) needs statistics 'gram' of the clients"):
        LegacyFedMerge("regmean")
    with pytest.raises(RecipeError, match="found a schedule of phases, of which clients of the older API could not be"):
        LegacyFedMerge(schedule([phase("ties")]))
    with pytest.raises(RecipeError, match="min_replies"):
        LegacyFedMerge("ties", min_replies=0)
    with pytest.raises(TypeError, match="fraction_train"):
        LegacyFedMerge("ties", fraction_train=0.5)


def test_evaluations_that_would_break_the_mean_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    proxies, _ = clients(4)
    answers = [(1.0, 10, 0.5), (float("nan"), 10, 0.0), (2.0, 0, 0.0), (3.0, 30, 0.9)]
    results = [
        (proxy, EvaluateRes(Status(Code.OK, ""), loss, count, {"accuracy": accuracy}))
        for proxy, (loss, count, accuracy) in zip(proxies, answers, strict=True)
    ]
    loss, metrics = LegacyFedMerge("ties").aggregate_evaluate(1, results, [])
    assert loss == pytest.approx(2.5)
    assert metrics == {"accuracy": pytest.approx(0.8)}
    assert sum("refused" in line for line in flower_log(caplog)) == 2


def flower_log(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "flwr"]


# --- whole apps ----------------------------------------------------------------------------------------------------


class NumPyTrainer(NumPyClient):
    """A client as deployments on the older API have them."""

    def __init__(self, number: int, nan: bool) -> None:
        self.number, self.nan = number, nan

    def get_parameters(self, config: dict[str, Scalar]) -> Arrays:
        return base()

    def fit(self, parameters: Arrays, config: dict[str, Scalar]) -> tuple[Arrays, int, dict[str, Scalar]]:
        arrays = trained(parameters, self.number)
        if self.nan:
            arrays[0][0, 0] = np.nan
        return arrays, examples(self.number), {"loss": 1.0}

    def evaluate(self, parameters: Arrays, config: dict[str, Scalar]) -> tuple[float, int, dict[str, Scalar]]:
        return float(np.abs(parameters[0]).mean()), examples(self.number), {"accuracy": 0.5}


def legacy_model(method: MergeMethod, *, nodes: int, nan: Sequence[int] = (), **arguments: Any) -> Arrays:
    """What an app on the older API, `server_fn` and `client_fn`, makes of the model in two rounds."""
    models: list[Arrays] = []
    strategy = LegacyFedMerge(
        method,
        parameter_names=NAMES,
        min_fit_clients=nodes,
        min_available_clients=nodes,
        evaluate_fn=lambda server_round, arrays, config: models.append(arrays),
        **arguments,
    )
    server = ServerApp(
        server_fn=lambda context: ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=2))
    )

    def client_fn(context: Context) -> NumPyClient:
        number = int(context.node_config["partition-id"])
        return NumPyTrainer(number, number in nan).to_client()

    run_app((server, ClientApp(client_fn=client_fn)), nodes=nodes, workers=0)
    return models[-1]


def native_model(method: MergeMethod, *, nodes: int) -> Arrays:
    """The same federation on the newer API."""
    client, server, models = ClientApp(), NativeServerApp(), []

    @client.train()
    def train(message: Message, context: Context) -> Message:
        number = int(context.node_config["partition-id"])
        arrays = trained([receive(message)[name].numpy() for name in NAMES], number)
        return reply(message, named(arrays), examples(number))

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = FedMerge(method, fraction_evaluate=0.0)
        outcome = strategy.start(grid=grid, initial_arrays=ArrayRecord(named(base())), num_rounds=2)
        models.append([outcome.arrays[name].numpy() for name in NAMES])

    run_app((server, client), nodes=nodes, workers=0)
    return models[0]


def test_an_unmodified_older_app_gives_what_fedmerge_gives() -> None:
    assert same(legacy_model(ties(density=0.2), nodes=4), native_model(ties(density=0.2), nodes=4))


def test_an_older_client_that_sends_nan() -> None:
    assert same(legacy_model(ties(), nodes=4, nan=[3]), legacy_model(ties(), nodes=3))


def test_an_older_run_in_which_all_fail_ends_with_an_error() -> None:
    with pytest.raises(MergeError, match="no round of 2 made a model"):
        legacy_model(ties(), nodes=2, nan=[0, 1], num_rounds=2)
