"""Real Flower processes on loopback: SuperLink, SuperNodes, `flwr run`, and none of them left afterwards.

Flower detaches what it starts (SuperExec runs in a session of its own, `flwr run` leaves a local SuperLink behind on
purpose), so neither a process group nor a parent finds everything. What all of them inherit is the environment: each
`FlowerHome` has a FLWR_HOME that no other process has, and a process that has it is ours to end. A guard process
does the same if the test run itself is killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["FlowerHome", "Run", "SuperLink", "flower_home", "processes_of"]

TOML = str | int | float | bool


@dataclass(frozen=True)
class Run:
    """What became of one `flwr run`.

    Args:
        exit_code: of the command, which is 0 for a failed run too.
        status: Flower's own word, such as 'finished:completed' or 'finished:failed'.
        log: what the run logged.
        seconds: from start to the final status.
    """

    exit_code: int
    status: str
    log: str
    seconds: float


@dataclass(frozen=True)
class SuperLink:
    """A running SuperLink: its address, and the name of the connection in this FLWR_HOME that leads to it."""

    home: FlowerHome
    address: str
    connection: str


@contextlib.contextmanager
def flower_home() -> Iterator[FlowerHome]:
    """A FLWR_HOME of its own; at the end every process that was started under it is gone.

    Raises:
        AssertionError: at the end, if one of them cannot be ended.
    """
    # Not under pytest's tmp_path: Ray's sockets lie below it, and a socket's path may have some 100 characters.
    path = Path(tempfile.mkdtemp(prefix="flwr-", dir="/tmp" if os.path.isdir("/tmp") else None)).resolve()
    guard = subprocess.Popen(
        [sys.executable, __file__, str(path)], stdin=subprocess.PIPE, start_new_session=True, stdout=subprocess.DEVNULL
    )
    home = FlowerHome(path)
    try:
        yield home
    finally:
        home.reap()
        guard.communicate()  # closes its standard input: it finds nothing to end and goes
        left = processes_of(path)
        assert not left, f"still running: {left}"


class FlowerHome:
    """Starts Flower's programs with a FLWR_HOME and ports that nobody else uses."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._children: list[subprocess.Popen[bytes]] = []
        local, control = free_ports(2)
        programs = str(Path(sys.executable).parent)
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("FLWR_", "RAY_"))},
            "FLWR_HOME": str(path),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
            "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(local),
            "FLWR_LOCAL_CONTROL_API_PORT": str(control),
            "RAY_TMPDIR": str(path / "ray"),
            "RAY_USAGE_STATS_ENABLED": "0",
            "PATH": programs + os.pathsep + os.environ.get("PATH", ""),
            "NO_PROXY": "127.0.0.1",
            "PYTHONUNBUFFERED": "1",
            "COLUMNS": "200",
        }
        self._connections = {"local": {"address": ":local:"}}
        (path / "ray").mkdir()
        self._write_config()

    @contextlib.contextmanager
    def superlink(self, connection: str = "loop") -> Iterator[SuperLink]:
        """A SuperLink that answers, and a connection by that name for the `flwr` commands."""
        (port,) = free_ports(1)
        address = f"127.0.0.1:{port}"
        command = ["flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(port)]
        with self._service([*command, "--disable-runtime-dependency-installation"], "superlink") as (process, log):
            _wait_until(lambda: _healthy(address), 60.0, process, log)
            self._connections[connection] = {"address": address, "insecure": True}
            self._write_config()
            yield SuperLink(self, address, connection)

    @contextlib.contextmanager
    def supernode(self, superlink: SuperLink, partition_id: int, num_partitions: int) -> Iterator[Callable[[], None]]:
        """A SuperNode that starts up; call what is yielded to wait until it is connected."""
        (port,) = free_ports(1)
        command = ["flower-supernode", "--insecure", "--superlink", superlink.address, "--port", str(port)]
        config = f"partition-id={partition_id} num-partitions={num_partitions}"
        with self._service([*command, "--node-config", config], f"supernode-{partition_id}") as (process, log):
            # The line is written when the SuperLink has given the node its id and counts it as online.
            yield lambda: _wait_until(lambda: "SuperNode ID" in log.read_text(), 60.0, process, log)

    @contextlib.contextmanager
    def federation(self, nodes: int) -> Iterator[SuperLink]:
        """A SuperLink with connected SuperNodes that hold partitions 0 .. nodes - 1."""
        with self.superlink() as superlink, contextlib.ExitStack() as stack:
            connected = [stack.enter_context(self.supernode(superlink, i, nodes)) for i in range(nodes)]
            for wait in connected:
                wait()
            yield superlink

    def flwr_run(
        self,
        app: Path,
        connection: str = "local",
        *,
        run_config: dict[str, TOML] | None = None,
        simulated_nodes: int | None = None,
        timeout: float = 120.0,
    ) -> Run:
        """`flwr run --stream`, to its end.

        Args:
            app: the app's folder.
            connection: of a SuperLink, or 'local' for Flower's own simulation, whose engine is Ray.
            run_config: overrides of `[tool.flwr.app.config]`.
            simulated_nodes: for the simulation.
            timeout: seconds until the run is given up and everything it started is ended.
        """
        command = ["run", str(app), connection, "--stream"]
        if run_config:
            command += ["--run-config", _toml(run_config)]
        if simulated_nodes is not None:
            # Flower gives each simulated client two cores unless told otherwise: one after the other on two cores.
            federation = {"num-supernodes": simulated_nodes, "client-resources-num-cpus": 1}
            command += ["--federation-config", _toml(federation)]
        start = time.monotonic()
        exit_code, output = self.flwr(*command, timeout=timeout)
        started = re.search(r"Successfully started run (\d+)", output)
        status = self.status(started[1], connection) if started else "not started"
        return Run(exit_code, status, output, time.monotonic() - start)

    def status(self, run_id: str, connection: str) -> str:
        """A run's status, which the exit code of `flwr run` does not tell."""
        _, output = self.flwr("list", connection, "--run-id", run_id, "--format", "json", timeout=30.0)
        return str(json.loads(output)["runs"][0]["status"])

    def flwr(self, *arguments: str, timeout: float) -> tuple[int, str]:
        """Exit code and output of a `flwr` command.

        Raises:
            AssertionError: if it takes longer than `timeout` seconds.
        """
        log = self.path / "flwr.log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                ["flwr", *arguments], env=self.environment, stdout=out, stderr=out, stdin=subprocess.DEVNULL
            )
            self._children.append(process)
            try:
                exit_code = process.wait(timeout)
            except subprocess.TimeoutExpired:
                raise AssertionError(f"no end after {timeout:g} s: flwr {arguments[0]}\n{log.read_text()}") from None
            finally:
                _stop(process)
        return exit_code, log.read_text()

    def reap(self) -> None:
        """End every process of this home, collect those that are children of this one, remove the folder."""
        end_processes_of(self.path)
        for process in self._children:
            _stop(process)
        shutil.rmtree(self.path, ignore_errors=True)

    @contextlib.contextmanager
    def _service(self, command: list[str], name: str) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
        log = self.path / f"{name}.log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                command, env=self.environment, stdout=out, stderr=out, stdin=subprocess.DEVNULL, start_new_session=True
            )
        self._children.append(process)
        try:
            yield process, log
        finally:
            _stop(process)

    def _write_config(self) -> None:
        lines = ['[superlink]\ndefault = "local"\n']
        for name, settings in self._connections.items():
            lines.append(f"[superlink.{name}]")
            lines += [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
        (self.path / "config.toml").write_text("\n".join(lines) + "\n")


def free_ports(count: int) -> list[int]:
    """Ports of the loopback interface that nobody listens on now, all different."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def processes_of(home: Path) -> dict[int, str]:
    """The running processes whose environment names this FLWR_HOME: id and command. Without /proc none is found."""
    mark = f"FLWR_HOME={home}".encode()
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark in (folder / "environ").read_bytes().split(b"\0"):
                found[int(folder.name)] = (
                    (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                )
    return found


def end_processes_of(home: Path, patience: float = 10.0) -> None:
    """Kill every process of this FLWR_HOME, and what they start meanwhile."""
    until = time.monotonic() + patience
    while (found := processes_of(home)) and time.monotonic() < until:
        for each in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(each, signal.SIGKILL)
        time.sleep(0.02)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a child, and collect it."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(3.0)
    if process.poll() is None:
        process.kill()
        process.wait()


def _healthy(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"http://{address}/health", timeout=1.0) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _wait_until(ready: Callable[[], bool], seconds: float, process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + seconds
    while not ready():
        assert process.poll() is None, f"ended with {process.returncode}:\n{log.read_text()}"
        assert time.monotonic() < until, f"not ready after {seconds:g} s:\n{log.read_text()}"
        time.sleep(0.05)


def _toml(settings: dict[str, TOML]) -> str:
    return " ".join(f"{key}={json.dumps(value)}" for key, value in settings.items())


if __name__ == "__main__":
    # The guard: its standard input closes when the test run ends, however that ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.stdin.buffer.read()
    end_processes_of(Path(sys.argv[1]))
    shutil.rmtree(sys.argv[1], ignore_errors=True)
