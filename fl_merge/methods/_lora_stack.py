from collections.abc import Sequence
from typing import Annotated

from fl_merge.hyperparameters import Range
from fl_merge.lowrank import Exchange, Merger, Missing, Module, Products
from fl_merge.method import merge_method
from fl_merge.ops.lowrank import Compressed, Factors, compress, norm, stack


@merge_method(paper="Wang et al., 2024, arXiv:2409.05976", base=False, additive=True, merges="adapters")
def lora_stack(*, max_rank: Annotated[int, Range(1)] | None = None, missing: Missing = "zero") -> Products:
    """Concatenate the factors of LoRA adapters: ranks add up, and the product is the exact weighted sum (FLoRA).

    B = [B_1 ... B_N],  A = [p_1 s_1 A_1; ...; p_N s_N A_N];  B A = sum p_i s_i B_i A_i

    s_i is a client's scaling, alpha / rank or alpha / sqrt(rank) (rsLoRA).

    Args:
        max_rank: a longer stack is cut to this rank by `lora_svd`'s truncation, and the report says how much was cut;
            none for the whole stack, whose rank is the sum of the clients'.
        missing: "zero": a client that does not have a module adds nothing to it; "renormalise": its weight is shared
            among the others.

    PEFT's `cat` is the same with weights that need not sum to 1.
    """

    def prepare(modules: Sequence[Module]) -> dict[str, Merger]:
        return {module.name: merger(module) for module in modules}

    def merger(module: Module) -> Merger:
        total = sum(module.ranks_P)
        cut = max_rank is not None and total > max_rank
        rank = max_rank if cut and max_rank is not None else total

        def merge(parts_P: Sequence[Factors], sent: Factors) -> Compressed:
            whole = stack(parts_P, module.spec.weights_N)
            return compress(whole, rank) if cut else Compressed(whole, 0.0, norm(whole))

        return Merger(rank, merge)

    return Products(prepare, missing, Exchange(), keeps=max_rank)
