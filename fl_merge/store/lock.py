"""Locks that end with their process, however it ends: who finds something without its lock knows that its writer died.

They are flock's, not process ids: an id is soon another process's, and in a container or on a network disk another
machine's. Where there are no such locks (Windows, some network disks) nothing is taken for a dead process's.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import weakref
from pathlib import Path

if sys.platform != "win32":
    import fcntl

WRITER_FILE = ".fl-merge.lock"
"""In a folder to which a model is being written: locked by the writer, and with notes of what it would leave behind."""


class LockedError(Exception):
    """Another writer, of this process or of another, has the lock."""


class Held:
    """A lock that lasts until it is released, nothing refers to it any more, or the process has died.

    Args:
        descriptor: of the locked file or folder; closed at the end.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.release = weakref.finalize(self, _release, descriptor, os.getpid())


def _release(descriptor: int, owner: int) -> None:
    # A forked child has the same lock: it must not end it for its parent, nor prolong it.
    if sys.platform != "win32" and os.getpid() == owner:
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


def take(descriptor: int) -> Held | None:
    """Lock an open file or folder, without waiting.

    Returns:
        The lock; None if this file system has none. The descriptor is closed in that case.

    Raises:
        LockedError: if another has it; the descriptor is closed then too.
    """
    if sys.platform == "win32":
        os.close(descriptor)
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):
            raise LockedError from None
        return None
    return Held(descriptor)


def lock_folder(folder: Path) -> Held | None:
    """Lock a folder itself; None if it cannot be had, for whatever reason."""
    if sys.platform == "win32":
        return None
    try:
        return take(os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW))
    except (OSError, LockedError):
        return None


class WriterLock:
    """The right to write a model to a folder, and notes on disk for whoever comes after a writer that was killed.

    Args:
        folder: in which `WRITER_FILE` is made; it is removed at the end.

    Raises:
        LockedError: if another writer has it.
        OSError: if the file cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / WRITER_FILE
        self._own: list[str] = []
        self._held = self._locked()
        self.exclusive = self._held is not None
        """False where the file system has no locks: other writers may be at work in the folder."""

    def _locked(self) -> Held | None:
        if sys.platform == "win32":
            return None
        while True:
            held = take(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666))
            if held is None:
                self._path.unlink(missing_ok=True)
                return None
            try:
                there = os.stat(self._path, follow_symlinks=False)
            except FileNotFoundError:
                there = None
            if there is not None and os.path.samestat(there, os.fstat(held.descriptor)):
                return held
            held.release()  # its owner removed it between our opening and our locking it

    def notes(self) -> list[str]:
        """What is noted; at first what a writer that was killed had noted, if there is a lock."""
        if self._held is None:
            return self._own
        text = os.pread(self._held.descriptor, os.fstat(self._held.descriptor).st_size, 0)
        return text.decode(errors="replace").split("\n")[:-1]  # behind the last line's end is half a line or nothing

    def rewrite(self, notes: list[str]) -> None:
        """Note these lines and no others."""
        self._own = list(notes)
        if self._held is None:
            return
        os.truncate(self._held.descriptor, 0)
        data = "".join(f"{note}\n" for note in notes).encode()
        while data:
            size = os.fstat(self._held.descriptor).st_size
            data = data[os.pwrite(self._held.descriptor, data, size) :]

    def release(self, *, keep_notes: bool = False) -> None:
        """End the lock; the file goes first, so that nobody can lock one that is about to go."""
        if self._held is not None:
            if not keep_notes:
                with contextlib.suppress(OSError):
                    self._path.unlink(missing_ok=True)
            self._held.release()
            self._held = None
