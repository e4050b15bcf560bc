"""The README's table of methods is the registry's."""

from __future__ import annotations

import re
from pathlib import Path

from fl_merge.cli import methods_table

README = Path(__file__).resolve().parents[1] / "README.md"


def test_the_table_of_methods_is_what_the_command_prints() -> None:
    found = re.search(
        r"<!-- methods: made by `fl-merge methods --markdown` -->\n(.*?)<!-- end of methods -->",
        README.read_text(encoding="utf-8"),
        re.DOTALL,
    )
    assert found is not None
    assert found[1] == methods_table()
