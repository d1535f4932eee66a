"""One run at a time: a lock on a file, held by the operating system for as long as the process lives, however it ends."""

import errno
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import IO

if sys.platform == "win32":
    import msvcrt

    def _lock(file: IO[bytes]) -> None:
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
else:
    import fcntl

    def _lock(file: IO[bytes]) -> None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


_TAKEN = (errno.EACCES, errno.EAGAIN)  # of an open file: somebody else holds the lock


class FileLock:
    """A lock by the name of `path`, an empty file that is there while the lock is held. What a killed process leaves is free."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[bytes] | None = None

    def take(self) -> bool:
        """Whether it is ours now; False if another process, or another holder in this one, has it. Raises OSError if it cannot be
        made, or the disk knows no locks."""
        while True:
            file = self.path.open("ab")
            try:
                _lock(file)
            except OSError as error:
                file.close()
                if error.errno in _TAKEN:
                    return False
                raise
            if self._names(file):
                self._file = file
                return True
            file.close()  # its holder removed it between our opening and our locking: what we have is a file without a name

    def release(self) -> None:
        """Let go and remove the file; nothing if it is not ours."""
        if self._file is None:
            return
        if sys.platform == "win32":  # removes no open file
            self._file.close()
        with suppress(OSError):
            self.path.unlink()  # while it is still ours: afterwards it may be another's
        self._file.close()
        self._file = None

    def _names(self, file: IO[bytes]) -> bool:
        try:
            return os.path.samestat(self.path.stat(), os.fstat(file.fileno()))
        except FileNotFoundError:
            return False
