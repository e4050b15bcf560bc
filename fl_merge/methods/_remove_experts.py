from typing import Annotated

from fl_merge.errors import RecipeError
from fl_merge.hyperparameters import Range
from fl_merge.method import merge_method
from fl_merge.structures.common import BASE_SOURCE, MERGED_SOURCE
from fl_merge.structures.experts import Reduced


@merge_method(paper="Sukhbaatar et al., 2024, arXiv:2403.07816", identity=None, merges="structures")
def remove_experts(*, experts: str = "0", source: str = BASE_SOURCE, top_k: Annotated[int, Range(0)] = 0) -> Reduced:
    """Take experts out of a mixture, and their rows out of the routers: a client opts out of what it gave.

    A token's scores are a softmax over the experts that are left, so that their shares sum to 1 again. What one client
    sent is not looked at, nor is that of several: the mixture of `source` is changed.

    Args:
        experts: numbers of the experts that go, separated by commas, such as "1,3". With one expert a client
            (`moe_upcycle`) an expert's number is its client's place in the cohort.
        source: whose mixture it is: "base" or a client's id.
        top_k: how many experts a token is given to from now on; 0 for as many as before.
    """
    try:
        removed = tuple(sorted({int(part) for part in experts.split(",")}))
    except ValueError:
        removed = (-1,)
    if removed[0] < 0:
        raise RecipeError(
            f"parameter 'experts' of remove_experts: found {experts!r}, wanted numbers >= 0 separated by commas"
        )
    if source == MERGED_SOURCE:
        raise RecipeError("parameter 'source' of remove_experts: found 'merged', wanted base or a client's id")
    return Reduced(removed, source, top_k)
