"""merge(): plain state dicts in, a plain state dict out."""

import math

import pytest
import torch

from fl_merge import MergeError, RecipeError, UpdateError, merge
from fl_merge.errors import NonFiniteError, TensorMismatchError
from fl_merge.methods import dare_linear, weighted_average

BASE = {"w": torch.tensor([1.0, 2.0])}
A, B = {"w": torch.tensor([3.0, 2.0])}, {"w": torch.tensor([1.0, 6.0])}


def test_a_list_or_clients_by_name_and_a_method_or_its_name():
    assert merge(weighted_average(), BASE, [A, B])["w"].tolist() == [2.0, 4.0]
    assert merge("weighted_average", BASE, {"a": A, "b": B}, {"b": 3, "a": 1})["w"].tolist() == [1.5, 5.0]
    assert merge("weighted_average", BASE, [A, B], (1, 3))["w"].tolist() == [1.5, 5.0]
    assert merge("weighted_average", BASE, [A, B], torch.tensor([1.0, 3.0]))["w"].tolist() == [1.5, 5.0]


def test_parameters_of_a_module_can_be_merged():
    models = [torch.nn.Linear(3, 2) for _ in range(3)]
    result = merge("weighted_average", models[0].state_dict(), [model.state_dict() for model in models[1:]])
    wanted = (models[1].weight + models[2].weight).detach() / 2
    torch.testing.assert_close(result["weight"], wanted)
    assert not result["weight"].requires_grad
    with_grad = merge("weighted_average", dict(models[0].named_parameters()), [dict(models[1].named_parameters())])
    assert not with_grad["weight"].requires_grad


def test_the_seed_is_an_argument():
    base, client = {"w": torch.zeros(100)}, {"w": torch.ones(100)}
    results = [merge(dare_linear(), base, [client], seed=seed)["w"] for seed in (0, 1, 0)]
    assert torch.equal(results[0], results[2])
    assert not torch.equal(results[0], results[1])


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ([1.0], "weights: found 1 of them, wanted one for each of the 2 clients ['0', '1']"),
        ([1.0, 2.0, 3.0], "weights: found 3 of them, wanted one for each of the 2 clients ['0', '1']"),
        ({"0": 1.0, "2": 1.0}, "weights: found ['0', '2'], wanted one for each of the 2 clients ['0', '1']"),
        ([1.0, 0.0], "weights: client '1': found 0.0, wanted a number > 0"),
        ([-1, 1.0], "weights: client '0': found -1, wanted a number > 0"),
        ([1.0, math.nan], "weights: client '1': found nan, wanted a number > 0"),
        ([1.0, math.inf], "weights: client '1': found inf, wanted a number > 0"),
        ([1.0, "2"], "weights: client '1': found '2', wanted a number > 0"),
        ([1.0, None], "weights: client '1': found None, wanted a number > 0"),
        (
            [1e308, 1.1e308],
            "weights: client '1': found 1.1e+308, and no float64 holds the sum of all; "
            "wanted smaller numbers in the same proportions",
        ),
    ],
)
def test_weights_that_do_not_fit(weights, words):
    with pytest.raises(RecipeError) as caught:
        merge("weighted_average", BASE, [A, B], weights)
    assert str(caught.value) == words


def test_clients_that_do_not_fit_are_named():
    with pytest.raises(TensorMismatchError, match=r"^client 'b', tensor 'w': shape \(3,\), base has \(2,\)$"):
        merge("weighted_average", BASE, {"a": A, "b": {"w": torch.ones(3)}})
    with pytest.raises(NonFiniteError, match=r"^client '1', tensor 'w': element 1 is inf, wanted finite numbers$"):
        merge("weighted_average", BASE, [A, {"w": torch.tensor([1.0, math.inf])}])
    with pytest.raises(UpdateError, match=r"^client '0', tensor 'v': \(1,\) float32 is not in the base$"):
        merge("weighted_average", BASE, [{**A, "v": torch.ones(1)}])


def test_nobody():
    with pytest.raises(MergeError, match=r"^there is nothing to merge: the cohort has no update$"):
        merge("weighted_average", BASE, [])


def test_an_unknown_method():
    with pytest.raises(RecipeError, match=r"^unknown merge method 'weighted_avg'; did you mean 'weighted_average'\?"):
        merge("weighted_avg", BASE, [A])


# --- tied weights ----------------------------------------------------------------------------------------------------


def test_names_of_one_storage_are_merged_once():
    shared = torch.zeros(50)
    base = {"embed": shared, "head": shared}
    moved = torch.arange(50.0)
    merged = merge(dare_linear(density=0.5), base, [{"embed": moved, "head": moved.clone()}] * 2)
    assert torch.equal(merged["embed"], merged["head"])
    assert merged["embed"].any()


def test_names_of_one_storage_that_a_client_has_parted_are_merged_apart():
    shared = torch.zeros(3)
    update = {"embed": torch.ones(3), "head": torch.full((3,), 5.0)}
    merged = merge(weighted_average(), {"embed": shared, "head": shared}, [update, update])
    assert torch.equal(merged["embed"], torch.ones(3))
    assert torch.equal(merged["head"], torch.full((3,), 5.0))


# --- arguments that are not what they should be ----------------------------------------------------------------------


def test_a_client_comes_back_however_far_the_base_is():
    """Float32 deltas would be rounded away; sums in float64 keep a client's digits down to 2^-53 of the base."""
    base, client = torch.tensor([1e6, 300.0, -7.0]), torch.tensor([0.12345679, 1.2345, 1e-3])
    assert torch.equal(merge(weighted_average(), {"a": base}, [{"a": client}])["a"], client)
    far = merge(weighted_average(), {"a": torch.tensor([1e10])}, [{"a": torch.tensor([1.2345])}])["a"]
    assert float(far) == pytest.approx(1.2345, abs=1e10 * 2**-52)


@pytest.mark.parametrize(
    ("method", "base", "update", "message"),
    [
        (weighted_average, {}, {}, r"^found <function weighted_average at .*did you mean weighted_average\(\)\?$"),
        (weighted_average(), None, {}, r"^base: found NoneType, wanted a state dict"),
        (weighted_average(), {"a": [1.0]}, {}, r"^base, 'a': found list, wanted a torch.Tensor by its name$"),
        (weighted_average(), {"a": torch.ones(1)}, [1], r"^client '0': found list, wanted a state dict"),
        (weighted_average(), {"a": torch.ones(2).to_sparse()}, {}, r"^base, 'a': a tensor without dense values"),
        (weighted_average(), {"a": torch.ones(2, device="meta")}, {}, r"^base, 'a': a tensor without dense values"),
        (
            weighted_average(),
            {"a": torch.ones(1) * 1j},
            {"a": torch.ones(1) * 1j},
            r"dtype complex64 cannot be merged$",
        ),
    ],
)
def test_arguments_of_another_kind(method, base, update, message):
    with pytest.raises(RecipeError, match=message):
        merge(method, base, [update])
