"""The global adapter of a federation in PEFT's format, round by round."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from fl_merge.adapters.config import PREFIX, AdapterConfig
from fl_merge.adapters.experts import EXPERT
from fl_merge.adapters.merging import plain_adapter
from fl_merge.errors import RecipeError
from fl_merge.pairs import RESIDUAL, pairs_of
from fl_merge.types import TensorSpec


def described(about: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of the adapters of a run beside their factors, checked.

    Args:
        about: keys of adapter_config.json such as `base_model_name_or_path` and `task_type`; all may be left out.

    Raises:
        RecipeError: for what is no LoRA, or a variant of it that cannot be merged as a product.
    """
    whole = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, **about}
    AdapterConfig.read(whole, "adapter_config")
    return whole


def require_parameters(names: Iterable[str], about: Mapping[str, Any]) -> None:
    """Refuse fused experts without the names of the parameters that they are: PEFT could not load what comes of them.

    Args:
        names: of the tensors of the adapter that a run starts from.
        about: as for `described`.

    Raises:
        RecipeError: naming a tensor.
    """
    for name in names:
        if EXPERT.fullmatch(name.partition(".lora_")[0]) and not about.get("target_parameters"):
            raise RecipeError(
                f"tensor '{name}' is of a fused expert, and adapter_config has no target_parameters; wanted what "
                "clients have, such as ['experts.gate_up_proj', 'experts.down_proj']"
            )


def write_global(
    folder: str | Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], manifest: Mapping[str, Any]
) -> None:
    """Write a global adapter so that `PeftModel.from_pretrained` loads it; a residual goes to a folder in it.

    Args:
        folder: made if it is not there; files in it are replaced.
        tensors: plain factors (scaling 1) in the dtype in which they are written; those of a residual have `residual.`
            before their names.
        config: see `described`; without `target_modules`, the modules are written down by their full names.
        manifest: what is to be said beside it.

    Raises:
        MergeError: if it cannot be written.
    """
    main = {name: TensorSpec.of(tensor) for name, tensor in tensors.items() if not name.startswith(RESIDUAL)}
    modules = sorted(module.removeprefix(PREFIX) for module in pairs_of(main)[0] if not EXPERT.fullmatch(module))
    found = plain_adapter(tensors, {**config, "target_modules": config.get("target_modules") or modules})
    replace(found, manifest={**found.manifest, **manifest}).save(folder)
