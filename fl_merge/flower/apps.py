"""Flower apps: a folder with a pyproject.toml, loaded as `flwr run` would and run in this process."""

from __future__ import annotations

import difflib
import importlib
import signal
import sys
import threading
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any, TypeVar

from flwr.app import Context, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fl_merge.errors import RecipeError
from fl_merge.flower._flwr import SUPERLINK_NODE_ID, flatten_dict, parse_config_args
from fl_merge.flower.inprocess import InProcessGrid, Replied, Scalar, Sent, Workers

App = TypeVar("App", ServerApp, ClientApp)


@dataclass(frozen=True)
class LoadedApp:
    """A Flower app, ready to run.

    Args:
        server_app: its ServerApp.
        client_app: its ClientApp.
        client_app_ref: `module:name` of the ClientApp, for worker processes; None if they must get it pickled.
        run_config: `[tool.flwr.app.config]`, nested keys joined with dots, with the overrides.
        folder: where its pyproject.toml is.
        name: of the project.
        overridden: the keys of its run config that are overrides.
    """

    server_app: ServerApp
    client_app: ClientApp
    client_app_ref: str | None = None
    run_config: dict[str, Scalar] = field(default_factory=dict)
    folder: Path | None = None
    name: str = "app"
    overridden: frozenset[str] = frozenset()


def load_app(folder: str | Path, overrides: Sequence[str] = ()) -> LoadedApp:
    """The Flower app in `folder`. The folder comes first on sys.path from then on.

    Args:
        folder: holds a pyproject.toml with `[tool.flwr.app.components]`.
        overrides: of the run config, as `flwr run --run-config` takes them: `key=value` in TOML, or one .toml file.

    Raises:
        RecipeError: there is no such app, it cannot be imported, or an override names no key of its config.
    """
    folder = Path(folder).expanduser().resolve()
    pyproject = folder / "pyproject.toml"
    if not folder.is_dir():
        raise RecipeError(
            f"app folder '{folder}': {'is a file, a folder is wanted' if folder.exists() else 'not found'}"
        )
    if not pyproject.is_file():
        raise RecipeError(f"app folder '{folder}': no pyproject.toml in it, a Flower app has one")
    try:
        project = tomllib.loads(pyproject.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as problem:
        raise RecipeError(f"'{pyproject}': not valid TOML: {problem}") from problem

    app = _table(project, "tool", "flwr", "app")
    components = _table(app, "components")
    missing = [name for name in ("serverapp", "clientapp") if not isinstance(components.get(name), str)]
    if missing:
        wanted = " and ".join(missing)
        raise RecipeError(f"'{pyproject}': [tool.flwr.app.components] has no {wanted}, a Flower app has 'module:name'")
    try:
        defaults = flatten_dict(dict(_table(app, "config")))
    except ValueError as problem:
        raise RecipeError(f"'{pyproject}', [tool.flwr.app.config]: {' '.join(str(problem).split())}") from problem
    overriding = _parsed_overrides(overrides, defaults)

    if str(folder) in sys.path:
        sys.path.remove(str(folder))
    sys.path.insert(0, str(folder))
    references = {name: str(components[name]) for name in ("serverapp", "clientapp")}
    for reference in references.values():
        _forget_namesakes(reference.partition(":")[0].partition(".")[0], folder)
    importlib.invalidate_caches()
    return LoadedApp(
        server_app=_component(folder, "serverapp", references["serverapp"], ServerApp),
        client_app=_component(folder, "clientapp", references["clientapp"], ClientApp),
        client_app_ref=references["clientapp"],
        run_config=defaults | overriding,
        folder=folder,
        name=str(_table(project, "project").get("name", folder.name)),
        overridden=frozenset(overriding),
    )


def run_app(
    app: LoadedApp | tuple[ServerApp, ClientApp],
    *,
    nodes: int,
    workers: Workers = "auto",
    seed: int = 0,
    run_config: Mapping[str, Scalar] | None = None,
    node_configs: Sequence[Mapping[str, Scalar]] | None = None,
    on_message: Callable[[Sent | Replied], None] | None = None,
    grid_wrapper: Callable[[Grid], Grid] | None = None,
) -> Context:
    """Run a Flower app with all its nodes on this machine; the ServerApp's context afterwards.

    The ServerApp runs in the calling thread; what it raises comes out here. Ctrl-C ends everything.

    Args:
        app: from `load_app`, or a ServerApp and a ClientApp made by hand.
        nodes: how many clients there are.
        workers: see InProcessGrid.
        seed: of the clients' random numbers.
        run_config: added to the app's own.
        node_configs: one mapping a node, added to its `partition-id` and `num-partitions`.
        on_message: called with `Sent` and `Replied` events, one at a time, from any thread.
        grid_wrapper: gives the Grid that the ServerApp sees, from the one that does the work.

    Raises:
        RecipeError: an argument is out of range.
    """
    loaded = app if isinstance(app, LoadedApp) else LoadedApp(*app)
    config = {**loaded.run_config, **(run_config or {})}
    grid = InProcessGrid(
        loaded.client_app,
        nodes,
        workers=workers,
        seed=seed,
        client_app_ref=loaded.client_app_ref,
        run_config=config,
        node_configs=node_configs,
        on_message=on_message,
    )
    context = Context(grid.run.run_id, SUPERLINK_NODE_ID, node_config={}, state=RecordDict(), run_config=config)
    with grid, _ctrl_c_interrupts(grid):
        loaded.server_app(grid_wrapper(grid) if grid_wrapper else grid, context)
    return context


@contextmanager
def _ctrl_c_interrupts(grid: InProcessGrid) -> Iterator[None]:
    """Let Ctrl-C stop the grid before it raises.

    A ServerApp of the older API talks to each client from a thread of its own and waits for them all on the way out:
    without this, KeyboardInterrupt would come through only when they have trained to the end.
    """
    usual = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(usual):
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        grid.interrupt()
        usual(number, frame)

    signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)


