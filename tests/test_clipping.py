"""Clipping before merging: on paper, the same by every way, bit for bit nothing where nothing is clipped."""

import math

import pytest
import torch

from fl_merge import METHODS, Recipe, RecipeError, adam, clip_norm, merge, partition, server_optimizer
from fl_merge.execute import execute
from fl_merge.methods import task_arithmetic, ties, weighted_average
from fl_merge.model import GlobalModel
from fl_merge.running import running_factor
from fl_merge.store import MemorySink, MemorySource
from fl_merge.types import Cohort, Update

BASE = {"w": torch.zeros(2), "v": torch.zeros(1), "n": torch.tensor(3)}
LONG = {"w": torch.tensor([3.0, 0.0]), "v": torch.tensor([4.0]), "n": torch.tensor(3)}  # of length 5
SHORT = {"w": torch.tensor([0.0, 1.0]), "v": torch.tensor([0.0]), "n": torch.tensor(3)}


def test_on_paper():
    """The norm is the whole model's: (3, 0, 4) is 5 long, and becomes (1.2, 0, 1.6) at a bound of 2."""
    found = merge(clip_norm(weighted_average(), max_norm=2.0), BASE, [LONG, SHORT])
    assert torch.cat([found["w"], found["v"]]).tolist() == pytest.approx([0.6, 0.5, 0.8])
    assert found["n"] == 3
    found = merge(clip_norm(task_arithmetic(normalize=False), quantile=0.5), BASE, [LONG, SHORT])  # the bound is 3
    assert torch.cat([found["w"], found["v"]]).tolist() == pytest.approx([1.8, 1.0, 2.4])


def clients(count=3, names=("a", "b", "c")):
    draw = torch.Generator().manual_seed(4)
    base = {
        "w": torch.randn(150, 200, generator=draw),
        "half": torch.randn(60, 50, generator=draw).bfloat16(),
        "double": torch.randn(9, generator=draw).double(),
        "n": torch.tensor(3),
    }
    made = {}
    for place, name in enumerate(names[:count]):
        made[name] = {
            key: (t.double() + 0.1 * 2**place * torch.randn(t.shape, generator=draw)).to(t.dtype)
            if t.is_floating_point()
            else t
            for key, t in base.items()
        }
    return base, made


def clipped_by_hand(base, made, bound):
    """The clients' models with their deltas scaled, in float64."""
    found = {}
    for name, model in made.items():
        deltas = {k: model[k].double() - t.double() for k, t in base.items() if t.is_floating_point()}
        norm = math.sqrt(sum(float(delta.square().sum()) for delta in deltas.values()))
        factor = min(1.0, bound / norm)
        found[name] = {k: base[k].double() + factor * deltas[k] if k in deltas else t for k, t in model.items()}
    return found


ALL = [name for name in METHODS if "fisher" not in METHODS[name].sends and "gram" not in METHODS[name].sends]


def takes_three(name):
    """Whether a method merges these three clients as they are."""
    base, made = clients()
    try:
        return bool(merge(METHODS[name].factory(), base, made, metrics=reports(made)))
    except Exception:
        return False


def reports(made):
    return {name: {"local-steps": 3} for name in made}


@pytest.mark.parametrize("name", [name for name in ALL if takes_three(name)])
def test_every_method_merges_what_was_clipped(name):
    """As the method does with clients that were clipped by hand: nothing of the unclipped ones is left."""
    base, made = clients()
    by_hand = clipped_by_hand(base, made, 20.0)
    wide = {key: tensor.double() if tensor.is_floating_point() else tensor for key, tensor in base.items()}
    method = METHODS[name].factory()
    wanted = merge(method, wide, by_hand, seed=2, metrics=reports(made))
    found = merge(clip_norm(method, max_norm=20.0), base, made, seed=2, metrics=reports(made))
    for key in base:
        distance = (found[key].double() - wanted[key].double()).norm()
        size = wanted[key].double().norm()
        assert distance <= (0.01 if key == "half" else 2e-3) * size, key
        assert found[key].dtype == base[key].dtype


@pytest.mark.parametrize("name", [name for name in ALL if takes_three(name)])
def test_where_nothing_is_clipped_it_is_the_method_bit_for_bit(name):
    base, made = clients()
    method = METHODS[name].factory()
    plain = merge(method, base, made, seed=2, metrics=reports(made))
    for wrapped in (clip_norm(method, quantile=1.0), clip_norm(method, max_norm=1e9)):
        found = merge(wrapped, base, made, seed=2, metrics=reports(made))
        assert all(torch.equal(found[key], plain[key]) for key in plain)


