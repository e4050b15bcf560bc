"""A running sum gives the same model whatever the order of arrival, in the same room for any number of clients."""

import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_merge.check import check_update
from fl_merge.errors import DecodeError, MergeError, RecipeError
from fl_merge.execute import execute
from fl_merge.method import METHODS
from fl_merge.methods import task_arithmetic, ties, weighted_average
from fl_merge.model import GlobalModel
from fl_merge.rounds import Round
from fl_merge.running import RunningSum, add_product, add_quotient, running_factor, two_product, two_sum
from fl_merge.spill import Spill
from fl_merge.store import MemorySink, MemorySource
from fl_merge.types import Cohort, CohortSpec, Update

doubles = st.floats(-1e30, 1e30, allow_subnormal=False).filter(lambda x: x == 0 or abs(x) > 1e-60)
narrow = st.floats(-(2.0**99), 2.0**99, width=32)
weights = st.floats(1e-6, 1e9)

COUNTER = "bn.num_batches_tracked"
BASE = {"a": torch.zeros(4), "w": torch.zeros(4), COUNTER: torch.tensor(0)}
WITHOUT_TWO = {"a": [2.0] * 4, "w": [2.0] * 4, COUNTER: 3}


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


class Averages:
    """weighted_average with the word that makes it a running sum, whatever the registered one says."""

    def __init__(self, factor=1.0):
        self.method = weighted_average() if factor == 1.0 else task_arithmetic(scale=factor)
        self.running = factor

    def plan(self, spec):
        return self.method.plan(spec)


@given(doubles, doubles)
def test_a_sum_and_its_error_are_exact(a, b):
    total, error = (float(x) for x in two_sum(double(a), double(b)))
    assert Fraction(total) + Fraction(error) == Fraction(a) + Fraction(b)
    assert total == a + b


@given(weights, doubles)
def test_a_product_and_its_error_are_exact(a, b):
    product, error = (float(x) for x in two_product(a, double(b)))
    assert Fraction(product) + Fraction(error) == Fraction(a) * Fraction(b)
    assert product == a * b


@given(st.lists(st.tuples(weights, doubles), min_size=1, max_size=8))
def test_a_sum_of_products_has_thirty_digits(terms):
    high_S, low_S = double(0.0), double(0.0)
    for weight, delta in terms:
        add_product(high_S, low_S, weight, double(delta))
    found = Fraction(float(high_S)) + Fraction(float(low_S))
    exact = sum(Fraction(weight) * Fraction(delta) for weight, delta in terms)
    size = sum(abs(Fraction(weight) * Fraction(delta)) for weight, delta in terms)
    assert abs(found - exact) <= size * Fraction(len(terms), 2**103)


@given(doubles, doubles, weights)
def test_a_quotient_is_added_to_the_last_place_of_the_larger(base, high, total):
    found = Fraction(float(add_quotient(double(base), double(high), double(0.0), total)))
    quotient = Fraction(high) / Fraction(total)
    exact = Fraction(base) + quotient
    assert abs(found - exact) <= Fraction(math.ulp(float(exact))) + (abs(exact) + abs(quotient)) / 2**100


def running(method, base, updates, folder):
    folder.mkdir(exist_ok=True)
    total = RunningSum(method, MemorySource(base), folder)
    for update in updates:
        total.add(update)
    sink = MemorySink()
    report = total.merge(sink)
    for path in folder.iterdir():
        path.unlink()
    return sink.tensors, report


@settings(max_examples=15)
@given(
    st.lists(st.tuples(weights, st.lists(narrow, min_size=3, max_size=3)), min_size=4, max_size=4),
    st.lists(narrow, min_size=3, max_size=3),
)
def test_the_order_of_arrival_does_not_change_a_bit(tmp_path_factory, clients, base):
    folder = tmp_path_factory.mktemp("sum")
    base = {"w": torch.tensor(base)}
    updates = [
        Update(str(number), weight, MemorySource({"w": torch.tensor(values)}))
        for number, (weight, values) in enumerate(clients)
    ]
    for update in updates:
        check_update(update, MemorySource(base).specs())
    first, _ = running(Averages(), base, updates, folder)
    for order in itertools.permutations(updates):
        again, _ = running(Averages(), base, order, folder)
        assert first["w"].numpy().tobytes() == again["w"].numpy().tobytes()


