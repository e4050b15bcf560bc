"""Subtracting a task vector: where a coefficient of 0 leads, how domains are averaged, and the files of the study."""

import pytest
import torch

import negation
from digits_clients import data
from one_shot import federation_of


@pytest.fixture(scope="module")
def federation():
    return federation_of(0, 1)


def test_noise_is_as_long_as_the_change():
    change = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    noise = negation.noise_like(change, data.seeded("test"))
    assert float(noise.norm()) == pytest.approx(5.0)
    assert noise.shape == change.shape


def test_subtracting_nothing_leaves_the_joint_model_and_the_vector_alone_gives_the_finetuned_one(
    federation, monkeypatch
):
    monkeypatch.setattr(negation, "SUBTRACTED", (0.0, -1.0))
    rows = negation.from_joint(federation, 2)
    joint = negation.joint_of(federation)
    learned = negation.finetune(joint, federation.people.clients[2], seed=(0, "negation", 2), epochs=1)
    assert rows[0]["coefficient"] == 0
    assert [{k: r[k] for k in ("target", "others")} for r in rows[:2]] == [
        negation.judged(federation, state, 2) for state in (joint, learned)
    ]


def test_judged_keeps_the_forgotten_domain_apart(federation):
    found = negation.judged(federation, federation.people.base, 1)
    every = list(federation.people.judge(federation.people.base).values())
    assert found["target"] == every[1]
    assert found["others"] == pytest.approx((sum(every) - every[1]) / 7)


def test_domains_are_averaged_within_a_seed():
    rows = [{"seed": 0, "target": 0.2}, {"seed": 0, "target": 0.4}, {"seed": 1, "target": 1.0}]
    assert negation.per_seed(rows, "target") == pytest.approx({0: 30.0, 1: 100.0})


def test_the_command_writes_its_files(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["negation.py", "--quick", "--workers", "0", "--out", str(tmp_path)])
    negation.main()
    text = (tmp_path / "table.md").read_text()
    assert text in capsys.readouterr().out
    assert text.count("| coefficient | forgotten domain % |") == 3
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    header = "seed,start,forgotten,vector,coefficient,target,others,scale"
    assert (tmp_path / "raw.csv").read_text().startswith(header)
