"""A model's weights under the names of its checkpoint, in and out.

transformers keeps some models in memory otherwise than on disk: since version 5 all experts of a mixture are one
tensor. What is sent, merged and written has the names of the checkpoint, which `fl_merge.structures` speaks too.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def tensors_of(model: Any) -> dict[str, Tensor]:
    """The model's weights as `save_pretrained` would write them, but for tied ones, which are there under each name."""
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    if not _differs_on_disk(model):
        return state
    from transformers.core_model_loading import revert_weight_conversion

    return {name: tensor.contiguous() for name, tensor in revert_weight_conversion(model, state).items()}


def model_of(config: Any, tensors: Mapping[str, Tensor]) -> Any:
    """A transformers model with this config and these weights, float32, in evaluation mode.

    Args:
        config: of transformers.
        tensors: under the names of the checkpoint or of the model in memory.

    Raises:
        ValueError: if the tensors are not those of such a model.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # a line for each model that each client loads in each round
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if model.state_dict().keys() == tensors.keys() or not _differs_on_disk(model):
        try:
            model.load_state_dict(dict(tensors))
        except RuntimeError as problem:
            raise ValueError(f"the model that was sent is not the one that the settings name: {problem}") from problem
        return model.eval()
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as folder:  # transformers renames what it reads from files
        config.save_pretrained(folder)
        written = {name: tensor.contiguous() for name, tensor in _each_once(tensors).items()}
        save_file(written, Path(folder) / "model.safetensors", {"format": "pt"})
        try:
            loaded, found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        except (RuntimeError, ValueError) as problem:
            raise ValueError(f"the model that was sent is not the one that the settings name: {problem}") from problem
    wrong = [*found["missing_keys"], *found["unexpected_keys"], *found["mismatched_keys"]]
    if wrong:
        raise ValueError(f"the model that was sent is not the one that the settings name: {wrong[0]} does not fit")
    return loaded.eval()


def config_of(architecture: Mapping[str, Any]) -> Any:
    """The config of transformers that a server's message holds as plain data.

    Raises:
        ValueError: if transformers has no such model.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.for_model(**architecture)
    except (TypeError, ValueError, KeyError) as problem:
        family = architecture.get("model_type")
        raise ValueError(f"a model of family '{family}', which transformers cannot build: {problem}") from problem


def plain(config: Any) -> dict[str, Any]:
    """A config of transformers as plain data, without where it was read from."""
    described = json.loads(config.to_json_string(use_diff=False))
    return {key: value for key, value in described.items() if not key.startswith("_")}


def train_only(model: Any, names: Collection[str]) -> None:
    """Train the parameters that are these tensors on disk, and no others.

    Raises:
        ValueError: if a parameter in memory is several tensors of which only some are named.
    """
    for parameter, weight in model.named_parameters():
        own = _on_disk(model, parameter, weight)
        asked = [name for name in own if name in names]
        if asked and len(asked) < len(own):
            raise ValueError(
                f"asked to train '{asked[0]}' without '{(own - set(asked)).pop()}': they are one tensor here"
            )
        weight.requires_grad_(bool(asked))


def _on_disk(model: Any, parameter: str, weight: Tensor) -> set[str]:
    """The names under which a parameter is written."""
    if not _differs_on_disk(model):
        return {parameter}
    from transformers.core_model_loading import revert_weight_conversion

    return set(revert_weight_conversion(model, {parameter: weight.detach()}))


def _differs_on_disk(model: Any) -> bool:
    """Whether the model has experts in one tensor."""
    return any(name.endswith(".experts.gate_up_proj") for name, _ in model.named_parameters())


def _each_once(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tied weights are written under their first name alone."""
    seen: set[int] = set()
    once = {}
    for name, tensor in tensors.items():
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            once[name] = tensor
    return once
