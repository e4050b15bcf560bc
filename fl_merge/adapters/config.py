"""What an adapter_config.json says, by PEFT's own rules, and what it says that cannot be merged."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fl_merge.errors import RecipeError

PREFIX = "base_model.model."
"""Before the name of each module in an adapter's file."""

NUMBERED = re.compile(r"\.experts\.\d+\.")
"""In the names of experts that are modules of their own, as before transformers 5: they are fused when such an adapter
is loaded, for which PEFT wants one rank of all of them."""

_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that change the base model's weights: the product is then no delta to the model that others have."""

_VARIANTS = {
    "use_dora": "DoRA, whose magnitudes are no part of a product",
    "use_qalora": "QALoRA, whose A sees pooled inputs",
    "use_bdlora": "BD-LoRA, whose factors are blocks of a diagonal",
    "lora_bias": "a bias beside B",
    "kasa_config": "KaSA, which truncates the base model",
    "arrow_config": "Arrow, which routes between adapters",
    "alora_invocation_tokens": "aLoRA, which is active from some token on",
    "monteclora_config": "MonteCLoRA, whose factors are drawn",
    "trainable_token_indices": "trained tokens beside the factors",
}
"""Settings under which the adapter is not what its factors' product says."""


@dataclass(frozen=True)
class AdapterConfig:
    """The parts of an adapter's configuration from which its scalings come, and all of it.

    Args:
        raw: adapter_config.json.
        rank, alpha: of modules that no pattern names.
        rslora: whether the scaling is alpha / sqrt(rank).
        rank_pattern, alpha_pattern: those of others, by PEFT's patterns.
    """

    raw: Mapping[str, Any]
    rank: int
    alpha: float
    rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]

    @classmethod
    def read(cls, raw: Mapping[str, Any], where: str) -> AdapterConfig:
        """The configuration, if an adapter of it can be merged.

        Args:
            raw: adapter_config.json.
            where: for messages.

        Raises:
            RecipeError: for another kind of adapter than LoRA, a variant or an initialisation that cannot be merged
                (DoRA, PiSSA, ...), or settings that are no numbers.
        """
        kind = raw.get("peft_type")
        if kind != "LORA":
            raise RecipeError(f"{where}: an adapter of type {kind!r}, wanted LORA")
        for key, what in _VARIANTS.items():
            if raw.get(key):
                raise RecipeError(f"{where}: {key} ({what}) cannot be merged as a product")
        init = raw.get("init_lora_weights")
        if isinstance(init, str) and init.lower().startswith(_CHANGED_BASE):
            raise RecipeError(
                f"{where}: init_lora_weights is {init!r}, which changes the base model's weights, so that the product "
                "is no change to the model that others have; convert it first (save_pretrained with "
                "path_initial_model_for_weight_conversion)"
            )
        rank, alpha = raw.get("r"), raw.get("lora_alpha")
        ranks, alphas = raw.get("rank_pattern") or {}, raw.get("alpha_pattern") or {}
        for key, value in {"r": rank, **ranks}.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise RecipeError(f"{where}: rank of {key!r} is {value!r}, wanted a whole number >= 1")
        for key, value in {"lora_alpha": alpha, **alphas}.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise RecipeError(f"{where}: alpha of {key!r} is {value!r}, wanted a number")
        assert isinstance(rank, int)
        assert isinstance(alpha, int | float)
        return cls(dict(raw), rank, float(alpha), bool(raw.get("use_rslora")), dict(ranks), dict(alphas))

    def rank_of(self, module: str) -> int:
        """The rank of a module, named as in the adapter's file."""
        return self.rank_pattern.get(_key(self.rank_pattern, module), self.rank)

    def scaling_of(self, module: str) -> float:
        """What the module's product is multiplied by."""
        rank = self.rank_of(module)
        alpha = float(self.alpha_pattern.get(_key(self.alpha_pattern, module), self.alpha))
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank

    @property
    def has_parameters(self) -> bool:
        """Whether parameters (the fused experts of a mixture) are adapted beside modules."""
        return bool(self.raw.get("target_parameters"))

    def parameter_patterns(self) -> list[str]:
        """The patterns that are for adapted parameters."""
        parts = {str(name).rpartition(".")[2] for name in self.raw.get("target_parameters") or ()}
        patterns = {**self.rank_pattern, **self.alpha_pattern}
        return sorted(pattern for pattern in patterns if any(part in pattern for part in parts))


