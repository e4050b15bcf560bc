"""Which tensors the merged model has, and of which tensors of which models each is made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from fl_merge.architectures import Architecture, Place
from fl_merge.errors import RecipeError, TensorMismatchError, counted
from fl_merge.offline.config import OfflineRecipe, Ref, Slice, Source
from fl_merge.offline.models import Model
from fl_merge.types import TensorSpec


@dataclass(frozen=True)
class Target:
    """One tensor of the merged model.

    Args:
        name: in the merged model.
        spec: as the models have it.
        slice: the number of the slice that it belongs to; its sources are those of the tensor.
        t: how far through the slice's layers it is, for gradients.
        names: by source, its name in that model.
        stored: by source, the name under which that model's file has it.
        layer: its layer in the merged model; None outside of layers.
    """

    name: str
    spec: TensorSpec
    slice: int
    t: float
    names: tuple[str, ...]
    stored: tuple[str, ...]
    layer: int | None


@dataclass(frozen=True)
class Layout:
    """The merged model's tensors, and the slices with the base among their sources.

    Args:
        slices: the recipe's, with layer ranges filled in.
        targets: in the order of the model: embeddings, layers, norm and head.
        notices: what is left out.
    """

    slices: tuple[Slice, ...]
    targets: tuple[Target, ...]
    notices: tuple[str, ...]

    def layers(self) -> list[tuple[Ref, int]]:
        """For each layer of the merged model, the model and the layer that its config is like: the first source's."""
        first = [part.sources[0] for part in self.slices]
        return [(source.model, layer) for source in first for layer in range(*(source.layers or (0, 0)))]


def lay_out(recipe: OfflineRecipe, models: Mapping[Ref, Model]) -> Layout:
    """The layout of a recipe's models.

    Raises:
        RecipeError: for a layer that is not there, or models of unlike depth.
        TensorMismatchError: if a model lacks a tensor or has another shape.
    """
    slices = recipe.slices if recipe.stacked else (_whole(recipe, models),)
    for number, part in enumerate(slices, start=1):
        for source in part.sources:
            depth, layers = models[source.model].depth, source.layers or (0, 0)
            if layers[1] > depth:
                raise RecipeError(
                    f"slice {number}: layer_range {list(layers)}: model '{source.model}' has {counted(depth, 'layer')}"
                )
    targets = tuple(_targets(slices, models, recipe.stacked))
    if not targets:
        raise RecipeError(f"model '{recipe.donor}' has no tensors")
    derived = {row.rest(name) for model, row in _rows(models) for name in model.source.specs() if row.is_derived(name)}
    notices = [f"left out, as they are constants: {', '.join(sorted(derived))} of each layer"] if derived else []
    if recipe.stacked and len(slices[-1].sources) > len(slices[0].sources):
        notices.append(
            "norm and head are made of all sources of the last slice; mergekit takes as many as the first has"
        )
    return Layout(tuple(slices), targets, tuple(notices))


def _rows(models: Mapping[Ref, Model]) -> Iterator[tuple[Model, Architecture]]:
    for model in models.values():
        yield model, model.architecture


def _whole(recipe: OfflineRecipe, models: Mapping[Ref, Model]) -> Slice:
    """All layers of each model, the base added at the end if it is not among them, as in mergekit."""
    [part] = recipe.slices
    sources = list(part.sources)
    if recipe.base_model is not None and recipe.base_model not in {source.model for source in sources}:
        sources.append(Source(recipe.base_model))
    depth = models[recipe.donor].depth
    for source in sources:
        if models[source.model].depth != depth:
            raise RecipeError(
                f"model '{source.model}' has {counted(models[source.model].depth, 'layer')}, '{recipe.donor}' has "
                f"{depth}; slices merge some of a model's layers"
            )
    return Slice(tuple(Source(s.model, (0, depth), s.parameters) for s in sources), part.base_model, part.parameters)


