"""What the table of methods calls additive is had from sums over the clients alone."""

import pytest
import torch

from fl_merge import METHODS, merge
from fl_merge.methods import breadcrumbs_ties, centered_clipping, dare_ties, fedgma, model_stock, multislerp, ties

BASE = {"w": torch.randn(60, 40, generator=torch.Generator().manual_seed(0))}
CLIENTS = {
    str(seed): {"w": BASE["w"] + torch.randn(60, 40, generator=torch.Generator().manual_seed(seed)) * 0.1}
    for seed in range(1, 6)
}
SHARES = {"1": 0.1, "2": 0.3, "3": 0.2, "4": 0.15, "5": 0.25}


def sent_by(client_id, method):
    """What a client sends after its pass over its own delta: its part by sign, and its share by sign.

    The trimmed delta is what the method makes of this client alone, which needs nobody else.
    """
    still = {other: BASE for other in CLIENTS if other != client_id}
    alone = method(normalize=False)
    trimmed = merge(alone, BASE, still | {client_id: CLIENTS[client_id]}, SHARES, seed=2)["w"].double() - BASE["w"]
    up, down = trimmed.clamp(min=0), trimmed.clamp(max=0)
    share = SHARES[client_id]
    return torch.stack([up, down, share * (trimmed > 0), share * (trimmed < 0)])


@pytest.mark.parametrize("method", [ties, breadcrumbs_ties, dare_ties])
def test_ties_from_four_sums(method):
    up, down, share_up, share_down = sum(sent_by(client_id, method) for client_id in CLIENTS)
    wins = up + down > 0
    total, share = torch.where(wins, up, down), torch.where(wins, share_up, share_down)
    wanted = torch.where(share > 0, total / share, 0.0)
    found = merge(method(), BASE, CLIENTS, SHARES, seed=2)["w"].double() - BASE["w"]
    assert float((found - wanted).norm() / wanted.norm()) < 2e-6
    assert int((wanted != 0).sum()) > 300


def test_fedgma_from_two_sums():
    deltas = {client_id: client["w"].double() - BASE["w"] for client_id, client in CLIENTS.items()}
    total = sum(SHARES[client_id] * delta for client_id, delta in deltas.items())
    signs = sum(SHARES[client_id] * delta.sign() for client_id, delta in deltas.items()).abs()
    wanted = torch.where(signs >= 0.45, 1.0, signs) * total
    found = merge(fedgma(threshold=0.45), BASE, CLIENTS, SHARES)["w"].double() - BASE["w"]
    assert float((found - wanted).norm() / wanted.norm()) < 2e-6


def shares_and_deltas():
    return [(SHARES[client_id], client["w"].double() - BASE["w"]) for client_id, client in CLIENTS.items()]


def test_model_stock_from_two_sums():
    """The mean cosine of pairs is in the length of the sum of directions."""
    count = len(CLIENTS)
    total = sum(delta for _, delta in shares_and_deltas())
    directions = sum(delta / delta.norm() for _, delta in shares_and_deltas())
    cosine = max(0.0, float(directions.square().sum() - count) / (count * (count - 1)))
    wanted = cosine / (1 + (count - 1) * cosine) * total
    found = merge(model_stock(), BASE, CLIENTS, SHARES)["w"].double() - BASE["w"]
    assert cosine > 1e-4
    assert float((found - wanted).norm() / wanted.norm()) < 1e-4


def test_multislerp_from_two_sums():
    mean = sum(share * delta / delta.norm() for share, delta in shares_and_deltas())
    length = sum(share * delta.norm() for share, delta in shares_and_deltas())
    found = merge(multislerp(), BASE, CLIENTS, SHARES)["w"].double() - BASE["w"]
    assert float((found - length * mean / mean.norm()).norm() / length) < 1e-6


def test_centered_clipping_from_one_sum():
    wanted = sum(share * delta * min(1.0, 4.9 / float(delta.norm())) for share, delta in shares_and_deltas())
    assert {float(delta.norm()) < 4.9 for _, delta in shares_and_deltas()} == {True, False}
    found = merge(centered_clipping(rho=4.9), BASE, CLIENTS, SHARES)["w"].double() - BASE["w"]
    assert float((found - wanted).norm() / wanted.norm()) < 1e-5


def needs_nothing_but_models(entry):
    return entry.merges == "models" and not entry.sends


@pytest.mark.parametrize(
    "entry", list(filter(needs_nothing_but_models, METHODS.values())), ids=lambda entry: entry.name
)
def test_the_table_says_which_results_depend_on_the_base(entry):
    draw = torch.Generator().manual_seed(20)
    count = entry.factory().clients.nearest(5)
    clients = {str(seed): {"w": torch.randn(30, 20, generator=draw)} for seed in range(count)}
    bases = [{"w": torch.randn(30, 20, generator=draw)}, clients["0"]]
    method = entry.factory(**({"scale": 0.7} if "scale" in entry.parameters else {}))
    results = [merge(method, base, clients, seed=2)["w"] for base in bases]
    assert torch.allclose(*results, atol=1e-5) is not entry.base


def test_the_table_says_so():
    additive = {
        "model_stock",
        "multislerp",
        "centered_clipping",
        "ties",
        "breadcrumbs",
        "breadcrumbs_ties",
        "dare_linear",
        "dare_ties",
        "della",
        "della_linear",
        "fedgma",
    }
    assert all(METHODS[name].additive for name in additive)
    not_additive = {"median", "trimmed_mean", "bulyan", "magmax", "emr", "sce", "pcb", "consensus"}
    assert not any(METHODS[name].additive for name in not_additive)
