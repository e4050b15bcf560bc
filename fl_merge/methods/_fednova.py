import math
from collections.abc import Sequence

from torch import Tensor

from fl_merge.errors import MergeError
from fl_merge.hyperparameters import Scale
from fl_merge.method import merge_method
from fl_merge.shapes import Span
from fl_merge.types import CohortSpec

STEPS = "local-steps"
"""The metric in which a client reports its number of local steps."""


@merge_method(paper="Wang et al., 2020, arXiv:2007.07481", sends=("steps",), additive=True)
def fednova(*, scale: Scale = 1.0) -> Span:
    """Divide each delta by the client's local steps, average, and go as many steps as the clients made on average.

    theta = theta_0 + scale * (sum w_i a_i) * sum w_i tau_i / a_i,   a_i the client's local steps

    A client that made more steps than the others does not pull the model further toward its own optimum.

    Args:
        scale: multiplies the merged delta.

    Each client reports a_i as the metric `local-steps`, a whole number >= 1; who does not is refused. With equal steps
    it is the weighted average, and one client's model comes back. The a_i are those of plain SGD: the paper's
    corrections for local momentum and proximal terms are for the client to make (a_i is then not a whole number, which
    is not taken). A client that claims many steps raises the mean: mind whom you trust.

    Raises:
        MergeError: if it is not known of every client how many steps it made.
    """

    def normalized(spec: CohortSpec, gram_NN: Tensor | None) -> Sequence[float]:
        found_N = [metrics.get(STEPS) for metrics in spec.metrics_N]
        steps_N = [float(steps) for steps in found_N if isinstance(steps, int | float) and steps >= 1]
        if len(steps_N) != len(spec.client_ids):
            raise MergeError(f"fednova: clients report their number of steps as '{STEPS}'; found {found_N}")

        def mean_over(own: float) -> float:  # exactly 1 where all are equal
            return math.fsum(w * (steps / own) for w, steps in zip(spec.weights_N, steps_N, strict=True))

        return [scale * w * mean_over(steps) for w, steps in zip(spec.weights_N, steps_N, strict=True)]

    return Span(normalized)
