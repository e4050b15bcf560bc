"""The splits: disjoint, seeded, proved on image numbers; the domains: the transforms they say they are."""

import pytest
import torch

from digits_clients import data


def as_set(numbers_B):
    return set(numbers_B.tolist())


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_the_four_parts_cover_every_image_exactly_once(seed):
    parts = data.split(seed)
    sizes = [len(part) for part in (parts.public, parts.validation, parts.test, parts.private)]
    assert sizes == [200, 85, 360, 1152]
    together = torch.cat([parts.public, parts.validation, parts.test, parts.private])
    assert sorted(together.tolist()) == list(range(1797))


def test_a_seed_gives_the_same_split_and_another_seed_another():
    assert torch.equal(data.split(3).test, data.split(3).test)
    assert not torch.equal(data.split(3).test, data.split(4).test)


def test_no_private_image_belongs_to_two_domains_and_no_test_image_is_trained_on_in_any():
    clients = [data.client(i, 8) for i in range(8)]
    assert [client.name for client in clients] == list(data.DOMAINS)
    trained = [number for client in clients for number in client.train.numbers_B.tolist()]
    assert len(trained) == len(set(trained)) == 1152
    assert all(len(client.train) == 144 and len(client.test) == 360 for client in clients)
    tested = set().union(*(as_set(client.test.numbers_B) for client in clients))
    public = as_set(data.public_examples().numbers_B)
    validation = set().union(*(as_set(part.numbers_B) for part in data.validation_examples().values()))
    assert not tested & (set(trained) | public | validation)
    assert not validation & (set(trained) | public)


def test_examples_are_the_images_and_labels_of_their_numbers():
    digits = data.all_digits()
    assert digits.images_BHW.shape == (1797, 8, 8)
    assert digits.images_BHW.min() == 0
    assert digits.images_BHW.max() == 1
    for client in (data.client(3, 8), data.client(5, 8)):
        originals_BHW = digits.images_BHW[client.test.numbers_B]
        assert torch.equal(client.test.images_BHW, data.DOMAINS[client.name](originals_BHW))
        assert torch.equal(client.test.labels_B, digits.labels_B[client.test.numbers_B])


UNDO = {
    "clean": lambda x: x,
    "rotated": lambda x: torch.rot90(x, 3, (1, 2)),
    "mirrored": lambda x: x.flip(2),
    "inverted": lambda x: 1 - x,
    "rows": lambda x: x[:, data.ROW_ORDER.argsort()],
    "permuted": lambda x: x.flatten(1)[:, data.PIXEL_ORDER.argsort()].view(-1, 8, 8),
    "transposed": lambda x: x.transpose(1, 2),
}


def test_every_domain_but_stripes_can_be_undone_exactly():
    assert set(UNDO) == set(data.DOMAINS) - {"stripes"}
    images_BHW = data.all_digits().images_BHW  # multiples of 1/16: 1 - x is exact
    for name, undo in UNDO.items():
        assert torch.equal(undo(data.DOMAINS[name](images_BHW)), images_BHW), name


def test_the_domains_are_what_they_say_on_one_pixel():
    image = torch.zeros(1, 8, 8)
    image[0, 1, 2] = 1.0  # row 1, column 2

    def lit(name):
        return data.DOMAINS[name](image)[0].nonzero().tolist()

    assert lit("clean") == [[1, 2]]
    assert lit("rotated") == [[5, 1]]  # anticlockwise: column 2 becomes row 7 - 2
    assert lit("mirrored") == [[1, 5]]
    assert lit("transposed") == [[2, 1]]
    assert lit("rows") == [[data.ROW_ORDER.tolist().index(1), 2]]
    assert lit("permuted") == [list(divmod(data.PIXEL_ORDER.tolist().index(8 * 1 + 2), 8))]
    assert len(lit("inverted")) == 63
    striped = data.DOMAINS["stripes"](image)[0]
    assert torch.equal(striped[[0, 3, 6]], torch.full((3, 8), 0.75))
    assert striped[1].sum() == 1
    assert striped[[2, 4, 5, 7]].sum() == 0


