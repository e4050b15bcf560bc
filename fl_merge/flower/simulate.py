"""Run a Flower app on this machine with its progress on the terminal and its results in a folder."""

from __future__ import annotations

import contextlib
import logging
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from fl_merge.errors import RecipeError, counted
from fl_merge.flower.apps import LoadedApp, load_app, run_app
from fl_merge.flower.inprocess import Workers
from fl_merge.flower.journal import Journal
from fl_merge.flower.live import Live
from fl_merge.flower.resume import Resumption, resuming
from fl_merge.flower.watch import watching
from fl_merge.recipe import Recipe
from fl_merge.runs import read_config

DEFAULT_NODES = 2


@dataclass(frozen=True)
class Simulated:
    """What a simulation leaves.

    Args:
        run_folder: journal, recipe and model; None if the app does not merge with FedMerge.
        seconds: of wall time, from the first message on.
        messages, errors: replies of clients, and how many of them were errors.
    """

    run_folder: Path | None
    seconds: float
    messages: int
    errors: int


def simulate(
    folder: str | Path,
    *,
    nodes: int | None = None,
    overrides: Sequence[str] = (),
    recipe: str | Path | None = None,
    workers: Workers = "auto",
    seed: int | None = None,
    run_folder: str | Path | None = None,
    resume: str | Path | None = None,
    force: bool = False,
    verbose: bool = False,
    console: Console | None = None,
) -> Simulated:
    """Run the Flower app in `folder` with all its nodes in this process and its workers.

    Args:
        folder: of an unmodified Flower app.
        nodes: how many clients; by default `nodes` of `[tool.fl-merge]` in its pyproject.toml, else 2.
        overrides: of the run config, `key=value`.
        recipe: a file that the app's run config key `recipe` is set to.
        workers: 0 for everything in this process, a number of worker processes, or "auto".
        seed: of the clients' random numbers; 0 if left out.
        run_folder: where an app that uses FedMerge leaves its journal and model; runs/<time>-<app> by default.
        resume: the folder of a run, with whose next round to go on there. Its run config, number of nodes and seed are
            taken where nothing else is said.
        force: resume although the method, the seed or the model's tensors are not those of the run.
        verbose: show Flower's own log too.
        console: where the progress goes.

    Raises:
        RecipeError: for wrong settings, before any client runs.
        RunFailedError: if no round made a model.
    """
    console = console or Console(stderr=True)
    app = load_app(folder, overrides)
    config: dict[str, bool | int | float | str] = {}
    before: Mapping[str, Any] = {}
    if resume is not None:
        if run_folder is not None and Path(run_folder).resolve() != Path(resume).resolve():
            raise RecipeError(f"a resumed run goes on in its own folder: found run folder '{run_folder}' beside it")
        run_folder, before = resume, read_config(resume)
        known = before.get("config", {})
        config |= {key: known[key] for key in app.run_config if key in known and key not in app.overridden}
        seed = before.get("seed") if seed is None else seed
    if recipe is not None:
        Recipe.load(recipe)
        if "recipe" not in app.run_config:
            raise RecipeError(
                f"app '{app.name}' has no key 'recipe' in its run config, so it cannot take a recipe file"
            )
        for key in ("merge-method", "parameters", "rules", "clip-norm", "server-optimizer"):
            if key in {name.partition(".")[0] for name in app.overridden}:
                raise RecipeError(f"run config '{key}': recipe '{recipe}' says how to merge; give one of the two")
        config["recipe"] = str(Path(recipe).resolve())
    seed = 0 if seed is None else seed
    count = nodes if nodes is not None else int(before.get("nodes", 0)) or _nodes(app)
    path = Path(run_folder) if run_folder is not None else _new_folder(app.name)
    simulated = {"nodes": count, "seed": seed}
    journal = Journal(path, app.run_config | config, simulated=simulated, resumed=resume is not None)
    resumption = None if resume is None else Resumption(path, force)
    console.print(f"[bold]{app.name}[/bold]: {counted(count, 'client')} in this process", highlight=False)
    started = time.perf_counter()
    try:
        with _flower_log(verbose), Live(console) as live, watching(live, journal), resuming(resumption):
            run_app(app, nodes=count, workers=workers, seed=seed, run_config=config, on_message=live.on_message)
    finally:
        if run_folder is None and not journal.written:
            path.rmdir()
    if resume is not None and not journal.written:
        raise RecipeError(f"app '{app.name}' does not merge with FedMerge, so it cannot be resumed; it ran anew")
    return Simulated(
        journal.path if journal.written else None, time.perf_counter() - started, live.messages, live.errors
    )


def _nodes(app: LoadedApp) -> int:
    assert app.folder is not None
    project = tomllib.loads((app.folder / "pyproject.toml").read_text(encoding="utf-8"))
    nodes = project.get("tool", {}).get("fl-merge", {}).get("nodes", DEFAULT_NODES)
    if not isinstance(nodes, int):
        raise RecipeError(
            f"'{app.folder}/pyproject.toml', [tool.fl-merge] nodes: found {nodes!r}, wanted a whole number"
        )
    return nodes


def _new_folder(name: str) -> Path:
    """A folder of this run's own, also where others start in the same second."""
    stem = Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S}-{name}"
    for path in (stem, *(stem.with_name(f"{stem.name}-{number}") for number in range(2, 1000))):
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise RecipeError(f"run folder '{path}': {error.strerror}; give another with --run-folder") from None
        return path
    raise RecipeError(f"run folder '{stem}': a thousand runs have that name; give one with --run-folder")


@contextlib.contextmanager
def _flower_log(verbose: bool) -> Iterator[None]:
    """Without Flower's log, unless it is asked for: `Live` shows what fails."""
    logger = logging.getLogger("flwr")
    level = logger.level
    logger.setLevel(level if verbose else logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
