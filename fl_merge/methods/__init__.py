"""The merge methods, one file each. A new file in this folder is a new method: nothing else is edited.

The files are named _ties.py and so on, so that `fl_merge.methods.ties` is the method and not a module.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import TYPE_CHECKING

from fl_merge.method import METHODS, Method, partition

if TYPE_CHECKING:

    def __getattr__(name: str) -> Callable[..., Method]: ...


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["partition"]
for _name, _entry in METHODS.items():
    if _entry.factory.__module__.startswith(f"{__name__}."):
        globals()[_name] = _entry.factory
        __all__ += [_name]
