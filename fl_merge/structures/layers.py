"""Models that are stacked out of layers of others: the shape of `layer_stack` and `depth_upscale`."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fl_merge.architectures import ARCHITECTURES, Architecture, architecture_of, depth_of, restacked
from fl_merge.errors import RecipeError
from fl_merge.method import Method
from fl_merge.structures.common import MERGED_SOURCE, Sources, made, shown
from fl_merge.types import CohortSpec, Output


@dataclass(frozen=True)
class Layer:
    """One layer of the new model.

    Args:
        source: "base", "merged" or a client's id.
        number: of the layer there.
        scale: multiplies its floating tensors.
        silent: whether the maps that write into the residual stream are zeros, so that the layer does nothing yet.
    """

    source: str
    number: int
    scale: float = 1.0
    silent: bool = False


@dataclass(frozen=True)
class Range:
    """`source[start:stop] * scale`: layers from start on, up to stop and without it; None for the model's own ends."""

    source: str
    start: int | None
    stop: int | None
    scale: float = 1.0

    def layers(self, owner: str, depth: int) -> list[Layer]:
        """The layers of a model of this depth.

        Raises:
            RecipeError: if it does not have all of them.
        """
        start, stop = self.start or 0, depth if self.stop is None else self.stop
        if not start < stop <= depth:
            raise RecipeError(f"{owner}: '{self}' is out of range, the model has layers 0 to {depth - 1}")
        return [Layer(self.source, number, self.scale) for number in range(start, stop)]

    def __str__(self) -> str:
        ends = ["" if end is None else str(end) for end in (self.start, self.stop)]
        return f"{self.source}[{':'.join(ends)}]" + (f" * {self.scale:g}" if self.scale != 1.0 else "")


_RANGE = re.compile(r"\s*([^\[\]*]+?)\s*\[\s*(\d*)\s*:\s*(\d*)\s*\]\s*(?:\*\s*(\S+)\s*)?")


def parse_ranges(owner: str, text: str) -> tuple[Range, ...]:
    """Ranges in the form `base[0:24], 7[8:32] * 0.5`.

    Raises:
        RecipeError: naming the part that is not of that form.
    """
    ranges = []
    for part in text.split(","):
        match = _RANGE.fullmatch(part)
        scale = 1.0
        try:
            scale = float(match[4]) if match and match[4] else 1.0
        except ValueError:
            match = None
        if match is None or not math.isfinite(scale):
            raise RecipeError(
                f"parameter 'layers' of {owner}: found {part.strip()!r}, wanted source[start:stop] such as "
                "base[0:24] or 7[8:32] * 0.5"
            )
        start, stop = (int(end) if end else None for end in (match[2], match[3]))
        if stop is not None and (start or 0) >= stop:
            raise RecipeError(f"parameter 'layers' of {owner}: found {part.strip()!r}, which has no layer")
        ranges.append(Range(match[1], start, stop, scale))
    return tuple(ranges)


def row_of(names: Sequence[str]) -> Architecture:
    """The row whose layers, attention and MLP the names have; else one with the layers that the names have."""
    known = set(names)
    for row in ARCHITECTURES.values():
        maps = [row.named(0, f"{part.replace('{e}', '0')}.weight") for part in (*row.attention, *row.mlp)]
        if known.issuperset(maps):
            return row
    return architecture_of(None, names)


@dataclass(frozen=True)
class Stack:
    """A model out of layers of the base, of clients and of the merged clients.

    Args:
        owner: the method's name, for errors.
        chosen: from a model's depth to the layers of the new one.
        embeddings, head: sources of what comes before the layers, and after.
        method: by which clients are merged.
    """

    owner: str
    chosen: Callable[[int], Sequence[Layer]]
    embeddings: str
    head: str
    method: Method

    def plan(self, spec: CohortSpec) -> Iterator[Output]:
        """What comes before the layers, the layers with new numbers, what comes after.

        Raises:
            RecipeError: if the tensors have no such layers, or the head is tied to embeddings of another source.
            MergeError: if there is no such client.
        """
        row = row_of(list(spec.tensors))
        depth = depth_of(row, spec.tensors)
        if depth == 0:
            raise RecipeError(f"{self.owner}: found no numbered layers among the tensors ({shown(spec.tensors)})")
        layers = self.chosen(depth)
        tensors: dict[int, list[str]] = {number: [] for number in range(depth)}
        outside: list[tuple[str, str]] = []
        for name in spec.tensors:
            place, number = row.place(name)
            if place == "layer":
                tensors[number].append(name)
            else:
                outside.append((self.embeddings if place == "before" else self.head, name))
        self._require_head(spec, row)
        merged = {name for source, name in outside if source == MERGED_SOURCE}
        merged |= {name for layer in layers if layer.source == MERGED_SOURCE for name in tensors[layer.number]}
        sources = Sources.of(self.owner, spec, self.method, merged)

        before = [name for _, name in outside if row.place(name)[0] == "before"]
        for source, name in outside:
            if name in before:
                yield sources.take(source, name, name)
        for number, layer in enumerate(layers):
            for name in tensors[layer.number]:
                rest = row.rest(name)
                if layer.silent and rest.rpartition(".")[0] in _outputs(row, rest):
                    yield made(row.named(number, rest), spec.tensors[name])
                else:
                    yield sources.take(layer.source, name, row.named(number, rest), layer.scale)
        for source, name in outside:
            if name not in before:
                yield sources.take(source, name, name)

    def _require_head(self, spec: CohortSpec, row: Architecture) -> None:
        """A head that is tied to the embeddings comes from where these come from."""
        tied = row.tied in spec.tensors and row.head is not None and row.head not in spec.tensors
        if tied and self.embeddings != self.head:
            raise RecipeError(
                f"{self.owner}: embeddings from '{self.embeddings}' and head from '{self.head}', but '{row.head}' is "
                f"tied to '{row.tied}': take both from one source"
            )

    def reconfigure(self, config: Mapping[str, Any], clients: int | None) -> dict[str, Any]:
        """The config with the new depth, and every list of one entry a layer."""
        row = architecture_of(config, ())
        depth = config.get(row.depth)
        if isinstance(depth, bool) or not isinstance(depth, int) or depth < 1:
            raise RecipeError(f"{self.owner}: the config's '{row.depth}' is {depth!r}, wanted the number of layers")
        layers = [(config, layer.number) for layer in self.chosen(depth)]
        return {**config, **dict(restacked(config, row, layers))}


def _outputs(row: Architecture, rest: str) -> tuple[str, ...]:
    """The maps that write into the residual stream, with the number of the expert that a tensor belongs to."""
    number = re.search(r"experts\.(\d+)\.", rest)
    return tuple(output.replace("{e}", number[1] if number else "0") for output in row.outputs)
