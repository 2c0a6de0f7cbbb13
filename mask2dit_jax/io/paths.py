"""Paths that may be local or in a bucket (gs://), and names whose accents a disk spells in another way."""

import os
import unicodedata
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


def as_composed(name: str) -> str:
    """Return a name in Unicode's composed form (NFC), in which two spellings of it are equal."""
    return unicodedata.normalize("NFC", name)


def find_file(path: str | os.PathLike) -> Path:
    """Return a local path as the disk spells it, or unchanged if there is nothing of that name.

    A path that exists is taken as it is. Otherwise accents are compared as they are read: macOS and what comes from
    there write them decomposed (NFD, e and an accent), most editors composed (NFC, one letter), and the two look alike.
    """
    path = Path(path)
    if os.path.exists(path):  # False for whatever cannot be a path, too
        return path
    found = Path(path.anchor)
    for part in path.relative_to(path.anchor).parts:
        name = _name_in(found, part)
        if name is None:
            return path
        found /= name
    return found


def _name_in(folder: Path, name: str) -> str | None:
    """Return how `folder` spells a name, None if it does not have it."""
    if os.path.exists(folder / name):
        return name
    if name.isascii():  # it has one spelling
        return None
    for form in ("NFC", "NFD"):  # before the folder is listed, which takes long where there are many clips
        if os.path.exists(folder / unicodedata.normalize(form, name)):
            return unicodedata.normalize(form, name)
    try:
        return next((other for other in os.listdir(folder) if as_composed(other) == as_composed(name)), None)
    except OSError:
        return None
