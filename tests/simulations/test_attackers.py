"""What bad clients send, with numbers on paper; who is bad; the tables and files of the study."""

import pytest
import torch

import attackers
from digits_clients.data import seeded
from fl_merge import METHODS

SENT = {"w": torch.tensor([1.0, 1.0])}
LEARNED = [{"w": torch.tensor([2.0, 1.0])}, {"w": torch.tensor([1.0, 3.0])}, {"w": torch.tensor([3.0, 3.0])}]


def sends(attack, bad=(1,)):
    found = attackers.ATTACKS[attack](SENT, LEARNED, list(bad), seeded("test"))
    return [state["w"].tolist() for state in found]


def test_flipped_and_scaled_deltas_on_paper():
    assert sends("flip") == [[2.0, 1.0], [1.0, -1.0], [3.0, 3.0]]
    assert sends("scale") == [[2.0, 1.0], [1.0, 21.0], [3.0, 3.0]]


def test_noise_is_ten_times_as_long_as_what_was_learned():
    noisy = torch.tensor(sends("noise")[1]) - SENT["w"]
    assert float(noisy.norm()) == pytest.approx(20.0)
    assert sends("noise")[0] == [2.0, 1.0]


def test_colluders_send_the_same_against_the_mean_of_the_good():
    # The good client's delta is (2, 2): half of it, turned round, from (1, 1) is (0, 0).
    assert sends("collude", bad=(0, 1)) == [[0.0, 0.0], [0.0, 0.0], [3.0, 3.0]]


def test_nobody_bad_changes_nothing():
    for attack in ("flip", "scale", "noise", "collude"):
        assert sends(attack, bad=()) == [state["w"].tolist() for state in LEARNED]


def test_a_fifth_of_the_clients_is_bad_and_seeds_differ():
    found = [attackers.bad_clients(seed) for seed in range(6)]
    assert all(len(set(bad)) == 3 and set(bad) <= set(range(15)) for bad in found)
    assert len(set(map(tuple, found))) > 1


def test_every_registered_aggregator_can_be_built():
    for settings in attackers.AGGREGATORS.values():
        for setting in settings:
            if setting.method in METHODS:
                setting.build()


def test_the_command_writes_its_files(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["attackers.py", "--quick", "--workers", "0", "--out", str(tmp_path)])
    attackers.main()
    text = (tmp_path / "table.md").read_text()
    assert text in capsys.readouterr().out
    assert "| aggregator | none | scale |" in text
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert (
        (tmp_path / "raw.csv").read_text().startswith("seed,attack,aggregator,setting,chosen,validation,test,round 1")
    )