@pytest.mark.parametrize("factor", [1.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_it_is_the_ordinary_merge_to_a_last_place(dtype, factor, tmp_path, generator):
    base = {
        "w": torch.randn(70, 1000, generator=generator).to(dtype),
        "none": torch.empty(0, dtype=dtype),
        "steps": torch.tensor(7),
        "bn.num_batches_tracked": torch.tensor(3),
    }
    updates = tuple(
        Update(
            str(client),
            client + 0.7,
            MemorySource(
                {
                    "w": (base["w"].float() + 0.1 * torch.randn(70, 1000, generator=generator)).to(dtype),
                    "none": base["none"],
                    "steps": torch.tensor(client),
                    "bn.num_batches_tracked": torch.tensor(client),
                }
            ),
        )
        for client in range(9)
    )
    wanted = MemorySink()
    report = execute(Averages(factor), Cohort(MemorySource(base), updates), wanted, master=True)
    found, own = running(Averages(factor), base, reversed(updates), tmp_path)
    assert list(found) == list(wanted.tensors)
    for name, tensor in wanted.tensors.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        if tensor.dtype == torch.float64:  # there the ordinary sum is itself rounded as it goes
            torch.testing.assert_close(found[name], tensor, rtol=1e-15, atol=1e-15)
        elif tensor.is_floating_point():
            off = torch.nextafter(tensor, torch.tensor(math.inf)) - tensor
            assert ((found[name] - tensor).abs() <= off).all()
        else:
            assert torch.equal(found[name], tensor)
    assert found["bn.num_batches_tracked"] == 8
    same = ("clients", "weights", "tensors", "bytes_written")
    assert [getattr(own, each) for each in same] == [getattr(report, each) for each in same]


@pytest.mark.parametrize("name", METHODS)
def test_who_says_to_be_a_running_sum_is_one(name):
    method = METHODS[name].factory()
    try:
        factor = running_factor(method)
    except RecipeError:
        return
    spec = CohortSpec({}, ("1", "2", "3"), (0.5, 0.3, 0.2))
    assert list(method.shape.coefficients(spec, None)) == pytest.approx([factor * share for share in spec.weights_N])


def test_tied_tensors_are_merged_once(tmp_path):
    shared = torch.zeros(3)
    base = {"embed": shared, "head": shared}
    update = Update("1", 1.0, MemorySource(dict.fromkeys(base, torch.ones(3))))
    found, _ = running(Averages(), base, [update], tmp_path)
    assert found["embed"].tolist() == found["head"].tolist() == [1.0] * 3


def test_other_methods_are_refused():
    with pytest.raises(RecipeError, match=r"^running_sum: found ties\(.*, wanted a method whose coefficients are"):
        running_factor(ties())


def test_what_does_not_fit_is_said(tmp_path):
    base = {"w": torch.full((4,), 3e38)}
    update = Update("1", 1.0, MemorySource({"w": torch.full((4,), -3e38)}))
    with pytest.raises(
        MergeError,
        match=r"^tensor 'w': a merged value of magnitude 6e\+38 does not fit float32; lower the method's scale$",
    ):
        running(Averages(-0.5), base, [update], tmp_path)


def pair(client, value):
    return Update(client, 1.0, MemorySource(filled(value)))


def filled(value):
    return {name: torch.full_like(tensor, value) for name, tensor in BASE.items()}


class Unreadable(MemorySource):
    """One tensor cannot be read; with `passed` reads of it that went well before."""

    def __init__(self, name, passed=0):
        super().__init__(filled(9.0))
        self.name, self.passed = name, passed

    def read(self, name):
        if name == self.name:
            self.passed -= 1
            if self.passed < 0:
                raise DecodeError("gone", tensor=name)
        return super().read(name)


@pytest.mark.parametrize("name", BASE)
def test_an_update_that_cannot_be_read_leaves_nothing_in_the_sum(tmp_path, name):
    total = RunningSum(Averages(), MemorySource(BASE, {}), tmp_path)
    total.add(pair("1", 1.0))
    with pytest.raises(DecodeError, match="gone"):
        total.add(Update("2", 1.0, Unreadable(name)))
    total.add(pair("3", 3.0))
    with pytest.raises(MergeError, match="client '1' is in the sum already"):
        total.add(pair("1", 1.0))
    sink = MemorySink()
    assert total.merge(sink).clients == ("1", "3")
    assert {name: tensor.tolist() for name, tensor in sink.tensors.items()} == WITHOUT_TWO


def breaks_on(place, monkeypatch):
    """The sum of the tensor at that place, of the second client, cannot be added to."""
    calls = 0

    def add(*arguments):
        nonlocal calls
        calls += 1
        if calls == 2 + place:
            raise RuntimeError("no luck")
        add_product(*arguments)

    monkeypatch.setattr("fl_merge.running.add_product", add)


def test_a_sum_that_broke_takes_no_more_and_is_not_merged(tmp_path, monkeypatch):
    total = RunningSum(Averages(), MemorySource(BASE, {}), tmp_path)
    breaks_on(2, monkeypatch)
    total.add(pair("1", 1.0))
    with pytest.raises(MergeError, match=r"^client '2' was added to the running sum in part: RuntimeError: no luck$"):
        total.add(pair("2", 9.0))
    with pytest.raises(MergeError, match=r"^client '3': the running sum takes no more, an update was added in part$"):
        total.add(pair("3", 1.0))
    with pytest.raises(MergeError, match="of no use"):
        total.merge(MemorySink())


def a_round(folder):
    model = GlobalModel.of(BASE)
    total = RunningSum(Averages(), MemorySource(model.sent), folder)
    return Round(1, model, Averages(), ("1", "2", "3"), running=total)


@pytest.mark.parametrize("name", BASE)
def test_a_round_loses_only_the_client_whose_update_cannot_be_read(tmp_path, name):
    collected = a_round(tmp_path)
    updates = [pair("1", 1.0), Update("2", 1.0, Unreadable(name, passed=1)), pair("3", 3.0)]  # the check reads it too
    for update in updates:
        collected.offer(update.client_id, lambda update=update: update)
    model, report = collected.merge()
    assert [str(refusal) for refusal in report.refused] == [f"client '2', tensor '{name}': gone"]
    assert {name: tensor.tolist() for name, tensor in model.sent.items()} == WITHOUT_TWO


def test_a_round_of_which_an_update_was_added_in_part_makes_no_model(tmp_path, monkeypatch):
    collected = a_round(tmp_path)
    breaks_on(2, monkeypatch)
    for update in pair("1", 1.0), pair("2", 9.0), pair("3", 3.0):
        collected.offer(update.client_id, lambda update=update: update)
    model, report = collected.merge()
    assert model is None
    assert report.failure == "client '2' was added to the running sum in part: RuntimeError: no luck"
    assert [str(refusal) for refusal in report.refused] == [
        "client '2': the server could not keep it",
        "client '3': came after the server could keep no more updates",
    ]


def test_where_no_room_can_be_claimed_ahead_it_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr("fl_merge.running.claim", lambda *arguments: False)
    found, _ = running(Averages(), BASE, [pair("1", 1.0), pair("2", 3.0)], tmp_path)
    assert found["w"].tolist() == [2.0] * 4


def test_no_room_is_said(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fl_merge.running.claim", full)
    with pytest.raises(
        MergeError, match=r"^cannot keep a running sum of 32 bytes for tensor 'w' in '.*0.high': No space left"
    ):
        running(Averages(), {"w": torch.zeros(4)}, [Update("1", 1.0, MemorySource({"w": torch.ones(4)}))], tmp_path)


def test_a_round_with_a_running_sum(tmp_path):
    model = GlobalModel.of({"w": torch.zeros(40)})
    with Spill(tmp_path) as spill:
        folder = spill.open()
        total = RunningSum(Averages(), MemorySource(model.sent), folder)
        size = {"0.high": 8 * 40, "0.low": 8 * 40}
        collected = Round(1, model, Averages(), ("1", "2", "3"), spill=spill, running=total)
        for client, value in ("2", 4.0), ("1", 1.0), ("3", math.nan):
            update = Update(client, 1.0, MemorySource({"w": torch.full((40,), value)}))
            collected.offer(client, lambda update=update: update)
            assert {path.name: path.stat().st_size for path in folder.iterdir()} == size  # for any number of clients
        after, report = collected.merge()
    assert after.sent["w"].tolist() == [2.5] * 40
    assert after.encoded
    assert report.merge.clients == ("1", "2")
    assert [refusal.client_id for refusal in report.refused] == ["3"]
    assert list(tmp_path.iterdir()) == []
