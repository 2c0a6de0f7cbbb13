"""Paths that may be local or in a bucket (gs://)."""

import os
from pathlib import Path

from etils import epath

ASSETS = Path(__file__).parents[1] / "assets"  # what ships with the package: the tiny encoders, the demo's captions


def is_remote(path: str | os.PathLike) -> bool:
    """Return whether `path` is a URL such as gs://BUCKET/FOLDER."""
    return "://" in os.fspath(path)


def absolute(path: str | os.PathLike) -> epath.Path:
    """Return an absolute path, as Orbax requires.

    `epath.Path.absolute` cannot be used for a remote path, because it treats gs://BUCKET as a local relative path.
    """
    path = epath.Path(path)
    return path if is_remote(path) else path.absolute()
