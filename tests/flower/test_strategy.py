"""FedMerge where FedAvg stood: sampling, messages, metrics, dtypes, errors that the SuperLink signs."""

import inspect
import logging
import random
import time

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.exception import AggregationError
from flwr.serverapp.strategy import FedAvg, Strategy

from fl_merge import FlMergeError, MergeError, RecipeError, clip_norm, partition
from fl_merge.flower import FedMerge
from fl_merge.flower.client import receive, reply
from fl_merge.flower.inprocess import InProcessGrid
from fl_merge.flower.records import to_record, to_tensors
from fl_merge.flower.strategy import RunFailedError
from fl_merge.flower.watch import Watcher, watching
from fl_merge.methods import krum, task_arithmetic, ties, weighted_average


def model(dtype=torch.float32):
    return {"w": torch.tensor([1.0, 2.0, -3.0]).to(dtype), "b": torch.tensor(0.5).to(dtype)}


def stepping_app(step=0.25, *, dtypes=(None,), plain=False):
    """Clients add (partition + 1) * step; they report loss and accuracy; `dtypes` are taken in turn."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        number = int(context.node_config["partition-id"])
        metrics = {"loss": float(number), "num-examples": number + 1}
        if plain:  # Flower's own types only
            arrays = {name: array.numpy() for name, array in message.content["arrays"].items()}
            moved = {name: Array(np.asarray(values + (number + 1) * step)) for name, values in arrays.items()}
            content = RecordDict({"arrays": ArrayRecord(moved), "metrics": MetricRecord(metrics)})
            return Message(content, reply_to=message)
        tensors = {name: tensor.float() + (number + 1) * step for name, tensor in receive(message).items()}
        return reply(message, tensors, number + 1, {"loss": float(number)}, dtypes[number % len(dtypes)])

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        number = int(context.node_config["partition-id"])
        return reply(message, None, number + 1, {"accuracy": float(number), "w0": float(receive(message)["w"][0])})

    return app


def grid_of(nodes, app=None):
    return InProcessGrid(app or stepping_app(), nodes, workers=0)


def asked(messages):
    return [message.metadata.dst_node_id for message in messages]


def configured(strategy, grid, server_round=1, phase="train", config=None):
    configure = strategy.configure_train if phase == "train" else strategy.configure_evaluate
    return list(configure(server_round, to_record(model()), config or ConfigRecord(), grid))


# --- standing where FedAvg stood -------------------------------------------------------------------------------------


def test_it_is_a_strategy_with_fedavgs_arguments_in_fedavgs_order():
    assert issubclass(FedMerge, Strategy)
    theirs = list(inspect.signature(FedAvg).parameters.values())
    ours = list(inspect.signature(FedMerge).parameters.values())[1 : len(theirs) + 1]
    assert [(p.name, p.default) for p in ours] == [(p.name, p.default) for p in theirs]
    theirs = list(inspect.signature(FedAvg.start).parameters)
    assert list(inspect.signature(FedMerge.start).parameters) == [*theirs, "resume", "force"]


@pytest.mark.parametrize("nodes", [2, 5, 11])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"fraction_train": 0.5, "fraction_evaluate": 0.3},
        {
            "fraction_train": 0.1,
            "min_train_nodes": 1,
            "fraction_evaluate": 0.1,
            "min_evaluate_nodes": 1,
            "min_replies": 1,
        },
        {"fraction_train": 0.99, "fraction_evaluate": 0.01},
        {"fraction_train": 0.0},
        {"fraction_evaluate": 0.0},
    ],
)
def test_as_many_nodes_are_sampled_as_by_fedavg(nodes, arguments):
    theirs = FedAvg(**{key: value for key, value in arguments.items() if key != "min_replies"})
    ours = FedMerge(weighted_average(), **arguments)
    with grid_of(nodes) as grid:
        for phase in ("train", "evaluate"):
            sampled = asked(configured(ours, grid, phase=phase))
            assert len(sampled) == len(asked(configured(theirs, grid, phase=phase)))
            assert len(set(sampled)) == len(sampled)
            assert set(sampled) <= set(grid.get_node_ids())


def test_sampling_is_a_function_of_seed_round_and_phase():
    def sampled(seed, server_round=1, phase="train", shuffled=False):
        strategy = FedMerge(weighted_average(), fraction_train=0.2, fraction_evaluate=0.2, seed=seed)
        with grid_of(50) as grid:
            if shuffled:
                grid.get_node_ids = lambda: random.Random(0).sample(range(1000, 1050), 50)
            random.seed(time.monotonic_ns())
            if phase == "evaluate":
                configured(strategy, grid)
            return asked(configured(strategy, grid, server_round, phase))

    first = sampled(3)
    assert len(first) == 10
    assert sampled(3) == sampled(3, shuffled=True) == first
    different = [first, sampled(4), sampled(3, 2), sampled(3, phase="evaluate")]
    assert len({tuple(nodes) for nodes in different}) == 4


def test_the_global_random_state_is_left_alone():
    random.seed(5)
    wanted = random.Random(5).random()
    with grid_of(4) as grid:
        configured(FedMerge(weighted_average(), fraction_train=0.5), grid)
    assert random.random() == wanted


def test_over_rounds_every_node_has_its_turn():
    strategy = FedMerge(weighted_average(), fraction_train=0.25)
    with grid_of(8) as grid:
        turns = [node for number in range(1, 201) for node in asked(configured(strategy, grid, number))]
    assert len(turns) == 400
    assert all(50 - 25 <= turns.count(node) <= 50 + 25 for node in range(1000, 1008))  # 4 standard deviations


def test_messages_carry_the_model_the_round_and_the_callers_config():
    config = ConfigRecord({"lr": 0.1, "server-round": 99})
    arrays = to_record(model())
    strategy = FedMerge(weighted_average(), arrayrecord_key="fitins.parameters", configrecord_key="fitins.config")
    with grid_of(2) as grid:
        train = list(strategy.configure_train(7, arrays, config, grid))
        evaluate = list(strategy.configure_evaluate(7, arrays, config, grid))
    assert config == ConfigRecord({"lr": 0.1, "server-round": 99})  # Flower's FedAvg writes into it
    for messages, kind in ((train, "train"), (evaluate, "evaluate")):
        for message in messages:
            assert set(message.content) == {"fitins.parameters", "fitins.config"}
            assert message.content["fitins.parameters"] is arrays
            assert dict(message.content["fitins.config"]) == {"lr": 0.1, "server-round": 7}
            assert (message.metadata.message_type, message.metadata.group_id) == (kind, "7")


class ChangingNodes(InProcessGrid):
    """As many nodes are connected as the next of `counts` says; the last one stays."""

    nodes_are_fixed = False

    def __init__(self, *counts):
        super().__init__(stepping_app(), max(counts), workers=0)
        self.counts = list(counts)

    def get_node_ids(self):
        return super().get_node_ids()[: self.counts.pop(0) if len(self.counts) > 1 else self.counts[0]]


def test_too_few_nodes_in_time_is_a_failed_run():
    strategy = FedMerge(weighted_average(), min_available_nodes=5, node_timeout=0.01)
    with ChangingNodes(3) as grid, pytest.raises(RunFailedError) as caught:
        strategy.start(grid, to_record(model()))
    assert str(caught.value) == "3 nodes connected in 0.01 s (node_timeout), wanted 5"


def test_too_few_simulated_nodes_are_not_waited_for():
    strategy = FedMerge(weighted_average(), min_available_nodes=5)
    with grid_of(3) as grid, pytest.raises(RecipeError) as caught:
        strategy.start(grid, to_record(model()))
    assert str(caught.value) == (
        "3 clients are simulated, the strategy wants at least 5 (min_available_nodes, min_train_nodes): "
        "simulate more, or lower these"
    )


def test_nodes_that_connect_late_are_waited_for():
    with ChangingNodes(0, 1, 3) as grid:
        strategy = FedMerge(weighted_average(), min_available_nodes=3, node_timeout=30)
        assert asked(configured(strategy, grid)) == [1000, 1001, 1002]


def test_nodes_lost_after_a_round_cost_a_round_and_not_the_run():
    listener = Listener()
    strategy = FedMerge(weighted_average(), fraction_evaluate=0.0, node_timeout=0.0, watchers=[listener])
    with ChangingNodes(2, 1, 2) as grid:
        result = strategy.start(grid, to_record(model()), num_rounds=3)
    assert set(result.train_metrics_clientapp) == {1, 3}
    assert [report.failure for report in listener.reports] == [
        None,
        "1 node connected in 0 s (node_timeout), wanted 2",
        None,
    ]
    assert float(to_tensors(result.arrays)["b"]) == pytest.approx(0.5 + 10 / 12)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"fraction_train": 1.5}, "parameter 'fraction_train': found 1.5, wanted a number in [0, 1]"),
        ({"fraction_evaluate": -0.1}, "parameter 'fraction_evaluate': found -0.1, wanted a number in [0, 1]"),
        ({"max_failures": "half"}, "parameter 'max_failures': found 'half', wanted a number in [0, 1]"),
        ({"min_replies": 0}, "parameter 'min_replies': found 0, wanted a whole number >= 1"),
        ({"min_replies": 2.5}, "parameter 'min_replies': found 2.5, wanted a whole number >= 1"),
        ({"min_train_nodes": -1}, "parameter 'min_train_nodes': found -1, wanted a whole number >= 0"),
        ({"min_available_nodes": True}, "parameter 'min_available_nodes': found True, wanted a whole number >= 0"),
        ({"max_num_examples": 0}, "parameter 'max_num_examples': found 0, wanted a number > 0"),
        ({"node_timeout": float("nan")}, "parameter 'node_timeout': found nan, wanted a number >= 0"),
        (
            {"wire_dtype": "bf16"},
            "wire dtype: found 'bf16', wanted one of float64, float32, float16, bfloat16, float8_e4m3fn, float8_e5m2",
        ),
    ],
)
def test_arguments_out_of_range_are_refused_at_construction(arguments, words):
    with pytest.raises(RecipeError) as caught:
        FedMerge(weighted_average(), **arguments)
    assert str(caught.value) == words


def test_a_method_or_its_name():
    assert str(FedMerge("ties").method) == str(ties())
    with pytest.raises(RecipeError, match=r"^unknown merge method 'tyes'; did you mean 'ties'\?"):
        FedMerge("tyes")
    for wrong, end in ((None, ""), (3, ""), (ties, r"; did you mean ties\(\)\?")):
        with pytest.raises(
            RecipeError, match=rf"wanted a merge method such as ties\(density=0\.2\), or its name{end}$"
        ):
            FedMerge(wrong)


def test_a_quorum_that_cannot_be_met_is_refused_before_clients_work():
    with grid_of(3) as grid, pytest.raises(RecipeError) as caught:
        FedMerge(weighted_average(), min_replies=4).start(grid, to_record(model()))
    assert str(caught.value) == (
        "3 nodes are sampled and a round needs 4 usable replies (min_replies): no round could succeed; "
        "sample more nodes or lower min_replies"
    )


def test_a_method_that_does_not_merge_so_many_is_refused_before_clients_work():
    inside = clip_norm(partition([("w", krum(f=1))], otherwise=weighted_average()), max_norm=1.0)
    for method in (krum(f=1), inside):
        with grid_of(3) as grid, pytest.raises(RecipeError) as caught:
            FedMerge(method).start(grid, to_record(model()))
        assert str(caught.value) == (
            "krum(f=1): found 3 clients, wanted at least 5 (N >= 2 f + 3 with f = 1); "
            "sample other numbers of nodes, or merge otherwise"
        )


# --- the run ---------------------------------------------------------------------------------------------------------


def test_a_run_by_hand():
    """Two clients, weights 1/3 and 2/3, steps 0.25 and 0.5: each round adds 5/12."""
    with grid_of(2) as grid:
        result = FedMerge(weighted_average()).start(grid, to_record(model()), num_rounds=2)
    assert to_tensors(result.arrays)["w"].tolist() == pytest.approx([1 + 10 / 12, 2 + 10 / 12, -3 + 10 / 12])
    assert dict(result.train_metrics_clientapp[1]) == {"loss": pytest.approx(2 / 3)}
    assert dict(result.evaluate_metrics_clientapp[2]) == {
        "accuracy": pytest.approx(2 / 3),
        "w0": pytest.approx(1 + 10 / 12),
    }


def test_a_server_side_evaluation_sees_every_model():
    seen = []

    def evaluate(server_round, arrays):
        seen.append((server_round, float(to_tensors(arrays)["w"][0])))
        return MetricRecord({"w0": seen[-1][1]}) if server_round != 1 else None

    with grid_of(2) as grid:
        result = FedMerge(weighted_average()).start(grid, to_record(model()), num_rounds=2, evaluate_fn=evaluate)
    assert seen == [(0, 1.0), (1, pytest.approx(1 + 5 / 12)), (2, pytest.approx(1 + 10 / 12))]
    assert set(result.evaluate_metrics_serverapp) == {0, 2}


@pytest.mark.parametrize(("arguments", "num_rounds"), [({}, 0), ({"fraction_train": 0.0}, 2)])
def test_a_run_that_does_not_train_gives_the_initial_model(arguments, num_rounds):
    arrays = to_record(model())
    with grid_of(2) as grid:
        result = FedMerge(weighted_average(), **arguments).start(grid, arrays, num_rounds=num_rounds)
    assert result.arrays is arrays


def test_a_strategy_may_be_used_again():
    strategy = FedMerge(weighted_average(), fraction_evaluate=0.0)
    with grid_of(2) as grid:
        first = strategy.start(grid, to_record(model()), num_rounds=1)
        again = strategy.start(grid, to_record(model()), num_rounds=1)
        onwards = strategy.start(grid, again.arrays, num_rounds=1)
    assert torch.equal(to_tensors(first.arrays)["w"], to_tensors(again.arrays)["w"])
    assert to_tensors(onwards.arrays)["w"].tolist() == pytest.approx([1 + 10 / 12, 2 + 10 / 12, -3 + 10 / 12])


def test_what_cannot_work_is_refused_before_any_client_is_asked():
    class Silent(InProcessGrid):
        def push_messages(self, messages):
            raise AssertionError("a client was asked")

    rules = partition([("*nrom*", ties())], weighted_average())
    for method, arrays, words in [
        (rules, to_record(model()), r"^rule '\*nrom\*' matches no tensor of the base, which has 2 tensors: w, b$"),
        (ties(), ArrayRecord({}), r"^the initial model has no arrays; pass ArrayRecord\(model\.state_dict\(\)\)$"),
        (ties(), to_record({"w": torch.tensor([1.0, float("nan")])}), r"^the initial model is not finite: tensor 'w'$"),
    ]:
        with Silent(stepping_app(), 2, workers=0) as grid, pytest.raises(RecipeError, match=words):
            FedMerge(method).start(grid, arrays)


def test_coefficients_may_name_nodes():
    """The check before the first round knows no node; the round does."""
    with grid_of(2) as grid:
        strategy = FedMerge(task_arithmetic(coefficients={"1001": -1.0}), fraction_evaluate=0.0)
        result = strategy.start(grid, to_record(model()), num_rounds=1)
    # 1/3 of the first one's 0.25, and the second one's 0.5 taken away
    assert float(to_tensors(result.arrays)["b"]) == pytest.approx(0.5 + 0.25 / 3 - 0.5)
    with (
        grid_of(2) as grid,
        pytest.raises(RunFailedError, match="coefficients name client '7', which has no usable update"),
    ):
        FedMerge(task_arithmetic(coefficients={"7": -1.0})).start(grid, to_record(model()), num_rounds=1)


def test_tied_weights_stay_tied():
    tensors = {"embed": torch.zeros(2), "head": torch.zeros(2)}
    with grid_of(2) as grid:
        strategy = FedMerge(weighted_average(), fraction_evaluate=0.0, tied={"head": "embed"})
        result = to_tensors(strategy.start(grid, to_record(tensors), num_rounds=1).arrays)
    assert torch.equal(result["embed"], result["head"])
    assert float(result["head"][0]) == pytest.approx(5 / 12)
    with grid_of(2) as grid, pytest.raises(RecipeError, match=r"^tied: the model has no tensor 'lm_head'$"):
        FedMerge(weighted_average(), tied={"lm_head": "embed"}).start(grid, to_record(tensors))


def test_a_failed_run_is_ours_and_flowers_error():
    """Flower ends a run that raises its AggregationError as failed."""
    for kind in (MergeError, FlMergeError, AggregationError):
        assert issubclass(RunFailedError, kind)
    error = RunFailedError("no round made a model")
    assert str(error) == "no round made a model"
    assert error.exit_code == AggregationError.exit_code


def test_the_model_before_the_first_round():
    with pytest.raises(MergeError, match=r"^there is no global model yet: configure_train has not been called$"):
        _ = FedMerge(ties()).model


def test_the_log_says_how_it_merges(caplog):
    with caplog.at_level(logging.INFO, logger="flwr"):
        FedMerge(ties(density=0.3), max_failures=0.25).summary()
    assert "ties(density=0.3, scale=1.0, normalize=True, scope='tensor', election='total')" in caplog.text
    assert "all less 25%, at least 2" in caplog.text


# --- dtypes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("client_dtypes", [("bfloat16", "float16"), ("float32", "bfloat16"), (None, None)])
def test_base_and_clients_in_any_floating_dtype(dtype, client_dtypes):
    app = stepping_app(dtypes=client_dtypes)
    strategy = FedMerge(weighted_average())
    with grid_of(2, app) as grid:
        result = strategy.start(grid, to_record(model(dtype)), num_rounds=1)
    tensors = to_tensors(result.arrays)
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    wanted = model()["w"] + 5 / 12
    assert torch.allclose(tensors["w"].double(), wanted.double(), rtol=2.0**-8)
    # The master has what the narrow dtype has not.
    narrow_error = (strategy.model.master()["w"].double() - wanted.double()).abs().max()
    assert narrow_error < 1e-6
    assert strategy.model.master()["w"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_small_steps_add_up_in_a_bfloat16_federation():
    """0.0005 of 1.0 is far below a step of bfloat16 (0.0078): only the float32 master keeps them."""
    app = stepping_app(0.0003)
    with grid_of(2, app) as grid:
        result = FedMerge(weighted_average()).start(grid, to_record(model(torch.bfloat16)), num_rounds=40)
    assert float(to_tensors(result.arrays)["w"][0]) == pytest.approx(1 + 40 * 0.0005, abs=0.005)


def test_a_float32_model_over_a_bfloat16_wire():
    seen = []
    app = stepping_app(dtypes=("bfloat16",))
    values = {"w": torch.tensor([1.001, 2.002, -3.003]), "b": torch.tensor(0.1)}

    class Listener(InProcessGrid):
        def push_messages(self, messages):
            messages = list(messages)
            seen.extend(array.dtype for message in messages for array in message.content["arrays"].values())
            return super().push_messages(messages)

    with Listener(app, 2, workers=0) as grid:
        strategy = FedMerge(weighted_average(), wire_dtype="bfloat16", fraction_evaluate=0.0)
        result = strategy.start(grid, to_record(values), num_rounds=1)
    assert set(seen) == {"bfloat16"}
    tensors = to_tensors(result.arrays)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    # The clients' steps are exact to bfloat16's; what they were not sent of the model is not lost.
    assert (tensors["w"] - values["w"] - 5 / 12).abs().max() < 0.02
    assert not torch.equal(tensors["w"], tensors["w"].bfloat16().float())


def test_plain_numpy_clients_work_unchanged():
    """They know nothing of fl_merge, and send float64 as numpy likes to make of float32."""
    app = stepping_app(plain=True)
    with grid_of(3, app) as grid:
        ours = FedMerge(weighted_average(), fraction_evaluate=0.0).start(grid, to_record(model()), num_rounds=1)
    with grid_of(3, app) as grid:
        theirs = FedAvg(fraction_evaluate=0.0).start(grid, to_record(model()), num_rounds=1)
    for name, array in ours.arrays.items():
        assert array.dtype == "float32"
        np.testing.assert_allclose(array.numpy(), theirs.arrays[name].numpy(), rtol=1e-6)


# --- metrics ---------------------------------------------------------------------------------------------------------


def test_metrics_of_the_users_own_function():
    """It is given the usable replies in the order of the nodes, and the key; its result is the round's."""
    calls = []

    def largest(contents, key):
        calls.append(([content["metrics"][key] for content in contents], key, ["arrays" in c for c in contents]))
        return MetricRecord({"largest": max(float(content["metrics"]["loss"]) for content in contents)})

    def smallest(contents, key):
        return MetricRecord({"smallest": min(float(content["metrics"]["accuracy"]) for content in contents)})

    strategy = FedMerge(weighted_average(), train_metrics_aggr_fn=largest, evaluate_metrics_aggr_fn=smallest)
    with grid_of(3) as grid:
        result = strategy.start(grid, to_record(model()), num_rounds=1)
    assert dict(result.train_metrics_clientapp[1]) == {"largest": 2.0}
    assert dict(result.evaluate_metrics_clientapp[1]) == {"smallest": 0.0}
    assert calls == [([1, 2, 3], "num-examples", [True, True, True])]


