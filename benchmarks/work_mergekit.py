"""mergekit's two ways, in the interpreter of its own environment. For engine_worker.py."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.engine_worker import Job, Work
from benchmarks.work_merge import model_folders


def mergekit(job: Job, folder: Path, out: Path) -> Callable[[], Work]:
    """What `mergekit-yaml` does with its arguments, in this process, so that its imports are not counted.

    job: `method`, `density` (or None), `dtype` (of the result; it computes in float32).
    """
    from mergekit.scripts.run_yaml import main

    base, clients = model_folders(job, folder)
    method = job["method"]
    parameters: dict[str, Any] = {}
    if method == "slerp":
        parameters = {"t": 0.5}
        models: list[dict[str, Any]] = [{"model": str(path)} for path in clients]
    else:
        models = [{"model": str(path), "parameters": of_clients(job)} for path in clients]
    config = {"merge_method": method, "models": models, "parameters": parameters}
    config |= {"dtype": "float32", "out_dtype": job["dtype"]}
    if method != "linear":
        config["base_model"] = str(clients[0] if method == "slerp" else base)
    arguments = ["--quiet", "--no-copy-tokenizer", "--no-write-model-card"]
    if folder == Path(job["tiny"]):  # torch takes this once in a process, before it computes; it then holds
        arguments += ["--num-threads", str(os.cpu_count())]

    def fresh() -> Work:
        recipe = out.with_suffix(".yaml")
        recipe.write_text(json.dumps(config))  # which is YAML
        return lambda: main([str(recipe), str(out), *arguments], standalone_mode=False)

    return fresh


def mergekit_memory(job: Job, folder: Path, out: Path) -> Callable[[], Work]:
    """`mergekit.merge_methods.merge_state_dicts`, from tensors in memory to tensors in memory."""
    import torch
    from mergekit.merge_methods import merge_state_dicts
    from safetensors.torch import load_file

    base, clients = model_folders(job, folder)
    method = job["method"]

    def tensors(path: Path) -> dict[str, Any]:
        return {name: tensor.clone() for name, tensor in load_file(path / "model.safetensors").items()}

    models = {str(number): tensors(path) for number, path in enumerate(clients)}
    parameters: dict[str, Any]
    with_base = None
    if method == "slerp":
        parameters, with_base = {"t": 0.5}, "0"
    else:
        parameters = {key: dict.fromkeys(models, value) for key, value in of_clients(job).items()}
        if method != "linear":
            with_base = "base"
            models["base"] = tensors(base)
    dtype = getattr(torch, job["dtype"])

    def work() -> object:
        with torch.no_grad():
            return merge_state_dicts(
                models, method, parameters=parameters, base=with_base, dtype=torch.float32, out_dtype=dtype
            )

    return lambda: work


def of_clients(job: Job) -> dict[str, float]:
    """A client's settings, in mergekit's words."""
    return {"weight": 1.0 / job["models"]} | ({"density": job["density"]} if job["density"] is not None else {})
