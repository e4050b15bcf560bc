"""Random draws that are a function of what they are for, not of when they are made.

The generator is counter-based (SplitMix64: Steele, Lea, Flood, 2014): number k of a stream is a mix of
key + (k + 1) * gamma, so that any slice of a tensor can be drawn alone, in any order, by any thread. Its lower 32 bits
are the draw of element 2 k, its upper ones that of element 2 k + 1.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

from fl_merge.kernels import after

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def stream_key(*parts: str | int) -> int:
    """A 64-bit key for the draws that belong to these parts, e.g. (seed, round, client id, tensor name)."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def uniform(key: int, start: int, stop: int) -> Tensor:
    """Draws start .. stop of the stream `key`, uniform on [0, 1).

    Returns:
        (stop - start,), float64, multiples of 2^-32.
    """
    first = start // 2
    if (kernels := after(stop - start)) is not None:
        out_S = torch.empty(stop - 2 * first, dtype=torch.float64)
        kernels.uniform(np.uint64(key), 2 * first, out_S.numpy())
        return out_S[start - 2 * first :]
    with np.errstate(over="ignore"):
        state = np.arange(first + 1, (stop + 1) // 2 + 1, dtype=np.uint64)
        state *= _GAMMA
        state += np.uint64(key)
        state ^= state >> np.uint64(30)
        state *= _MIX_1
        state ^= state >> np.uint64(27)
        state *= _MIX_2
        state ^= state >> np.uint64(31)
    words = state.astype("<u8", copy=False).view("<u4")[start - 2 * first : stop - 2 * first]
    return torch.from_numpy(words.astype(np.float64) * 2.0**-32)
