"""Locks that a process holds and that vanish with it."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from hasten.app.errors import BadInput

SETUP, MANIFEST, BATCHES = 0, 1, 2
"""Bytes of the lock file: who makes the plan, who writes the manifest, and from here on one for each batch."""


class Locks:
    """Byte-range locks of one file (POSIX `fcntl`): byte n is lock n.

    The system lets go of them the moment their process ends, by whatever signal, so a dead process's work is free at once and no
    heartbeat or time limit can be wrong. NFS, GPFS, CephFS and Lustre (mounted with `flock`) keep them across machines; there a dead
    machine's locks are freed by the file server. They belong to the process, so there must be only one such object for a file in it.

    Args:
        path: The file; made where there is none.

    Raises:
        BadInput: The system or the file system has no such locks.
    """

    def __init__(self, path: Path) -> None:
        try:
            import fcntl
        except ImportError:
            raise BadInput("hasten batch needs POSIX file locks, which this system has not; on Windows use WSL") from None
        self._fcntl = fcntl
        self._path = path
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)

    def close(self) -> None:
        """Lets go of all locks."""
        os.close(self._file)

    def take(self, number: int) -> None:
        """Waits for a lock."""
        self._ask(self._fcntl.LOCK_EX, number)

    def try_take(self, number: int) -> bool:
        """Takes a lock if it is free (or this process has it)."""
        try:
            self._ask(self._fcntl.LOCK_EX | self._fcntl.LOCK_NB, number)
        except (BlockingIOError, PermissionError):  # EAGAIN or EACCES, as the system likes
            return False
        return True

    def release(self, number: int) -> None:
        """Lets go of a lock."""
        self._ask(self._fcntl.LOCK_UN, number)

    def _ask(self, what: int, number: int) -> None:
        try:
            self._fcntl.lockf(self._file, what, 1, number)
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise BadInput(
                    f"--out must be on a file system with file locks, by which processes share the work; {self._path.parent.parent} has "
                    f"none ({error.strerror})"
                ) from None
            raise