def test_a_metrics_function_that_fails_costs_the_metrics_and_not_the_model(caplog):
    def broken(contents, key):
        raise KeyError("f1")

    strategy = FedMerge(weighted_average(), train_metrics_aggr_fn=broken, fraction_evaluate=0.0)
    with grid_of(2) as grid:
        result = strategy.start(grid, to_record(model()), num_rounds=1)
    assert float(to_tensors(result.arrays)["b"]) == pytest.approx(0.5 + 5 / 12)
    assert result.train_metrics_clientapp == {}
    assert "KeyError: 'f1'" in caplog.text


def test_another_key_for_the_number_of_examples():
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        number = int(context.node_config["partition-id"])
        tensors = {name: tensor + number for name, tensor in receive(message).items()}
        return reply(message, tensors, 1 + 2 * number, {"num-examples": 1000.0}, weighted_by_key="num_examples")

    with grid_of(2, app) as grid:
        strategy = FedMerge(weighted_average(), weighted_by_key="num_examples", fraction_evaluate=0.0)
        result = strategy.start(grid, to_record(model()), num_rounds=1)
    assert float(to_tensors(result.arrays)["b"]) == 0.5 + 0.75
    assert dict(result.train_metrics_clientapp[1]) == {"num-examples": 1000.0}


# --- replies that are not what they seem -----------------------------------------------------------------------------


