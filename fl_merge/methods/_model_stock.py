from collections.abc import Sequence

from torch import Tensor

from fl_merge.method import merge_method
from fl_merge.ops.interpolate import stock_ratio
from fl_merge.shapes import Span, VectorSpan
from fl_merge.types import CohortSpec


@merge_method(paper="Jang et al., 2024, arXiv:2403.19522", additive=True, passes="2")
def model_stock(*, filter_wise: bool = False) -> Span | VectorSpan:
    """Go from the base towards the clients' mean, the further the more their deltas point in one direction.

    theta = theta_0 + t * mean tau,  t = N c / (1 + (N - 1) c),  c = mean cosine over pairs of deltas, in [0, 1]

    Every client counts the same, whatever its number of examples: the formula follows from the geometry of models that
    are equally far from where they want to go. With one client there is no pair, and t is 1.

    Args:
        filter_wise: an angle for each row of a tensor (along its last dimension), in place of one for each tensor.

    The mean cosine is clamped to [0, 1]: below 0, where the deltas conflict, mergekit's formula leaves the segment (t
    is negative, and without bound near c = -1 / (N - 1)); here the base stays. mergekit also counts deltas whose norms'
    product is below 1e-6 as less parallel than they are; here lengths do not matter.
    """

    def towards_the_mean(spec: CohortSpec, gram_VNN: Tensor) -> Tensor:
        count = len(spec.client_ids)
        return (stock_ratio(gram_VNN) / count)[:, None].expand(-1, count)

    if filter_wise:
        return VectorSpan(towards_the_mean)

    def folded(spec: CohortSpec, gram_NN: Tensor | None) -> Sequence[float]:
        assert gram_NN is not None
        return towards_the_mean(spec, gram_NN[None])[0].tolist()

    return Span(folded, gram=True)
