"""mergekit in an environment of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

MERGEKIT = "mergekit==0.1.5"
MERGEKIT_TORCH = "torch==2.13.0"


def mergekit_python(tell: Callable[[str], None]) -> str | None:
    """The interpreter of mergekit's environment, made on first use; None, and a notice, if it cannot be made."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fl_merge-bench"
    home = cache / MERGEKIT.replace("==", "-")
    python = home / "bin" / "python"
    works = [str(python), "-c", "import mergekit"]
    if python.exists() and subprocess.run(works, capture_output=True).returncode == 0:
        return str(python)
    tell(f"installing {MERGEKIT} into {home}: a few minutes, once")
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet", MERGEKIT, MERGEKIT_TORCH]
    for command in ([sys.executable, "-m", "venv", "--clear", str(home)], pip):
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode != 0:
            last = (done.stdout.strip().splitlines() or ["no reason given"])[-1]
            tell(f"mergekit is left out: it cannot be installed ({last})")
            shutil.rmtree(home, ignore_errors=True)
            return None
    return str(python)
