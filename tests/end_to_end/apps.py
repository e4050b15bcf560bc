"""The quickstart app, with lines of it replaced."""

from __future__ import annotations

import shutil
from pathlib import Path

QUICKSTART = Path(__file__).parent / "quickstart"

FEDMERGE = {
    "from flwr.serverapp.strategy import FedAvg": (
        "from fl_merge.flower import FedMerge\nfrom fl_merge.methods import ties"
    ),
    "strategy = FedAvg(": "strategy = FedMerge(ties(density=0.2), ",
}
"""What a user changes in server_app.py: the import and the strategy."""


def quickstart(folder: Path, server: dict[str, str] | None = None, client: dict[str, str] | None = None) -> Path:
    """A copy of the quickstart app in which these texts of its server_app.py and client_app.py are replaced."""
    shutil.copytree(QUICKSTART, folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file, replacements in (("server_app.py", server), ("client_app.py", client)):
        path = folder / "quickstart" / file
        text = path.read_text()
        for old, new in (replacements or {}).items():
            assert old in text, f"not in {file}: {old}"
            text = text.replace(old, new)
        path.write_text(text)
    return folder
