from typing import Annotated

import torch
from torch import Tensor

from fl_merge.hyperparameters import Range, Scale
from fl_merge.method import Clients, merge_method
from fl_merge.ops.masks import consensus_delta
from fl_merge.shapes import Coordinate, Elements, Slice


def _enough(scale: float, threshold: float, at_least: int, normalize: bool) -> Clients:
    return Clients(at_least, why=f"an element is to be in {at_least} masks")


@merge_method(
    paper="Wang et al., 2024, arXiv:2405.07813",
    identity={"at_least": 1, "scale": 1.0, "normalize": True},
    clients=_enough,
)
def consensus(
    *,
    scale: Scale = 0.3,
    threshold: Annotated[float, Range(0.0)] = 0.4,
    at_least: Annotated[int, Range(1)] = 2,
    normalize: bool = False,
) -> Coordinate:
    """Keep what matters to at least two clients in the sum of the deltas: Consensus Task Arithmetic (TALL masks).

    merged = scale * sum tau_i;  mask_i = |tau_i| > threshold * |merged - tau_i|
    theta = theta_0 + (merged where at least `at_least` masks have the element, else 0)

    One client: with `at_least` 1 and scale 1 its model comes back; with more it is refused, since no element could be
    in two masks. N clients with one model give it back with `normalize`, but not as the raw sum.

    Args:
        scale: multiplies the sum, before the masks are taken.
        threshold: lambda, >= 0; the larger, the fewer elements are in a mask.
        at_least: k: in how many masks an element has to be; 1 erases what is nobody's, 2 also what is only one's.
        normalize: the deltas are weighted by the clients' shares; if false (as in the paper) they are added.

    Raises:
        MergeError: if the cohort has fewer than `at_least` clients.

    The authors' code takes the masks of the unscaled sum, and scales what they leave. From sums over clients it could
    be had in two exchanges, the second for the masks.
    """

    def combine(deltas_NS: Tensor, weights_N: Tensor, at: Slice) -> Tensor:
        factors_N = weights_N if normalize else torch.ones_like(weights_N)
        return consensus_delta(deltas_NS, factors_N, scale, threshold, at_least)

    compiled = Elements("consensus", (scale, threshold, at_least), weighted=normalize)
    return Coordinate(combine, stages=compiled)
