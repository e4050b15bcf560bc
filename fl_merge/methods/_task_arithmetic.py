from collections.abc import Mapping, Sequence

from torch import Tensor

from fl_merge.errors import MergeError
from fl_merge.hyperparameters import Scale
from fl_merge.method import merge_method
from fl_merge.shapes import Span
from fl_merge.types import CohortSpec


@merge_method(paper="Ilharco et al., 2022, arXiv:2212.04089", additive=True)
def task_arithmetic(
    *, scale: Scale = 1.0, coefficients: Mapping[str, float] | None = None, normalize: bool = True
) -> Span:
    """Add task vectors to the base, or subtract them to remove what a client learned.

    theta = theta_0 + scale * sum c_i tau_i

    Args:
        scale: multiplies the sum; the paper uses about 0.3 for the raw sum of 8 tasks.
        coefficients: c_i by client id, negative to remove a capability; taken as they are. Clients that are not named
            keep their default.
        normalize: the default c_i is the client's share w_i; if false it is 1 (a raw sum).

    mergekit's `weight` is c_i here and its `lambda` is `scale`; its `normalize` divides by the sum of all c_i, also of
    given ones.

    Raises:
        MergeError: if `coefficients` names a client that is not in the cohort: leaving out a subtraction silently
            would give a model that nobody asked for.
    """

    def signed_shares(spec: CohortSpec, gram_NN: Tensor | None) -> Sequence[float]:
        given = coefficients or {}
        absent = [client_id for client_id in given if client_id not in spec.client_ids]
        if absent:
            raise MergeError(
                f"task_arithmetic: coefficients name client '{absent[0]}', which has no usable update here "
                f"(clients: {', '.join(spec.client_ids)})"
            )
        default_N = spec.weights_N if normalize else [1.0] * len(spec.client_ids)
        return [
            scale * given.get(client_id, default) for client_id, default in zip(spec.client_ids, default_N, strict=True)
        ]

    return Span(signed_shares, running=scale if normalize and not coefficients else None)
