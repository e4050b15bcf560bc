from collections.abc import Sequence
from typing import Annotated

from torch import Tensor

from fl_merge.hyperparameters import Range
from fl_merge.measured import Measured, Needed
from fl_merge.method import merge_method
from fl_merge.naming import GRAM, GramLayout, gram_of, member
from fl_merge.ops.evidence import Evidence, fisher_mean, regression_mean, regression_mean_bias
from fl_merge.types import CohortSpec


@merge_method(paper="Jin et al., 2023, arXiv:2212.09849", base=False, sends=("gram",), additive=True, passes="1 to 3")
def regmean(
    *, alpha: Annotated[float, Range(0.0, 1.0)] = 0.9, ridge: Annotated[float, Range(0.0, 1e6)] = 0.01
) -> Measured:
    """Solve for the layers whose outputs are nearest to each client's own outputs on its own inputs.

    W = (sum W_i G_i + r sum w_i W_i) (sum G_i + r)^-1,  G_i = (w_i / n_i) X_i^T X_i,  r = ridge * mean(diag(sum G_i))

    X_i are the inputs of the layer for n_i examples of client i, with a constant 1 as one more input for the bias;
    patches for a convolution. For an embedding G_i is diagonal, the number of times that each row was looked up.
    Clients send the sums over examples and n_i (`fl_merge.statistics.collect`); with all of a client's examples in its
    sum, w_i / n_i is the same for all. Tensors without a Gram matrix (norms) are averaged by share, and the report
    names them.

    Args:
        alpha: multiplies the Gram matrices off their diagonals, in [0, 1]; the paper uses 0.9, and 0.1 for some models.
        ridge: >= 0, pulls toward the average with this fraction of the mean of the diagonal. Over several rounds 0.1 is
            safer. Inputs that no client has are averaged; 0 still adds what float64 needs to solve.

    The authors' code has no ridge, and gives all clients' Gram matrices the same weight whatever their shares.
    """

    def needed(name: str, spec: CohortSpec) -> Needed | None:
        module, _, what = name.rpartition(".")
        gram, weight = spec.statistics.get(gram_of(module)), spec.tensors.get(member(module, "weight"))
        if what not in ("weight", "bias") or gram is None or weight is None:
            return None
        layout = GramLayout.of(gram.shape, weight.shape)
        bias = spec.tensors.get(member(module, "bias"))
        with_bias = layout is not None and layout.constant and bias is not None and bias.shape == weight.shape[:1]
        if layout is None or (what == "bias" and not with_bias):
            return None
        tensors = tuple(member(module, each) for each in (("weight", "bias") if with_bias else ("weight",)))

        def merged(clients: Sequence[Evidence]) -> Tensor:
            if layout.lookups:
                return fisher_mean(clients, floor=ridge)
            if what == "bias":
                return regression_mean_bias(clients, layout, alpha, ridge)
            return regression_mean(clients, layout, alpha, ridge)[:, :, : layout.columns]

        return Needed(gram_of(module), tensors, merged)

    return Measured(GRAM, needed)
