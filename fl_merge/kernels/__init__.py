"""Compiled versions of the hot functions in `fl_merge.ops`. The torch function is the definition; the kernel equals it.

A kernel is used for float32 and float64 on the CPU. Importing numba and compiling takes seconds, once a machine (the
compiled code is cached), so small merges never do it: kernels are loaded when some 100 million elements have gone
through the definitions. Since both give the same bits, it does not matter when that is.
"""

from __future__ import annotations

import logging
import os
import threading
from types import ModuleType

import torch
from torch import Tensor

logger = logging.getLogger("fl_merge")

LOAD_AFTER = 1 << 27
"""Elements that go through the definitions before the kernels are loaded."""

_lock = threading.Lock()
_module: ModuleType | None = None
_tried = False
_elements = 0


def kernels_for(*tensors: Tensor) -> ModuleType | None:
    """The compiled functions, if they serve these tensors: contiguous, on the CPU, all float32 or all float64.

    Returns:
        None where the torch definition is to be used.
    """
    first = tensors[0]
    if first.dtype not in (torch.float32, torch.float64) or any(
        tensor.device.type != "cpu" or tensor.dtype != first.dtype or not tensor.is_contiguous() for tensor in tensors
    ):
        return None
    return after(first.numel())


def after(elements: int) -> ModuleType | None:
    """The compiled functions, if this many more elements are reason enough to load them."""
    global _elements
    if _tried:
        return _module
    with _lock:
        _elements += elements
        enough = _elements >= LOAD_AFTER
    return load() if enough else None


def load() -> ModuleType | None:
    """Import and compile the kernels now; None, with one notice, if numba fails or FL_MERGE_NO_KERNELS is set."""
    global _module, _tried
    with _lock:
        if not _tried:
            try:
                if os.environ.get("FL_MERGE_NO_KERNELS"):
                    raise ImportError("FL_MERGE_NO_KERNELS is set")
                from fl_merge.kernels import compiled

                _module = compiled
            except Exception as error:  # no numba, or nowhere to keep what it compiles (a read-only machine)
                logger.warning("merging without compiled kernels, several times slower: %s", error)
            _tried = True
    return _module
