"""Who works on a folder: one process at a time, also where several sweeps share it."""

from __future__ import annotations

__all__ = ["Claim"]

import errno
import fcntl
import os
import socket
import time
import warnings
from pathlib import Path
from types import TracebackType
from typing import Self, final

# what file systems without locks answer
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
# one that only looks whether a claim is held has it for an instant itself
_TRIES, _BETWEEN = 20, 0.01


@final
class Claim:
    """A lock on a file, held by this process and by those that inherit its descriptor, until the last of them ends.

    The kernel keeps it (``flock``), so a claim cannot outlive its processes: what a killed process held is free. On
    a network file system it holds between machines where the file system's locks do (NFS does; Lustre with the mount
    option ``flock``). Where there are no locks at all, a warning says that two sweeps must not share a folder.

    Args:
        path: File to lock; it is made, with its folder, where it does not exist, and stays.
        wait: Whether to wait for a claim that another process holds.

    Raises:
        BlockingIOError: Another process holds the claim, and ``wait`` is False.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / ".claim"
        >>> with Claim(path):
        ...     Claim.held(path)
        True
        >>> Claim.held(path)
        False
    """

    def __init__(self, path: Path, wait: bool = False) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            self._lock(wait)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(self.descriptor)
                raise
            warnings.warn(
                f"the file system of {path} has no locks: start no second sweep on this folder while one is running",
                stacklevel=2,
            )
        # for whoever looks; the lock does not depend on it
        os.truncate(self.descriptor, 0)
        os.pwrite(self.descriptor, f"{socket.gethostname()} {os.getpid()}\n".encode(), 0)

    def _lock(self, wait: bool) -> None:
        for left in reversed(range(_TRIES)):
            try:
                return fcntl.flock(self.descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                if not left:
                    raise
                time.sleep(_BETWEEN)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()

    def release(self) -> None:
        """Give this process's part of the claim back."""
        os.close(self.descriptor)

    @staticmethod
    def held(path: Path) -> bool:
        """Whether some process holds the claim at this moment.

        Args:
            path: The file; one that does not exist is not held.
        """
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return False
        try:
            # shared, so that two that look do not see each other
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        finally:
            os.close(descriptor)
        return False