class Listener(Watcher):
    def __init__(self):
        self.reports, self.evaluations, self.events = [], [], []

    def run_started(self, num_rounds, method):
        self.events.append(f"run of {num_rounds} with {method.name}")

    def round_started(self, round_number, sampled):
        self.events.append(f"round {round_number}: {', '.join(sampled)}")

    def replied(self, round_number, client_id, refusal, seconds):
        assert seconds >= 0
        self.events.append(f"{client_id} {'refused' if refusal else 'taken in'}")

    def round_ended(self, report, model):
        self.reports.append(report)
        self.events.append(f"round {report.round_number} ended: {float(model.sent['w'][0]):g}")

    def clients_evaluated(self, evaluation):
        self.evaluations.append(evaluation)
        self.events.append(f"evaluated: {evaluation.metrics['accuracy']:g}")

    def server_evaluated(self, round_number, metrics):
        self.events.append(f"server {round_number}: {metrics['x']:g}")


def replies_to(strategy, app, nodes=3, phase="train"):
    """Real replies of in-process clients to the strategy's messages."""
    with grid_of(nodes, app) as grid:
        messages = configured(strategy, grid, phase=phase)
        return list(grid.send_and_receive(messages))


def signed_by_the_superlink(message, reason):
    """An error reply as the SuperLink makes it when a node is gone: from node 1."""
    request = Message(RecordDict(), dst_node_id=message.metadata.src_node_id, message_type="train")
    request.metadata.__dict__["_message_id"] = message.metadata.reply_to_message_id
    error = Message(Error(code=3, reason=reason), reply_to=request)
    error.metadata.__dict__["_src_node_id"] = 1
    return error


