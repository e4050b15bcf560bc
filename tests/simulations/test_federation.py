"""Training side by side is training alone; rounds are the server's; bad clients change what they send and no more."""

import pytest
import torch

from digits_clients import data, model
from federation import Local, federate, sampled, train_together
from fl_merge import MergeError, merge
from fl_merge.methods import dare_ties, weighted_average
from fl_merge.optimizers import momentum, server_optimizer

LOCAL = Local(epochs=2)


@pytest.fixture(scope="module")
def clients():
    return [data.client(i, 20, setting="dirichlet", alpha=0.5) for i in range(20)]


@pytest.fixture(scope="module")
def start():
    return model.random_state(0, hidden=16)


def close(found, wanted, tolerance=1e-5):
    return all(torch.allclose(found[name], wanted[name], rtol=0, atol=tolerance) for name in wanted)


def test_side_by_side_each_client_learns_what_it_learns_alone(clients, start):
    train = [client.train for client in clients[10:14]]
    assert len({len(examples) for examples in train}) == 2  # one of the last batches is shorter than another
    together = train_together(start, train, LOCAL, list(range(4)))
    for i, examples in enumerate(train):
        alone = model.train(start, examples, epochs=LOCAL.epochs, learning_rate=LOCAL.learning_rate, seed=i)
        assert close(together[i], alone)
        assert not close(together[i], start, 1e-3)


def test_clients_with_other_numbers_of_steps_are_refused(clients, start):
    few = data.examples(torch.arange(10))
    with pytest.raises(ValueError, match=r"found \[1, 2\] steps an epoch"):
        train_together(start, [clients[0].train, few], LOCAL, [0, 1])


def options(**more):
    return {"rounds": 2, "per_round": 5, "seed": 3, "local": LOCAL} | more


def test_a_round_is_a_merge_of_the_sampled_clients_models(clients, start):
    found = next(federate(start, clients, dare_ties(), **options()))
    chosen = sampled(20, 5, 3, 1)
    learned = train_together(start, [clients[i].train for i in chosen], LOCAL, [(3, 1, i) for i in chosen])
    updates = {str(i): state for i, state in zip(chosen, learned, strict=True)}
    weights = {str(i): float(len(clients[i].train)) for i in chosen}
    # The draws of round 1 are not those of merge(), which has no rounds: without chance, both are one.
    exact = merge(weighted_average(), start, updates, weights)
    assert all(torch.equal(next(federate(start, clients, weighted_average(), **options()))[n], exact[n]) for n in exact)
    assert not close(found, exact)


def test_who_takes_part_depends_on_seed_and_round_alone():
    assert sampled(20, 5, 3, 1) == sampled(20, 5, 3, 1)
    assert len({tuple(sampled(20, 5, 3, number)) for number in range(1, 9)}) == 8


def test_a_server_optimizer_keeps_its_state_from_round_to_round(clients, start):
    heavy = server_optimizer(weighted_average(), momentum(lr=1.0, beta=0.5))
    first, second = federate(start, clients, heavy, **options())
    plain_first = next(federate(start, clients, weighted_average(), **options()))
    assert close(first, plain_first)
    chosen = sampled(20, 5, 3, 2)
    learned = train_together(first, [clients[i].train for i in chosen], LOCAL, [(3, 2, i) for i in chosen])
    average = merge(weighted_average(), first, learned, [float(len(clients[i].train)) for i in chosen])
    expected = {n: first[n] + 0.5 * (first[n] - start[n]) + (average[n] - first[n]) for n in first}
    assert close(second, expected)


def test_an_attack_gets_what_was_learned_and_the_places_of_bad_clients(clients, start):
    seen = []

    def attack(sent, learned, places, draws):
        seen.append((sampled(20, 5, 3, len(seen) + 1), places))
        return [sent if place in places else state for place, state in enumerate(learned)]

    bad = [0, 3, 7, 11]
    list(federate(start, clients, weighted_average(), **options(attack=attack, bad=bad)))
    assert [[chosen[p] for p in places] for chosen, places in seen] == [
        [i for i in chosen if i in bad] for chosen, _ in seen
    ]
    assert any(places for _, places in seen)


def test_replies_that_are_not_finite_are_refused_and_a_method_that_cannot_merge_says_why(clients, start):
    def spoil(sent, learned, places, draws):
        return [{n: t * float("nan") for n, t in learned[0].items()}, *learned[1:]]

    spoiled = next(federate(start, clients, weighted_average(), **options(attack=spoil)))
    assert all(bool(tensor.isfinite().all()) for tensor in spoiled.values())

    class Never:
        def plan(self, spec):
            if spec.round:
                raise MergeError("never merges")
            return weighted_average().plan(spec)

    with pytest.raises(MergeError, match="never merges"):
        list(federate(start, clients, Never(), **options()))