def _table(parent: Mapping[str, Any], *keys: str) -> Mapping[str, Any]:
    """The table at `keys`; empty where there is none."""
    found: Any = parent
    for key in keys:
        found = found.get(key, {}) if isinstance(found, Mapping) else {}
    return found if isinstance(found, Mapping) else {}


def _parsed_overrides(overrides: Sequence[str], known: Mapping[str, Scalar]) -> dict[str, Scalar]:
    for override in overrides:
        if "=" not in override and not override.endswith(".toml"):
            raise RecipeError(f"run config '{override}': no value, key=value is wanted")
    try:
        parsed: dict[str, Scalar] = parse_config_args(list(overrides))
    except OSError as problem:
        raise RecipeError(f"run config {' '.join(overrides)}: {problem}") from problem
    except Exception as problem:  # flwr raises click's errors, tomli's and ValueError
        wanted = """key=value as in TOML, e.g. rounds=3, rate=0.1, flag=true or 'name="text"', is wanted"""
        raise RecipeError(f"run config {' '.join(overrides)}: {wanted}") from problem
    for key in parsed:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"it has: {', '.join(sorted(known)) or 'none'}"
            raise RecipeError(f"run config '{key}': the app's config has no such key; {hint}")
    return parsed


def _component(folder: Path, kind: str, reference: str, wanted: type[App]) -> App:
    """What `module:name` refers to."""
    where = f"app '{folder}', {kind} = '{reference}'"
    module_name, _, attributes = reference.partition(":")
    if not module_name or not attributes:
        raise RecipeError(f"{where}: 'module:name' is wanted")
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as problem:
        reason = " ".join(str(problem).split())
        raise RecipeError(f"{where}: cannot import {module_name}: {type(problem).__name__}: {reason}") from problem
    for attribute in attributes.split("."):
        if not hasattr(found, attribute):
            near = difflib.get_close_matches(attribute, dir(found), n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise RecipeError(f"{where}: {module_name} has no '{attribute}'{hint}")
        found = getattr(found, attribute)
    if not isinstance(found, wanted):
        raise RecipeError(f"{where}: it is {type(found).__name__}, {wanted.__name__} is wanted")
    return found


def _forget_namesakes(package: str, folder: Path) -> None:
    """Forget an imported module of this name if the folder has its own: two apps may call their packages alike."""
    loaded = sys.modules.get(package)
    if loaded is None or not ((folder / package).is_dir() or (folder / f"{package}.py").is_file()):
        return
    if not any(path.is_relative_to(folder) for path in _paths(loaded)):
        for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
            del sys.modules[name]


def _paths(module: ModuleType) -> list[Path]:
    paths = list(getattr(module, "__path__", [])) or [getattr(module, "__file__", None) or ""]
    return [Path(path).resolve() for path in paths]
