"""Models in folders, and `fl-merge` run in a folder of its own."""

from __future__ import annotations

import sys

import pytest
import torch
from llamas import llama, save_tokenizer

from fl_merge.cli import main


@pytest.fixture(scope="session")
def zoo(tmp_path_factory):
    """The folders base, math, code, chat (finetuned from base), half (in bfloat16) and deep (6 layers)."""
    home = tmp_path_factory.mktemp("zoo")
    base = llama(0)
    made = {"base": base, "math": llama(1, start=base), "code": llama(2, start=base), "chat": llama(3, start=base)}
    made |= {"half": llama(4, start=base, dtype=torch.bfloat16), "deep": llama(5, layers=6)}
    for name, model in made.items():
        model.save_pretrained(home / name)
        save_tokenizer(home / name)
    return home


@pytest.fixture
def run(monkeypatch, capsys, tmp_path, zoo):
    """Run `fl-merge` in a folder in which the models lie: exit code, what it printed, what it complained of."""
    for folder in zoo.iterdir():
        (tmp_path / folder.name).symlink_to(folder)
    monkeypatch.chdir(tmp_path)

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["fl-merge", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    return command


@pytest.fixture
def merged(run, tmp_path):
    """Merge by a recipe's text, into the folder `out`: its tensors."""
    from fl_merge.store import load

    def merge(text, *options, out="out"):
        (tmp_path / "recipe.yaml").write_text(text)
        code, _, complaint = run("merge", "recipe.yaml", out, *options)
        assert code == 0, complaint
        return load(tmp_path / out)

    return merge
