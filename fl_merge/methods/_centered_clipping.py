from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from fl_merge.hyperparameters import Range
from fl_merge.method import merge_method
from fl_merge.ops.robust import centered_clip
from fl_merge.shapes import Span
from fl_merge.types import CohortSpec


@merge_method(paper="Karimireddy et al., 2021, arXiv:2012.10333", identity={"rho": 1e30}, additive=True, passes="2")
def centered_clipping(
    *,
    rho: Annotated[float, Range(0.0, open_low=True)] = 10.0,
    iterations: Annotated[int, Range(1)] = 1,
) -> Span:
    """Average the clients' deltas, each clipped to a length.

    v <- v + sum w_i (tau_i - v) min(1, rho / |tau_i - v|),  from v = 0 on;  theta = theta_0 + v

    The lengths are those of whole models. A bad client moves the result by at most w_i rho an iteration.

    Args:
        rho: the length, > 0, in units of the weights. It has to be of the size of good clients' distances from v:
            larger, it clips nothing; smaller, it slows all of them down.
        iterations: how often, >= 1; from the second on, what is clipped are the distances from the last result. All
            run on the N x N inner products, so their number costs nothing.

    With one iteration, which clips each client for itself, it is a sum over clients; with more it is not.

    The authors clip the clients' momenta around the last round's aggregate; here the centre is the base, the round's
    own start.
    """

    def clipped(spec: CohortSpec, gram_NN: Tensor | None) -> Sequence[float]:
        assert gram_NN is not None
        return centered_clip(gram_NN, torch.tensor(spec.weights_N, dtype=torch.float64), rho, iterations).tolist()

    return Span(clipped, gram=True, scope="model")
