"""LoRA adapters in and out, in PEFT's format, and their merge, without the model that they belong to."""

from fl_merge.adapters.base import BaseModel
from fl_merge.adapters.config import AdapterConfig
from fl_merge.adapters.folder import TENSORS as ADAPTER_FILE
from fl_merge.adapters.folder import Adapter, is_adapter, load_adapter, require_free
from fl_merge.adapters.folding import FoldedSource, fold
from fl_merge.adapters.merging import MergedAdapter, merge_adapters, plain_adapter
from fl_merge.adapters.source import experts_apart, experts_together

__all__ = [
    "ADAPTER_FILE",
    "Adapter",
    "AdapterConfig",
    "BaseModel",
    "FoldedSource",
    "MergedAdapter",
    "experts_apart",
    "experts_together",
    "fold",
    "is_adapter",
    "load_adapter",
    "merge_adapters",
    "plain_adapter",
    "require_free",
]
