"""The properties that every merge method has, whoever wrote it. One function a property; `PROPERTIES` has them all.

A property is called with a registered method's entry and the settings to try it with.
"""

import inspect
import math
import re
import types
import typing

import pytest
import torch

from fl_merge import METHODS, FlMergeError, MergeError, RecipeError, build, merge
from fl_merge.hyperparameters import Range
from fl_merge.method import Clients, MethodEntry
from fl_merge.types import TensorSpec

HUGE = 10**9
USUAL = 3  # how many clients take part where the method does not say otherwise
WEIGHTS = {"7": 3.0, "12": 1.0, "100": 5.5, "101": 2.0, "x": 1.5, "y": 4.0, "z": 0.5}
"""Of all clients there are, in the cohort's order, which is not that of the alphabet."""


# --- models ----------------------------------------------------------------------------------------------------------


def base_model() -> dict[str, torch.Tensor]:
    """Every kind of tensor there is; the largest are cut into slices."""
    draw = torch.Generator().manual_seed(1)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(shape, generator=draw).to(dtype)

    return {
        "embed.weight": normal(250, 200),
        "layers.0.weight": normal(211, 157, dtype=torch.float64),
        "layers.0.bias": normal(157),
        "layers.1.weight": normal(130, 129, dtype=torch.bfloat16),
        "conv.weight": normal(4, 3, 5, 5, dtype=torch.float16),
        "turned.weight": normal(40, 60).T,
        "every_other": normal(64)[::2],
        "temperature": normal(),
        "one": normal(1),
        "nothing": normal(0, 3),
        "half.nothing": normal(0, dtype=torch.bfloat16),
        "positions": torch.arange(9),
        "mask": torch.tensor([[True, False], [False, True]]),
        "norm.num_batches_tracked": torch.tensor(3),
    }


