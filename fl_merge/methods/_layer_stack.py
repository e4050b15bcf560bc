from collections.abc import Mapping
from typing import Any

from fl_merge.errors import RecipeError
from fl_merge.method import Method, merge_method
from fl_merge.structures.common import MERGED_SOURCE, inner_method
from fl_merge.structures.layers import Layer, Stack, parse_ranges


@merge_method(
    paper="Goddard et al., 2024, arXiv:2403.13257 (mergekit: passthrough with slices)", base=False, merges="structures"
)
def layer_stack(
    *,
    layers: str = "merged[:]",
    embeddings: str = MERGED_SOURCE,
    head: str = "",
    repeats: bool = True,
    method: str | Method = "weighted_average",
    settings: Mapping[str, Any] | None = None,
) -> Stack:
    """Stack layers of the base and of clients, in any order, to a model of another depth (frankenmerging).

    `layers="base[0:24], 7[8:32] * 0.5"` takes layers 0 to 23 of the base, then 8 to 31 of client 7 with all their
    floating tensors halved; they are numbered anew. A source is "base", a client's id, or "merged": all clients merged
    by `method`. `[:]` is all layers. `fl_merge.structures.reconfigure` gives the config of the new model.

    Args:
        layers: ranges source[start:stop], with an optional scale, separated by commas.
        embeddings: source of what comes before the layers.
        head: source of the final norm and the head; by default that of the embeddings, as it has to be where the head
            is tied to them.
        repeats: if false, a layer that is taken twice from one source is refused.
        method: by which "merged" is made: a method for models by name, or itself.
        settings: its parameters.

    mergekit writes the same as `slices` under `merge_method: passthrough`.
    """
    ranges = parse_ranges("layer_stack", layers)
    inner = inner_method("layer_stack", method, settings)

    def chosen(depth: int) -> list[Layer]:
        taken = [layer for each in ranges for layer in each.layers("layer_stack", depth)]
        seen: set[tuple[str, int]] = set()
        for layer in taken:
            if not repeats and (layer.source, layer.number) in seen:
                raise RecipeError(
                    f"layer_stack: '{layers}' overlaps: layer {layer.number} of '{layer.source}' is taken twice, "
                    "wanted each once (repeats is false)"
                )
            seen.add((layer.source, layer.number))
        return taken

    return Stack("layer_stack", chosen, embeddings, head or embeddings, inner)
