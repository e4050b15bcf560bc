"""Run a piece of work in a process of its own (engine_worker.py) and watch its anonymous memory from here."""

from __future__ import annotations

import contextlib
import json
import os
import select
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

REPOSITORY = Path(__file__).parents[1]

SAMPLE_SECONDS = 0.002
"""Between two looks at a process's memory."""


class Floor(NamedTuple):
    """Seconds of the work that is the floor of another."""

    wall: float
    cpu: float


@dataclass(frozen=True)
class Run:
    """One repetition: seconds, bytes above the start where the system tells them, what the work found out, and how long
    its floor took just before."""

    wall: float
    cpu: float
    extra: int | None
    more: Mapping[str, Any]
    floor: Floor | None = None


@dataclass(frozen=True)
class Measured:
    """The repetitions of one job.

    Args:
        wall, cpu: medians, in seconds.
        best: the shortest wall.
        spread: (slowest - fastest) / median.
        extra: the highest anonymous memory of the first repetition above what the process had when its clock started.
            Later repetitions begin with what the allocator has kept.
        runs: how many there were.
        more: what the last repetition found out beside.
        floor: medians of the floor's times before each repetition, if it was measured there.
    """

    wall: float
    cpu: float
    best: float
    spread: float
    extra: int | None
    runs: int
    more: Mapping[str, Any] = field(default_factory=dict)
    floor: Floor | None = None

    @classmethod
    def of(cls, runs: Sequence[Run]) -> Measured:
        """Medians of these."""
        timed = runs[1:] or runs  # the first is the one whose memory was watched
        walls = [run.wall for run in timed]
        middle = statistics.median(walls)
        floors = [run.floor for run in timed if run.floor is not None]
        return cls(
            middle,
            statistics.median(run.cpu for run in timed),
            min(walls),
            (max(walls) - min(walls)) / middle if middle else 0.0,
            runs[0].extra,
            len(timed),
            runs[-1].more,
            Floor(*map(statistics.median, zip(*floors, strict=True))) if floors else None,
        )


class WorkFailedError(RuntimeError):
    """A worker's process has ended, with the last line that it printed."""


class Worker:
    """A process that does jobs one after another; a context manager, whose end ends it.

    Args:
        python: its interpreter.
        environment: variables beside this process's own.
    """

    def __init__(self, python: str = sys.executable, environment: Mapping[str, str] | None = None) -> None:
        # The modules that stand beside this one are found there; mergekit's environment has nothing else of ours.
        path = [str(REPOSITORY)]
        if python == sys.executable and os.environ.get("PYTHONPATH"):
            path.append(os.environ["PYTHONPATH"])
        settings = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        settings["PYTHONPATH"] = os.pathsep.join(path)
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115, close() does it
        self._process = subprocess.Popen(
            [python, "-m", "benchmarks.engine_worker"],
            env=os.environ | settings | dict(environment or {}),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    def run(self, job: Mapping[str, Any], repeats: int = 1, budget: float = float("inf")) -> Measured:
        """Do a job, again until it has been done so often or has taken so many seconds.

        Raises:
            WorkFailedError: if it fails; the worker is then of no more use.
        """
        self._say(json.dumps(job))
        runs: list[Run] = []
        while True:
            self._hear()  # it is ready
            before = anonymous_bytes(self._process.pid)
            highest = before or 0
            self._say("go")
            assert self._process.stdout is not None
            # Only the first time: to be looked at holds up the work, the more the more memory it fills.
            while not select.select([self._process.stdout], [], [], None if runs else SAMPLE_SECONDS)[0]:
                highest = max(highest, anonymous_bytes(self._process.pid) or 0)
            highest = max(highest, anonymous_bytes(self._process.pid) or 0)
            found = self._hear()
            last = len(runs) + 1 >= repeats + (repeats > 1) or sum(run.wall for run in runs) + found["wall"] >= budget
            self._say("last" if last else "again")
            more = self._hear()
            extra = None if before is None else highest - before
            floor = Floor(found["floor_wall"], found["floor_cpu"]) if "floor_wall" in found else None
            runs.append(Run(found["wall"], found["cpu"], extra, more, floor))
            if last:
                return Measured.of(runs)

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self._raise()

    def _hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._raise()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _raise(self) -> None:
        self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines()
        raise WorkFailedError(lines[-1] if lines else f"exit code {self._process.returncode}")

    def close(self) -> None:
        """End the process, whatever it is doing."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):  # what it was told last, and did not read
                    stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, raised: BaseException | None, at: TracebackType | None
    ) -> None:
        self.close()


def anonymous_bytes(pid: int) -> int | None:
    """A process's anonymous memory; None where the system does not tell (anywhere but on Linux)."""
    try:
        with open(f"/proc/{pid}/status") as file:
            for line in file:
                if line.startswith("RssAnon:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None
