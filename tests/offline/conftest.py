"""Small Llama-shaped models in folders, as transformers writes them, and `fl-merge` run in a folder of its own."""

from __future__ import annotations

import sys

import pytest
import torch

from fl_merge.cli import main

LAYERS = 4


def llama(seed, *, layers=LAYERS, start=None, tied=False, dtype=torch.float32, **settings):
    """A model; finetuned from `start` where that is given: all weights are moved, in part alike for all seeds."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=settings.pop("vocab_size", 64),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        **settings,
    )
    model = LlamaForCausalLM(config)
    common = torch.Generator().manual_seed(99)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            moved, alike = torch.randn(tensor.shape), torch.randn(tensor.shape, generator=common)
            learned = 0.01 * moved + 0.006 * alike
            tensor.copy_(start.state_dict()[name] + learned if start is not None else 0.1 * moved)
    return model.to(dtype)


def save_tokenizer(folder, words=64):
    """A tokenizer of words w0 w1 ..., as its files."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0} | {f"w{number}": number for number in range(1, words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)


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
