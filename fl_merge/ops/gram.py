"""Inner products whose value does not depend on how the tensor was sliced. Suffixes: N vectors, S elements."""

from __future__ import annotations

import torch
from torch import Tensor

from fl_merge.errors import MergeError

BLOCK = 16384
"""Elements a partial sum runs over. Slices start at multiples of it, so the partial sums are always the same ones."""

_GROUP = 64
"""Partial sums that are added to one at a time, so that few of them are kept."""


def gram_block(vectors_NS: Tensor) -> Tensor:
    """Inner products of every pair of vectors.

    Args:
        vectors_NS: (N, S), float64, contiguous; S at most BLOCK.

    Returns:
        (N, N), float64. What is below the diagonal may differ from what is above it in the last bits.
    """
    return vectors_NS @ vectors_NS.T


def gram_partials(vectors_NS: Tensor) -> Tensor:
    """Inner products of every pair of vectors, one a block of BLOCK elements.

    Args:
        vectors_NS: (N, S), a floating dtype; S need not be a multiple of BLOCK.

    Returns:
        (blocks, N, N), float64.
    """
    count, numel = vectors_NS.shape
    partials = [torch.empty(0, count, count, dtype=torch.float64)]
    for start in range(0, numel, BLOCK):
        partials.append(gram_block(vectors_NS[:, start : start + BLOCK].double().contiguous()).cpu()[None])
    return torch.cat(partials)


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
