"""Inner products whose value does not depend on how the tensor was sliced. Suffixes: N vectors, S elements."""

from __future__ import annotations

import torch
from torch import Tensor

from fl_merge.errors import MergeError

BLOCK = 16384
"""Elements a partial sum runs over. Slices start at multiples of it, so the partial sums are always the same ones."""

_GROUP = 64
"""Partial sums that are added to one at a time, so that few of them are kept."""


LANES, GROUP = 16, 1024
"""The order of additions within a block: each group of GROUP elements has LANES running sums, one for every LANES-th
element; these are added by halves, and so are the groups'. The compiled pass has the same order."""

_AT_A_TIME = 1 << 17
"""Running sums that are kept at a time, so that they stay in a core's cache."""


def gram_partials(vectors_NS: Tensor) -> Tensor:
    """Inner products of every pair of vectors, one a block of BLOCK elements.

    Args:
        vectors_NS: (N, S), a floating dtype; S need not be a multiple of BLOCK.

    Returns:
        (blocks, N, N), float64, on the CPU.
    """
    count, numel = vectors_NS.shape
    groups = -(-numel // GROUP)
    padded_NS = torch.nn.functional.pad(vectors_NS.double(), (0, groups * GROUP - numel))
    steps = padded_NS.view(count, groups, GROUP // LANES, LANES).permute(2, 0, 1, 3).reshape(-1, count, groups * LANES)
    by_group = torch.empty(groups, count, count, dtype=torch.float64)
    rows = max(1, _AT_A_TIME // max(1, count * groups * LANES))
    for start in range(0, count, rows):
        stop = min(start + rows, count)
        # Products are rounded before they are added: see `combine.weighted_sum`.
        sums = steps[0, start:stop, None] * steps[0, None]
        products = torch.empty_like(sums)
        for step in steps[1:]:
            sums += torch.mul(step[start:stop, None], step[None], out=products)
        sums = sums.view(stop - start, count, groups, LANES)
        while sums.shape[-1] > 1:
            sums = sums[..., : sums.shape[-1] // 2] + sums[..., sums.shape[-1] // 2 :]
        by_group[:, start:stop] = sums[..., 0].permute(2, 0, 1).cpu()
    starts = range(0, groups, BLOCK // GROUP)
    return torch.stack([added_by_halves(by_group[start : start + BLOCK // GROUP]) for start in starts])


def sums_of_squares(vectors_NS: Tensor) -> Tensor:
    """(N,) float64: the diagonal of `gram_partials` of one block, of BLOCK elements at most."""
    count, numel = vectors_NS.shape
    groups = -(-numel // GROUP)
    padded_NS = torch.nn.functional.pad(vectors_NS.double(), (0, groups * GROUP - numel))
    steps = padded_NS.square_().view(count, groups, GROUP // LANES, LANES).unbind(dim=2)
    sums = torch.zeros(count, groups, LANES, dtype=torch.float64, device=vectors_NS.device)
    for step in steps:
        sums += step
    while sums.shape[-1] > 1:
        sums = sums[..., : sums.shape[-1] // 2] + sums[..., sums.shape[-1] // 2 :]
    return added_by_halves(sums[..., 0].T)


def gram_of_lines(vectors_NRC: Tensor, along: str) -> Tensor:
    """Inner products of every pair of vectors for each row or each column of matrices.

    Args:
        vectors_NRC: (N, rows, columns), float64.
        along: "rows" or "columns".

    Returns:
        (rows, N, N) or (columns, N, N), float64.
    """
    vectors_VNS = vectors_NRC.permute(1, 0, 2) if along == "rows" else vectors_NRC.permute(2, 0, 1)
    return torch.bmm(vectors_VNS, vectors_VNS.transpose(1, 2))


class GramSum:
    """The Gram matrix, from the partial sums of all blocks given in order. How they are grouped makes no difference.

    Args:
        count: N.
    """

    def __init__(self, count: int) -> None:
        self._pending = torch.empty(0, count, count, dtype=torch.float64)
        self._sums: list[Tensor | None] = []  # number k is of 2^k groups, as the digits of a binary counter

    def add(self, partials: Tensor) -> None:
        """The next blocks' partial sums, (blocks, N, N)."""
        self._pending = torch.cat([self._pending, partials])
        while len(self._pending) >= _GROUP:
            carried: Tensor | None = added_by_halves(self._pending[:_GROUP])
            self._pending = self._pending[_GROUP:].clone()
            for place, sum_NN in enumerate(self._sums):
                if sum_NN is None or carried is None:
                    self._sums[place] = sum_NN if carried is None else carried
                    carried = None
                else:
                    self._sums[place], carried = None, sum_NN + carried
            if carried is not None:
                self._sums.append(carried)

    def total(self) -> Tensor:
        """(N, N), float64, symmetric.

        Raises:
            MergeError: if a product or a sum is beyond float64.
        """
        sum_NN = added_by_halves(self._pending)
        for each_NN in self._sums:
            sum_NN = sum_NN if each_NN is None else each_NN + sum_NN
        return finite_gram(sum_NN)


def finite_gram(sum_NN: Tensor) -> Tensor:
    """A Gram matrix (or several) that is symmetric to the last bit.

    Raises:
        MergeError: if a product or a sum is beyond float64.
    """
    gram_NN = torch.triu(sum_NN) + torch.triu(sum_NN, 1).transpose(-2, -1)
    if not torch.isfinite(gram_NN).all():
        raise MergeError("an inner product of the clients' models is beyond float64")
    return gram_NN


def added_by_halves(partials: Tensor) -> Tensor:
    """The sum over the first dimension, by halves, in an order that depends on their number alone."""
    while len(partials) > 1:
        even = partials[: len(partials) // 2 * 2]
        halves = even[0::2] + even[1::2]
        partials = torch.cat([halves, partials[len(even) :]])
    return partials[0] if len(partials) else partials.sum(dim=0)
