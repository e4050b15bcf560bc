from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from fl_merge.hyperparameters import Range
from fl_merge.method import Clients, merge_method
from fl_merge.ops.robust import krum_scores, mean_of_best
from fl_merge.shapes import Span
from fl_merge.types import CohortSpec


def _enough(f: int, m: int | None) -> Clients:
    krums = Clients(2 * f + 3, why=f"N >= 2 f + 3 with f = {f}")
    if m is None or f + m + 2 <= krums.fewest:
        return krums
    return Clients(f + m + 2, why=f"N >= f + m + 2 with f = {f}, m = {m}")


@merge_method(paper="Blanchard et al., 2017, arXiv:1703.02757", passes="2", clients=_enough, base=False)
def multi_krum(*, f: Annotated[int, Range(0)] = 1, m: Annotated[int, Range(1)] | None = None) -> Span:
    """Average the clients' models that have the nearest neighbours, weighted by their numbers of examples.

    theta = sum w_i theta_i / sum w_i over the m clients with the smallest scores of `krum`

    Args:
        f: how many clients may be bad, >= 0.
        m: how many are averaged, from 1 (which is `krum`) to N - f - 2; None for N - f - 2.

    A client's number of examples is what it says it is: among the chosen, it counts for as much as it claims. Flower's
    MultiKrum does the same, with distances of whole weights in their own dtype, and for any N, f and m.

    Raises:
        MergeError: for fewer than 2 f + 3 or f + m + 2 clients: then it promises nothing. So there is no merge of one
            client, and none of two.
    """

    def best(spec: CohortSpec, gram_NN: Tensor | None) -> Sequence[float]:
        assert gram_NN is not None
        chosen = len(gram_NN) - f - 2 if m is None else m
        return mean_of_best(krum_scores(gram_NN, f), torch.tensor(spec.weights_N, dtype=torch.float64), chosen).tolist()

    return Span(best, gram=True, scope="model")
