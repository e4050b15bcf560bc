"""Language models with adapters of ranks 4, 8 and 16 that travel in bfloat16; the merged one writes text by PEFT."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import peft
import pytest
import torch
import transformers
from typer.testing import CliRunner

from fl_merge.cli import app as command
from fl_merge.flower.apps import load_app, run_app
from fl_merge.store import load
from flower_processes import FlowerHome
from language_clients import base, lora
from language_clients.settings import Settings

Config = dict[str, str | int | float]

APP = Path(__file__).resolve().parents[2] / "clients" / "language"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A tiny model, and text to match."""
    return {
        "layers": 2,
        "hidden": 32,
        "pretraining-steps": 3,
        "cache-folder": str(tmp_path_factory.mktemp("cache")),
        "num-server-rounds": 2,
        "local-steps": 3,
        "batch-size": 4,
        "sequence-length": 64,
        "learning-rate": 0.01,
        "train-bytes": 20_000,
        "evaluation-bytes": 1_000,
        "merge-method": "lora_svd",
        "wire-dtype": "bfloat16",
    }


@pytest.fixture
def threads() -> Iterator[None]:
    """What runs in this process may leave another number of threads behind."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def events(run: Path, kind: str) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == kind]


def check(run: Path, *, rank: int, clients: int) -> None:
    """Both rounds took every client in, and the adapter of the run's folder changes what its base writes."""
    for event in events(run, "round_ended"):
        report = event["report"]
        assert isinstance(report, dict)
        assert len(report["accepted"]) == clients, report
        assert not report["refused"]
    about = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert (about["r"], about["lora_alpha"], about["task_type"]) == (rank, rank, "CAUSAL_LM")
    manifest = json.loads((run / "adapter" / "fl_merge_manifest.json").read_text())
    assert manifest["round"] == 2
    assert len(manifest["clients"]) == clients

    where = about["base_model_name_or_path"]
    base = transformers.AutoModelForCausalLM.from_pretrained(where, dtype=torch.bfloat16).eval()
    tokens = transformers.AutoTokenizer.from_pretrained(where)("import ", return_tensors="pt").input_ids
    with torch.no_grad():
        before = base(tokens).logits.float()
        model = peft.PeftModel.from_pretrained(base, run / "adapter").eval()
        after = model(tokens).logits.float()
        written = model.generate(input_ids=tokens, max_new_tokens=8, do_sample=False)
    assert tokens.tolist() == [list(b"import ")]
    assert 0.01 < float((after - before).abs().max()) < 100
    assert written.shape[1] > tokens.shape[1]


def test_in_process_by_the_command(config: Config, tmp_path: Path, threads: None) -> None:
    """Three clients, of ranks 4, 8 and 16."""
    arguments = ["simulate", str(APP), "--nodes", "3", "--run-folder", str(tmp_path / "run"), "--workers", "0"]
    for key, value in {**config, "adapter-rank": "4,8,16", "adapter-alpha": "8,16,64"}.items():
        arguments += ["-c", f"{key}={json.dumps(value)}"]
    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == 0, result.output
    check(tmp_path / "run", rank=16, clients=3)


@pytest.mark.end_to_end
@pytest.mark.slow  # every message starts a process that loads transformers
def test_on_a_superlink_with_three_supernodes(
    flower: FlowerHome, config: Config, tmp_path: Path, threads: None
) -> None:
    """Clients of ranks 4, 8 and 16 round a global adapter of rank 8: one is sent less of it, and one is filled up.

    The adapter is the one that a run in this process gives, but for what other threads and another order of clients
    make of rounding, and nobody evaluating.
    """
    config = {**config, "adapter-rank": "4,8,16", "adapter-alpha": "8,16,64", "parameters": "{rank: 8}"}
    base.folder(Settings.read(config))  # once, before four processes want it
    there = {**config, "fraction-evaluate": 0.0, "run-folder": str(tmp_path / "run")}
    with flower.federation(nodes=3) as superlink:
        run = flower.flwr_run(APP, superlink.connection, run_config=there, timeout=500.0)
    assert run.status == "finished:completed", run.log
    check(tmp_path / "run", rank=8, clients=3)

    run_app(load_app(APP), nodes=3, workers=0, run_config={**config, "run-folder": str(tmp_path / "here")})
    adapter, here = load(tmp_path / "run"), load(tmp_path / "here")
    assert adapter.keys() == here.keys()
    for name in adapter:
        if name.endswith(lora.A):
            product = adapter[name.replace("lora_A", "lora_B")] @ adapter[name]
            wanted = here[name.replace("lora_A", "lora_B")] @ here[name]
            torch.testing.assert_close(product, wanted, rtol=0.02, atol=float(wanted.abs().max()) * 0.05)
