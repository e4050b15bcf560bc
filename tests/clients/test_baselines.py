"""The numbers of the comparison: what a row says, how a vote is counted, which clients the baselines use."""

import pytest
import torch

import baselines
from digits_clients import data, model


def test_a_row_sums_up_its_accuracies():
    row = baselines.Row("merged", {"a": 0.4, "b": 0.9})
    assert row.mean == pytest.approx(0.65)
    assert row.worst == 0.4
    assert row.normalised({"a": 0.8, "b": 0.9}) == pytest.approx((0.5 + 1.0) / 2)


def test_the_majority_wins_and_a_tie_goes_to_the_larger_mean_logit():
    logits_NBK = torch.tensor(
        [
            [[9.0, 0.0, 0.0], [2.0, 1.0, 0.0]],
            [[0.0, 1.0, 0.0], [0.0, 3.0, 0.0]],
            [[0.0, 1.0, 0.0], [0.0, 0.0, 2.5]],
        ]
    )
    # First example: two votes for 1 against one loud 0. Second: one vote each, mean logits 2/3, 4/3, 2.5/3.
    assert baselines.majority_vote(logits_NBK).tolist() == [1, 1]
    assert logits_NBK.mean(0).argmax(-1).tolist() == [0, 1]


def test_a_class_without_votes_never_wins_a_vote():
    logits_NBK = torch.tensor([[[3.0, 2.9, 0.0]], [[0.0, 2.9, 3.0]]])
    assert logits_NBK.mean(0).argmax(-1).tolist() == [1]
    assert baselines.majority_vote(logits_NBK).item() in (0, 2)


@pytest.fixture(scope="module")
def people():
    return baselines.population(epochs=1)


def test_every_client_starts_from_the_base_and_trains_on_its_own(people):
    assert [client.name for client in people.clients] == list(data.DOMAINS)
    alone = baselines.finetune(model.initial(0), data.client(2, 8), seed=(0, 1, 2), epochs=1)
    assert all(torch.equal(alone[name], people.finetuned[2][name]) for name in alone)


def test_the_baselines_are_complete_and_reproducible(people):
    rows = baselines.baselines(people)
    assert [row.name.split(",")[0] for row in rows] == [
        *("pretrained", "individual", "individual", "sequential", "joint", "ensemble", "ensemble")
    ]
    assert [row.forward_passes for row in rows] == [1, 1, 1, 1, 1, 8, 8]
    assert all(list(row.accuracies) == list(data.DOMAINS) for row in rows)
    assert rows[1].normalised(people.individual) == pytest.approx(1.0)
    assert baselines.baselines(people) == rows


def test_forgetting_is_the_loss_since_a_clients_own_training(people):
    row, forgetting = baselines.sequential(people)
    state, learned = people.base, []
    for i, client in enumerate(people.clients):
        state = baselines.finetune(state, client, seed=(0, "sequential", i), epochs=1)
        learned.append(model.accuracy(state, client.test))
    final = [row.accuracies[client.name] for client in people.clients]
    assert final[-1] == learned[-1]
    assert forgetting == pytest.approx(sum(a - b for a, b in zip(learned[:7], final[:7], strict=True)) / 7)
    assert row.uplink_bytes == 8 * 4 * 301_066


def test_label_skew_has_ten_clients_and_uses_every_private_image():
    people = baselines.population("dirichlet", alpha=0.1, epochs=1)
    assert len(people.clients) == len(people.finetuned) == 10
    assert sum(len(client.train) for client in people.clients) == data.PRIVATE
