"""The check that every update passes: what is refused, and in which words."""

import math

import numpy as np
import pytest
import torch

from fl_merge import kernels
from fl_merge.check import MAX_NUM_EXAMPLES, check_finite, check_num_examples, check_specs, check_update
from fl_merge.errors import FlMergeError, NonFiniteError, TensorMismatchError, UpdateError, WeightError
from fl_merge.store import MemorySource
from fl_merge.types import TensorSpec, Update

F32, F16, BF16, I64 = torch.float32, torch.float16, torch.bfloat16, torch.int64
BASE = {"a": TensorSpec((2, 3), F32), "b": TensorSpec((), F16), "steps": TensorSpec((), I64)}


def good():
    return {"a": torch.ones(2, 3), "b": torch.ones((), dtype=F16), "steps": torch.tensor(3)}


def refusal(change, num_examples=5):
    tensors = good()
    change(tensors)
    with pytest.raises(UpdateError) as caught:
        check_update(Update("12", num_examples, MemorySource(tensors)), BASE)
    return caught.value


def test_a_good_update_passes_in_any_floating_dtype():
    check_update(Update("12", 5, MemorySource(good())), BASE)
    for dtype in (torch.float64, F16, BF16):
        tensors = good()
        tensors["a"], tensors["b"] = tensors["a"].to(dtype), tensors["b"].to(dtype)
        check_update(Update("12", 0.5, MemorySource(tensors)), BASE)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("a"), "client '12', tensor 'a': is missing"),
        (lambda t: t.update(extra=torch.ones(2)), "client '12', tensor 'extra': (2,) float32 is not in the base"),
        (lambda t: t.update(a=torch.ones(3, 2)), "client '12', tensor 'a': shape (3, 2), base has (2, 3)"),
        (lambda t: t.update(a=torch.ones(1, 3)), "client '12', tensor 'a': shape (1, 3), base has (2, 3)"),
        (lambda t: t.update(a=torch.ones(6)), "client '12', tensor 'a': shape (6,), base has (2, 3)"),
        (lambda t: t.update(b=torch.ones(1).half()), "client '12', tensor 'b': shape (1,), base has ()"),
        (lambda t: t.update(a=torch.ones(2, 3).int()), "client '12', tensor 'a': dtype int32, base has float32"),
        (lambda t: t.update(a=torch.ones(2, 3) > 0), "client '12', tensor 'a': dtype bool, base has float32"),
        (lambda t: t.update(steps=torch.tensor(3.0)), "client '12', tensor 'steps': dtype float32, base has int64"),
        (lambda t: t.update(steps=torch.tensor(3).int()), "client '12', tensor 'steps': dtype int32, base has int64"),
        (
            lambda t: (t.pop("a"), t.pop("steps"), t.update(extra=torch.ones(2))),
            "client '12', tensor 'a': is missing (and 2 more tensors do not fit)",
        ),
        (lambda t: t.clear(), "client '12', tensor 'a': is missing (and 2 more tensors do not fit)"),
    ],
)
def test_names_shapes_and_dtypes(change, words):
    error = refusal(change)
    assert type(error) is TensorMismatchError
    assert isinstance(error, FlMergeError)
    assert str(error) == words
    assert error.client_id == "12"