def test_errors_that_the_superlink_signs_are_the_nodes_that_did_not_reply():
    listener = Listener()
    strategy = FedMerge(weighted_average(), watchers=[listener])
    first, second, third = replies_to(strategy, stepping_app())
    gone = signed_by_the_superlink(second, "Node unavailable")
    assert gone.metadata.src_node_id == 1
    arrays, metrics = strategy.aggregate_train(1, [first, gone, third])
    [report] = listener.reports
    assert [entry.client_id for entry in report.accepted] == ["1000", "1002"]
    assert [str(refusal) for refusal in report.refused] == ["client '1001': client error: Node unavailable"]
    assert float(to_tensors(arrays)["b"]) == pytest.approx(0.5 + (0.25 * 1 + 0.75 * 3) / 4)
    assert dict(metrics) == {"loss": pytest.approx(1.5)}


def test_a_long_traceback_is_one_line_in_the_report():
    listener = Listener()
    strategy = FedMerge(weighted_average(), watchers=[listener])
    replies = replies_to(strategy, stepping_app())
    trace = "Traceback (most recent call last):\n  File x\n    y\n\nValueError: no data\x1b[31m" + "!" * 1000 + "\n\n"
    strategy.aggregate_train(1, [signed_by_the_superlink(replies[0], trace), *replies[1:]])
    [refusal] = listener.reports[0].refused
    assert str(refusal).startswith("client '1000': client error: ValueError: no data")
    assert len(str(refusal)) < 400
    assert str(refusal).isprintable()


