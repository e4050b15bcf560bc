from fl_merge.hyperparameters import Scale
from fl_merge.method import Clients, merge_method
from fl_merge.shapes import Span


@merge_method(
    paper="Goddard et al., 2024, arXiv:2403.13257 (mergekit)", base=False, additive=True, clients=Clients(1, 1)
)
def passthrough(*, scale: Scale = 1.0) -> Span:
    """Take the one client's model as it is, or its weights times a factor.

    theta = scale * theta_1

    Args:
        scale: multiplies the weights themselves, not the delta; negative to turn their sign.
    """
    return Span(lambda spec, gram_NN: [scale], on="weights")
