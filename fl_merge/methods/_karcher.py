from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from torch import Tensor

from fl_merge.hyperparameters import Range
from fl_merge.method import merge_method
from fl_merge.ops.interpolate import karcher_mean
from fl_merge.shapes import Span
from fl_merge.types import CohortSpec


@merge_method(paper="Karcher, 1977; of models: Wang et al., 2026, arXiv:2603.04972", base=False, passes="2")
def karcher(
    *,
    on: Literal["weights", "deltas"] = "weights",
    max_iterations: Annotated[int, Range(1)] = 10,
    tolerance: Annotated[float, Range(0.0)] = 1e-5,
) -> Span:
    """Take the mean of the clients' directions on the sphere, times their mean length.

    u <- exp_u(sum w_i log_u(theta_i / |theta_i|)) until the step is below `tolerance`;  theta = sum w_i |theta_i| * u

    The mean does not depend on an order of the clients, as folded arcs do. It is computed for each tensor, flattened.
    All iterations run on the N x N inner products, so their number costs nothing.

    Args:
        on: "weights": of whole weights (nearly parallel where clients share a base: then it is close to the weighted
            average); "deltas": of task vectors.
        max_iterations: at most so many steps, >= 1.
        tolerance: the last step's length in radians, >= 0.

    Where there is no mean direction (two opposite clients with equal shares, or one that is opposite to the mean) the
    weighted average is taken. mergekit weights all models equally, iterates in float32, and leaves out an opposite one.
    """

    def mean(spec: CohortSpec, gram_NN: Tensor | None) -> Sequence[float]:
        assert gram_NN is not None
        weights_N = torch.tensor(spec.weights_N, dtype=torch.float64)
        return karcher_mean(gram_NN, weights_N, max_iterations, tolerance).tolist()

    return Span(mean, gram=True, on=on)
