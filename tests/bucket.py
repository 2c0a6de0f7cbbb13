"""gs:// as a folder of the local disk."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import fsspec
import fsspec.implementations.local
from etils import epath


class Bucket(fsspec.implementations.local.LocalFileSystem):
    """What goes through epath is as with a bucket; a rename is an error, as it would be a copy."""

    protocol = ("gcs", "gs")
    root = ""

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).replace("gs://", f"{cls.root}/"))

    def rename(self, *_, **__):
        raise AssertionError("a bucket cannot rename")

    mv = rename


@contextlib.contextmanager
def buckets_in(folder: Path, monkeypatch) -> Iterator[None]:
    """gs://NAME is `folder`/NAME, for what goes through epath in this process."""
    monkeypatch.setattr(Bucket, "root", str(folder))
    systems = {"gcs": Bucket(auto_mkdir=True), "file": fsspec.implementations.local.LocalFileSystem()}
    monkeypatch.setattr(fsspec, "filesystem", lambda name, **_: systems[name])
    epath.backend.fsspec_backend._get_filesystem.cache_clear()
    try:
        yield
    finally:
        epath.backend.fsspec_backend._get_filesystem.cache_clear()
