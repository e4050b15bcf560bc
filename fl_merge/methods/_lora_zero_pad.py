import math
from collections.abc import Sequence
from typing import Literal

from torch.nn.functional import pad

from fl_merge.lowrank import Exchange, Merger, Missing, Module, Products
from fl_merge.method import merge_method
from fl_merge.methods._lora_factor_mean import present_mean
from fl_merge.ops.lowrank import Compressed, Factors, norm


@merge_method(paper="Cho et al., 2024, arXiv:2401.06432", base=False, additive=True, merges="adapters")
def lora_zero_pad(*, weighting: Literal["examples", "norm"] = "examples", missing: Missing = "zero") -> Products:
    """Pad the factors of LoRA adapters with zeros to the largest rank and average them separately (HetLoRA).

    B = sum p_i [B_i 0],  A = sum p_i [A_i; 0]

    The baseline for clients of several ranks: what only the larger ones have is averaged with zeros, and the means
    of factors are not the mean of products (see `lora_factor_mean`). `lora_svd` has neither fault.

    Args:
        weighting: "examples": p_i is the client's share; "norm": times the norm of its product, normalised over the
            clients (the paper's sparsity weighting).
        missing: as for `lora_factor_mean`.
    """

    def prepare(modules: Sequence[Module]) -> dict[str, Merger]:
        return {module.name: merger(module) for module in modules}

    def merger(module: Module) -> Merger:
        rank = max(module.ranks_P)

        def merge(parts_P: Sequence[Factors], sent: Factors) -> Compressed:
            wide = [padded(part, rank) if part.rank else part for part in parts_P]
            weights = list(module.spec.weights_N)
            if weighting == "norm":
                norms = [weight * norm(part) for weight, part in zip(weights, wide, strict=True)]
                total = math.fsum(norms)
                here = math.fsum(weight for weight, part in zip(weights, wide, strict=True) if part.rank)
                weights = [each / total * here for each in norms] if total else weights
            mean = present_mean(module, wide, weights)
            return Compressed(mean, 0.0, norm(mean))

        return Merger(rank, merge)

    return Products(prepare, missing, Exchange(ordered=False, prefix=True))


def padded(part: Factors, rank: int) -> Factors:
    """The same product with factors of a larger rank."""
    more = rank - part.rank
    return Factors(pad(part.b_OR, (0, more)), pad(part.a_RI, (0, 0, 0, more)))
