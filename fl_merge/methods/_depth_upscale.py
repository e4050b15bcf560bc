from collections.abc import Mapping
from typing import Annotated, Any

from fl_merge.errors import RecipeError, counted
from fl_merge.hyperparameters import Range
from fl_merge.method import Method, merge_method
from fl_merge.structures.common import MERGED_SOURCE, inner_method
from fl_merge.structures.layers import Layer, Stack


@merge_method(paper="SOLAR: Kim et al., 2023, arXiv:2312.15166", identity=None, base=False, merges="structures")
def depth_upscale(
    *,
    m: Annotated[int, Range(0)] | None = None,
    zero_init: bool = False,
    source: str = MERGED_SOURCE,
    method: str | Method = "weighted_average",
    settings: Mapping[str, Any] | None = None,
) -> Stack:
    """Make a deeper model of two copies of one: the first without its last m layers, the second without its first m.

    n layers become 2 (n - m): 32 with m = 8 become 48. It has to be trained further; for one client too it is not that
    client's model, but a deeper one, which with `zero_init` computes the same.

    Args:
        m: layers left out of each copy, at least 0 and below n; by default n / 4.
        zero_init: set to zero what the repeated layers of the second copy write into the residual stream (the output
            projections of attention and MLP): the deeper model then computes what the original does, until it is
            trained. Needs m <= n / 2, or layers of the original would be missing.
        source: the model that is copied: "merged" (all clients merged by `method`), "base", or a client's id.
        method: by which "merged" is made: a method for models by name, or itself.
        settings: its parameters.
    """
    inner = inner_method("depth_upscale", method, settings)

    def chosen(depth: int) -> list[Layer]:
        left_out = depth // 4 if m is None else m
        if left_out >= depth:
            raise RecipeError(
                f"depth_upscale: m is {left_out} and the model has {counted(depth, 'layer')}, wanted m below that"
            )
        if zero_init and 2 * left_out > depth:
            raise RecipeError(
                f"depth_upscale: zero_init with m = {left_out} of {counted(depth, 'layer')} would lose layers "
                f"{depth - left_out} to {left_out - 1}, wanted m <= {depth // 2}"
            )
        first = [Layer(source, number) for number in range(depth - left_out)]
        second = [
            Layer(source, number, silent=zero_init and number < depth - left_out) for number in range(left_out, depth)
        ]
        return first + second

    return Stack("depth_upscale", chosen, source, source, inner)
