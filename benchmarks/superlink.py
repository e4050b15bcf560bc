"""A federation on a real SuperLink with FedMerge and with Flower's FedAvg: what memory does the ServerApp take?

    python benchmarks/superlink.py [--megabytes 100] [--nodes 8] [--rounds 1]

SuperLink, SuperNodes and apps are processes of their own on the loopback interface. Each node answers each round with
a float32 model of its own, so a round has as many replies as there are nodes; eight replies from two SuperNodes are
`--nodes 2 --rounds 4`, where a round has two. The ServerApp measures itself: its anonymous memory every
5 ms, above what it had before it made the initial model, and the system's own peak of everything resident, mapped files
included (VmHWM). No process is left behind, whether this ends by itself or by Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from flower_processes import FlowerHome, flower_home

PROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "weigh"
version = "1.0.0"
description = "Clients that answer with a model"
license = "Apache-2.0"
dependencies = ["flwr>=1.41,<1.43"]

[tool.hatch.build.targets.wheel]
packages = ["."]

[tool.flwr.app]
publisher = "flwrlabs"

[tool.flwr.app.components]
serverapp = "weigh.server:app"
clientapp = "weigh.client:app"

[tool.flwr.app.config]
strategy = "FedMerge"
megabytes = 1
nodes = 2
num-server-rounds = 1
report = ""
spill-folder = ""
"""

CLIENT = """
import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message, context):
    seed, arrays = context.node_config["partition-id"] + 1, {}
    for name, array in message.content["arrays"].items():
        values = array.numpy()
        arrays[name] = Array(values + np.float32(0.01 * seed))
    metrics = MetricRecord({"num-examples": seed})
    return Message(RecordDict({"arrays": ArrayRecord(arrays), "metrics": metrics}), reply_to=message)
"""

SERVER = """
import json, threading, time

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

from fl_merge.flower import FedMerge
from fl_merge.methods import weighted_average

app = ServerApp()
MEGABYTES_A_TENSOR = 10


def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key)) / 1000


@app.main()
def main(grid, context):
    config = context.run_config
    options = {"fraction_evaluate": 0.0, "min_train_nodes": config["nodes"], "min_available_nodes": config["nodes"]}
    if config["strategy"] == "FedMerge":
        strategy = FedMerge(weighted_average(), spill_folder=config["spill-folder"], **options)
    else:
        strategy = FedAvg(**options)
    before = peak = status("RssAnon")
    done = threading.Event()

    def watch():
        nonlocal peak
        while not done.is_set():
            peak = max(peak, status("RssAnon"))
            time.sleep(0.005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    sizes = [MEGABYTES_A_TENSOR] * (config["megabytes"] // MEGABYTES_A_TENSOR)
    sizes += [config["megabytes"] % MEGABYTES_A_TENSOR] * (config["megabytes"] % MEGABYTES_A_TENSOR > 0)
    arrays = [ArrayRecord({
        str(i): Array(np.random.default_rng(i).standard_normal(size * 250_000, dtype=np.float32))
        for i, size in enumerate(sizes)
    })]
    started = time.perf_counter()
    result = strategy.start(grid, arrays.pop(), num_rounds=config["num-server-rounds"])
    seconds = time.perf_counter() - started
    done.set()
    watcher.join()
    first = float(result.arrays["0"].numpy()[0])
    numbers = {"before": before, "peak": peak, "resident": status("VmHWM"), "seconds": seconds, "first": first}
    with open(config["report"], "w") as file:
        json.dump(numbers, file)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=100, help="of one model (default: 100)")
    parser.add_argument("--nodes", type=int, default=8, help="SuperNodes, each a client (default: 8)")
    parser.add_argument("--rounds", type=int, default=1, help="rounds (default: 1)")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for one federation (default: 600)")
    arguments = parser.parse_args()
    if min(arguments.megabytes, arguments.rounds) < 1 or arguments.nodes < 2:
        parser.error("wanted at least 1 megabyte, 1 round and 2 nodes")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what is started is ended

    replies = arguments.nodes * arguments.rounds
    print(f"SuperNodes: {arguments.nodes}, rounds: {arguments.rounds}, replies of {arguments.megabytes} MB: {replies}")
    print(f"{'':<10}{'before':>9}{'peak':>9}{'extra':>9}{'models':>8}{'VmHWM':>9}{'seconds':>9}   (ServerApp, MB)")
    values = []
    with tempfile.TemporaryDirectory(prefix="fl-merge-superlink-") as folder:
        app = write_app(Path(folder))
        for strategy in ("FedMerge", "FedAvg"):
            with federation(arguments.nodes) as home:
                numbers = measure(home, app, strategy, arguments)
            extra = numbers["peak"] - numbers["before"]
            print(
                f"{strategy:<10}{numbers['before']:>9.0f}{numbers['peak']:>9.0f}{extra:>9.0f}"
                f"{extra / arguments.megabytes:>8.1f}{numbers['resident']:>9.0f}{numbers['seconds']:>9.1f}",
                flush=True,
            )
            values.append(numbers["first"])
    if abs(values[0] - values[1]) > 1e-5:
        sys.exit(f"the two models differ: {values}")


@contextlib.contextmanager
def federation(nodes: int) -> Iterator[FlowerHome]:
    """A home in which a SuperLink named "loop" runs with so many connected SuperNodes."""
    with flower_home() as home, home.federation(nodes):
        yield home


def measure(home: FlowerHome, app: Path, strategy: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Run one federation; gives what the ServerApp wrote down."""
    report = app.parent / f"{strategy}.json"
    config: dict[str, str | int | float | bool] = {
        "strategy": strategy,
        "megabytes": arguments.megabytes,
        "nodes": arguments.nodes,
        "num-server-rounds": arguments.rounds,
        "report": str(report),
        "spill-folder": str(app.parent / "spill"),
    }
    run = home.flwr_run(app, "loop", run_config=config, timeout=arguments.timeout)
    if not report.exists():
        sys.exit(f"{strategy}: the run ended as '{run.status}':\n{run.log}")
    numbers: dict[str, float] = json.loads(report.read_text())
    return numbers


def write_app(folder: Path) -> Path:
    """The Flower app, in a folder of its own."""
    package = folder / "app" / "weigh"
    package.mkdir(parents=True)
    (package.parent / "pyproject.toml").write_text(PROJECT)
    for name, text in {"__init__.py": "", "client.py": CLIENT, "server.py": SERVER}.items():
        (package / name).write_text(text)
    return package.parent


if __name__ == "__main__":
    main()
