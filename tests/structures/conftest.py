"""A maker of small models."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file
from small_models import SIZES, Model


@pytest.fixture
def make(tmp_path):
    """A randomly initialised model of a family; weights large enough to tell layers apart."""
    count = iter(range(100))

    def made(family="llama", seed=0, **changes):
        config = transformers.AutoConfig.for_model(family, **{**SIZES, **changes})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = transformers.AutoModelForCausalLM.from_config(config)
            for name, weight in model.named_parameters():
                weight.data = torch.randn_like(weight) * 0.2 + ("norm" in name)
        folder = tmp_path / f"made-{next(count)}"
        model.save_pretrained(folder)
        return Model(json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors"))

    return made
