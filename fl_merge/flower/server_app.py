"""A ServerApp that is driven by the run config: no code needed for a server that merges.

    [tool.flwr.app.components]
    serverapp = "fl_merge.flower.server_app:app"

    [tool.flwr.app.config]
    initial-model = "model.safetensors"       # or an adapter's folder, or "my_app.task:initial_model", a function
    merge-method = "ties"
    parameters.density = 0.2

Where the initial model or an evaluation needs the app's code, `make_server_app(initial=..., evaluate=...)` makes one.
"""

from __future__ import annotations

import difflib
import importlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from torch import Tensor

from fl_merge.adapters import BaseModel, is_adapter, load_adapter
from fl_merge.errors import RecipeError
from fl_merge.exchange import PLAIN
from fl_merge.flower.journal import Journal
from fl_merge.flower.records import ARCHITECTURE_KEY, to_record, to_tensors
from fl_merge.flower.resume import Resumption, goes_on_in, resuming, resumption_here
from fl_merge.flower.strategy import FedMerge
from fl_merge.flower.watch import Watcher
from fl_merge.phases import as_schedule
from fl_merge.recipe import Recipe
from fl_merge.store import load, tied_names
from fl_merge.tuning import Tuner

Config = Mapping[str, bool | int | float | str]

SETTINGS: dict[str, bool | int | float | str] = {
    "recipe": "",
    "merge-method": "weighted_average",
    "parameters": "",
    "rules": "",
    "clip-norm": "",
    "server-optimizer": "",
    "initial-model": "",
    "base-model": "",
    "num-server-rounds": 3,
    "fraction-train": 1.0,
    "fraction-evaluate": 1.0,
    "min-train-nodes": 2,
    "min-evaluate-nodes": 2,
    "min-available-nodes": 2,
    "min-replies": 0,
    "max-failures": 0.5,
    "round-timeout": 3600.0,
    "node-timeout": 3600.0,
    "wire-dtype": "",
    "seed": 0,
    "run-folder": "",
    "resume": "",
    "resume-force": False,
    "spill-folder": "",
    "max-spill-bytes": 0,
    "running-sum": False,
}
"""The keys of the run config that the server reads, with their defaults. 0 or "" means: not set."""


