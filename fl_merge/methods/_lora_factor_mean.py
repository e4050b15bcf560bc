import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch

from fl_merge.errors import MergeError
from fl_merge.lowrank import Exchange, Merger, Missing, Module, Products
from fl_merge.method import merge_method
from fl_merge.ops.lowrank import Compressed, Factors, mean_factors, norm

Share = Literal["AB", "A", "B", "alternate"]


def trains(share: Share, round_number: int) -> Literal["AB", "A", "B"]:
    """Which factors clients train in a round: RoLoRA's B in the odd rounds, A in the even ones."""
    if share != "alternate":
        return "B" if share == "B" else "AB"
    if round_number == 0:
        return "AB"
    return "B" if round_number % 2 else "A"


def require_one_form(module: Module, who: str) -> None:
    """Refuse factors that cannot be averaged: of several ranks, or with several scalings.

    Raises:
        MergeError: naming the module and two clients that differ.
    """
    known = [(client, rank) for client, rank in zip(module.spec.client_ids, module.ranks_P, strict=True) if rank]
    for client, rank in known[1:]:
        if rank != known[0][1]:
            raise MergeError(
                f"{who}: module '{module.name}' has rank {known[0][1]} at client '{known[0][0]}' and {rank} at client "
                f"'{client}'; factors of one rank are wanted, or lora_svd, which takes any"
            )
    said = [
        (client, scaling)
        for client, scaling, rank in zip(module.spec.client_ids, module.scalings_P, module.ranks_P, strict=True)
        if rank and not math.isnan(scaling)
    ]
    for client, scaling in said[1:]:
        if not math.isclose(scaling, said[0][1], rel_tol=1e-9):
            raise MergeError(
                f"{who}: module '{module.name}' is scaled (alpha / rank) by {said[0][1]:g} at client '{said[0][0]}' "
                f"and by {scaling:g} at client '{client}'; one alpha is wanted, or lora_svd, which takes any"
            )


@merge_method(
    paper="FedIT: Zhang et al., 2023, arXiv:2305.05644; FFA: Sun et al., 2024, arXiv:2403.12313; "
    "FedSA: Guo et al., 2024, arXiv:2410.01463; RoLoRA: Chen et al., 2024, arXiv:2409.02346",
    base=False,
    additive=True,
    merges="adapters",
)
def lora_factor_mean(*, share: Share = "AB", missing: Missing = "zero") -> Products:
    """Average the A and the B of LoRA adapters separately (FedIT, FFA-LoRA, FedSA-LoRA, RoLoRA).

    B = sum p_i B_i,  A = sum p_i A_i

    This is the mean of what the adapters do only where all A, or all B, are equal. It depends on how each client
    happens to split its product (B c, A / c does the same and averages to something else), so clients must have one
    rank and one alpha; they are refused by name if they do not.

    Args:
        share: "AB": both are averaged (FedIT). "B": A is frozen and must be the same at all clients; the mean is then
            exact (FFA-LoRA). "A": clients keep their own B (FedSA-LoRA); the merged adapter has the mean of the B that
            are known, for whoever has none. "alternate": clients train B in the odd rounds and A in the even ones, the
            other factor being frozen (RoLoRA), so that each round's mean is exact.
        missing: "zero": a module that a client does not have is scaled down by that client's weight; "renormalise": it
            is not.

    PEFT's `linear` weights each factor by sqrt(weight * scaling) instead: N identical adapters do not give themselves.
    """

    def prepare(modules: Sequence[Module]) -> dict[str, Merger]:
        for module in modules:
            require_one_form(module, "lora_factor_mean")
        return {module.name: Merger(max(module.ranks_P), merge(module)) for module in modules}

    def merge(module: Module) -> Callable[[Sequence[Factors], Factors], Compressed]:
        frozen = trains(share, module.spec.round)

        def averaged(parts_P: Sequence[Factors], sent: Factors) -> Compressed:
            mean = present_mean(module, parts_P)
            for factor, name in ((1, "A"), (0, "B")):
                if name not in frozen:
                    _require_equal(module, parts_P, factor, name)
            return Compressed(mean, 0.0, norm(mean))

        return averaged

    shared: Literal["AB", "A", "B"] = "AB" if share == "alternate" else share
    return Products(prepare, missing, Exchange(ordered=False, share=shared, trains=lambda r: trains(share, r)))


def present_mean(module: Module, parts_P: Sequence[Factors], weights_P: Sequence[float] | None = None) -> Factors:
    """The mean factors of the clients that have a module; for the others B is scaled down by their weight."""
    shares = module.spec.weights_N if weights_P is None else weights_P
    here = [(part, weight) for part, weight in zip(parts_P, shares, strict=True) if part.rank]
    total = math.fsum(weight for _, weight in here)
    mean = mean_factors([part for part, _ in here], [weight / total for _, weight in here])
    return mean if len(here) == len(parts_P) else Factors(mean.b_OR * total, mean.a_RI)


def _require_equal(module: Module, parts_P: Sequence[Factors], factor: int, name: str) -> None:
    here = [(who, part[factor]) for who, part in zip(module.spec.client_ids, parts_P, strict=True) if part.rank]
    for who, tensor in here[1:]:
        largest = float(here[0][1].abs().max())
        if not torch.allclose(tensor, here[0][1], rtol=0.0, atol=1e-6 * largest):
            raise MergeError(
                f"lora_factor_mean: module '{module.name}': {name} was to stay frozen, and it differs between client "
                f"'{here[0][0]}' and client '{who}'"
            )