def test_domains_leave_their_input_alone_and_differ_from_each_other():
    images_BHW = data.all_digits().images_BHW[:50]
    before = images_BHW.clone()
    seen = [transform(images_BHW) for transform in data.DOMAINS.values()]
    assert torch.equal(images_BHW, before)
    assert not any(torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])


def test_the_shuffled_orders_are_permutations_that_do_something():
    for order, length in ((data.ROW_ORDER, 8), (data.PIXEL_ORDER, 64)):
        assert sorted(order.tolist()) == list(range(length))
        assert (order != torch.arange(length)).sum() >= length // 2


@pytest.mark.parametrize("num_clients", [2, 9, 20, 100])
def test_other_numbers_of_domain_clients_share_without_overlap(num_clients):
    clients = [data.client(i, num_clients) for i in range(num_clients)]
    trained = [number for client in clients for number in client.train.numbers_B.tolist()]
    assert len(trained) == len(set(trained)) == (288 if num_clients == 2 else 1152)
    assert len({client.name for client in clients}) == num_clients
    assert clients[-1].name.startswith(list(data.DOMAINS)[(num_clients - 1) % 8])


@pytest.mark.parametrize("alpha", [0.1, 0.5, 100.0])
def test_label_skew_deals_every_image_to_exactly_one_client(alpha):
    clients = [data.client(i, 10, setting="dirichlet", alpha=alpha) for i in range(10)]
    parts = data.split(0)
    for part, dealt in (
        (parts.private, [client.train for client in clients]),
        (parts.test, [client.test for client in clients]),
    ):
        numbers = [number for hand in dealt for number in hand.numbers_B.tolist()]
        assert sorted(numbers) == sorted(part.tolist())
        assert max(map(len, dealt)) - min(map(len, dealt)) <= 1


def test_smaller_alpha_is_more_skewed_and_the_test_labels_follow_the_training_labels():
    def clients(alpha):
        return [data.client(i, 10, setting="dirichlet", alpha=alpha) for i in range(10)]

    def shares(examples):
        return torch.bincount(examples.labels_B, minlength=10) / len(examples)

    def largest_share(alpha):
        return sum(float(shares(client.train).max()) for client in clients(alpha)) / 10

    assert largest_share(0.1) > largest_share(0.5) > largest_share(100.0)
    assert largest_share(0.1) > 0.4
    assert largest_share(100.0) < 0.2
    apart = [float((shares(c.train) - shares(c.test)).abs().sum()) / 2 for c in clients(0.1)]
    swapped = [float((shares(c.train) - shares(d.test)).abs().sum()) / 2 for c in clients(0.1) for d in clients(0.1)]
    assert sum(apart) / len(apart) < 0.5 * sum(swapped) / len(swapped)


def test_label_skew_is_seeded():
    mixes = data.label_mixes(10, 0.1, seed=0)
    assert mixes.shape == (10, 10)
    assert mixes.sum(1) == pytest.approx(1.0)
    assert (mixes == data.label_mixes(10, 0.1, seed=0)).all()
    assert (mixes != data.label_mixes(10, 0.1, seed=1)).any()
    first, again = (data.partition_by_label(data.split(0).private, mixes, seed=0) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"setting": "cats"}, "setting: 'cats', wanted 'domains' or 'dirichlet'"),
        ({"partition": 8}, "partition-id: 8, wanted 0 to 7"),
        ({"setting": "dirichlet", "alpha": 0.0}, "alpha: 0.0, wanted a finite number > 0"),
        ({"setting": "dirichlet", "num_partitions": 361}, "num-partitions: 361, wanted at most 360"),
        ({"partition": 1159, "num_partitions": 1160}, "leaves client 1159 without an image"),
    ],
)
def test_settings_that_cannot_be_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        data.client(**{"partition": 0, "num_partitions": 8, **arguments})


def test_the_servers_validation_part_is_sorted_by_domain_or_by_digit():
    domains = data.validation_examples("domains")
    assert {name: len(part) for name, part in domains.items()} == dict.fromkeys(data.DOMAINS, 85)
    digits = data.validation_examples("dirichlet")
    assert sum(map(len, digits.values())) == 85
    assert all((part.labels_B == int(name.removeprefix("digit-"))).all() for name, part in digits.items())
