from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from fl_merge.method import merge_method
from fl_merge.ops.interpolate import slerp_fold
from fl_merge.shapes import ScopeName, Span
from fl_merge.types import CohortSpec


@merge_method(paper="Shoemake, 1985, SIGGRAPH 19(3)", base=False, passes="2")
def slerp(*, on: Literal["weights", "deltas"] = "weights", scope: ScopeName = "tensor") -> Span:
    """Go along the arc between two models; more than two are folded in sequence.

    sin((1 - t) W) / sin W * a + sin(t W) / sin W * b,  W the angle between a and b;  a straight line where
    |cos W| > 0.9995. Clients are taken in order of their id, the k-th with t = w_k / (w_1 + ... + w_k), so the order
    matters a little: folding arcs is not associative.

    Args:
        on: "weights": arcs between whole weights. Models that share a base are nearly parallel, so this is close to
            the weighted average (the straight line is taken for most tensors). "deltas": arcs between task vectors,
            where it is not.
        scope: the angle of each tensor (flattened), or one angle for the whole model.

    mergekit's `slerp` takes two models and gives t itself.
    """

    def folded(spec: CohortSpec, gram_NN: Tensor | None) -> Sequence[float]:
        assert gram_NN is not None
        return slerp_fold(gram_NN, torch.tensor(spec.weights_N, dtype=torch.float64)).tolist()

    return Span(folded, gram=True, on=on, scope=scope)
