"""A federation's progress on a terminal: a bar while clients work, a line a round, the reasons of every refusal."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from fl_merge.errors import counted
from fl_merge.flower.inprocess import Replied, Sent
from fl_merge.flower.watch import Evaluation, Watcher
from fl_merge.model import GlobalModel
from fl_merge.phases import Phase
from fl_merge.rounds import Refusal, RoundReport
from fl_merge.types import MergeMethod


class Live(Watcher):
    """Shows a run as it happens. Use it as a context manager; give `on_message` to the engine too for a live bar.

    Args:
        console: where to write.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f} clients"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        self._task = self._progress.add_task("waiting for nodes", total=None, visible=False)
        self._rounds = 0
        self._phase: tuple[str, str] | None = None
        self._sent = self._answered = 0
        self._bytes = {"train": 0, "evaluate": 0}
        self._downlink = 0
        self._round_started = time.perf_counter()
        self.messages = 0
        self.errors = 0

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, raised: BaseException | None, at: TracebackType | None
    ) -> None:
        self._progress.stop()

    def on_message(self, event: Sent | Replied) -> None:
        """Count a message on its way to a client, or back."""
        kind = event.message_type.partition(".")[0]
        if isinstance(event, Sent):
            if (kind, event.group_id) != self._phase or self._answered >= self._sent > 0:
                self._phase, self._sent, self._answered = (kind, event.group_id), 0, 0
            self._sent += 1
            self._downlink += event.num_bytes
        else:
            self._answered += 1
            self.messages += 1
            self.errors += not event.ok
            if event.error is not None and not self._rounds:  # FedMerge says so itself, with the round
                self._console.print(
                    f"  [yellow]error[/yellow] node {event.node_id}, {kind}: {escape(event.error)}",
                    highlight=False,
                    soft_wrap=True,
                )
            self._bytes[kind] = self._bytes.get(kind, 0) + event.num_bytes
        where = f"round {event.group_id}/{self._rounds} " if event.group_id and self._rounds else ""
        self._progress.update(
            self._task, description=f"{where}{kind}", total=self._sent, completed=self._answered, visible=True
        )

    def run_started(self, num_rounds: int, method: MergeMethod) -> None:
        self._rounds = num_rounds
        line = f"merging with {escape(str(method))}, {counted(num_rounds, 'round')}"
        self._console.print(line, highlight=False, soft_wrap=True)

    def run_resumed(self, num_rounds: int, method: MergeMethod, after_round: int) -> None:
        self.run_started(num_rounds, method)
        self._console.print(f"going on after round {after_round}", highlight=False)

    def phase_started(self, round_number: int, number: int, phase: Phase) -> None:
        train = "" if phase.trains_all else f", clients train {', '.join(phase.train)}"
        self._console.print(f"phase {number}: {escape(str(phase.method) + train)}", highlight=False, soft_wrap=True)

    def adapter_folded(self, round_number: int, modules: int, model: GlobalModel) -> None:
        self._console.print(f"  the adapter ({counted(modules, 'module')}) is folded into the base", highlight=False)

    def round_started(self, round_number: int, sampled: tuple[str, ...]) -> None:
        self._round_started = time.perf_counter()
        self._bytes = {"train": 0, "evaluate": 0}
        self._downlink = 0

    def replied(self, round_number: int, client_id: str, refusal: Refusal | None, seconds: float) -> None:
        if refusal is not None:
            self._console.print(f"  [yellow]refused[/yellow] {escape(str(refusal))}", highlight=False, soft_wrap=True)

    def round_ended(self, report: RoundReport, model: GlobalModel) -> None:
        for refusal in report.refused:
            if refusal.reason.startswith("no reply"):
                self._console.print(
                    f"  [yellow]refused[/yellow] {escape(str(refusal))}", highlight=False, soft_wrap=True
                )
        head = f"round {report.round_number}/{self._rounds}" if self._rounds else f"round {report.round_number}"
        if report.merge is None:
            self._console.print(
                f"{head}  [red]failed[/red], the old model stands: {escape(report.failure or '')}", soft_wrap=True
            )
            return
        refused = f", {len(report.refused)} refused" if report.refused else ""
        uplink = self._bytes["train"] or sum(entry.num_bytes for entry in report.accepted)
        self._console.print(
            f"{head}  {len(report.accepted)} of {len(report.sampled)} merged{_who(report)}{refused}  "
            f"{time.perf_counter() - self._round_started:.1f} s (merge {report.merge.seconds:.3f} s)  "
            f"up {megabytes(uplink)}, down {megabytes(self._downlink)}",
            highlight=False,
            soft_wrap=True,
        )

    def clients_evaluated(self, evaluation: Evaluation) -> None:
        text = _metrics(evaluation.metrics)
        if text:
            self._console.print(f"  clients: {text}", highlight=False, soft_wrap=True)
        self._lists(evaluation.metrics)
        for refusal in evaluation.refused:
            self._console.print(
                f"  [yellow]no evaluation[/yellow] {escape(str(refusal))}", highlight=False, soft_wrap=True
            )

    def server_evaluated(self, round_number: int, metrics: Mapping[str, Any]) -> None:
        parts = {key: value for key, value in metrics.items() if "/" in key and not isinstance(value, list)}
        whole = {key: value for key, value in metrics.items() if "/" not in key}
        head = "initial model" if round_number == 0 else "  server"
        self._console.print(f"{head}: {_metrics(whole)}", highlight=False, soft_wrap=True)
        if parts:
            short = {key.rpartition("/")[2]: value for key, value in parts.items()}
            self._console.print(f"    [dim]{_metrics(short)}[/dim]", highlight=False, soft_wrap=True)
        self._lists(metrics)

    def _lists(self, metrics: Mapping[str, Any]) -> None:
        """Metrics of several numbers (each expert's load), a line for all parts of one name."""
        rows: dict[str, list[str]] = {}
        for key, value in metrics.items():
            if isinstance(value, list):
                name, _, part = key.partition("/")
                rows.setdefault(name, []).append(" ".join([part, *(f"{number:.2f}" for number in value)]).strip())
        for name, texts in rows.items():
            self._console.print(f"    [dim]{name}: {' | '.join(texts)}[/dim]", highlight=False, soft_wrap=True)


def _who(report: RoundReport) -> str:
    """The clients whose updates are in the model, if they fit a line."""
    clients = report.merge.clients if report.merge is not None else ()
    return f" ({' '.join(clients)})" if len(clients) <= 16 else ""


def megabytes(num_bytes: float) -> str:
    """A number of bytes as MB, or as kB below a tenth of one."""
    return f"{num_bytes / 1e6:.1f} MB" if num_bytes >= 1e5 else f"{num_bytes / 1e3:.1f} kB"


def _metrics(metrics: Mapping[str, Any]) -> str:
    shown = {key: value for key, value in metrics.items() if isinstance(value, int | float) and key != "partition-id"}
    return "  ".join(f"{key} {value:.3f}" for key, value in shown.items())
