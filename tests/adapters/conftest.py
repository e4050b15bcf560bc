import sys
import warnings
from pathlib import Path

import pytest

from fl_merge import cli

sys.path.insert(0, str(Path(__file__).parents[1] / "methods"))  # the battery knows the settings of every method


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """`fl-merge ...` in the test's folder; gives the exit code and what it has printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments):
        monkeypatch.setattr("sys.argv", ["fl-merge", *arguments])
        capsys.readouterr()  # what making the models has printed
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return call