def moved(base: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """A client's model: floating tensors moved, but for some elements; non-contiguous ones stay so.

    A part of each step is common to all clients, as it is where they learn the same.
    """
    draw, common_draw = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(2)
    model = {}
    for name, tensor in base.items():
        if tensor.is_floating_point():
            common = torch.randn(tensor.shape, generator=common_draw)
            step = (torch.randn(tensor.shape, generator=draw) + common) * 0.07
            step[torch.rand(tensor.shape, generator=draw) < 0.1] = 0.0
            new = tensor.clone(memory_format=torch.preserve_format)
            model[name] = new.copy_((tensor.double() + step).to(tensor.dtype))
        else:
            model[name] = tensor.clone()
    model["norm.num_batches_tracked"] = torch.tensor(seed)
    return model


BASE = base_model()
CLIENTS = {client_id: moved(BASE, 10 + i) for i, client_id in enumerate(WEIGHTS)}


def takes(entry: MethodEntry, settings: dict) -> Clients:
    """How many clients the method takes with these settings; no more than there are."""
    found = entry.factory(**settings).clients
    assert found.fewest <= len(CLIENTS), "the battery needs more clients for this method"
    return found


def usual(entry: MethodEntry, settings: dict) -> list[str]:
    """The clients that take part: three, or as near to it as the method can have."""
    return list(CLIENTS)[: takes(entry, settings).nearest(USUAL)]


def counts(entry: MethodEntry, settings: dict, wanted: tuple[int, ...]) -> list[int]:
    """Those of the wanted numbers of clients that the method takes, and the fewest that it takes."""
    bounds = takes(entry, settings)
    return sorted({bounds.fewest, *(count for count in wanted if count in bounds)})


def bits(model: dict[str, torch.Tensor]) -> dict[str, bytes]:
    """The bytes of every tensor."""
    return {name: tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for name, tensor in model.items()}


def ulp(magnitude: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The distance to the next number of that dtype, in float64."""
    about = torch.finfo(dtype)
    exponent = torch.frexp(magnitude.double()).exponent
    return (about.eps * torch.exp2(exponent.double() - 1)).clamp(min=about.smallest_normal * about.eps)


def assert_within_ulps(found: dict, wanted: dict, base: dict, ulps: float) -> None:
    """Floating tensors are within so many ulps of max(|base|, |wanted|); the rest is equal."""
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        if not tensor.is_floating_point():
            assert torch.equal(found[name], tensor), name
            continue
        largest = torch.maximum(base[name].abs(), tensor.abs())
        error = (found[name].double() - tensor.double()).abs() / ulp(largest, tensor.dtype)
        assert tensor.numel() == 0 or error.max() <= ulps, f"{name}: {float(error.max())} ulps"


# --- settings --------------------------------------------------------------------------------------------------------


def choices(annotation: object) -> tuple:
    """All values of a parameter that has few: a Literal's, a bool's."""
    if typing.get_origin(annotation) is typing.Literal:
        return typing.get_args(annotation)
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return tuple(choice for option in typing.get_args(annotation) for choice in choices(option))
    return (True, False) if annotation is bool else ()


def variants(entry: MethodEntry) -> list[dict]:
    """The defaults, then each other choice of each parameter that has a few."""
    found: list[dict] = [{}]
    for name, parameter in entry.parameters.items():
        found += [{name: choice} for choice in choices(parameter.annotation) if choice != parameter.default]
    return found


def identity_variants(entry: MethodEntry) -> list[dict]:
    """The settings that give back one client's model, with each choice of each Literal parameter."""
    if entry.identity is None:
        return []
    literals = [v for v in variants(entry) if not any(isinstance(value, bool) for value in v.values())]
    return [variant | dict(entry.identity) for variant in literals]


def bad_values(annotation: object) -> list:
    """Values that a parameter of that annotation must refuse."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        bad = bad_values(arguments[0])
        for allowed in (note for note in arguments[1:] if isinstance(note, Range)):
            if allowed.low > -math.inf:
                bad += [allowed.low - 1, math.nextafter(allowed.low, -math.inf)]
                bad += [allowed.low] if allowed.open_low else []
            if allowed.high < math.inf:
                bad += [allowed.high + 1, math.nextafter(allowed.high, math.inf)]
        return bad
    if origin is typing.Literal:
        return ["no such choice", None, 1, True, [arguments[0]]]
    if origin in (typing.Union, types.UnionType):
        bad = [value for option in arguments if option is not type(None) for value in bad_values(option)]
        return [value for value in bad if value is not None and not (bool in arguments and isinstance(value, bool))]
    if inspect.isclass(origin) and issubclass(origin, typing.Mapping):
        inner = [value for value in bad_values(arguments[1]) if value is not None]
        return [3.0, "text", ["a"], {1.5: 1.0}, *({"client": value} for value in inner)]
    table = {
        float: [math.nan, math.inf, -math.inf, 10**400, "0.5", True, None, [0.5]],
        int: [1.5, "3", True, None, math.nan],
        bool: [1, 0, "true", None, 0.0],
        str: [1, None],
    }
    return list(table.get(annotation, []))


def settings_text(settings: dict) -> str:
    """For the name of a test."""
    return ",".join(f"{key}={value}" for key, value in settings.items()) or "defaults"


def refused_counts(entry: MethodEntry, settings: dict) -> list[int]:
    """The numbers of clients just outside of those that the method takes."""
    bounds = takes(entry, settings)
    return [bounds.fewest - 1] * (bounds.fewest > 1) + ([bounds.most + 1] if bounds.most is not None else [])


# --- properties of the numbers ---------------------------------------------------------------------------------------


def run(entry: MethodEntry, settings: dict, base=BASE, clients=None, weights=WEIGHTS, **options) -> dict:
    if clients is None:
        clients = {client_id: CLIENTS[client_id] for client_id in usual(entry, settings)}
    weights = {client_id: weights[client_id] for client_id in clients}
    if {"gram", "fisher"} & set(entry.sends):
        options["statistics"] = {client_id: made_up_statistics(entry.sends, client_id) for client_id in clients}
    if "steps" in entry.sends:
        options["metrics"] = {client: {"local-steps": 7} for client in clients}
    return merge(entry.factory(**settings), base, clients, weights, seed=5, **options)


def made_up_statistics(kinds: tuple[str, ...], client_id: str) -> dict[str, torch.Tensor]:
    """Of the shapes that a client would send for the base, of fewer examples than most layers have inputs."""
    seed = sum(client_id.encode())
    draw = torch.Generator().manual_seed(seed)
    found = {"count": torch.tensor(20.0 + seed)}
    for name, tensor in BASE.items():
        if "fisher" in kinds and tensor.is_floating_point():
            found[f"fisher/{name}"] = torch.rand(tensor.shape, generator=draw)
        if "gram" in kinds and name.endswith(".weight") and tensor.dim() > 1:
            inputs = torch.randn(30, tensor[0].numel(), generator=draw)
            found[f"gram/{name.removesuffix('.weight')}"] = inputs.T @ inputs
    return found


def order_threads_and_slices_do_not_matter(entry: MethodEntry, settings: dict) -> None:
    """Any order of arrival, number of threads and size of slices gives the same bytes, and so does a second run."""
    wanted = bits(run(entry, settings, threads=1, slice_elements=HUGE))
    here = usual(entry, settings)
    orders = [here[::-1], here[1:] + here[:1], here[:1] + here[:0:-1], here]
    ways = [(1, 16384), (2, 32768), (3, 16384), (3, HUGE)]
    for order, (threads, slice_elements) in zip(orders, ways, strict=True):
        arrived = {client_id: CLIENTS[client_id] for client_id in order}
        found = bits(run(entry, settings, clients=arrived, threads=threads, slice_elements=slice_elements))
        assert list(found) == list(wanted)
        different = [name for name in wanted if found[name] != wanted[name]]
        assert not different, f"{different} with {threads} threads, slices of {slice_elements}, order {order}"
    assert bits(run(entry, settings)) == bits(run(entry, settings)) == wanted


def outputs_are_as_planned_and_finite(entry: MethodEntry, settings: dict) -> None:
    """Names in the base's order, its shapes and dtypes; integers are the base's, a count of batches the largest."""
    result = run(entry, settings)
    assert [(n, TensorSpec.of(t)) for n, t in result.items()] == [(n, TensorSpec.of(t)) for n, t in BASE.items()]
    assert all(torch.isfinite(tensor).all() for tensor in result.values())
    assert torch.equal(result["positions"], BASE["positions"])
    assert torch.equal(result["mask"], BASE["mask"])
    assert result["norm.num_batches_tracked"] == 9 + len(usual(entry, settings))
    still = [n for n, t in BASE.items() if t.is_floating_point() and t.numel() > 1 and torch.equal(t, result[n])]
    assert not still, "the clients moved these tensors and the merged model did not"


def inputs_are_not_modified(entry: MethodEntry, settings: dict) -> None:
    """Values in, values out: and no output shares memory with an input."""
    before = bits(BASE), {client_id: bits(client) for client_id, client in CLIENTS.items()}
    result = run(entry, settings)
    for tensor in result.values():
        tensor.zero_()
    assert before == (bits(BASE), {client_id: bits(client) for client_id, client in CLIENTS.items()})


def no_movement_gives_the_base(entry: MethodEntry, settings: dict) -> None:
    """If every client sends the base, the merged model is the base bit for bit, however many there are."""
    for count in counts(entry, settings, (1, 2, 3, 7, 11)):
        clients = {str(i): BASE for i in range(count)}
        weights = {str(i): 1.0 + 0.37 * i for i in range(count)}
        assert bits(run(entry, settings, clients=clients, weights=weights)) == bits(BASE), f"{count} clients"


def other_numbers_of_clients_are_refused(entry: MethodEntry, settings: dict) -> None:
    """One client fewer than the method takes, or one more: an error that names the method and says what it wants."""
    for count in refused_counts(entry, settings):
        clients = {str(i): CLIENTS["12"] for i in range(count)}
        weights = dict.fromkeys(clients, 1.0)
        with pytest.raises(MergeError, match=rf"^{entry.name}\(.*\): found {count} clients?, wanted "):
            run(entry, settings, clients=clients, weights=weights)


def one_client_gives_that_client(entry: MethodEntry, settings: dict) -> None:
    """To the last place of the larger of base and client: the delta is rounded once."""
    for client_id, client in CLIENTS.items():
        result = run(entry, settings, clients={client_id: client}, weights={client_id: 17.0})
        assert_within_ulps(result, client, BASE, 1)


def identical_clients_give_that_model(entry: MethodEntry, settings: dict) -> None:
    """Several clients with the same model, whatever their weights."""
    for count in counts(entry, settings, (2, 5)):
        clients = {str(i): CLIENTS["12"] for i in range(count)}
        weights = {str(i): 1.0 + i for i in range(count)}
        assert_within_ulps(run(entry, settings, clients=clients, weights=weights), CLIENTS["12"], BASE, 4)


# --- properties of the settings --------------------------------------------------------------------------------------


def bad_settings_are_refused_at_construction(entry: MethodEntry) -> None:
    """Wrong type, not finite, out of range or no choice: refused by name before any tensor is seen."""
    required = {n: p for n, p in entry.parameters.items() if p.default is inspect.Parameter.empty}
    assert not required, "every parameter has a default, so that a method's name alone is a recipe"
    for name, parameter in entry.parameters.items():
        bad = bad_values(parameter.annotation)
        assert bad, f"parameter '{name}': annotation {parameter.annotation} says nothing about its values"
        for value in bad:
            with pytest.raises(RecipeError) as caught:
                entry.factory(**{name: value})
            assert str(caught.value).startswith(f"parameter '{name}' of {entry.name}"), value
            assert ", wanted " in str(caught.value)
            with pytest.raises(RecipeError):
                build(entry.name, **{name: value})


def unknown_settings_are_refused_with_the_nearest(entry: MethodEntry) -> None:
    """A misspelt parameter is not ignored; settings are given by name."""
    with pytest.raises(RecipeError, match=rf"^{entry.name} has no parameter 'zzqq' \(known: "):
        entry.factory(zzqq=1)
    for name in entry.parameters:
        typo = name[:-2] + name[-1]
        if typo == name:  # of one letter, to which nothing is near
            continue
        with pytest.raises(RecipeError) as caught:
            entry.factory(**{typo: 1})
        assert str(caught.value).startswith(f"{entry.name} has no parameter '{typo}'; did you mean '{name}'? (known: ")
    with pytest.raises(RecipeError, match=f"^{entry.name} takes its settings by name, such as {entry.name}"):
        entry.factory(0.5)


def it_explains_itself(entry: MethodEntry) -> None:
    """A first line, a paper with its year and where to find it, every parameter described; settings shown in full."""
    assert re.fullmatch(r"[A-Z].{10,110}\.", entry.summary), entry.summary
    assert re.search(r"\b(19|20)\d\d\b", entry.paper), entry.paper
    assert re.search(r"arXiv:\d{4}\.\d{4,5}\b|\b[A-Z]{4,}\b", entry.paper), entry.paper
    for name in entry.parameters:
        assert re.search(rf"^ +([a-z_]+, )*{name}(, [a-z_]+)*: ", entry.description, re.MULTILINE), name
    defaults = ", ".join(f"{name}={p.default!r}" for name, p in entry.parameters.items())
    assert str(entry.factory()) == f"{entry.name}({defaults})"
    assert entry.identity is not None or "one client" in entry.description


def it_is_in_the_registry(entry: MethodEntry) -> None:
    """By name, with an unknown name answered by the nearest one."""
    assert METHODS[entry.name] is entry
    assert build(entry.name).name == entry.name
    typo = entry.name[:-2] + entry.name[-1]
    if typo not in METHODS:
        with pytest.raises(FlMergeError, match=rf"^unknown merge method '{typo}'; did you mean '\w+'\? \(known: "):
            build(typo)


NUMBERS = [
    order_threads_and_slices_do_not_matter,
    outputs_are_as_planned_and_finite,
    inputs_are_not_modified,
    no_movement_gives_the_base,
]
SETTINGS = [
    bad_settings_are_refused_at_construction,
    unknown_settings_are_refused_with_the_nearest,
    it_explains_itself,
    it_is_in_the_registry,
]


def cases(entry: MethodEntry) -> list[tuple]:
    """Every property with every setting to try it with: (property, arguments, name)."""
    found: list[tuple] = []
    if entry.merges != "models":  # their numbers have tests of their own: tests/adapters, tests/structures
        return [(check, (entry,), "") for check in SETTINGS]
    for settings in variants(entry):
        found += [(check, (entry, settings), settings_text(settings)) for check in NUMBERS]
        if refused_counts(entry, settings):
            found.append((other_numbers_of_clients_are_refused, (entry, settings), settings_text(settings)))
    for settings in identity_variants(entry):
        found.append((identical_clients_give_that_model, (entry, settings), settings_text(settings)))
        if 1 in takes(entry, settings):
            found.append((one_client_gives_that_client, (entry, settings), settings_text(settings)))
    found += [(check, (entry,), "") for check in SETTINGS]
    return found