@pytest.mark.parametrize("method", [weighted_average(), ties()])
def test_threads_and_slices_do_not_matter(method):
    base, made = clients()
    models = [
        merge(clip_norm(method, quantile=0.3), base, made, threads=threads, slice_elements=elements)
        for threads, elements in ((1, 16384), (3, 16384), (2, 10**9))
    ]
    assert all(torch.equal(models[0][key], model[key]) for model in models[1:] for key in base)


def test_the_report_says_what_was_clipped():
    updates = tuple(Update(name, 1.0, MemorySource(model)) for name, model in (("a", LONG), ("b", SHORT)))
    report = execute(clip_norm("weighted_average", max_norm=2.0), Cohort(MemorySource(BASE), updates), MemorySink())
    assert report.found["clip_norm"] == {"bound": 2.0, "norms": (5.0, 1.0), "factors": (0.4, 1.0)}


def test_inside_a_server_optimizer_it_clips_too():
    method = server_optimizer(clip_norm(weighted_average(), max_norm=2.0), adam(correction="none", lr=1.0, tau=1.0))
    updates = tuple(Update(name, 1.0, MemorySource(model)) for name, model in (("a", LONG), ("b", LONG)))
    model, report = GlobalModel.of(BASE).merged(method, updates, seed=0, round_number=1)
    assert model.optimizer_state["m/w"].tolist() == pytest.approx([0.12, 0.0])
    assert report.found["clip_norm"]["factors"] == (0.4, 0.4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: clip_norm("ties"), "clip_norm: found max_norm=None, quantile=None, wanted one of them"),
        (lambda: clip_norm("ties", max_norm=1.0, quantile=0.5), "clip_norm: found max_norm=1.0, quantile=0.5, wanted"),
        (lambda: clip_norm("ties", max_norm=0.0), "parameter 'max_norm': found 0.0, wanted a number > 0"),
        (lambda: clip_norm("ties", quantile=1.5), "parameter 'quantile': found 1.5, wanted a number in [0, 1]"),
        (lambda: clip_norm("ties", quantile="half"), "parameter 'quantile': found 'half', wanted a number"),
        (lambda: clip_norm(server_optimizer("ties", "adam"), quantile=0.5), "clip_norm: found server_optimizer("),
        (lambda: clip_norm(clip_norm("ties", quantile=0.5), quantile=0.5), "clip_norm: found clip_norm("),
        (lambda: partition([("*", clip_norm("ties", quantile=0.5))], otherwise=ties()), "partition: found clip_norm("),
        (lambda: running_factor(clip_norm("weighted_average", quantile=0.5)), "running_sum: found clip_norm("),
    ],
)
def test_refused_at_construction(make, message):
    with pytest.raises(RecipeError) as caught:
        make()
    assert str(caught.value).startswith(message)


def test_a_recipe_has_it_and_comes_back(tmp_path):
    content = {"merge_method": "ties", "clip_norm": {"quantile": 0.5}, "server_optimizer": {"name": "adam"}}
    method = Recipe.from_dict(content).build()
    assert str(method) == str(server_optimizer(clip_norm(ties(), quantile=0.5), adam()))
    path = tmp_path / "recipe.yaml"
    path.write_text(Recipe.of(method).to_yaml())
    assert str(Recipe.load(path).build()) == str(method)
    assert (
        str(Recipe.from_config({"clip-norm": "{max_norm: 2}"}).build()) == "clip_norm(weighted_average(), max_norm=2.0)"
    )
    assert str(Recipe.from_config({"clip-norm": 2.5}).build()) == "clip_norm(weighted_average(), max_norm=2.5)"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"norm": 1}, "unknown key 'norm' in clip_norm; did you mean 'max_norm'?"),
        ({"quantile": 2}, "parameter 'quantile': found 2, wanted a number in [0, 1]"),
        ([1], "clip_norm: found [1], wanted {quantile: 0.5}"),
        (True, "clip_norm: found True, wanted {quantile: 0.5}"),
    ],
)
def test_a_recipe_with_a_wrong_one_is_refused(value, message):
    with pytest.raises(RecipeError) as caught:
        Recipe.from_dict({"merge_method": "ties", "clip_norm": value}).build()
    assert str(caught.value).startswith(message)
