import shutil
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ArrayRecord, Message, RecordDict
from flwr.client import NumPyClient
from flwr.clientapp import ClientApp
from flwr.server import ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg
from flwr.serverapp import Grid, ServerApp

from fl_merge.errors import RecipeError
from fl_merge.flower.apps import load_app, run_app
from fl_merge.flower.inprocess import Replied

TOY = Path(__file__).parent / "toy_app"


@pytest.fixture(autouse=True)
def _same_path_and_modules_afterwards(monkeypatch):
    before = set(sys.modules)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in set(sys.modules) - before:
        if name.partition(".")[0] == "toy":
            del sys.modules[name]


@pytest.fixture
def toy(tmp_path):
    """A copy of the toy app, to be spoilt."""
    return Path(shutil.copytree(TOY, tmp_path / "copy"))


def replace_in(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


# ---- unmodified apps


def test_an_unmodified_fedavg_app_with_200_nodes():
    app = load_app(TOY)
    run_app(app, nodes=2)
    events = []
    start = time.perf_counter()
    context = run_app(app, nodes=200, on_message=events.append)
    seconds = time.perf_counter() - start
    assert seconds < 2.0  # 0.4 on an idle core
    assert len([event for event in events if isinstance(event, Replied)]) == 2 * 2 * 200
    assert all(event.ok for event in events if isinstance(event, Replied))
    assert context.state["arrays"]["weights"].numpy() == pytest.approx([1.0, -2.0, 0.5, 3.0], abs=0.7)
    assert context.state["metrics"]["eval_loss"] < 1.0
    assert context.run_config == app.run_config


def test_the_same_model_with_worker_processes():
    app = load_app(TOY, ["num-server-rounds=1"])
    models = [run_app(app, nodes=2, workers=workers, seed=3).state["arrays"] for workers in (0, 2)]
    for name in ("weights", "bias"):
        # Flower's FedAvg adds up in order of arrival; with two clients, the order does not change a sum.
        assert models[0][name].data == models[1][name].data


def legacy_app(fail_partition=None):
    """An app of Flower's older API, as they stand in many deployments."""
    results = {}

    class Client(NumPyClient):
        def __init__(self, partition):
            self.partition = partition

        def get_parameters(self, config):
            return [np.zeros(3)]

        def fit(self, parameters, config):
            if self.partition == fail_partition:
                raise RuntimeError("no")
            return [parameters[0] + self.partition], 10, {}

        def evaluate(self, parameters, config):
            return float(parameters[0].sum()), 10, {"accuracy": 0.5}

    def average(metrics):
        return {"accuracy": sum(n * m["accuracy"] for n, m in metrics) / sum(n for n, _ in metrics)}

    def server_fn(context):
        strategy = FedAvg(
            min_available_clients=4,
            evaluate_metrics_aggregation_fn=average,
            evaluate_fn=lambda server_round, parameters, config: results.update({server_round: parameters[0].tolist()}),
        )
        return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=2))

    client_fn = lambda context: Client(context.node_config["partition-id"]).to_client()  # noqa: E731
    return (ServerApp(server_fn=server_fn), ClientApp(client_fn=client_fn)), results


@pytest.mark.parametrize(("fail_partition", "step"), [(None, 1.5), (3, 1.0)])
def test_server_fn_and_numpyclient(fail_partition, step):
    app, results = legacy_app(fail_partition)
    threads = set(threading.enumerate())  # other tests' libraries may keep some
    start = time.perf_counter()
    run_app(app, nodes=4)
    assert time.perf_counter() - start < 2.0
    assert [results[i] for i in (0, 1, 2)] == [pytest.approx([i * step] * 3) for i in (0, 1, 2)]
    assert set(threading.enumerate()) <= threads


def test_what_the_server_app_raises_comes_out_and_a_wrapped_grid_goes_in():
    server_app, seen = ServerApp(), []

    @server_app.main()
    def main(grid: Grid, context):
        seen.append((grid, dict(context.run_config)))
        raise LookupError("nothing to train")

    with pytest.raises(LookupError, match="nothing to train"):
        run_app((server_app, ClientApp()), nodes=1, run_config={"a": 1}, grid_wrapper=lambda grid: [grid])
    assert isinstance(seen[0][0], list)
    assert seen[0][1] == {"a": 1}


