"""`lora_merge` with every method of the registry, in all three spaces; a new method is in by being registered.

Each is either refused by name, or
- gives back one client, and several with one adapter, at the settings that its entry names as its identity;
- equals itself on the dense matrices of its space. This is what is held of those that have no such settings
  (`identity=None`, with the reason in the docstring) and of all others at every other setting.
"""

import re

import pytest
import torch
from battery import identity_variants, settings_text, takes, variants
from random_adapters import adapter, distance, of_adapter, products

from fl_merge import METHODS, RecipeError, UpdateError, build, merge
from fl_merge.adapters import merge_adapters
from fl_merge.method import sends
from fl_merge.ops.lowrank import Factors, core_basis, knots_basis
from fl_merge.shapes import Coordinate, Span
from fl_merge.types import CohortSpec, TensorSpec

SPACES = ("full", "knots", "core")
SIZES = {"layers.0.q": (12, 9), "layers.0.up": (16, 9), "layers.1.down": (9, 14)}
PATTERNS = [
    {"use_rslora": True},
    {"ranks": {"layers.0.up": 5}, "alpha_pattern": {r"layers\.1\.down": 2}},
    {"use_rslora": True, "ranks": {"layers.0.up": 2}, "alpha_pattern": {"up": 16}},
]
ADAPTERS = [adapter("x", 1, rank=3, sizes=SIZES, **settings) for settings in PATTERNS]


def why_refused(entry, settings):
    """What the refusal must say of a method that cannot run on products; None for all others."""
    if entry.merges != "models":
        return f"found '{entry.name}', wanted a method for models"
    statistics = [kind for kind in entry.sends if kind != "steps"]
    if statistics:
        return rf"found '{entry.name}', which needs clients' statistics \({', '.join(statistics)}\)"
    method = build(entry.name, **settings)
    count = method.clients.nearest(3)
    tensors = {name: TensorSpec((4, 3), torch.float32) for name in ("a.weight", "b.weight")}
    metrics = ({"local-steps": 1},) * count
    spec = CohortSpec(tensors, tuple(map(str, range(count))), (1 / count,) * count, 0, metrics_N=metrics)
    elementwise = [output for output in method.plan(spec) if isinstance(output.compute, Coordinate)]
    if any(len(output.scope.names) > 1 for output in elementwise):
        return rf"{re.escape(str(method))} surveys the whole model"
    return None


def cases(settings_of):
    """Method and settings of those that are taken."""
    return [
        pytest.param(entry.name, settings, id=f"{entry.name}-{settings_text(settings)}")
        for entry in METHODS.values()
        if not [kind for kind in entry.sends if kind != "steps"] and entry.merges == "models"
        for settings in settings_of(entry)
        if why_refused(entry, settings) is None
    ]


REFUSED = [
    pytest.param(entry.name, settings, id=f"{entry.name}-{settings_text(settings)}")
    for entry in METHODS.values()
    for settings in ([{}] if entry.merges != "models" or entry.sends else [*variants(entry), *identity_variants(entry)])
    if why_refused(entry, settings) is not None
]


def run(name, settings, space, adapters, weights, **more):
    metrics = {client: {"local-steps": 7} for client in adapters}
    method = build("lora_merge", method=name, settings=settings, space=space, **more)
    return products(merge_adapters(method, adapters, weights, seed=3, metrics=metrics, threads=1).tensors)


@pytest.mark.parametrize(("name", "settings"), REFUSED)
def test_what_cannot_run_on_products_is_refused_by_name_before_a_tensor_is_seen(name, settings):
    for space in SPACES:
        with pytest.raises(RecipeError, match=rf"lora_merge: .*{why_refused(METHODS[name], settings)}"):
            build("lora_merge", method=name, settings=settings, space=space)


