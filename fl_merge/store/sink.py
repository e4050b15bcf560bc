"""A folder to which a model is written, and what happens to it when the writer fails or is killed.

Each file is written under a temporary name and renamed when it is whole, the index last: a reader sees the model that
was there before or the new one, whole. A writer holds the folder's lock; another that comes meanwhile is refused. What
a killed writer left is removed by the next one: temporary files by their names, shards by the notes that the dead one
made of what it was about to rename (`new`) and to remove (`old`). No other file is ever touched.

That holds when the writer is killed, not when the power fails: nothing waits for the disk (there is no fsync), and what
a system that goes down had not yet written out is lost, names and bytes in any order.
"""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
import re
import secrets
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fl_merge.errors import MergeError
from fl_merge.store.format import (
    INDEX_FILE,
    SINGLE_FILE,
    check_storable,
    claim,
    fill,
    layout,
    temporary_name,
    write_text,
)
from fl_merge.store.lock import WRITER_FILE, LockedError, WriterLock
from fl_merge.types import TensorSpec

TEMPORARY = re.compile(r"\.model(-[0-9a-f]+)?(-\d{5,}-of-\d{5,})?\.safetensors(\.index\.json)?\.[0-9a-f]+\.tmp")
"""The temporary names of a writer's files."""

_ADVICE = {
    errno.ENOSPC: "; make room on that disk or write to another",
    errno.EDQUOT: "; make room within your quota or write to another disk",
    errno.EFBIG: "; raise the limit on the size of a file (ulimit -f) or write smaller shards",
}


class SafetensorsSink:
    """Writes a folder that Hugging Face libraries read: model.safetensors, or shards of a given size and their index.

    All or nothing against a process that is killed, not against a loss of power: there is no fsync.

    A tensor up to `whole_bytes` is better written at once than through the mapping: the system then has to find room in
    memory for many pages together, and has none to clear before.

    Args:
        folder: made if it is not there; a model of the same names in it is replaced when the new one is whole.
        max_shard_bytes: a larger model is cut into shards (a larger tensor still stays in one piece).
        metadata: text to store in the header of each file.
    """

    whole_bytes = 1 << 24

    def __init__(
        self, folder: str | Path, *, max_shard_bytes: int = 5 * 10**9, metadata: Mapping[str, str] | None = None
    ) -> None:
        self._folder = Path(folder)
        self._max_shard_bytes = max_shard_bytes
        self._metadata = {"format": "pt", **(metadata or {})}
        self._lock: WriterLock | None = None
        self._shards: list[_Shard] = []
        self._place: dict[str, _Shard] = {}

    def begin(self, specs: Mapping[str, TensorSpec]) -> None:
        """Make the files at their full size, under temporary names; what a killed writer left is removed before.

        Raises:
            MergeError: if a tensor cannot be stored, another writer is at work in the folder, or there is no room;
                nothing of the new model is left there then.
        """
        if self._lock is not None:
            raise MergeError(f"'{self._folder}': begin() was called twice; wanted finish() or abort() in between")
        check_storable(specs)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MergeError(f"cannot make the folder '{self._folder}': {error.strerror}") from error
        self._lock = self._locked()
        try:
            if self._recover(self._lock):
                self._lock.rewrite([])
            groups = _shard_groups(specs, self._max_shard_bytes)
            for final, names in zip(self._finals(len(groups)), groups, strict=True):
                shard = _Shard(self._folder / final, {name: specs[name] for name in names}, self._metadata)
                self._shards.append(shard)
                self._place |= dict.fromkeys(names, shard)
                shard.create()
        except BaseException:
            self.abort()
            raise

    def _locked(self) -> WriterLock:
        try:
            return WriterLock(self._folder)
        except LockedError:
            raise MergeError(
                f"another merge is writing to '{self._folder}' (it has the lock '{WRITER_FILE}' there); wait for its "
                "end, or write to another folder"
            ) from None
        except OSError as error:
            raise _cannot_write(self._folder / WRITER_FILE, 0, error) from error

    def _finals(self, count: int) -> list[str]:
        if count == 1:
            return [SINGLE_FILE]
        plain = _shard_names("model", count)
        assert self._lock is not None
        if self._lock.exclusive and not any((self._folder / name).exists() for name in plain):
            return plain
        # The shards of the model that is there stay readable until the index names the new ones, and those of another
        # writer, where no lock keeps it away, have names of their own.
        return _shard_names(f"model-{secrets.token_hex(4)}", count)

    def write(self, name: str, start: int, values_S: Tensor) -> None:
        """Elements from `start` on, to their place in the file."""
        self._shard(name).write(name, start, values_S)

    def place(self, name: str) -> Tensor:
        """A view of the mapped file."""
        return self._shard(name).place(name)

    def _shard(self, name: str) -> _Shard:
        shard = self._place.get(name)
        if shard is None:
            raise MergeError(f"'{self._folder}': tensor '{name}' is not among those that were begun")
        return shard

    def release(self, name: str) -> None:
        """Say that a tensor has been written: what is mapped of it need not stay in this process."""
        self._place[name].release(name)

    def finish(self) -> None:
        """Give the files their final names, the index last, and remove the model that it replaces.

        Raises:
            MergeError: if `begin` has not made the files, or they cannot be renamed. Until `abort` the folder is as it
                was, but for files that no index names.
        """
        if self._lock is None:
            raise MergeError(f"'{self._folder}': finish() without a begin() that made the files; nothing was written")
        for shard in self._shards:
            shard.close()
        index = self._folder / INDEX_FILE
        new = {shard.final.name for shard in self._shards}
        try:
            there = {path.name for path in self._folder.iterdir()}
            old = ({SINGLE_FILE, *_indexed(index)} - new) & there
            notes = [f"new {name}" for name in sorted(new - there)] + [f"old {name}" for name in sorted(old)]
            self._lock.rewrite(notes)
            for shard in self._shards:
                os.replace(shard.temporary, shard.final)
            if len(new) > 1:
                total = sum(shard.data_bytes for shard in self._shards)
                weight_map = {name: shard.final.name for name, shard in sorted(self._place.items())}
                text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
                write_text(index, text + "\n")
            else:
                index.unlink(missing_ok=True)
        except OSError as error:
            raise _cannot_write(self._folder, sum(shard.data_bytes for shard in self._shards), error) from error
        self._end()

    def abort(self) -> None:
        """Remove what has been written; a model that was there before is untouched. A second call does nothing."""
        if self._lock is not None:
            self._end()

    def _end(self) -> None:
        """Let go of the files, remove what is not (or no longer) the folder's model, and end the lock."""
        assert self._lock is not None
        for shard in self._shards:
            shard.close()
            with contextlib.suppress(OSError):
                shard.temporary.unlink(missing_ok=True)
        self._shards, self._place = [], {}
        lock = self._lock
        try:
            lock.release(keep_notes=not self._recover(lock))  # what could not be removed is the next writer's to remove
        finally:
            self._lock = None

    def _recover(self, lock: WriterLock) -> bool:
        """Bring a folder in order in which a writer has stopped at any point; true if all could be removed.

        Without a lock, only what this writer has noted itself is removed: the rest may be a living one's.
        """
        index = self._folder / INDEX_FILE
        current = _indexed(index) if index.exists() else {SINGLE_FILE}
        new, old = (
            {note[4:] for note in lock.notes() if note[:4] == kind and Path(note[4:]).name == note[4:]}
            for kind in ("new ", "old ")
        )
        # Only when the index names the new files is the old model not in use.
        unused = (old if new <= current else new) - current if current else set()
        try:
            left = [path for path in self._folder.iterdir() if lock.exclusive and TEMPORARY.fullmatch(path.name)]
        except OSError:
            return False
        return _remove([*left, *(self._folder / name for name in sorted(unused))])


