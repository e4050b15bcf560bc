"""A round of adapters as a running sum of their products: each is added when it comes and then forgotten.

    sum n_i s_i B_i A_i, kept as one product of at most four times the rank that the method keeps

Where the stack of all that has come grows beyond that, it is cut to half of it: to the best approximation, whose error
is added up and reported. As long as the clients' ranks add up to no more nothing is cut, and the result is that of the
method on all adapters at once. The order of arrival may show in last bits, and in what is cut.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fl_merge.errors import MergeError, RecipeError
from fl_merge.execute import MergeReport
from fl_merge.lowrank import Products
from fl_merge.ops.lowrank import Factors, compress, none, norm, stack
from fl_merge.pairs import RESIDUAL, factors, pairs_of
from fl_merge.types import MergeMethod, TensorSource, TensorSpec, Update, client_order

_TIMES = 4
"""The rank that is held, in ranks that the method keeps."""


def held_rank(method: MergeMethod) -> int | None:
    """The rank that a method for adapters keeps, if its result is a sum of products cut to that; None for any other.

    Raises:
        RecipeError: for a method for adapters that cannot be a running sum.
    """
    shape = getattr(method, "shape", method)
    if not isinstance(shape, Products):
        return None
    if shape.keeps is None or shape.missing != "zero":
        raise RecipeError(
            f"running_sum: found {method}, wanted a sum of adapters that keeps a rank, such as lora_svd(rank=16)"
        )
    return shape.keeps


class RunningProducts:
    """One round's sum of adapters. `add` them in any order, then `total`.

    Args:
        rank: that the method keeps.
        base: the adapter that clients were sent.
    """

    def __init__(self, rank: int, base: TensorSource) -> None:
        self._held = _TIMES * rank
        self._base = base
        specs = {name: spec for name, spec in base.specs().items() if not name.startswith(RESIDUAL)}
        self._pairs, self._others = pairs_of(specs)
        self._products: dict[str, Factors] = {}
        self._cut: dict[str, float] = {}
        self._sums: dict[str, tuple[Tensor, float]] = {}
        self._added: dict[str, float] = {}
        self._absent: dict[str, list[str]] = {}

    @property
    def ranks(self) -> dict[str, int]:
        """What is held of each module."""
        return {module: product.rank for module, product in self._products.items()}

    def add(self, update: Update) -> None:
        """Add an adapter with its scalings in B. All of it is read before anything is added.

        Raises:
            MergeError: if the client's is in the sum already.
        """
        if update.client_id in self._added:
            raise MergeError(f"client '{update.client_id}' is in the sum already")
        weight = update.num_examples
        theirs = {name: update.tensors.read(name) for name in update.tensors.specs()}
        for module, pair in self._pairs.items():
            if pair.a not in theirs:
                self._absent.setdefault(pair.a, []).append(update.client_id)
                continue
            before = self._products.get(module, none(pair.outputs, pair.inputs))
            grown = stack([before, factors(theirs[pair.a], theirs[pair.b])], [1.0, weight])
            if grown.rank > self._held:
                cut = compress(grown, max(self._held // 2, 1))
                grown = cut.factors
                self._cut[module] = self._cut.get(module, 0.0) + cut.error
            self._products[module] = grown
        for name in self._others:
            if name in theirs and theirs[name].is_floating_point():
                total, share = self._sums.get(name, (torch.zeros((), dtype=torch.float64), 0.0))
                self._sums[name] = total + weight * theirs[name].double(), share + weight
        self._added[update.client_id] = weight

    def total(self) -> Update:
        """One update that stands for all: their weighted mean.

        Raises:
            MergeError: if nothing was added.
        """
        if not self._added:
            raise MergeError("the running sum is of no use: nothing was added")
        total = math.fsum(self._added.values())
        found: dict[str, Tensor] = {}
        for module, product in self._products.items():
            pair = self._pairs[module]
            a_spec, b_spec = pair.of_rank(product.rank)
            found[pair.a] = (product.a_RI / math.sqrt(total)).view(a_spec.shape)
            found[pair.b] = (product.b_OR / math.sqrt(total)).view(b_spec.shape)
        found |= {name: sum_S / share for name, (sum_S, share) in self._sums.items()}
        return Update("all", 1.0, _Tensors(found))

    def reported(self, report: MergeReport) -> MergeReport:
        """The report of a merge of that update, as one of all clients."""
        clients = tuple(sorted(self._added, key=client_order))
        total = math.fsum(self._added.values())
        whole = math.sqrt(math.fsum(norm(product) ** 2 for product in self._products.values()))
        cut = math.fsum(self._cut.values()) / whole if whole else 0.0
        notes = {name: f"clients without this module: {', '.join(sorted(who))}" for name, who in self._absent.items()}
        return replace(
            report,
            clients=clients,
            weights=tuple(self._added[client] / total for client in clients),
            notes={**report.notes, **notes},
            found={**report.found, "lora-cut-while-running": cut},
        )


class _Tensors:
    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def specs(self) -> Mapping[str, TensorSpec]:
        return {name: TensorSpec.of(tensor) for name, tensor in self._tensors.items()}

    def read(self, name: str) -> Tensor:
        return self._tensors[name]

    def aliases(self) -> Mapping[str, str]:
        return {}