def evaluated(change, nodes=3):
    listener = Listener()
    strategy = FedMerge(weighted_average(), watchers=[listener])
    strategy._carried.adopt(to_record(model()))
    replies = replies_to(strategy, stepping_app(), nodes, "evaluate")
    metrics = strategy.aggregate_evaluate(1, change(replies))
    return metrics, listener.evaluations[0]


def without_examples(replies):
    del replies[1].content["metrics"]["num-examples"]
    return replies


@pytest.mark.parametrize(
    ("change", "refused"),
    [
        (lambda replies: replies[:1] + replies[2:], "client '1001': no reply before the deadline"),
        (
            lambda replies: [replies[0], signed_by_the_superlink(replies[1], "gone"), replies[2]],
            "client '1001': client error: gone",
        ),
        (without_examples, "client '1001': the MetricRecord has no 'num-examples' (it has: accuracy, w0)"),
    ],
)
def test_evaluations_without_a_usable_reply_are_left_out_and_reported(change, refused):
    metrics, evaluation = evaluated(change)
    assert dict(metrics) == {"accuracy": pytest.approx((1 * 0 + 3 * 2) / 4), "w0": 1.0}
    assert [str(refusal) for refusal in evaluation.refused] == [refused]
    assert {client: examples for client, (examples, _) in evaluation.by_client.items()} == {"1000": 1.0, "1002": 3.0}