def test_every_method_is_taken_or_refused():
    taken = {case.values[0] for case in cases(variants)}
    refused = {case.values[0] for case in REFUSED}
    assert taken | refused == set(METHODS)
    assert {name for name in taken & refused if "scope" not in METHODS[name].parameters} == set()
    identities = {case.values[0] for case in cases(identity_variants)}
    assert {name for name in taken if METHODS[name].identity is not None} == identities
    for name in taken - identities:
        assert "one client" in METHODS[name].description.lower(), "the entry has no identity, and does not say why"


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize(("name", "settings"), cases(identity_variants))
def test_one_client_and_identical_clients_give_that_adapter(name, settings, space):
    """With rsLoRA, rank_pattern and alpha_pattern; to 1e-6 over all modules, whatever the clients' weights."""
    bounds = takes(METHODS[name], settings)
    for one in ADAPTERS:
        for count in sorted({bounds.nearest(1), bounds.nearest(3)}):
            clients = {str(client): one for client in range(count)}
            weights = {client: 1.0 + int(client) for client in clients}
            found = run(name, settings, space, clients, weights)
            assert distance(found, of_adapter(one)) < 1e-6, f"{count} clients, {one.config.raw}"


def dense(method, space, adapters, weights):
    """The method on plain matrices: the products, or what they are in the space."""
    parts = {client: of_adapter(each) for client, each in adapters.items()}
    metrics = {client: {"local-steps": 7} for client in adapters}

    def merged(matrices):
        base = {f"{name}.weight": torch.zeros_like(first) for name, first in matrices[next(iter(matrices))].items()}
        models = {client: {f"{name}.weight": m for name, m in each.items()} for client, each in matrices.items()}
        return merge(method, base, models, weights, seed=3, metrics=metrics, threads=1)

    by_models = isinstance(method.shape, Span) and method.shape.scope == "model"
    if space == "full" or by_models:  # coefficients of whole models are those of the products in every space
        found = merged({client: {name: p.float() for name, p in each.items()} for client, each in parts.items()})
        return {name.removesuffix(".weight"): tensor.double() for name, tensor in found.items()}
    small, left, right = {client: {} for client in parts}, {}, {}
    for name in next(iter(parts.values())):
        factors = [factors_of(adapters[client], name) for client in parts]
        if space == "knots":
            left[name], each_PKI = knots_basis(factors)
            right[name] = torch.eye(each_PKI.shape[2], dtype=torch.float64)
        else:
            left[name], each_PKI, right[name] = core_basis(factors)
        for client, matrix in zip(parts, each_PKI, strict=True):
            small[client][name] = matrix.float()
    found = merged(small)
    return {name: left[name] @ found[f"{name}.weight"].double() @ right[name] for name in left}


def factors_of(adapter, module):
    a, b = (adapter.plain.read(f"{module}.lora_{which}.weight").double() for which in "AB")
    return Factors(b, a)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize(("name", "settings"), cases(variants))
def test_it_is_the_method_on_the_matrices_of_its_space(name, settings, space):
    """For clients that differ in values, ranks and scalings; nothing is cut, so that all of the result is seen."""
    method = build(name, **settings)
    few = [adapter(str(i), 5 + i, rank=2 + i % 3, alpha=4 + i, sizes=SIZES) for i in range(method.clients.nearest(3))]
    clients = {each.name: each for each in few}
    weights = {client: 1.0 + int(client) for client in clients}
    found = run(name, settings, space, clients, weights, rank=16)
    assert distance(found, dense(method, space, clients, weights)) < 1e-5


def test_what_clients_report_is_asked_of_them_through_lora_merge():
    """FedNova's number of steps: named by the method inside, and missed by name."""
    method = build("lora_merge", method="fednova")
    assert sends(method) == ("steps",)
    clients = {"a": ADAPTERS[0], "b": ADAPTERS[0]}
    with pytest.raises(UpdateError, match="client 'b': metric 'local-steps' is missing"):
        merge_adapters(method, clients, metrics={"a": {"local-steps": 3}})
