"""Flower's records to tensors and back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from flwr.app import Array, ArrayRecord
from torch import Tensor

from fl_merge.codecs import CODECS, DTYPES, codec_for
from fl_merge.errors import DecodeError, RecipeError
from fl_merge.types import TensorSpec

STATISTICS_KEY = "fl-merge.statistics"
"""In the config of a message to train: the kinds of statistics that the client is asked for, joined with commas."""

ARCHITECTURE_KEY = "fl-merge.architecture"
"""In the config of every message: the config of the model that is sent, as JSON, where the server knows it."""

TRAIN_KEY = "fl-merge.train"
"""In the config of a message to train: what the client trains and sends, where that is not all ("router", globs)."""

EXCHANGE_KEY = "fl-merge.exchange"
"""In the config of every message of a run that begins with adapters: "adapter" while they are exchanged, "weights" once
they are folded into the model."""

STATISTICS_RECORD = "statistics"
"""The name of the ArrayRecord in which a client sends them."""


def to_record(
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype | str | None = None,
    *,
    encoded: Mapping[tuple[str, torch.dtype], bytes] | None = None,
) -> ArrayRecord:
    """An ArrayRecord of these tensors.

    What numpy has travels as Flower's own arrays do; bfloat16 travels as raw bytes under a tag of our own, which
    Flower's built-in strategies refuse and `to_tensors` reads.

    Args:
        tensors: a state dict.
        dtype: convert floating tensors to it first; None leaves them as they are.
        encoded: the bytes of some of the tensors, by name and dtype, which are then taken as they are.

    Raises:
        RecipeError: for a dtype that does not travel.
    """
    wanted = wire_dtype(dtype)
    arrays = {}
    for name, tensor in tensors.items():
        if wanted is not None and tensor.is_floating_point():
            tensor = tensor.to(wanted)
        label = str(tensor.dtype).removeprefix("torch.")
        if label not in DTYPES:
            raise RecipeError(f"tensor '{name}': dtype {label} does not travel (known: {', '.join(DTYPES)})")
        codec = codec_for(tensor.dtype)
        data = (encoded or {}).get((name, tensor.dtype))
        data = codec.encode(tensor) if data is None else data
        arrays[name] = Array(dtype=label, shape=tuple(tensor.shape), stype=codec.tag, data=data)
    return ArrayRecord(arrays)


def to_tensors(record: ArrayRecord) -> dict[str, Tensor]:
    """The tensors of an ArrayRecord, as copies that may be trained on.

    Raises:
        DecodeError: naming the tensor, if its bytes are not what its header says.
    """
    return {name: tensor.clone() for name, tensor in views(record).items()}


def views(record: ArrayRecord) -> dict[str, Tensor]:
    """The tensors of an ArrayRecord, as views of its bytes, which nobody may write to.

    Raises:
        DecodeError: as `to_tensors`.
    """
    source = RecordSource(record)
    return {name: source.read(name) for name in source.specs()}


def wire_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A floating dtype by its name or itself; None and "" stay None.

    Raises:
        RecipeError: if it is no floating dtype that travels.
    """
    if dtype is None or dtype == "":
        return None
    found = DTYPES.get(str(dtype).removeprefix("torch."))
    if found is None or not found.is_floating_point:
        floating = [name for name, known in DTYPES.items() if known.is_floating_point]
        raise RecipeError(f"wire dtype: found '{dtype}', wanted one of {', '.join(floating)}")
    return found


class RecordSource:
    """The tensors of an ArrayRecord, read as views of its bytes. Headers are checked before bytes are believed."""

    def __init__(self, record: ArrayRecord) -> None:
        self._arrays = dict(record.items())
        self._tensors: dict[str, Tensor] = {}

    def specs(self) -> Mapping[str, TensorSpec]:
        """Names, shapes and dtypes, as announced.

        Raises:
            DecodeError: for a dtype or a tag that is not known.
        """
        return {name: self._spec(name, array) for name, array in self._arrays.items()}

    @staticmethod
    def _spec(name: str, array: Array) -> TensorSpec:
        if array.stype not in CODECS:
            raise DecodeError(f"encoded as '{array.stype}', known are {', '.join(CODECS)}", tensor=name)
        if array.dtype not in DTYPES:
            raise DecodeError(f"dtype '{array.dtype}' is not supported ({', '.join(DTYPES)})", tensor=name)
        if any(isinstance(size, bool) or not isinstance(size, int) or size < 0 for size in array.shape):
            raise DecodeError(f"shape {array.shape} is no shape", tensor=name)
        return TensorSpec(tuple(array.shape), DTYPES[array.dtype])

    def read(self, name: str) -> Tensor:
        """A read-only view of the bytes.

        Raises:
            DecodeError: if they are not what was announced.
        """
        if name not in self._tensors:
            array = self._arrays[name]
            try:
                self._tensors[name] = CODECS[array.stype].decode(array.data, self._spec(name, array))
            except DecodeError as error:
                raise DecodeError(error.problem, tensor=name) from None
        return self._tensors[name]

    def aliases(self) -> Mapping[str, str]:
        """None: a record holds each tensor for itself."""
        return {}
