from collections.abc import Mapping
from typing import Annotated, Any

from fl_merge.errors import RecipeError
from fl_merge.hyperparameters import Range
from fl_merge.method import Method, merge_method
from fl_merge.structures.common import MERGED_SOURCE, inner_method
from fl_merge.structures.experts import Router, Upcycled


@merge_method(
    paper="Komatsuzaki et al., 2022, arXiv:2212.05055; one expert a client: Sukhbaatar et al., 2024, arXiv:2403.07816",
    identity=None,
    base=False,
    merges="structures",
)
def moe_upcycle(
    *,
    copies: Annotated[int, Range(0)] = 0,
    top_k: Annotated[int, Range(1)] = 2,
    router: Router = "random",
    source: str = MERGED_SOURCE,
    method: str | Method = "weighted_average",
    settings: Mapping[str, Any] | None = None,
) -> Upcycled:
    """Make a mixture of experts of dense models: the clients' MLPs side by side, or one MLP copied (sparse upcycling).

    Attention, norms and embeddings are merged by `method`; a router is added to each layer. Llama and Mistral become
    Mixtral, Qwen2 and Qwen3 their mixtures, under the names of Hugging Face's checkpoints; a plain network with hidden1
    and hidden2 becomes experts.0.hidden1 ... and a router on its input. `fl_merge.structures.reconfigure` gives the
    config. With copies the mixture computes what the dense model does, whatever the router. Of one client a mixture of
    one expert is made, which computes what that client's model does (top_k=1).

    Args:
        copies: how many times the MLP of `source` is copied; 0 for one expert a client, in the cohort's order.
        top_k: how many experts a token is given to; their router weights are normalised to sum to 1.
        router: "random": rows of standard deviation 0.02; "zero": the first top_k experts until it is trained;
            "hidden": each client's mean hidden state less that of all, which clients send as the statistics
            `hidden/0`, `hidden/1`, ...: the mean over its tokens of what each layer's MLP reads.
        source: with copies, the model: "merged" (all clients merged by `method`), "base", or a client's id.
        method: by which everything but the experts is merged: a method for models by name, or itself. One that looks at
            whole models looks at these tensors.
        settings: its parameters.

    Qwen2's mixtures have an expert that every token passes: it gets 8 hidden units and starts silent.
    """
    if copies and top_k > copies:
        raise RecipeError(f"parameter 'top_k' of moe_upcycle: found {top_k}, wanted at most the {copies} experts")
    if copies and router == "hidden":
        raise RecipeError("parameter 'router' of moe_upcycle: found 'hidden' with copies, wanted one expert a client")
    if not copies and source != MERGED_SOURCE:
        raise RecipeError(f"parameter 'source' of moe_upcycle: found '{source}' without copies, whose MLP it would be")
    return Upcycled(copies, top_k, router, inner_method("moe_upcycle", method, settings), source)
