"""Networks of comparisons that sort so many values whatever they are. Suffix: P pairs."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


@functools.cache
def sorting_network(count: int) -> Array:
    """(P, 2) int64: pairs of places; putting the smaller value of each pair first, in order, sorts `count` values.

    Batcher's odd-even merge sort (1968), for any number of values.
    """
    pairs = []
    width = 1
    while width < count:
        step = width
        while step:
            for first in range(step % width, count - step, 2 * step):
                for at in range(first, min(first + step, count - step)):
                    if at // (2 * width) == (at + step) // (2 * width):
                        pairs.append((at, at + step))
            step //= 2
        width *= 2
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)
