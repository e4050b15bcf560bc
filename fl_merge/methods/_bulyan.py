from typing import Annotated, Literal

import torch
from torch import Tensor

from fl_merge.hyperparameters import Range
from fl_merge.method import Clients, merge_method
from fl_merge.ops.order import mean_around_median, select_by_krum
from fl_merge.shapes import Coordinate, Elements, Slice
from fl_merge.types import CohortSpec


def _enough(f: int, selection: str) -> Clients:
    return Clients(4 * f + 3, why=f"N >= 4 f + 3 with f = {f}") if f else Clients()


@merge_method(
    paper="El Mhamdi et al., 2018, arXiv:1802.07927", identity={"f": 0}, base=False, passes="2", clients=_enough
)
def bulyan(*, f: Annotated[int, Range(0)] = 1, selection: Literal["repeated", "once"] = "repeated") -> Coordinate:
    """Choose N - 2 f clients by Krum, then average, element by element, the N - 4 f values nearest to their median.

    1. of the whole models' deltas: the client with the smallest sum of squared distances to its N - f - 2 nearest
       others is taken and left out of what follows, until N - 2 f are taken
    2. theta = theta_0 + mean of the N - 4 f chosen deltas that are nearest to the chosen deltas' median

    It stands up to f bad clients of N >= 4 f + 3. The shares of examples play no part. One client: with f 0 all are
    chosen and the result is their mean; with any other it is refused, as is every cohort that is too small.

    Args:
        f: how many clients may be bad, >= 0.
        selection: "repeated": step 1 as in the paper; "once": the N - 2 f lowest of the first scores, as Flower.

    Raises:
        MergeError: if the cohort has fewer than 4 f + 3 clients and f is not 0.

    Distances come from float64 inner products of deltas. Flower's Bulyan takes them of whole weights in float32, where
    nearby models cancel to nothing.
    """

    def chosen(spec: CohortSpec, gram_NN: Tensor) -> Tensor:
        count = len(spec.client_ids)
        places = select_by_krum(gram_NN, f, count - 2 * f, repeated=selection == "repeated")
        return torch.tensor(places, dtype=torch.float64)

    def combine(deltas_NS: Tensor, weights_N: Tensor, at: Slice) -> Tensor:
        chosen_MS = deltas_NS[at.joint_K.long().to(deltas_NS.device)]
        return mean_around_median(chosen_MS, len(deltas_NS) - 4 * f)

    compiled = Elements("mean_around_median", count=lambda clients: clients - 4 * f, chosen=True)
    return Coordinate(combine, gram=chosen, scope="model", stages=compiled)