def _key(patterns: Mapping[str, Any], module: str) -> str:
    """The first pattern that a module's name matches: all of it, or its end after a dot; else the name itself."""
    name = module.removeprefix(PREFIX)
    for pattern in patterns:
        if re.match(rf"(.*\.)?({pattern})$", name):
            return pattern
    return name


_KEPT = (
    "peft_type",
    "task_type",
    "base_model_name_or_path",
    "revision",
    "auto_mapping",
    "bias",
    "fan_in_fan_out",
    "modules_to_save",
    "exclude_modules",
    "layer_replication",
    "target_parameters",
    "megatron_config",
    "megatron_core",
)
"""What the configuration of a merged adapter takes from those of the clients; everything else starts anew."""

MUST_AGREE = ("bias", "fan_in_fan_out", "layer_replication")


def merged_config(
    configs: Mapping[str, AdapterConfig], ranks: Mapping[str, int], parameters: set[str], alike: bool
) -> dict[str, Any]:
    """An adapter_config.json with which factors load as they are: alpha = rank everywhere, and no rsLoRA.

    Args:
        configs: of the clients, by name; the first is the donor.
        ranks: of the merged modules, named as in the file. `parameters` of them all have one rank.
        parameters: modules that stand for adapted parameters.
        alike: whether all clients and the merged adapter have the same modules, so that their targets stay.

    Raises:
        RecipeError: if the clients disagree in what the factors mean.
    """
    first_name, first = next(iter(configs.items()))
    for name, config in configs.items():
        for key in MUST_AGREE:
            if config.raw.get(key) != first.raw.get(key):
                raise RecipeError(
                    f"'{name}': {key} is {config.raw.get(key)!r}, '{first_name}' has {first.raw.get(key)!r}"
                )
    raw = {key: first.raw[key] for key in _KEPT if first.raw.get(key) is not None}
    for key in ("modules_to_save", "target_parameters"):
        union = sorted({item for config in configs.values() for item in config.raw.get(key) or ()})
        if union:
            raw[key] = union
    modules = [module for module in ranks if module not in parameters]
    keys = ("target_modules", "layers_to_transform", "layers_pattern", "exclude_modules")
    if alike and len({repr([_sorted(c.raw.get(key)) for key in keys]) for c in configs.values()}) == 1:
        raw |= {key: _sorted(first.raw[key]) for key in keys if first.raw.get(key) is not None}
        raw.setdefault("target_modules", [])
    else:
        raw.pop("exclude_modules", None)
        raw["target_modules"] = sorted(module.removeprefix(PREFIX) for module in modules)
    experts = parameters or {module for module in ranks if NUMBERED.search(module)}  # all of one rank
    rank = ranks[min(experts)] if experts else _commonest(list(ranks.values()))
    others = {module.removeprefix(PREFIX): ranks[module] for module in modules if ranks[module] != rank}
    # The longer first: a name that is the end of another's would match that too.
    pattern = {name: others[name] for name in sorted(others, key=lambda name: (-len(name), name))}
    for module in modules:
        name = module.removeprefix(PREFIX)
        if pattern.get(_key(pattern, name), rank) != ranks[module]:
            pattern = {name: ranks[module], **pattern}
    raw |= {
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": pattern,
        "alpha_pattern": dict(pattern),
        "use_rslora": False,
        "use_dora": False,
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    return raw


def _sorted(value: Any) -> Any:
    return sorted(value) if isinstance(value, list | set | tuple) and all(isinstance(v, str) for v in value) else value


def _commonest(ranks: list[int]) -> int:
    return max(sorted(set(ranks)), key=ranks.count)
