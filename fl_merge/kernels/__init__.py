"""Compiled passes over the inputs of a merge. The torch function is the definition; the pass equals it bit for bit.

Importing numba takes half a second, and compiling up to half a minute more, once a machine (the compiled code is
cached), so small merges never do it: the passes are loaded when there are some 130 million elements to go through, in
one merge or in many. Since both give the same bits, it does not matter when that is.
"""

from __future__ import annotations

import logging
import os
import threading
from types import ModuleType

logger = logging.getLogger("fl_merge")

LOAD_AFTER = 1 << 27
"""Elements that are gone through without the passes before they are loaded."""

NOTICE_AFTER = 2.0
"""Seconds of loading before a notice says what takes so long."""

_lock = threading.Lock()
_module: ModuleType | None = None
_tried = False
_elements = 0


def after(elements: int) -> ModuleType | None:
    """The compiled passes, if so many more elements are reason enough to load them.

    Returns:
        None where the torch definition is to be used.
    """
    global _elements
    if _tried:
        return _module
    with _lock:
        _elements += elements
        enough = _elements >= LOAD_AFTER
    return load() if enough else None


def _loaded() -> ModuleType:
    """The passes, with a notice if they are long in coming."""
    text = "loading the compiled passes; the first time on a machine they are compiled, which takes up to a minute"
    notice = threading.Timer(NOTICE_AFTER, logger.warning, (text,))
    notice.daemon = True
    notice.start()
    try:
        _require_half()
        from fl_merge.kernels import compiled, rows

        rows.warm_up(compiled)
        return compiled
    finally:
        notice.cancel()


def _require_half() -> None:
    """Refuse a processor that cannot convert float16 (virtual ones may not): LLVM would end the process over it."""
    from numba.core.registry import cpu_target

    triple, _, features = cpu_target.target_context.codegen().magic_tuple()
    machine = triple.partition("-")[0]
    if machine not in ("aarch64", "arm64") and not (machine == "x86_64" and "+f16c" in features):
        raise ImportError(f"this {machine} processor does not convert float16 (F16C)")


def load() -> ModuleType | None:
    """Import and compile the passes now (once a machine; later processes read what was compiled).

    Returns:
        None, with one notice, if that fails for whatever reason or FL_MERGE_NO_KERNELS is set.
    """
    global _module, _tried
    with _lock:
        if not _tried:
            try:
                if os.environ.get("FL_MERGE_NO_KERNELS"):
                    raise ImportError("FL_MERGE_NO_KERNELS is set")
                _module = _loaded()
            except Exception as error:  # no numba, or nowhere to keep what it compiles (a read-only machine)
                logger.warning("merging without compiled kernels, several times slower: %s", error)
            _tried = True
    return _module
