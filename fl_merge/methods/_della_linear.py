from collections.abc import Mapping
from typing import Annotated

from fl_merge.errors import RecipeError
from fl_merge.hyperparameters import Density, Range, Scale
from fl_merge.method import merge_method
from fl_merge.shapes import Coordinate
from fl_merge.stages import KeepRanked, Rescale, Stages

Epsilon = Annotated[float, Range(0.0, 1.0)]
"""How far the probabilities of the largest and of the smallest element are apart."""


@merge_method(paper="Deep et al., 2024, arXiv:2406.11617", identity={"density": 1.0}, additive=True, passes="1")
def della_linear(
    *,
    density: Density | Mapping[str, Density] = 0.5,
    epsilon: Epsilon = 0.2,
    scale: Scale = 1.0,
    rescale: Rescale = True,
) -> Coordinate:
    """Keep each element by chance, larger ones more likely, divide by the chance, and take the weighted sum.

    theta = theta_0 + scale * sum w_i m_i tau_i / p_i,  m_i = 1 with probability p_i, else 0
    p_i = density + epsilon / 2 - epsilon * r / (n - 1),  r = 0 .. n - 1 the rank of |tau_i| among its row's n elements,
    the largest first

    Equal magnitudes share their mean rank, so that no p_i depends on where in its row an element is. Equal are those
    that agree in the exponent and the first 5 bits behind the point (less than 1/32 apart), and all that are less than
    about 2^-32 of the row's largest. The p_i of a row add up to n times the density, as with ranks of single elements;
    of normal deltas each is within a hundredth of epsilon of what it would be with those.

    A row is one entry of the first dimension; a tensor with one dimension is one row. Rows of one element are kept, and
    so is all at density 1. The draws are those of `dare_linear`, and the expected result is the one without dropping.

    Args:
        density: mean probability that an element is kept, in (0, 1]; for all clients or by client id.
        epsilon: how far the probabilities are apart, in [0, 1], so that all of them are in (0, 1].
        scale: multiplies the merged delta.
        rescale: if false, kept elements are not divided by their probabilities; "l1": what is kept of a delta is
            rescaled to the whole one's L1 norm instead, as mergekit does (not unbiased).

    mergekit's `epsilon` is half of this one; it ranks equal magnitudes in any order, and cannot merge rows of one
    element (0 / 0).
    """
    check_spread("della_linear", density, epsilon)
    return Stages(KeepRanked(density, epsilon, rescale), scale=scale).coordinate()


def check_spread(method: str, density: float | Mapping[str, float], epsilon: float) -> None:
    """Refuse probabilities that are not in (0, 1]; at density 1 there are none.

    Raises:
        RecipeError: with the largest epsilon that goes with the density.
    """
    for each in density.values() if isinstance(density, Mapping) else [density]:
        most = 2 * min(each, 1 - each)
        if each < 1 and (epsilon > most or each - epsilon / 2 <= 0):
            wanted = f"wanted a number in [0, {most:g}] at density {each:g}: every probability has to be in (0, 1]"
            raise RecipeError(f"parameter 'epsilon' of {method}: found {epsilon!r}, {wanted}")
