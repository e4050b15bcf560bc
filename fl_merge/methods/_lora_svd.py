from collections.abc import Sequence
from typing import Annotated

from fl_merge.hyperparameters import Range
from fl_merge.lowrank import Exchange, Merger, Missing, Module, Products
from fl_merge.method import merge_method
from fl_merge.ops.lowrank import Compressed, Factors, compress, stack


@merge_method(paper="Bai et al., 2024, arXiv:2402.11505", base=False, additive=True, merges="adapters")
def lora_svd(
    *,
    rank: Annotated[int, Range(1)] | None = None,
    energy: Annotated[float, Range(0.0, 1.0, open_low=True)] | None = None,
    tolerance: Annotated[float, Range(0.0, 1.0)] | None = None,
    missing: Missing = "zero",
) -> Products:
    """Sum the products of LoRA adapters and keep the best approximation of a rank (FlexLoRA).

    sum p_i s_i B_i A_i = U diag(sigma) V^T;  B = U_r sqrt(sigma_r),  A = sqrt(sigma_r) V_r^T

    The default for adapters. It is had by QR of the stacked factors and the singular value decomposition of a small
    core: no matrix of the size of the layer is ever made. What is cut off is known exactly from the singular values,
    and reported.

    Args:
        rank: the most that is kept; by default the largest of the clients' ranks, or with energy or tolerance as many
            as these need.
        energy: the share of the squared singular values that is kept, in (0, 1].
        tolerance: the largest relative error (Frobenius), in [0, 1].
        missing: "zero": a client that does not have a module counts as a product of zeros; "renormalise": its weight
            is shared among the others.

    PEFT's `svd` is the same truncation, by a decomposition of the whole m x n matrix.
    """

    def prepare(modules: Sequence[Module]) -> dict[str, Merger]:
        return {module.name: merger(module) for module in modules}

    def merger(module: Module) -> Merger:
        most = rank
        if most is None:
            most = max(module.ranks_P) if energy is None and tolerance is None else module.full_rank
        bound = min(most, module.full_rank)

        def merge(parts_P: Sequence[Factors], sent: Factors) -> Compressed:
            return compress(stack(parts_P, module.spec.weights_N), bound, energy, tolerance)

        return Merger(bound, merge)

    return Products(prepare, missing, Exchange(), keeps=rank)
