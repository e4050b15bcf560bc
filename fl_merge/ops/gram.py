"""Inner products whose value does not depend on how the tensor was sliced. Suffixes: N vectors, S elements."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fl_merge.errors import MergeError

BLOCK = 16384
"""Elements a partial sum runs over. Slices start at multiples of it, so the partial sums are always the same ones."""


def gram_partials(vectors_NS: Tensor) -> Tensor:
    """Inner products of every pair of vectors, one a block of BLOCK elements.

    Args:
        vectors_NS: (N, S), a floating dtype; S need not be a multiple of BLOCK.

    Returns:
        (blocks, N, N), float64, symmetric.
    """
    count, numel = vectors_NS.shape
    blocks = math.ceil(numel / BLOCK)
    partials = torch.empty(blocks, count, count, dtype=torch.float64)
    for block in range(blocks):
        part_NS = vectors_NS[:, block * BLOCK : (block + 1) * BLOCK].double()
        for row in range(count):
            products_NS = (part_NS[row] * part_NS[row:]).sum(dim=1).cpu()
            partials[block, row, row:] = products_NS
            partials[block, row:, row] = products_NS
    return partials


def gram_from_partials(partials: Sequence[Tensor]) -> Tensor:
    """The Gram matrix from the partial sums of all slices, added exactly (and so in any order).

    Args:
        partials: tensors of shape (blocks, N, N).

    Returns:
        (N, N), float64.

    Raises:
        MergeError: if a product or a sum is beyond float64.
    """
    columns = torch.cat([part.flatten(1) for part in partials]).T.tolist()
    size = partials[0].shape[-1]
    try:
        sums = [math.fsum(column) for column in columns]
    except (OverflowError, ValueError):
        raise MergeError("an inner product of the clients' models is beyond float64") from None
    return torch.tensor(sums, dtype=torch.float64).reshape(size, size)
