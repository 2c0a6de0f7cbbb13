"""Atomic output files: a reader never sees a file that is only partly written."""

import contextlib
import os
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

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
