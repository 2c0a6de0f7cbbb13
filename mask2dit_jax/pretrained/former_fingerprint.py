"""The hash by which older versions knew components, for the data sets that they wrote.

It covers the name, the size and both ends of every file in a folder. Two encoders that differ only in the middle of a
file have the same one, so nothing is written with it any more.
"""

import hashlib
from collections.abc import Iterable, Iterator

from etils import epath

from mask2dit_jax.pretrained.directory import ORIGIN

_ENDS = 1 << 20  # bytes


def former_fingerprint(directory: epath.PathLike, names: Iterable[str]) -> str:
    """Return what older versions returned for `directory.fingerprint`."""
    digest = hashlib.sha256()
    for name in sorted(names):
        digest.update(f"{name} {_origin(epath.Path(directory) / name)}".encode())
    return digest.hexdigest()[:16]


def _origin(folder: epath.Path) -> str:
    if (folder / ORIGIN).exists():
        return (folder / ORIGIN).read_text().partition("\n")[0]
    digest = hashlib.sha256()
    for file in _files(folder):
        size = file.stat().length
        digest.update(f"{file.relative_to(folder)} {size}".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(_ENDS))
            stream.seek(max(0, size - _ENDS))
            digest.update(stream.read(_ENDS))
    return digest.hexdigest()[:16]


def _files(folder: epath.Path) -> Iterator[epath.Path]:
    for path in sorted(folder.iterdir()) if folder.exists() else ():
        yield from _files(path) if path.is_dir() else (path,)
