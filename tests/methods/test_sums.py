"""What the table of methods calls additive is had from sums over the clients alone."""

import pytest
import torch

from fl_merge import METHODS, merge
from fl_merge.methods import breadcrumbs_ties, dare_ties, fedgma, ties

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


def test_the_table_says_so():
    additive = {
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
