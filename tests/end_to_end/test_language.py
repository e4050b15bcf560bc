"""Language clients with adapters of ranks 4 and 8 on a real SuperLink with two SuperNodes, in bfloat16."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch

from fl_merge.flower.apps import load_app, run_app
from fl_merge.store import load
from flower_processes import SuperLink
from language_clients import base, lora
from language_clients.settings import Settings

pytestmark = [pytest.mark.end_to_end, pytest.mark.slow]  # every message starts a process that loads transformers

APP = Path(__file__).resolve().parents[2] / "clients" / "language"


def test_adapters_of_two_ranks_are_merged_and_the_result_generates(superlink: SuperLink, tmp_path: Path) -> None:
    config = {
        "num-server-rounds": 2,
        "fraction-evaluate": 0.0,
        "merge-method": "lora_svd",
        "adapter-rank": "4,8",
        "adapter-alpha": "8,16",
        "wire-dtype": "bfloat16",
        "layers": 2,
        "hidden": 32,
        "pretraining-steps": 3,
        "local-steps": 3,
        "batch-size": 4,
        "sequence-length": 64,
        "train-bytes": 20_000,
        "evaluation-bytes": 1_000,
        "cache-folder": str(tmp_path / "cache"),
    }
    folder = base.folder(Settings.read(config))  # once, before three processes want it
    there = {**config, "run-folder": str(tmp_path / "run")}
    run = superlink.home.flwr_run(APP, superlink.connection, run_config=there, timeout=500.0)
    assert run.status == "finished:completed", run.log
    run_app(load_app(APP), nodes=2, workers=0, run_config={**config, "run-folder": str(tmp_path / "here")})

    adapter, here = load(tmp_path / "run"), load(tmp_path / "here")
    assert lora.rank_of(adapter) == 8
    for name, tensor in adapter.items():
        assert tensor.shape == here[name].shape, name
    for name in adapter:
        if name.endswith(lora.A):
            product = adapter[name.replace("lora_A", "lora_B")] @ adapter[name]
            wanted = here[name.replace("lora_A", "lora_B")] @ here[name]
            assert product.abs().max() > 0
            torch.testing.assert_close(product, wanted, rtol=0.02, atol=float(wanted.abs().max()) * 0.02)
    lora.save(adapter, tmp_path / "adapter", base_model=folder)
    model = peft.PeftModel.from_pretrained(base.load(Settings.read(config)), tmp_path / "adapter")
    asked = torch.tensor([list(b"import ")])
    assert model.generate(input_ids=asked, max_new_tokens=5, do_sample=False).shape[1] > 7