def _targets(
    slices: Sequence[Slice],
    models: Mapping[Ref, Model],
    stacked: bool,
) -> Iterator[Target]:
    for number in (0, len(slices) - 1):
        if number == 0:
            yield from _outside(0, slices[0], models, "before")
            yield from _inside(slices, models)
        if number == len(slices) - 1:
            yield from _outside(number, slices[number], models, "after")
            break
    if not stacked:
        _refuse_more(slices[0], models)


def _outside(
    number: int,
    part: Slice,
    models: Mapping[Ref, Model],
    place: Place,
) -> Iterator[Target]:
    first = models[part.sources[0].model]
    for name in first.source.specs():
        if first.architecture.place(name)[0] == place:
            yield _target(name, number, part, models, 0.0, [name] * len(part.sources), None)


def _inside(slices: Sequence[Slice], models: Mapping[Ref, Model]) -> Iterator[Target]:
    layer = 0
    for number, part in enumerate(slices):
        owned = [models[source.model] for source in part.sources]
        starts = [source.layers[0] for source in part.sources if source.layers]
        length = part.sources[0].layers[1] - starts[0] if part.sources[0].layers else 0
        output = models[slices[0].sources[0].model].architecture
        by_layer: dict[int, list[str]] = {}
        for name in owned[0].source.specs():
            place, at = owned[0].architecture.place(name)
            if place == "layer" and not owned[0].architecture.is_derived(name):
                by_layer.setdefault(at, []).append(name)
        for step in range(length):
            t = step / (length - 1) if length > 1 else 1.0
            for name in by_layer.get(starts[0] + step, []):
                rest = owned[0].architecture.rest(name)
                names = [
                    model.architecture.named(start + step, rest) for model, start in zip(owned, starts, strict=True)
                ]
                merged = output.named(layer, rest)
                yield _target(merged, number, part, models, t, names, layer)
            layer += 1


def _target(
    name: str,
    number: int,
    part: Slice,
    models: Mapping[Ref, Model],
    t: float,
    names: Sequence[str],
    layer: int | None,
) -> Target:
    stored = []
    for source, known in zip(part.sources, names, strict=True):
        found = models[source.model].stored_as(known)
        if found is None:
            raise TensorMismatchError(f"is missing in model '{source.model}'", tensor=known)
        stored.append(found)
    specs = [models[source.model].source.specs()[found] for source, found in zip(part.sources, stored, strict=True)]
    first = part.sources[0].model
    for source, spec, known in zip(part.sources, specs, names, strict=True):
        if spec.shape != specs[0].shape:
            vocabulary = len(spec.shape) == 2 and spec.shape[1] == specs[0].shape[1] and layer is None
            hint = "; models of different vocabularies cannot be merged here" if vocabulary else ""
            raise TensorMismatchError(
                f"shape {spec.shape} in model '{source.model}', '{first}' has {specs[0].shape}{hint}", tensor=known
            )
        if spec.is_floating != specs[0].is_floating or spec.dtype.is_complex:
            raise TensorMismatchError(
                f"dtype {spec.dtype} in model '{source.model}', '{first}' has {specs[0].dtype}", tensor=known
            )
    return Target(name, specs[0], number, t, tuple(names), tuple(stored), layer)


def _refuse_more(part: Slice, models: Mapping[Ref, Model]) -> None:
    """Refuse models with tensors that the first one lacks: nothing of a model is dropped without a word."""
    first = models[part.sources[0].model]
    for source in part.sources[1:]:
        model = models[source.model]
        for name in model.source.specs():
            place, layer = model.architecture.place(name)
            rest = model.architecture.rest(name) if place == "layer" else ""
            wanted = first.architecture.named(layer, rest) if place == "layer" else name
            known = first.stored_as(wanted) is not None or model.architecture.is_derived(name)
            if not known and not _repeats(model, name):
                raise TensorMismatchError(
                    f"is in model '{source.model}' and not in '{part.sources[0].model}'", tensor=name
                )


def _repeats(model: Model, name: str) -> bool:
    """Whether a tensor is a head that the model stores though it is tied to the embedding."""
    return name == model.architecture.head and bool((model.config or {}).get("tie_word_embeddings"))
