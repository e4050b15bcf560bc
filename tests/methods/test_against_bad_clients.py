"""Krum, MultiKrum, geometric median, centered clipping: whole models, with clients that lie."""

import pytest
import torch

from fl_merge import MergeError, merge, partition
from fl_merge.methods import centered_clipping, geometric_median, krum, multi_krum, weighted_average

SHAPES = {"a.weight": (20, 30), "a.bias": (20,), "b.weight": (7, 20)}


def models(count, bad, seed=0, spread=0.1, attack=30.0):
    """A base, `count` clients that learn nearly the same, and among them `bad` that are far away together."""
    draw = torch.Generator().manual_seed(seed)

    def normal():
        return {name: torch.randn(shape, generator=draw) for name, shape in SHAPES.items()}

    base, common, evil = normal(), normal(), normal()
    clients = []
    for number in range(count):
        own = normal()
        step = {n: (-attack * evil[n] if number < bad else common[n]) + spread * own[n] for n in SHAPES}
        clients.append({name: base[name] + step[name] for name in SHAPES})
    return base, clients


def whole(model):
    return torch.cat([model[name].flatten().double() for name in sorted(model)])


def distance(model, other):
    return float((whole(model) - whole(other)).norm())


@pytest.mark.parametrize("method", [krum(f=2), multi_krum(f=2), multi_krum(f=2, m=3), geometric_median(iterations=20)])
def test_bad_clients_hardly_matter(method):
    base, clients = models(9, bad=2)
    honest = merge(weighted_average(), base, clients[2:])
    moved = distance(honest, base)
    assert distance(merge(method, base, clients), honest) < 0.15 * moved
    assert distance(merge(weighted_average(), base, clients), honest) > 5 * moved


def test_centered_clipping_bounds_what_a_client_can_do():
    base, clients = models(9, bad=2)
    rho = 25.0
    found = merge(centered_clipping(rho=rho), base, clients)
    honest = merge(centered_clipping(rho=rho), base, [*clients[2:], base, base])
    assert distance(found, honest) <= 2 / 9 * rho * (1 + 1e-6)
    assert distance(merge(weighted_average(), base, clients), honest) > 100


def test_krum_takes_a_whole_model_as_it_is():
    base, clients = models(7, bad=2)
    found = merge(krum(f=2), base, clients)
    distances = torch.cdist(
        torch.stack([whole(c) for c in clients])[None], torch.stack([whole(c) for c in clients])[None]
    )
    scores = (distances[0] ** 2).sort(dim=1).values[:, 1 : 1 + 7 - 2 - 2].sum(dim=1)
    best = clients[int(scores.argmin())]
    for name in SHAPES:
        torch.testing.assert_close(found[name], best[name], rtol=0, atol=1e-5)
    assert int(scores.argmin()) >= 2


def test_the_distance_is_that_of_the_whole_model_not_of_each_tensor():
    """With f = 0 of three, the score is the distance of the nearest: clients 1 and 2 have each other, so 1 wins.

    In tensor b alone clients 0 and 2 have each other, and 0 wins.
    """
    base = {"a": torch.zeros(1), "b": torch.zeros(1)}
    clients = [{"a": torch.tensor([a]), "b": torch.tensor([b])} for a, b in ((9.0, 0.0), (1.0, 0.25), (0.0, -0.125))]
    found = merge(krum(f=0), base, clients)
    assert [float(found[name]) for name in ("a", "b")] == [1.0, 0.25]
    by_tensor = merge(partition([("a", krum(f=0))], krum(f=0)), base, clients)
    assert [float(by_tensor[name]) for name in ("a", "b")] == [1.0, 0.0]


@pytest.mark.parametrize(
    ("method", "clients", "wanted"),
    [
        (krum(), 4, r"krum\(f=1\): found 4 clients, wanted at least 5 \(N >= 2 f \+ 3 with f = 1\)"),
        (krum(f=0), 2, r"krum\(f=0\): found 2 clients, wanted at least 3 \(N >= 2 f \+ 3 with f = 0\)"),
        (
            multi_krum(f=2),
            6,
            r"multi_krum\(f=2, m=None\): found 6 clients, wanted at least 7 \(N >= 2 f \+ 3 with f = 2\)",
        ),
        (
            multi_krum(f=1, m=4),
            6,
            r"multi_krum\(f=1, m=4\): found 6 clients, wanted at least 7 \(N >= f \+ m \+ 2 with f = 1, m = 4\)",
        ),
    ],
)
def test_too_few_for_what_is_promised(method, clients, wanted):
    base, sent = models(clients, bad=0)
    with pytest.raises(MergeError, match=f"^{wanted}$"):
        merge(method, base, sent)
    more = models(clients + 1, bad=0)
    merge(method, *more)


def test_multi_krum_of_one_is_krum_and_by_default_it_is_all_but_f_and_two():
    base, clients = models(8, bad=1)
    one, best = merge(multi_krum(m=1), base, clients), merge(krum(), base, clients)
    assert all(torch.equal(one[name], best[name]) for name in SHAPES)
    five, default = merge(multi_krum(m=5), base, clients), merge(multi_krum(), base, clients)
    assert all(torch.equal(five[name], default[name]) for name in SHAPES)


def test_among_the_chosen_examples_count():
    base, clients = models(5, bad=1)
    weights = [1.0, 1.0, 2.0, 3.0, 4.0]
    found = whole(merge(multi_krum(f=1, m=2), base, clients, weights))
    pairs = [(i, j) for i in range(1, 5) for j in range(i + 1, 5)]
    means = {
        (i, j): whole(merge(weighted_average(), base, [clients[i], clients[j]], [weights[i], weights[j]]))
        for i, j in pairs
    }
    assert min(float((found - mean).norm()) for mean in means.values()) < 1e-4
    plain = [(whole(clients[i]) + whole(clients[j])) / 2 for i, j in pairs]
    assert min(float((found - mean).norm()) for mean in plain) > 1e-2


@pytest.mark.parametrize("far", [1.0, 1e3])
def test_close_models_far_from_zero_are_told_apart(far):
    """Weights of about `far`, differences of 1e-3: distances from float32 sums over whole weights would be noise."""
    draw = torch.Generator().manual_seed(3)
    base = {"w": far + torch.randn(5000, generator=draw)}
    steps = [(0.0009765625 * k) * torch.ones(5000) for k in (1, 2, 3, 5, 9)]
    clients = [{"w": base["w"] + step} for step in steps]
    found = merge(krum(f=1), base, clients)["w"]
    wanted = min(range(3), key=lambda k: [5, 2, 5][k])  # two nearest others at 1, 2 / 1, 1 / 1, 2 steps
    torch.testing.assert_close(found, clients[wanted]["w"], rtol=1e-6, atol=0)
