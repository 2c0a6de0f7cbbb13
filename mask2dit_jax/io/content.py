"""Identity of files: two files are the same if their bytes are.

Each local file is hashed once, all of it. The hash is kept in the user's cache, with the path, size, inode,
modification time and change time that the file had. While these stay, the file is not read again. A program can set
the modification time back after it changed a file, but not the change time.

    ~/.cache/mask2dit_jax/hashes/sha256.sqlite    can be deleted at any time

A large object in a bucket is not read: its length and modification time stand for its content, because that is all that
the file system tells of it. An object cannot be changed in place, only replaced, and then its time is a new one.
"""

import functools
import hashlib
import os
import sqlite3
import threading
import time
from pathlib import Path

from absl import logging
from etils import epath
from tqdm import tqdm

from mask2dit_jax.io.paths import is_remote
from mask2dit_jax.io.user_cache import user_cache

_BLOCK = 4 << 20  # bytes read at a time
_SMALL = 4 << 20  # bytes; objects in a bucket up to this size are read: configs, tokenizers
_SETTLED_NS = 2 * 10**9  # the coarsest clock of a file system (FAT)
_BUSY_S = 10  # to wait for another process that keeps a hash
_TABLE = "CREATE TABLE IF NOT EXISTS hashes (path BLOB PRIMARY KEY, state TEXT, hash TEXT) WITHOUT ROWID"


def file_hash(path: str | os.PathLike) -> str:
    """Return what identifies the content of a file: the SHA-256 of its bytes in hex.

    For an object of more than 4 MiB in a bucket, return its length and modification time instead.

    Raises:
        OSError: the file is missing or cannot be read.
    """
    if is_remote(path):
        return _object_hash(epath.Path(path))
    path, state, started = os.path.abspath(path), file_state(path), time.time_ns()
    kept = _kept_hashes(user_cache("hashes"), os.getpid())
    known = kept.get(path, state)
    if known:
        return known
    found = _sha256(path)
    # Two changes within one tick of the file system's clock leave the same times, so a file must have settled.
    if file_state(path) == state and started - max(map(int, state.split()[2:])) > _SETTLED_NS:
        kept.put(path, state, found)
    return found


def file_state(path: str | os.PathLike) -> str:
    """Return size, inode, modification time and change time of a local file, which is not read.

    While the state is the same, so is the content.

    Raises:
        OSError: the file is missing.
    """
    status = os.stat(path)
    return f"{status.st_size} {status.st_ino} {status.st_mtime_ns} {status.st_ctime_ns}"


def _object_hash(path: epath.Path) -> str:
    status = path.stat()
    if status.length <= _SMALL:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    return f"{status.length} bytes, modified {status.mtime}"


def _sha256(path: str) -> str:
    digest, block = hashlib.sha256(), memoryview(bytearray(min(_BLOCK, os.path.getsize(path) + 1)))
    progress = tqdm(
        desc=f"hashing {os.path.basename(path)}",
        total=os.path.getsize(path),
        unit="B",
        unit_scale=True,
        delay=2,
        disable=len(block) < _BLOCK or None,
    )
    with open(path, "rb", buffering=0) as file, progress:
        while count := file.readinto(block):
            digest.update(block[:count])
            progress.update(count)
    return digest.hexdigest()


class _KeptHashes:
    """The hashes of files by path and state. Threads share it. If the disk refuses it, nothing is kept."""

    def __init__(self, folder: epath.Path):
        self._lock, self._connection, file = threading.Lock(), None, Path(folder) / "sha256.sqlite"
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            connection = sqlite3.connect(file, _BUSY_S, isolation_level=None, check_same_thread=False)
            connection.execute("PRAGMA synchronous = OFF")  # a hash that a power cut loses is computed again
            connection.execute(_TABLE)
            self._connection = connection
        except (sqlite3.Error, OSError) as error:
            logging.warning("%s cannot be used (%s), so files are hashed again in each run; delete it", file, error)

    def get(self, path: str, state: str) -> str | None:
        """Return the hash of the file in this state, or None if it is not known."""
        found = self._execute("SELECT hash FROM hashes WHERE path = ? AND state = ?", os.fsencode(path), state)
        return found[0][0] if found else None

    def put(self, path: str, state: str, found: str) -> None:
        """Keep the hash of the file in this state, and forget those of earlier states."""
        self._execute("INSERT OR REPLACE INTO hashes VALUES (?, ?, ?)", os.fsencode(path), state, found)

    def _execute(self, statement: str, *values: object) -> list[tuple]:
        if self._connection is None:
            return []
        try:
            with self._lock:
                return self._connection.execute(statement, values).fetchall()
        except sqlite3.Error as error:
            logging.warning("a file's hash is not kept (%s)", error)
            return []


@functools.cache
def _kept_hashes(folder: epath.Path, process: int) -> _KeptHashes:
    """Open the hashes once in each process, because SQLite's connections do not survive a fork."""
    return _KeptHashes(folder)
