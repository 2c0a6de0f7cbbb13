"""A hold on a folder, so that two living runs never write into the same one.

On a disk it is a lock, which dies with its process. A bucket has no locks: there it is an object that says who holds
the folder. It is created, refreshed and taken over only if it is what was seen last (the generation precondition of
Cloud Storage), and a holder that has not refreshed it for `_STALE_S` counts as dead.
"""

import contextlib
import datetime
import email.utils
import json
import os
import sys
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import logging

from mask2dit_jax.errors import UserError, is_no_answer
from mask2dit_jax.io.atomic import FileLock, this_process
from mask2dit_jax.io.paths import is_remote

_NAME = ".lock"
_REFRESH_S = 15.0
_STALE_S = 120.0  # longer than gcsfs tries to reach a storage that does not answer


@contextlib.contextmanager
def folder_held(folder: str | os.PathLike) -> Iterator[None]:
    """Hold a folder for the block. Whatever a dead process held is taken over.

    Args:
        folder: local or gs://. Other remote folders cannot be held, which is logged.

    Raises:
        UserError: a living run holds it, or it cannot be written.
    """
    path = os.fspath(folder)
    if is_remote(path) and not path.startswith("gs://"):
        logging.warning("%s: this storage has no locks; start one run at a time", path)
        yield
        return
    hold = BucketLock(f"{path.rstrip('/')}/{_NAME}") if is_remote(path) else FileLock(Path(path, _NAME))
    if not hold.acquire():
        raise UserError(f"{path} is in use by {hold.holder()}; wait for it or end it, or choose another folder")
    try:
        yield
    finally:
        hold.release()


class BucketLock:
    """A lock between processes whose file is an object of Cloud Storage. Ages are measured by the server's clock."""

    def __init__(self, path: str):
        """Name the lock by an object, gs://BUCKET/NAME."""
        import fsspec  # gcsfs comes with an extra

        self._storage = fsspec.filesystem("gs")
        self._bucket, _, self._name = path.removeprefix("gs://").partition("/")
        self._path, self._holder = path, "another process"
        self._content = json.dumps({"holder": this_process(), "token": uuid.uuid4().hex})
        self._generation = 0  # of the object that this process has written
        self._released = threading.Event()
        self._refreshing = threading.Thread(target=self._refresh, daemon=True)

    def acquire(self) -> bool:
        """Take the lock, and return whether this process holds it; it does not wait.

        Raises:
            UserError: the object cannot be written.
        """
        try:
            seen = self._look()
            while seen is None or seen[1] > _STALE_S:
                if self._write(0 if seen is None else seen[0]):
                    self._refreshing.start()
                    return True
                seen = self._look()
        except OSError as error:
            raise UserError(f"{self._path} cannot be written ({error}); choose another folder") from error
        return False

    def holder(self) -> str:
        """Return which process holds the lock, on which host and since when."""
        return self._holder

    def release(self) -> None:
        """Give the lock back if this process holds it."""
        if self._generation:
            self._released.set()
            self._refreshing.join()
            # One that cannot be deleted is stale before long.
            with contextlib.suppress(Exception):
                where = "b/{}/o/{}", self._bucket, self._name
                self._storage.call("DELETE", *where, ifGenerationMatch=str(self._generation))
            self._generation = 0

    def _look(self) -> tuple[int, float] | None:
        """Return generation and age in seconds of the object, and remember its holder; None if there is none."""
        try:
            headers, found = self._storage.call("GET", "b/{}/o/{}", self._bucket, self._name)
            _, content = self._storage.call("GET", "b/{}/o/{}", self._bucket, self._name, alt="media")
        except FileNotFoundError:
            return None
        described, written = json.loads(found), _as_object(content)
        age = email.utils.parsedate_to_datetime(headers["Date"]) - datetime.datetime.fromisoformat(described["updated"])
        self._holder = f"{written.get('holder', 'another process')} (seen {max(0, age.total_seconds()):.0f} s ago)"
        return int(described["generation"]), age.total_seconds()

    def _write(self, generation: int) -> bool:
        """Replace the object of this generation, 0 for none, and return whether it was still the one there."""
        upload = self._storage.base.replace("/storage/v1/", "/upload/storage/v1/") + "b/{}/o"
        given = {"uploadType": "media", "name": self._name, "ifGenerationMatch": str(generation)}
        try:
            answer = self._storage.call("POST", upload, self._bucket, data=self._content, json_out=True, **given)
        except FileExistsError:  # the precondition failed; or the answer to a first try of gcsfs was lost
            return self._is_own()
        self._generation = int(answer["generation"])
        return True

    def _is_own(self) -> bool:
        try:
            described = self._storage.call("GET", "b/{}/o/{}", self._bucket, self._name, json_out=True)
            _, content = self._storage.call("GET", "b/{}/o/{}", self._bucket, self._name, alt="media")
        except FileNotFoundError:
            return False
        if content != self._content.encode():
            return False
        self._generation = int(described["generation"])
        return True

    def _refresh(self) -> None:
        """Write the object again and again, and end the process if another has taken over."""
        while not self._released.wait(_REFRESH_S):
            try:
                if self._write(self._generation):
                    continue
            except Exception as error:
                if not (isinstance(error, OSError) or is_no_answer(error)):
                    raise
                logging.warning("%s cannot be refreshed: %s", self._path, error)
                continue
            print(f"error: {self._path} was taken over by another run: this one ends", file=sys.stderr, flush=True)
            os._exit(1)


def _as_object(content: bytes) -> dict[str, Any]:
    try:
        found = json.loads(content)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
