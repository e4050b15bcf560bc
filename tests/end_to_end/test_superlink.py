"""On a real SuperLink with two SuperNodes: clients that speak bfloat16, and clients that all fail."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from apps import FEDMERGE, quickstart
from torch import Tensor

from fl_merge.flower.apps import load_app, run_app
from fl_merge.flower.inprocess import Replied, Sent
from flower_processes import SuperLink

pytestmark = pytest.mark.end_to_end

BF16_SERVER = {
    "from quickstart.task": "from fl_merge.flower import to_record, to_tensors\nfrom quickstart.task",
    "ArrayRecord(Net().state_dict())": 'to_record(Net().state_dict(), dtype="bfloat16")',
    "result.arrays.to_torch_state_dict()": "to_tensors(result.arrays)",
}
BF16_CLIENT = {
    "from quickstart.task import Net": "from fl_merge.flower import receive, reply\nfrom quickstart.task import Net",
    'msg.content["arrays"].to_torch_state_dict()': "receive(msg)",
    """    model_record = ArrayRecord(model.state_dict())
    metrics = {"train_loss": train_loss, "num-examples": len(trainloader.dataset)}
    content = RecordDict({"arrays": model_record, "metrics": MetricRecord(metrics)})
    return Message(content=content, reply_to=msg)
""": """    metrics = {"train_loss": train_loss}
    return reply(msg, model.state_dict(), len(trainloader.dataset), metrics, dtype="bfloat16")
""",
}

FAILING_CLIENT = {
    '    """Train the model on local data."""\n': """
    if context.node_config["partition-id"] == 0:
        raise RuntimeError("no data today")
"""
}


def test_bfloat16_travels_both_ways(superlink: SuperLink, tmp_path: Path) -> None:
    app = quickstart(tmp_path / "app", server={**FEDMERGE, **BF16_SERVER}, client=BF16_CLIENT)
    config = {"fraction-evaluate": 0.0, "final-model": str(tmp_path / "deployment.pt")}
    run = superlink.home.flwr_run(app, superlink.connection, run_config=config)
    assert run.status == "finished:completed", run.log

    events: list[Sent | Replied] = []
    config["final-model"] = str(tmp_path / "in_process.pt")
    run_app(load_app(app), nodes=2, workers=0, run_config=config, on_message=events.append)

    model: dict[str, Tensor] = torch.load(tmp_path / "deployment.pt")
    torch.testing.assert_close(model, torch.load(tmp_path / "in_process.pt"), rtol=1e-5, atol=1e-5)
    counters = {"norm.num_batches_tracked"}
    assert {name for name, tensor in model.items() if tensor.dtype != torch.bfloat16} == counters
    # Both ways: two bytes a number, and the counter, which numpy has and so comes as a .npy file.
    floats = sum(tensor.numel() for name, tensor in model.items() if name not in counters)
    assert {event.num_bytes for event in events} == {2 * floats + 128 + 8}


def test_a_run_whose_clients_all_fail_ends_as_failed(superlink: SuperLink, tmp_path: Path) -> None:
    final = tmp_path / "final.pt"
    app = quickstart(tmp_path / "app", server=FEDMERGE, client=FAILING_CLIENT)
    # One client raises; the other diverges at this learning rate and sends NaN.
    config = {"num-server-rounds": 1, "learning-rate": 1e30, "fraction-evaluate": 0.0, "final-model": str(final)}
    run = superlink.home.flwr_run(app, superlink.connection, run_config=config)
    assert run.status == "finished:failed", run.log
    assert run.exit_code == 0  # Flower's own answer, which is why the status is asked for
    assert "no data today" in run.log
    assert "0 usable replies of 2 clients" in run.log
    assert run.log.count("made no model, the old one stands") == 1
    assert not final.exists()