def test_the_first_evaluation_of_a_node_counts():
    def twice(replies):
        again = Message(
            RecordDict({"metrics": MetricRecord({"num-examples": 100, "accuracy": 9.0})}), reply_to=replies[0]
        )
        again.metadata.__dict__["_reply_to_message_id"] = replies[0].metadata.reply_to_message_id
        return [*replies, again]

    metrics, evaluation = evaluated(twice, nodes=2)
    assert metrics["accuracy"] == pytest.approx(2 / 3)
    assert evaluation.refused == ()


def test_when_nobody_can_evaluate_there_are_no_metrics():
    class Counting(Listener):
        def clients_evaluated(self, evaluation):
            self.evaluations.append(evaluation)

    listener = Counting()
    strategy = FedMerge(weighted_average(), watchers=[listener])
    strategy._carried.adopt(to_record(model()))
    replies = replies_to(strategy, stepping_app(), 2, "evaluate")
    assert strategy.aggregate_evaluate(1, [signed_by_the_superlink(message, "gone") for message in replies]) is None
    assert len(listener.evaluations[0].refused) == 2


# --- a Grid that is a network ----------------------------------------------------------------------------------------


class Network(InProcessGrid):
    """Gives one reply a pull, as a SuperLink would; `trouble` is what happens to node 1001's."""

    replies_are_in_memory = False

    def __init__(self, nodes, trouble):
        super().__init__(stepping_app(), nodes, workers=0)
        self.trouble, self.pulled, self.of_1001 = trouble, [], None

    def push_messages(self, messages):
        ids = super().push_messages(messages)
        self.of_1001 = next(i for i, m in zip(ids, messages, strict=True) if m.metadata.dst_node_id == 1001)
        return [None if i == self.of_1001 and self.trouble == "not sent" else i for i in ids]

    def pull_messages(self, message_ids):
        [message_id] = message_ids
        self.pulled.append(message_id)
        replies = super().pull_messages([message_id])
        if message_id == self.of_1001 and replies:
            if isinstance(self.trouble, Exception):
                raise self.trouble
            if self.trouble == "forged":
                replies[0].metadata.__dict__["_reply_to_message_id"] = self.pulled[0]
        return replies


