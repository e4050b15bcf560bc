"""One small federation through our in-process engine and through `flwr run`: prints a table of seconds.

    python benchmarks/simulate.py [--nodes 200] [--rounds 2]

The app is tests/flower/toy_app, unmodified: least squares with numpy and FedAvg, so the seconds are the engines' own.
`flwr run` is measured twice: with the start of its local SuperLink, as the first run after a boot has it, and with the
SuperLink running. This program starts that SuperLink itself, as `flwr run` does, in order to be able to stop it.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

APP = Path(__file__).parents[1] / "tests" / "flower" / "toy_app"
BIN = Path(sys.executable).parent  # flwr starts its parts by name

OURS = """
import sys, time
from fl_merge.flower.apps import load_app, run_app
app = load_app(sys.argv[1], [sys.argv[3]])
start = time.perf_counter()
context = run_app(app, nodes=int(sys.argv[2]))
print("seconds", time.perf_counter() - start, "loss", context.state["metrics"]["eval_loss"])
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=200, help="clients (default: 200)")
    parser.add_argument("--rounds", type=int, default=2, help="rounds (default: 2)")
    arguments = parser.parse_args()
    # Flower's simulation is still registering nodes when the ServerApp starts: the first round would see some of them.
    config = f"num-server-rounds={arguments.rounds} min-nodes={arguments.nodes}"

    with tempfile.TemporaryDirectory(prefix="fl-merge-simulate-") as folder:
        app = Path(shutil.copytree(APP, Path(folder) / "toy_app", ignore=shutil.ignore_patterns("__pycache__")))
        wall, output = timed([sys.executable, "-c", OURS, str(app), str(arguments.nodes), config], dict(os.environ))
        found = re.search(r"seconds (\S+) loss (\S+)", output)
        if not found:
            sys.exit(f"our run gave no result:\n{output}")
        after_imports = float(found[1])
        rows = [("fl_merge, in process", after_imports, wall, float(found[2]))]

        start = time.perf_counter()
        with superlink(Path(folder)) as environment:
            started = time.perf_counter() - start
            nodes = f"num-supernodes={arguments.nodes}"
            command = [str(BIN / "flwr"), "run", str(app), "bench", "--stream"]
            command += ["--run-config", config, "--federation-config", nodes]
            for name, before in (("flwr run (Ray), SuperLink started", started), ("flwr run (Ray), SuperLink up", 0.0)):
                wall, output = timed(command, environment)
                losses = re.findall(r"'eval_loss': '?([0-9.e+-]+)", output)
                if not losses:
                    sys.exit(f"flwr run gave no result:\n{output}")
                rows.append((name, None, wall + before, float(losses[-1])))

    print(f"rounds: {arguments.rounds}, clients: {arguments.nodes}, cores: {os.cpu_count()}; numpy least squares\n")
    print(f"{'engine':36}{'after imports':>15}{'wall':>10}{'ratio of walls':>17}{'final loss':>13}")
    for name, after, wall, loss in rows:
        inside = "" if after is None else f"{after:.2f} s"
        print(f"{name:36}{inside:>15}{wall:>8.2f} s{wall / rows[0][2]:>17.1f}{loss:>13.4f}")
    print(f"\nratio of `flwr run` with its SuperLink up to ours after imports: {rows[-1][2] / after_imports:.0f}")


def timed(command: list[str], environment: dict[str, str]) -> tuple[float, str]:
    """The wall seconds of a command, and what it printed."""
    start = time.perf_counter()
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    seconds = time.perf_counter() - start
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout}")
    return seconds, done.stdout


@contextmanager
def superlink(folder: Path) -> Iterator[dict[str, str]]:
    """A SuperLink for simulations, with a Flower home of its own; the environment in which `flwr` finds it."""
    port = free_port()
    home = folder / "flwr"
    home.mkdir()
    (home / "config.toml").write_text(f'[superlink.bench]\naddress = "127.0.0.1:{port}"\ninsecure = true\n')
    environment = os.environ | {
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    }
    command = [str(BIN / "flower-superlink"), "--insecure", "--simulation", "--isolation", "subprocess"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--control-api-address", f"127.0.0.1:{free_port()}"]
    command += ["--database", str(home / "state.db")]
    # In a session of its own, so that it can be stopped together with all that it starts.
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        wait_until_healthy(f"http://127.0.0.1:{port}/health", process)
        yield environment
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(10)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_until_healthy(address: str, process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + 60
    while time.monotonic() < until and process.poll() is None:
        try:
            with urllib.request.urlopen(address, timeout=1):
                return
        except OSError:
            time.sleep(0.1)
    sys.exit(f"flower-superlink did not come up (exit code {process.poll()})")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main()
