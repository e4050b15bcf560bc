"""The study of adapters: a round is what a server makes of it, refusals are shown, the command writes its files."""

import pytest
import torch

import lora as study_of_adapters
from fl_merge.errors import MergeError
from lora import FEDIT, FOLDED, PADDED, QUICK, SETTINGS, Clients, federate, methods, products, tables


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FL_MERGE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def clients():
    return Clients(0, QUICK)


def apart(found, wanted):
    assert found.keys() == wanted.keys()
    error = sum(float((found[module] - wanted[module]).square().sum()) for module in wanted)
    return (error / sum(float(wanted[module].square().sum()) for module in wanted)) ** 0.5


def outcomes(clients, setting, method, rounds, fold=False):
    return list(federate(clients, SETTINGS[setting], method, rounds, 2, fold=fold))


def test_products_are_sums_over_an_adapter_and_its_residual():
    a, b = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [4.0]])
    names = {"x.lora_A.weight": a, "x.lora_B.weight": b, "residual.x.lora_A.weight": a, "residual.x.lora_B.weight": b}
    assert torch.equal(products(names)["x"], torch.tensor([[6.0, 12.0], [8.0, 16.0]]))
    del names["residual.x.lora_A.weight"], names["residual.x.lora_B.weight"]
    assert torch.equal(products(names, 0.5)["x"], torch.tensor([[1.5, 3.0], [2.0, 4.0]]))


def test_once_the_stack_and_the_mean_with_its_residual_are_the_exact_sum(clients):
    own = methods(SETTINGS["equal ranks"])
    (stack,) = outcomes(clients, "equal ranks", own[FOLDED], 1, fold=True)
    (whole,) = outcomes(clients, "equal ranks", own["FedEx: mean and residual"], 1)
    (mean,) = outcomes(clients, "equal ranks", own[FEDIT], 1)
    assert apart(whole.added, stack.added) < 5e-3  # the stack is what was sent: bfloat16
    assert 0.01 < apart(mean.added, stack.added) < 0.1  # near, after two steps from one A


def test_bytes_are_counted_in_bfloat16_as_they_travel(clients):
    own = methods(SETTINGS["mixed ranks"])
    parameters = sum(t.numel() for t in clients.untrained(8, 16.0).values()) / 8  # for each rank
    (svd,) = outcomes(clients, "mixed ranks", own["svd, rank 16"], 1)
    (stack,) = outcomes(clients, "mixed ranks", own[FOLDED], 1, fold=True)
    assert (svd.up, svd.down) == (2 * parameters * 8, 2 * parameters * 8)  # 4, 8, 16 and 4 are 8 on average
    assert (stack.up, stack.down) == (2 * parameters * 8, 2 * parameters * 32)
    (ffa,) = outcomes(clients, "equal ranks", methods(SETTINGS["equal ranks"])["FFA: A frozen, mean of B"], 1)
    assert ffa.up < ffa.down == 2 * parameters * 8


def test_rounds_go_on_from_what_was_merged(clients):
    method = methods(SETTINGS["mixed alpha"])
    for name, fold in ((FOLDED, True), ("svd, rank 8", False)):
        first, second = outcomes(clients, "mixed alpha", method[name], 2, fold=fold)
        assert 0.2 < apart(first.added, second.added) < 0.9, name
    assert clients.judged(second.added)["tables"] < clients.judged(first.added)["tables"] < clients.judged({})["tables"]


@pytest.mark.parametrize(
    ("setting", "reason"),
    [("mixed ranks", "rank 4, wanted the rank of the global adapter, 16"), ("mixed alpha", "one alpha is wanted")],
)
def test_the_mean_of_factors_is_refused_where_it_is_not_defined(clients, setting, reason):
    with pytest.raises(MergeError, match=reason):
        outcomes(clients, setting, methods(SETTINGS[setting])[FEDIT], 1)


def test_tables_show_differences_within_seeds_and_what_was_refused():
    def rows(method, means, **more):
        domains = dict.fromkeys(study_of_adapters.corpus.DOMAINS, 2.0) | {"docs": 3.0}
        about = {"setting": "mixed ranks", "rounds": 10, "round": 10, "method": method}
        return [{"seed": s, **about, "mean": mean, **domains, "down": 2000.0, **more} for s, mean in enumerate(means)]

    refused = [
        {"seed": s, "setting": "mixed ranks", "rounds": 10, "round": 10, "method": FEDIT, "refused": "rank 4"}
        for s in range(3)
    ]
    text = tables([*refused, *rows(PADDED, [3.0, 3.5, 4.0]), *rows("svd, rank 16", [2.9, 3.4, 3.9])])
    assert "### 10 rounds, mixed ranks" in text
    assert "| to HetLoRA |" in text
    line = next(line for line in text.splitlines() if line.startswith("| svd, rank 16"))
    assert line.endswith("| -0.100 [-0.100, -0.100] | 2.000 | 2.000 | 2.000 | 2.000 | 3.000 | 2.0 |  |  |")
    assert f"| {FEDIT} | refused |" in text
    assert f"- {FEDIT}: rank 4" in text


def test_the_command_writes_its_files(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        study_of_adapters, "SETTINGS", {name: SETTINGS[name] for name in ("equal ranks", "mixed ranks")}
    )
    monkeypatch.setattr("sys.argv", ["lora.py", "--quick", "--workers", "0", "--out", str(tmp_path)])
    study_of_adapters.main()
    printed = capsys.readouterr().out
    assert (tmp_path / "table.md").read_text() in printed
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    header = (tmp_path / "raw.csv").read_text().splitlines()[0]
    assert header.startswith("seed,setting,rounds,method,round,mean,python,licences,tables,headers")
    assert "Refused:" in printed
