from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from fl_merge.method import merge_method
from fl_merge.ops.interpolate import PARALLEL, slerp_fold
from fl_merge.shapes import Span, VectorSpan
from fl_merge.types import CohortSpec


@merge_method(paper="Goddard et al., 2024, arXiv:2403.13257 (mergekit)", passes="2")
def nuslerp(
    *,
    vectors: Literal["tensors", "rows", "columns"] = "tensors",
    on: Literal["deltas", "weights"] = "deltas",
    lengths: Literal["arc", "linear"] = "arc",
) -> Span | VectorSpan:
    """Go along the arc between two deltas, by tensors, rows or columns; more than two are folded in sequence.

    sin((1 - t) W) / sin W * a + sin(t W) / sin W * b,  W the angle between a and b. Clients are taken in order of
    their id, the k-th with t = w_k / (w_1 + ... + w_k). A straight line is taken only where a and b are parallel.

    Args:
        vectors: what has an angle of its own: each tensor (flattened), each row (along the last dimension: what one
            output of a linear layer takes from its inputs) or each column (along the first dimension).
        on: "deltas": arcs between task vectors; "weights": between whole weights, which are nearly parallel.
        lengths: "arc": the formula as it stands, as mergekit computes it; "linear": the arc between the directions
            of a and b, times the length (1 - t) |a| + t |b|. The two are the same where a and b have one length.

    mergekit takes two models. Its `nuslerp_row_wise` gives each column its angle, in the words used here, and without
    it and without `nuslerp_flatten` each row has one.
    """

    def coefficients_VN(spec: CohortSpec, gram_VNN: Tensor) -> Tensor:
        weights_N = torch.tensor(spec.weights_N, dtype=torch.float64)
        return slerp_fold(gram_VNN, weights_N, PARALLEL, linear_lengths=lengths == "linear")

    if vectors != "tensors":
        return VectorSpan(coefficients_VN, along=vectors, on=on)

    def folded(spec: CohortSpec, gram_NN: Tensor | None) -> Sequence[float]:
        assert gram_NN is not None
        return coefficients_VN(spec, gram_NN).tolist()

    return Span(folded, gram=True, on=on)
