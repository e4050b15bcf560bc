"""A folder on disk for one round's updates: the server then holds one model in memory, not one a client.

An update that has passed the check is written as a safetensors file and read back through a mapping of it, slice by
slice as it is merged. The elements are the same bit for bit, so the merged model is.

Each `Spill` makes a folder of its own within the one that it is given, and holds a lock on it for as long as its
process lives. Whoever finds such a folder without a lock knows that its process has died, and removes it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from fl_merge.errors import DecodeError, MergeError, RecipeError, TensorMismatchError, UpdateError
from fl_merge.store import SAFETENSORS_DTYPES, Held, SafetensorsSource, check_storable, claim, layout, lock_folder
from fl_merge.types import TensorSource, TensorSpec, Update

PREFIX = "fl-merge-spill-"
"""With the process id and something random behind it, the name of a round's folder."""

_UNLOCKED = f".{PREFIX}"
"""What a folder's name begins with until it is locked (for good, where the file system has no locks); nobody takes such
a folder for a dead process's before it is an hour old, nor ever where there are no locks."""

UNLOCKED_SECONDS = 3600


class Spill:
    """Keeps one round's updates on disk; a context manager, whose end removes them.

    Args:
        folder: where to make the round's folder; made if it is not there. None for the system's temporary folder.
        max_bytes: of tensors, for all clients together; None for as much as the disk has.
        clients: among how many `max_bytes` is shared out equally. Which updates fit then depends on neither the order
            of arrival nor what other clients send.
    """

    def __init__(self, folder: str | Path | None = None, max_bytes: int | None = None, clients: int = 1) -> None:
        self._parent = Path(tempfile.gettempdir() if folder is None else folder)
        self._max_bytes = max_bytes
        self._clients = max(clients, 1)
        self._folder: Path | None = None
        self._lock: Held | None = None
        self._count = 0

    def open(self) -> Path:
        """The round's folder; at the first call it is made, and what dead processes left beside it is removed.

        Raises:
            MergeError: if it cannot be made.
        """
        if self._folder is None:
            try:
                self._parent.mkdir(parents=True, exist_ok=True)
                remove_leftovers(self._parent)
                self._folder = Path(tempfile.mkdtemp(prefix=f"{_UNLOCKED}{os.getpid()}-", dir=self._parent))
                self._lock = lock_folder(self._folder)
                if self._lock is not None:
                    self._folder = self._folder.rename(self._folder.with_name(self._folder.name.removeprefix(".")))
            except OSError as error:
                self.close()
                raise MergeError(
                    f"cannot make a folder for updates in '{self._parent}' (spill_folder): {error.strerror}"
                ) from error
        return self._folder

    def keep(self, update: Update) -> Update:
        """The same update with its tensors and statistics on disk; nothing of what it was read from is referred to.

        Args:
            update: has passed the check.

        Returns:
            An update whose tensors are read from the file when they are asked for. To read one is a MergeError if its
            bytes are no longer those that were written; see `SpilledTensors` for when that is looked at.

        Raises:
            UpdateError: if the update is larger than its share of `max_bytes`, or has a dtype that no safetensors file
                has.
            MergeError: if it cannot be written: the disk is full, say. Nothing of it is left there then.
        """
        sources = {"": update.tensors} | ({"-statistics": update.statistics} if update.statistics is not None else {})
        size = sum(self._size(source, update.client_id) for source in sources.values())
        if self._max_bytes is not None and size > self._max_bytes // self._clients:
            raise UpdateError(
                f"{size:,} bytes are more than a client's share of max_spill_bytes ({self._max_bytes:,} for "
                f"{self._clients}); raise it to {size * self._clients:,}",
                client_id=update.client_id,
            )
        number = self._count
        self._count += 1
        written: list[Path] = []
        kept = []
        for suffix, source in sources.items():
            path = self.open() / f"{number:06d}{suffix}.safetensors"
            try:
                kept.append(self._write(source, path, update.client_id))
            except BaseException:
                for earlier in written:
                    earlier.unlink(missing_ok=True)
                raise
            written.append(path)
        return replace(update, tensors=kept[0], statistics=kept[1] if len(kept) > 1 else None)

    @staticmethod
    def _size(source: TensorSource, client_id: str) -> int:
        """Bytes that its file will have behind the header.

        Raises:
            UpdateError: for a dtype that no safetensors file has.
        """
        specs = source.specs()
        for name, spec in specs.items():
            if spec.dtype not in SAFETENSORS_DTYPES:
                known = ", ".join(_short(dtype) for dtype in SAFETENSORS_DTYPES)
                raise TensorMismatchError(
                    f"dtype {_short(spec.dtype)} cannot be kept on disk, wanted one of {known}",
                    client_id=client_id,
                    tensor=name,
                )
        check_storable(specs)
        return layout(specs, {})[2]

    def _write(self, source: TensorSource, final: Path, client_id: str) -> SpilledTensors:
        head, places, size = layout(source.specs(), {})
        temporary = final.with_suffix(".tmp")
        checksums = {}
        try:
            with open(temporary, "wb", buffering=0) as file:
                claim(file.fileno(), 0, len(head) + size)  # where it cannot, the writes will tell
                _write(file.fileno(), memoryview(head))
                for name in places:
                    data = _bytes_of(source.read(name))
                    checksums[name] = zlib.crc32(data)
                    _write(file.fileno(), data)
            os.replace(temporary, final)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise MergeError(
                f"cannot keep an update of {size:,} bytes in '{self._parent}' (spill_folder): {error.strerror}"
            ) from error
        return SpilledTensors(final, checksums, client_id)

    def close(self) -> None:
        """Remove the folder and all that is in it; updates that are still mapped stay readable on POSIX systems."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, raised: BaseException | None, at: TracebackType | None
    ) -> None:
        self.close()


class SpilledTensors:
    """A mapped safetensors file.

    Each tensor is compared with its checksum when it is first read, and when it is read after something has changed in
    what the system says of the file: its size, its times, or that it is another. What changes in the file after a
    tensor was read, while views of it are still in use, is found only if the tensor is read again.
    """

    def __init__(self, path: Path, checksums: Mapping[str, int], client_id: str) -> None:
        self._path = path
        self._client_id = client_id
        self._checksums = dict(checksums)
        self._size = path.stat().st_size
        self._checked: dict[str, object] = {}  # what the system said of the file before each tensor was compared
        try:
            self._source = SafetensorsSource(path)
        except (DecodeError, RecipeError) as error:
            raise self._changed(str(error)) from error
        self._specs = dict(self._source.specs())

    def specs(self) -> Mapping[str, TensorSpec]:
        """Names, shapes and dtypes."""
        return self._specs

    def read(self, name: str) -> Tensor:
        """A view of the mapped file.

        Raises:
            MergeError: if it is not what was written.
        """
        # To touch what was cut off from a mapped file ends the process; one that was removed stays readable.
        state: object = "removed"
        with contextlib.suppress(FileNotFoundError):
            found = self._path.stat()
            if found.st_size != self._size:
                raise self._changed(f"the file has {found.st_size:,} bytes, wanted {self._size:,}")
            state = found.st_dev, found.st_ino, found.st_mtime_ns, found.st_ctime_ns
        try:
            tensor = self._source.read(name)
        except DecodeError as error:  # cut off since
            raise self._changed(error.problem) from error
        if self._checked.get(name) != state:
            if zlib.crc32(_bytes_of(tensor)) != self._checksums[name]:
                raise self._changed(f"tensor '{name}' does not have its checksum")
            self._checked[name] = state
        return tensor

    def aliases(self) -> Mapping[str, str]:
        """None: the format stores each tensor once."""
        return {}

    def _changed(self, how: str) -> MergeError:
        return MergeError(f"client '{self._client_id}': its update in '{self._path}' has changed since it came: {how}")


def remove_leftovers(folder: Path) -> None:
    """Remove the round folders of processes that have died; those of living ones are locked and stay."""
    for left in [*folder.glob(f"{PREFIX}*"), *_never_locked(folder)]:
        lock = lock_folder(left)
        if lock is not None:
            shutil.rmtree(left, ignore_errors=True)
            lock.release()


def _never_locked(folder: Path) -> Iterator[Path]:
    """Folders whose process died between making and locking them; it takes no hour to get from one to the other."""
    for left in folder.glob(f"{_UNLOCKED}*"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > UNLOCKED_SECONDS:
                yield left


def _bytes_of(tensor: Tensor) -> memoryview:
    flat_S = tensor.detach().cpu().contiguous().view(-1)
    return flat_S.view(torch.uint8).numpy().data if flat_S.numel() else memoryview(b"")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _write(descriptor: int, data: memoryview) -> None:
    while data.nbytes:
        data = data[os.write(descriptor, data) :]
