"""The README's table of methods is the registry's, and its commands on files run as they are written."""

from __future__ import annotations

import re
import shlex
import sys
import textwrap
from pathlib import Path

import pytest

from fl_merge.cli import main, methods_table

README = Path(__file__).resolve().parents[1] / "README.md"


def test_the_table_of_methods_is_what_the_command_prints() -> None:
    found = re.search(
        r"<!-- methods: made by `fl-merge methods --markdown` -->\n(.*?)<!-- end of methods -->",
        README.read_text(encoding="utf-8"),
        re.DOTALL,
    )
    assert found is not None
    assert found[1] == methods_table()


def test_files_are_merged_as_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The section's blocks in order: a Python script, recipes with their names in a comment, commands."""
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    section = README.read_text(encoding="utf-8").split("\n## Merge files\n")[1].split("\n## ")[0]
    blocks = [textwrap.dedent(block) for block in re.findall(r"(?:^(?:    .*)?\n)+", section, re.MULTILINE)]
    commands = 0
    for block in filter(str.strip, blocks):
        for part in re.split(r"\n\n(?=\.venv)", block.strip()):
            if "<<'EOF'" in part:
                exec(part.split("<<'EOF'\n")[1].removesuffix("EOF"), {})
            elif part.startswith("# "):
                Path(part.split()[1]).write_text(part + "\n", encoding="utf-8")
            else:
                for line in part.splitlines():
                    arguments = shlex.split(line, comments=True)
                    assert arguments[0] == ".venv/bin/fl-merge"
                    monkeypatch.setattr(sys, "argv", arguments)
                    with pytest.raises(SystemExit) as ended:
                        main()
                    assert not ended.value.code, line
                    commands += 1
    assert commands == 4
    assert (tmp_path / "models" / "merged" / "README.md").exists()
    assert (tmp_path / "layers.png").exists()
