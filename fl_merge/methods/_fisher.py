from functools import partial
from typing import Annotated

from fl_merge.hyperparameters import Range
from fl_merge.measured import Measured, Needed
from fl_merge.method import merge_method
from fl_merge.naming import FISHER, fisher_of
from fl_merge.ops.evidence import fisher_mean
from fl_merge.types import CohortSpec


@merge_method(paper="Matena & Raffel, 2022, arXiv:2111.09832", base=False, sends=("fisher",), additive=True)
def fisher(*, floor: Annotated[float, Range(0.0, 1e6)] = 1e-6) -> Measured:
    """Average with each element weighted by how much the client's data say about it (diagonal Fisher information).

    theta = (sum w_i F_i theta_i + r sum w_i theta_i) / (sum w_i F_i + r),  r = floor * mean(sum w_i F_i)
    F_i: client i's mean over its examples of sum_c p(c | x) (grad log p(c | x))^2

    Clients send the sums over examples and the number of examples (`fl_merge.statistics.collect`). Tensors without
    are averaged by share, and the report names them.

    Args:
        floor: >= 0, weight of the plain average as a fraction of the tensor's mean information: what it adds up to in
            elements that no client's data depend on.

    The authors' code has an absolute floor of 1e-6 on each client's Fisher information, which is beside its size. The
    square of a batch's mean gradient is not Fisher information, though it is often used as such.
    """

    def needed(name: str, spec: CohortSpec) -> Needed | None:
        if fisher_of(name) not in spec.statistics:
            return None
        return Needed(fisher_of(name), (name,), partial(fisher_mean, floor=floor))

    return Measured(FISHER, needed)
