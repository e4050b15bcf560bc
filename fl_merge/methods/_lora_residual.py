from collections.abc import Callable, Sequence
from typing import Annotated

from fl_merge.hyperparameters import Range
from fl_merge.lowrank import Exchange, Merger, Missing, Module, Products
from fl_merge.method import merge_method
from fl_merge.methods._lora_factor_mean import present_mean, require_one_form
from fl_merge.ops.lowrank import Compressed, Factors, compress, norm, residual, stack


@merge_method(paper="Singhal et al., 2024, arXiv:2410.09432", base=False, additive=True, merges="adapters")
def lora_residual(*, max_rank: Annotated[int, Range(1)] | None = None, missing: Missing = "zero") -> Products:
    """Average the factors of LoRA adapters, and give what that lacks of the exact sum as a second one (FedEx-LoRA).

    B = sum p_i B_i,  A = sum p_i A_i;  residual = sum p_i B_i A_i - B A = sum p_i (B_i - B) (A_i - A)

    of rank (N - 1) r at most. It is folded into the base model (`fl-merge lora fold`) or carried as a second adapter
    that is not trained; in a federation it is added to the residual of the rounds before, which clients are sent.

    Args:
        max_rank: of the residual: more is cut off, and the report says how much; none for all of it.
        missing: "zero": a module that a client does not have is scaled down by that client's weight; "renormalise": it
            is not.

    Clients must have one rank and one alpha, as for `lora_factor_mean`.
    """

    def prepare(modules: Sequence[Module]) -> dict[str, Merger]:
        for module in modules:
            require_one_form(module, "lora_residual")
        return {module.name: Merger(max(module.ranks_P), mean(module)) for module in modules}

    def mean(module: Module) -> Callable[[Sequence[Factors], Factors], Compressed]:
        def averaged(parts_P: Sequence[Factors], sent: Factors) -> Compressed:
            found = present_mean(module, parts_P)
            return Compressed(found, 0.0, norm(found))

        return averaged

    def second(module: Module, before: int) -> Merger:
        here = [rank for rank in module.ranks_P if rank]
        room = (len(here) - 1) * max(here) if here else 0
        bound = max(1, min(room + before, module.outputs, module.inputs, max_rank or room + before))

        def lacking(parts_P: Sequence[Factors], sent: Factors) -> Compressed:
            present = [(p, w) for p, w in zip(parts_P, module.spec.weights_N, strict=True) if p.rank]
            total = sum(weight for _, weight in present)
            shares = [weight / total for _, weight in present]
            parts = [part for part, _ in present]
            middle = present_mean(module, parts_P)
            unscaled = Factors(middle.b_OR / total if len(parts) < len(parts_P) else middle.b_OR, middle.a_RI)
            return compress(stack([sent, residual(parts, shares, unscaled)], [1.0, total]), bound)

        return Merger(bound, lacking)

    return Products(prepare, missing, Exchange(ordered=False), second=second)
