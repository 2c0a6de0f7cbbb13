"""Locks between processes."""

import errno
import fcntl
import subprocess
import sys

import pytest

from mask2dit_jax.errors import UserError
from mask2dit_jax.io.atomic import FileLock


def test_a_lock_has_one_owner_and_dies_with_it(tmp_path):
    path = tmp_path / "folder" / "file.lock"
    program = f"""
import time
from mask2dit_jax.io.atomic import FileLock
lock = FileLock({str(path)!r})
print(lock.acquire(), flush=True)
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "True\n"
        lock = FileLock(path)
        assert not lock.acquire()
        other.kill()
    assert lock.acquire()
    assert not FileLock(path).acquire()
    lock.release()
    assert FileLock(path).acquire()


def test_a_disk_without_locks(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert FileLock(tmp_path / "a.lock").acquire()
    assert "this disk has no locks (No locks available); start one run at a time" in caplog.text
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file cannot be written \(File exists\); choose another folder"):
        FileLock(tmp_path / "file" / "a.lock").acquire()
