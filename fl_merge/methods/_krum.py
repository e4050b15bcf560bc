from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from fl_merge.hyperparameters import Range
from fl_merge.method import Clients, merge_method
from fl_merge.ops.robust import krum_scores, mean_of_best
from fl_merge.shapes import Span
from fl_merge.types import CohortSpec


def enough_for_krum(f: int, **others: object) -> Clients:
    """What its guarantee asks for."""
    return Clients(2 * f + 3, why=f"N >= 2 f + 3 with f = {f}")


@merge_method(paper="Blanchard et al., 2017, arXiv:1703.02757", passes="2", clients=enough_for_krum, base=False)
def krum(*, f: Annotated[int, Range(0)] = 1) -> Span:
    """Take the one client's model that has the nearest neighbours.

    score_i = sum of the N - f - 2 smallest |theta_i - theta_j|^2 over the other clients; the smallest score wins

    The distances are those of whole models, from inner products of the deltas in float64: those of whole weights in
    float32 cancel between nearby models. Of equal scores the first client's wins.

    Args:
        f: how many clients may be bad, >= 0.

    Raises:
        MergeError: for fewer than 2 f + 3 clients: then it promises nothing. So there is no merge of one client, and
            none of two.
    """

    def nearest(spec: CohortSpec, gram_NN: Tensor | None) -> Sequence[float]:
        assert gram_NN is not None
        return mean_of_best(krum_scores(gram_NN, f), torch.tensor(spec.weights_N, dtype=torch.float64), 1).tolist()

    return Span(nearest, gram=True, scope="model")