@pytest.mark.parametrize("dtype", [F32, F16, BF16, torch.float64])
@pytest.mark.parametrize(("value", "shown"), [(math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf")])
def test_values_that_are_not_finite(dtype, value, shown):
    def poison(tensors):
        tensors["a"] = tensors["a"].to(dtype)
        tensors["a"][1, 1] = value
        tensors["a"][1, 2] = value

    error = refusal(poison)
    assert type(error) is NonFiniteError
    assert str(error) == f"client '12', tensor 'a': element 4 is {shown}, wanted finite numbers"


def test_values_that_the_bases_dtype_does_not_have():
    """They would not fit the merged model either, and the whole round would fail for one client."""
    error = refusal(lambda t: t.update(b=torch.tensor(70000.0)))
    assert str(error) == "client '12', tensor 'b': element 0 is 70000.0, wanted numbers that float16 has"
    error = refusal(lambda t: t.update(a=torch.full((2, 3), 1e300, dtype=torch.float64)))
    assert str(error) == "client '12', tensor 'a': element 0 is 1e+300, wanted numbers that float32 has"


def test_enormous_numbers_are_refused_unless_the_base_has_them():
    """A sum of them would overflow and cost the round; a mask of the base's own is left alone."""
    largest = torch.finfo(F32).max
    check_finite("a", torch.tensor([1e30, -1e30, 1e-45]), F32)
    check_finite("b", torch.tensor([65504.0]), F16)
    mask = MemorySource({"a": torch.tensor([0.0, -largest])})
    check_finite("a", torch.tensor([1.0, -largest]), F32, mask)
    for values in (None, mask):
        with pytest.raises(NonFiniteError, match=r"element 0 is 3.4\d+e\+38, wanted magnitudes up to 1e\+30$"):
            check_finite("a", torch.tensor([largest, 0.0]), F32, values)


def test_a_bad_value_is_found_wherever_it_is():
    """Beyond the first piece of a million elements, and in a tensor that is not contiguous."""
    tensor = torch.zeros(3, 1_000_000).T
    tensor[999_999, 2] = math.nan
    with pytest.raises(NonFiniteError, match=r"^tensor 'a': element 2999999 is nan, wanted finite numbers$"):
        check_finite("a", tensor, F32)


def test_integers_have_no_nan():
    check_finite("steps", torch.tensor([2**62]), I64)


@pytest.mark.parametrize("value", [1, 0.001, 2.5, 1e9, int(MAX_NUM_EXAMPLES), np.float64(3.0)])
def test_numbers_of_examples_that_are_believed(value):
    assert check_num_examples(value) == float(value)
    assert type(check_num_examples(value)) is float


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0, "0, wanted a number > 0 and <= 1e+09"),
        (0.0, "0.0, wanted a number > 0 and <= 1e+09"),
        (-10, "-10, wanted a number > 0 and <= 1e+09"),
        (math.nan, "nan, wanted a number > 0 and <= 1e+09"),
        (math.inf, "inf, wanted a number > 0 and <= 1e+09"),
        (-math.inf, "-inf, wanted a number > 0 and <= 1e+09"),
        (1e12, "1000000000000.0, wanted a number > 0 and <= 1e+09"),
        (10**12, "1000000000000, wanted a number > 0 and <= 1e+09"),
        (True, "True, wanted one number"),
        ([5], "[5], wanted one number"),
        ("5", "'5', wanted one number"),
        (None, "None, wanted one number"),
        (5 + 0j, "(5+0j), wanted one number"),
    ],
)
def test_numbers_of_examples_that_are_not(value, words):
    with pytest.raises(WeightError) as caught:
        check_num_examples(value)
    assert str(caught.value) == f"number of examples is {words}"
    assert str(refusal(lambda t: None, value)) == f"client '12': number of examples is {words}"


def test_a_number_beyond_float64_is_refused_too():
    with pytest.raises(WeightError, match=r"^number of examples is 10+\.\.\., wanted a number > 0 and <= 1e\+09$"):
        check_num_examples(10**400)


def test_the_limit_is_the_operators():
    assert check_num_examples(20, 20) == 20.0
    with pytest.raises(WeightError, match=r"^number of examples is 21, wanted a number > 0 and <= 20$"):
        check_num_examples(21, 20)


def test_the_first_problem_is_the_same_whatever_the_order():
    found = {"z": TensorSpec((1,), F32), "a": TensorSpec((9,), F32), "b": BASE["b"]}
    for order in (list(found), list(reversed(found))):
        with pytest.raises(TensorMismatchError, match=r"^tensor 'a': shape \(9,\), base has \(2, 3\) \(and 2 more"):
            check_specs({name: found[name] for name in order}, BASE)


def test_nothing_is_read_of_an_update_whose_names_do_not_fit():
    class Unreadable(MemorySource):
        def read(self, name):
            raise AssertionError("read before the check of names and shapes")

    with pytest.raises(TensorMismatchError):
        check_update(Update("12", 5, Unreadable({"a": torch.ones(9)})), BASE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("place", [0, 1_500_000, 2_999_999])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 2e30])
def test_one_bad_element_is_found_with_and_without_kernels(bad, place, dtype):
    if dtype == torch.float16 and bad == 2e30:
        bad = float("inf")
    base = {"w": TensorSpec((3_000_000,), torch.float32)}
    tensor = torch.ones(3_000_000, dtype=dtype)
    before = kernels._tried, kernels._module
    try:
        for module in (None, kernels.load()):
            kernels._tried, kernels._module = True, module
            check_update(Update("12", 5, MemorySource({"w": tensor})), base)
            tensor[place] = bad
            with pytest.raises(NonFiniteError, match=f"element {place} is"):
                check_update(Update("12", 5, MemorySource({"w": tensor})), base)
            tensor[place] = 1.0
    finally:
        kernels._tried, kernels._module = before


def test_what_a_narrower_base_has_no_place_for_is_found_by_kernels_too():
    assert kernels.load() is not None
    base = {"w": TensorSpec((2,), torch.float16)}
    check_update(Update("12", 5, MemorySource({"w": torch.tensor([65504.0, 65519.0])})), base)
    with pytest.raises(NonFiniteError, match="numbers that float16 has"):
        check_update(Update("12", 5, MemorySource({"w": torch.tensor([65504.0, 65520.0])})), base)
