"""Paths that may lie in a bucket (gs://)."""

import os
from pathlib import Path

from etils import epath

ASSETS = Path(__file__).parents[1] / "assets"  # what ships with the package: the tiny encoders, the demo's captions


def is_remote(path: str | os.PathLike) -> bool:
    return "://" in os.fspath(path)


def absolute(path: str | os.PathLike) -> epath.Path:
    """As Orbax wants its folders. `epath.Path.absolute` takes gs://BUCKET for a folder of the working directory."""
    path = epath.Path(path)
    return path if is_remote(path) else path.absolute()