def over_a_network(trouble):
    listener = Listener()
    strategy = FedMerge(weighted_average(), fraction_evaluate=0.0, watchers=[listener])
    with Network(3, trouble) as grid:
        strategy.start(grid, to_record(model()), num_rounds=1, timeout=30)
    [report] = listener.reports
    return [entry.client_id for entry in report.accepted], [str(refusal) for refusal in report.refused], grid


def test_replies_are_fetched_one_at_a_time():
    accepted, refused, grid = over_a_network(None)
    assert (accepted, refused) == (["1000", "1001", "1002"], [])
    assert len(set(grid.pulled)) == 3


@pytest.mark.parametrize(
    ("trouble", "refused"),
    [
        ("not sent", "client '1001': client error: the request could not be sent"),
        (ValueError("bad protobuf"), "client '1001': client error: undecodable reply: ValueError: bad protobuf"),
    ],
)
def test_what_happens_to_one_message_costs_one_client(trouble, refused):
    assert over_a_network(trouble)[:2] == (["1000", "1002"], [refused])


def test_whose_reply_it_is_is_known_from_what_was_asked_for():
    """Node 1001 writes into its reply that it answers the first node's message."""
    accepted, refused, _ = over_a_network("forged")
    assert (accepted, refused) == (["1000", "1001", "1002"], [])


def test_a_superlink_that_is_gone_ends_the_run():
    with pytest.raises(ConnectionRefusedError):
        over_a_network(ConnectionRefusedError())


# --- being told ------------------------------------------------------------------------------------------------------


def test_watchers_hear_everything_in_order():
    outer, own = Listener(), Listener()

    def evaluate(server_round, arrays):
        return MetricRecord({"x": float(server_round)})

    with grid_of(2) as grid, watching(outer):
        strategy = FedMerge(weighted_average(), watchers=[own])
        strategy.start(grid, to_record(model()), num_rounds=1, evaluate_fn=evaluate)
    assert own.events == outer.events
    assert own.events == [
        "run of 1 with weighted_average",
        "server 0: 0",
        "round 1: 1000, 1001",
        "1000 taken in",
        "1001 taken in",
        "round 1 ended: 1.41667",
        "evaluated: 0.666667",
        "server 1: 1",
    ]
    with grid_of(2) as grid:
        FedMerge(weighted_average()).start(grid, to_record(model()), num_rounds=1)
    assert len(outer.events) == 8  # out of the block nothing is heard