def _remove(paths: Iterable[Path]) -> bool:
    gone = True
    for path in paths:
        try:
            path.unlink(missing_ok=True)
        except OSError:
            gone = False
    return gone


def _cannot_write(path: Path, size: int, error: OSError) -> MergeError:
    return MergeError(f"cannot write '{path}' ({size:,} bytes): {error.strerror}{_ADVICE.get(error.errno or 0, '')}")


def _shard_names(stem: str, count: int) -> list[str]:
    return [f"{stem}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _indexed(index: Path) -> set[str]:
    """The shards that an index in this folder names; none if there is no index."""
    try:
        return {Path(name).name for name in json.loads(index.read_text())["weight_map"].values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return set()


def _shard_groups(specs: Mapping[str, TensorSpec], limit: int) -> list[list[str]]:
    groups: list[list[str]] = [[]]
    filled = 0
    for name, spec in specs.items():
        if groups[-1] and filled + spec.nbytes > limit:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += spec.nbytes
    return groups


class _Shard:
    """One safetensors file that is being written: 8 bytes of header length, a JSON header, the tensors."""

    def __init__(self, final: Path, specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> None:
        self.final = final
        self.temporary = temporary_name(final)
        self._specs = specs
        self._head, self._start, self.data_bytes = layout(specs, metadata)
        self._map: mmap.mmap | None = None
        self._file: int | None = None

    def create(self) -> None:
        try:
            with open(self.temporary, "xb+", buffering=0) as file:
                # The header too is in room that has been claimed: a disk that is full is found out here.
                size = len(self._head) + self.data_bytes
                if not claim(file.fileno(), 0, size):
                    fill(file.fileno(), 0, size)
                self._map = mmap.mmap(file.fileno(), 0)
                self._map[: len(self._head)] = self._head
                self._file = os.dup(file.fileno())
        except OSError as error:
            raise _cannot_write(self.final, self.data_bytes, error) from error

    def write(self, name: str, start: int, values_S: Tensor) -> None:
        assert self._file is not None
        as_bytes: Any = values_S.contiguous().view(-1).view(torch.uint8).numpy()
        left = memoryview(as_bytes)
        at = self._start[name] + start * values_S.element_size()
        try:
            while len(left):
                written = os.pwrite(self._file, left, at)
                left, at = left[written:], at + written
        except OSError as error:
            raise _cannot_write(self.final, self.data_bytes, error) from error

    def place(self, name: str) -> Tensor:
        spec = self._specs[name]
        if spec.numel == 0:
            return torch.empty(0, dtype=spec.dtype)
        assert self._map is not None
        return torch.frombuffer(self._map, dtype=spec.dtype, count=spec.numel, offset=self._start[name])

    def release(self, name: str) -> None:
        start = self._start[name]
        first, end = -(-start // mmap.PAGESIZE), (start + self._specs[name].nbytes) // mmap.PAGESIZE
        if first < end and self._map is not None and sys.platform == "linux":  # there it is written to the file anyway
            self._map.madvise(mmap.MADV_DONTNEED, first * mmap.PAGESIZE, (end - first) * mmap.PAGESIZE)

    def close(self) -> None:
        """Let go of the mapping, which ends with the last tensor that looks into it."""
        self._map = None
        if self._file is not None:
            os.close(self._file)
            self._file = None