def make_server_app(
    initial: Callable[[Config], Mapping[str, Tensor]] | None = None,
    evaluate: Callable[[Config, int, dict[str, Tensor]], Mapping[str, float | list[float]]] | None = None,
    tune: Callable[[Config], Tuner | None] | None = None,
    architecture: Callable[[Config], Mapping[str, Any]] | None = None,
    adapter_config: Callable[[Config], Mapping[str, Any]] | None = None,
    base: Callable[[Config], BaseModel] | None = None,
) -> ServerApp:
    """A ServerApp that runs `FedMerge` as the run config says; the keys are those of `SETTINGS`.

    Args:
        initial: from the run config to the initial state dict; by default `initial-model` names it.
        evaluate: from the run config, the round (0 before the first) and the global model to metrics, numbers or
            lists of numbers; `name/part` is the metric of a part of the data. Its config has
            one key more, `lora-plain`: whether the model is an adapter in plain factors (alpha = rank).
        architecture: from the run config to the config of the initial model, for clients that build the model from it.
            `evaluate` is then given that of the model at hand in its own config, `fl-merge.architecture`, as JSON.
        tune: from the run config to what chooses each round's scale on validation data, or None.
        adapter_config: from the run config to what `FedMerge` takes under that name; by default that of the adapter
            whose folder is the `initial-model`.
        base: from the run config to the model that adapters are folded into, for phases that begin with adapters; by
            default `base-model` names its file or folder.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        run(grid, context.run_config, initial, evaluate, tune, architecture, adapter_config, base)

    return app


def run(
    grid: Grid,
    config: Config,
    initial: Callable[[Config], Mapping[str, Tensor]] | None = None,
    evaluate: Callable[[Config, int, dict[str, Tensor]], Mapping[str, float | list[float]]] | None = None,
    tune: Callable[[Config], Tuner | None] | None = None,
    architecture: Callable[[Config], Mapping[str, Any]] | None = None,
    adapter_config: Callable[[Config], Mapping[str, Any]] | None = None,
    base: Callable[[Config], BaseModel] | None = None,
) -> None:
    """One federation, from the run config to the run's folder.

    Raises:
        RecipeError: if the config does not make sense, before any client is asked.
        RunFailedError: if no round made a model.
    """
    _refuse_misspelt(config)
    settings = {key: _setting(key, config.get(key, default), default) for key, default in SETTINGS.items()}
    method = Recipe.from_config(config).build()
    found: BaseModel | str | None = str(settings["base-model"]) or None
    if base is not None and as_schedule(method).folds:
        found = base(config)
    adapters: Mapping[str, Any] = {}
    if initial is not None:
        state = dict(initial(config))
    else:
        state, adapters = _initial_model(str(settings["initial-model"]))
    if adapter_config is not None:
        adapters = adapter_config(config)
    tied = tied_names(state)
    handed = [to_record(state)]  # taken out where it is used: nothing here keeps the initial model for the whole run
    del state
    resumption = resumption_here()
    if settings["resume"]:
        resumption = Resumption(Path(str(settings["resume"])), bool(settings["resume-force"]))
    watchers: list[Watcher] = []
    folder = str(settings["run-folder"]) or str(settings["resume"])
    if folder:
        watchers.append(Journal(folder, config, resumed=goes_on_in(folder, resumption)))
    strategy = FedMerge(
        method,
        fraction_train=float(settings["fraction-train"]),
        fraction_evaluate=float(settings["fraction-evaluate"]),
        min_train_nodes=int(settings["min-train-nodes"]),
        min_evaluate_nodes=int(settings["min-evaluate-nodes"]),
        min_available_nodes=int(settings["min-available-nodes"]),
        min_replies=int(settings["min-replies"]) or None,
        max_failures=float(settings["max-failures"]),
        node_timeout=float(settings["node-timeout"]),
        seed=int(settings["seed"]),
        wire_dtype=str(settings["wire-dtype"]) or None,
        spill_folder=str(settings["spill-folder"]) or None,
        max_spill_bytes=int(settings["max-spill-bytes"]) or None,
        running_sum=bool(settings["running-sum"]),
        tune=tune(config) if tune is not None else None,
        architecture=architecture(config) if architecture is not None else None,
        base=found,
        tied=tied,
        adapter_config=adapters,
        watchers=watchers,
    )

    def evaluated(server_round: int, model: ArrayRecord) -> MetricRecord:
        assert evaluate is not None
        known = strategy.model.architecture
        about = {**config, PLAIN: strategy.schedule.at(server_round).merges_adapters}
        about |= {ARCHITECTURE_KEY: json.dumps(known)} if known else {}
        found = evaluate(about, server_round, to_tensors(model))
        return MetricRecord(
            {
                key: [float(v) for v in value] if isinstance(value, list) else float(value)
                for key, value in found.items()
            }
        )

    with resuming(resumption):
        strategy.start(
            grid,
            handed.pop(),
            num_rounds=int(settings["num-server-rounds"]) or strategy.schedule.total or 0,
            timeout=float(settings["round-timeout"]),
            evaluate_fn=evaluated if evaluate is not None else None,
        )


def _setting(key: str, value: object, default: bool | int | float | str) -> bool | int | float | str:
    kind = (int, float) if isinstance(default, float) else type(default)
    if not isinstance(value, kind) or (isinstance(value, bool) and not isinstance(default, bool)):
        raise RecipeError(
            f"run config, '{key}': found {value!r}, wanted {type(default).__name__} (default {default!r})"
        )
    return value


def _refuse_misspelt(config: Config) -> None:
    """A key of the server's that is nearly right would be ignored, and the run not what was asked for."""
    for key in config:
        if key in SETTINGS or "." in key:
            continue
        close = difflib.get_close_matches(key.replace("_", "-"), SETTINGS, n=1, cutoff=0.87)
        if close and close[0] not in config:
            raise RecipeError(f"run config: unknown key '{key}'; did you mean '{close[0]}'?")


def _initial_model(where: str) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    """The tensors, and the configuration of an adapter, whose tensors are then its plain factors."""
    if not where:
        raise RecipeError("run config, 'initial-model': found nothing, wanted a safetensors file or 'module:function'")
    if is_adapter(where):
        adapter = load_adapter(where)
        plain = {name: adapter.plain.read(name) for name in adapter.plain.specs()}
        return {name: t.to(adapter.dtype) if ".lora_" in name else t for name, t in plain.items()}, adapter.config.raw
    module, colon, function = where.partition(":")
    if colon and not Path(where).exists():
        try:
            return dict(getattr(importlib.import_module(module), function)()), {}
        except (ImportError, AttributeError) as error:
            raise RecipeError(f"run config, 'initial-model': cannot load '{where}': {error}") from error
    return load(where), {}


app = make_server_app()
"""The app for `serverapp = "fl_merge.flower.server_app:app"`."""
