from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from fl_merge.hyperparameters import Range
from fl_merge.method import merge_method
from fl_merge.ops.robust import geometric_median as weiszfeld
from fl_merge.shapes import Span
from fl_merge.types import CohortSpec


@merge_method(paper="Pillutla et al., 2019, arXiv:1912.13445", passes="2", base=False)
def geometric_median(
    *,
    iterations: Annotated[int, Range(1)] = 4,
    smoothing: Annotated[float, Range(0.0, open_low=True)] = 1e-5,
) -> Span:
    """Find the model with the smallest sum of distances to the clients' models (RFA).

    theta <- sum b_i theta_i / sum b_i,  b_i = w_i / max(smoothing, |theta - theta_i|),  from the weighted average on

    The distances are those of whole models. It holds as long as bad clients have less than half of all weight (their
    numbers of examples are what they say they are), for any number of clients: one client is never outvoted, and of
    two the one with more weight wins.

    Args:
        iterations: how often, >= 1; the paper takes 4, which is near the median but not at it. All run on the N x N
            inner products, so their number costs nothing.
        smoothing: a distance, > 0, in units of the weights; nearer clients do not count for more.
    """

    def median(spec: CohortSpec, gram_NN: Tensor | None) -> Sequence[float]:
        assert gram_NN is not None
        return weiszfeld(gram_NN, torch.tensor(spec.weights_N, dtype=torch.float64), iterations, smoothing).tolist()

    return Span(median, gram=True, scope="model")
