"""Writing a result so that nobody ever sees half of it."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from mask2dit_jax.errors import UserError


@contextlib.contextmanager
def atomic_output(path: str | os.PathLike) -> Iterator[Path]:
    """Gives a local file to write. After the block it appears at `path` (local or gs://) in one move; if the block or
    the move fails, whatever was at `path` before stays. Missing folders are made.

    Raises:
        UserError: `path` cannot be written.
    """
    path = epath.Path(path)
    partial = path.parent / f".{path.name}.{os.getpid()}.tmp"  # two runs may fill one cache
    try:
        with tempfile.TemporaryDirectory() as folder:
            local = Path(folder, path.name)
            yield local
            path.parent.mkdir(parents=True, exist_ok=True)
            epath.Path(local).copy(partial, overwrite=True)
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; choose an output that can be written"
        ) from error
