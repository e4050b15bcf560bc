from fl_merge.method import merge_method
from fl_merge.shapes import Span


@merge_method(
    paper="McMahan et al., 2017, arXiv:1602.05629; model soups: Wortsman et al., 2022, arXiv:2203.05482",
    base=False,
    additive=True,
)
def weighted_average() -> Span:
    """Average the clients' models, weighted by their numbers of examples (FedAvg, model soup).

    theta = sum w_i theta_i = theta_0 + sum w_i tau_i

    It is computed in the second form: a tensor that no client moved keeps its bits.
    mergekit's `linear` is the same with weights that need not sum to 1.
    """
    return Span(lambda spec, gram_NN: spec.weights_N, running=1.0)
