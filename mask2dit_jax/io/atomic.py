"""Atomic output files, which a reader never sees half-written, and locks between processes."""

import contextlib
import errno
import fcntl
import os
import socket
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from absl import logging
from etils import epath

from mask2dit_jax.errors import UserError, is_no_answer
from mask2dit_jax.io.paths import is_remote


@contextlib.contextmanager
def atomic_output(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a local file to write, and move it to `path` in one step when the block ends.

    If the block or the move fails, the old content of `path` stays. Missing folders are created. If several processes
    write the same `path` at once, the last one wins.

    Args:
        path: A local or gs:// path.

    Raises:
        UserError: `path` cannot be written.
    """
    write = _uploaded if is_remote(path) else _moved
    try:
        with write(epath.Path(path)) as partial:
            yield partial
    except Exception as error:
        if not isinstance(error, OSError) and not is_no_answer(error):
            raise
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write {path}: {reason}; choose a writable output") from error


def remove_leftovers(folder: str | os.PathLike, name: str = "*") -> None:
    """Delete the partial files in `folder` that killed writers of `name` (or of any file) left behind.

    No writer may be active.
    """
    for partial in epath.Path(folder).glob(f".????????.{name}"):
        partial.unlink(missing_ok=True)


class FileLock:
    """A lock between processes, also of several machines on a shared disk; a process that dies releases it.

    The file says who holds it, for messages alone: what a dead process has written there means nothing.
    """

    def __init__(self, path: str | os.PathLike):
        """Name the lock by a file, which is made if needed and stays."""
        self._path, self._file = Path(path), None

    def acquire(self) -> bool:
        """Take the lock, and return whether this process holds it; it does not wait.

        Raises:
            UserError: the file cannot be written.
        """
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._file or self._path.open("ab", buffering=0)
        except OSError as error:
            raise UserError(
                f"{self._path.parent} cannot be written ({error.strerror}); choose another folder"
            ) from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            logging.warning("%s: this disk has no locks (%s); start one run at a time", self._path, error.strerror)
        with contextlib.suppress(OSError):  # a full disk; the lock holds without it
            self._file.truncate(0)
            self._file.write(this_process().encode())
        return True

    def holder(self) -> str:
        """Return which process holds the lock, on which host and since when, as far as can be read."""
        try:
            return self._path.read_text() or "another process"
        except OSError:
            return "another process"

    def release(self) -> None:
        """Give the lock back if this process holds it."""
        if self._file:
            self._file.close()
            self._file = None


def this_process() -> str:
    """Return what tells this process from others: its id and host, and the time."""
    now = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    return f"process {os.getpid()} on {socket.gethostname()} since {now}"


@contextlib.contextmanager
def _moved(path: epath.Path) -> Iterator[Path]:
    """Write beside `path`, so that the move copies nothing.

    The hidden name keeps the suffix of `path`, because some writers choose a format by it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.parent / f".{uuid.uuid4().hex[:8]}.{path.name}"
    try:
        yield Path(partial)
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def _uploaded(path: epath.Path) -> Iterator[Path]:
    """Write to a temporary file and upload it. An object in a bucket appears only once its upload is complete."""
    with tempfile.TemporaryDirectory() as folder:
        yield (local := Path(folder, path.name))
        path.parent.mkdir(parents=True, exist_ok=True)
        epath.Path(local).copy(path, overwrite=True)