def test_node_configs_reach_the_clients():
    server_app, client_app = ServerApp(), ClientApp()

    @client_app.query()
    def query(message, context):
        content = RecordDict({"arrays": ArrayRecord([np.array(context.node_config["domain"])])})
        return Message(content, reply_to=message)

    @server_app.main()
    def main(grid: Grid, context):
        replies = grid.send_and_receive(Message(RecordDict(), node, "query") for node in grid.get_node_ids())
        context.state["arrays"] = ArrayRecord([np.array([str(r.content["arrays"]["0"].numpy()) for r in replies])])

    context = run_app((server_app, client_app), nodes=2, node_configs=[{"domain": "left"}, {"domain": "right"}])
    assert context.state["arrays"]["0"].numpy().tolist() == ["left", "right"]


# ---- loading


def test_load_app():
    app = load_app(TOY)
    assert isinstance(app.server_app, ServerApp)
    assert isinstance(app.client_app, ClientApp)
    assert (app.name, app.folder, app.client_app_ref) == ("toy", TOY.resolve(), "toy.client_app:app")
    assert app.run_config == {
        "num-server-rounds": 2,
        "min-nodes": 2,
        "fraction-evaluate": 1.0,
        "learning-rate": 0.1,
        "local-steps": 5,
    }


def test_nested_config_and_overrides(toy, tmp_path):
    with (toy / "pyproject.toml").open("a") as file:
        file.write('[tool.flwr.app.config.model]\nname = "small"\nwidth = 3\n')
    app = load_app(toy, ["local-steps=7 learning-rate=0.5", 'model.name="large"'])
    assert (app.run_config["local-steps"], app.run_config["learning-rate"]) == (7, 0.5)
    assert (app.run_config["model.name"], app.run_config["model.width"]) == ("large", 3)
    (tmp_path / "more.toml").write_text("[model]\nwidth = 4\n")
    assert load_app(toy, [str(tmp_path / "more.toml")]).run_config["model.width"] == 4


def test_two_apps_whose_packages_have_the_same_name(toy):
    replace_in(toy / "toy" / "task.py", "[1.0, -2.0, 0.5, 3.0]", "[5.0]")
    assert load_app(toy).server_app is not load_app(TOY).server_app
    context = run_app(load_app(toy), nodes=2)
    assert len(context.state["arrays"]["weights"].numpy()) == 1
    context = run_app(load_app(TOY), nodes=2)
    assert len(context.state["arrays"]["weights"].numpy()) == 4


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["local-stps=3"], "run config 'local-stps': the app's config has no such key; did you mean 'local-steps'?"),
        (["zzz=3"], "it has: fraction-evaluate, learning-rate, local-steps, min-nodes, num-server-rounds"),
        (["local-steps"], "run config 'local-steps': no value, key=value is wanted"),
        (["local-steps=many"], "run config local-steps=many: key=value as in TOML"),
        (["nowhere.toml"], "nowhere.toml"),
    ],
)
def test_wrong_overrides(overrides, text):
    with pytest.raises(RecipeError) as error:
        load_app(TOY, overrides)
    assert text in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("file", "old", "new", "text"),
    [
        ("pyproject.toml", "[tool.flwr.app.components]", "[tool.other]", "no serverapp and clientapp"),
        ("pyproject.toml", "clientapp =", "client =", "has no clientapp"),
        ("pyproject.toml", "[project]", "[project", "not valid TOML"),
        ("pyproject.toml", "local-steps = 5", "local-steps = [5]", "[tool.flwr.app.config]"),
        ("pyproject.toml", "toy.client_app:app", "toy.client_app", "'module:name' is wanted"),
        ("pyproject.toml", "toy.client_app:app", "toy.client_app:ap", "has no 'ap'; did you mean 'app'?"),
        ("pyproject.toml", "toy.client_app:app", "toy.server_app:app", "it is ServerApp, ClientApp is wanted"),
        ("pyproject.toml", "toy.client_app:app", "toy.clients:app", "cannot import toy.clients: ModuleNotFoundError"),
        (
            "toy/task.py",
            "import numpy",
            "import numpyy",
            "cannot import toy.server_app: ModuleNotFoundError: No module",
        ),
        ("toy/client_app.py", "app = ClientApp()", "app = ClientApp(", "cannot import toy.client_app: SyntaxError"),
    ],
)
def test_an_app_that_cannot_be_loaded(toy, file, old, new, text):
    replace_in(toy / file, old, new)
    with pytest.raises(RecipeError) as error:
        load_app(toy)
    assert text in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_that_is_no_app(tmp_path):
    with pytest.raises(RecipeError, match="nowhere': not found"):
        load_app(tmp_path / "nowhere")
    with pytest.raises(RecipeError, match=r"no pyproject\.toml"):
        load_app(tmp_path)
