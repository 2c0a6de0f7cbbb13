"""One living run holds a folder, on a disk and in a bucket; what a dead one held is taken over."""

import datetime
import os
import re
import socket
import subprocess
import sys
import time

import gcsfs
import pytest

from mask2dit_jax.errors import UserError
from mask2dit_jax.io import run_hold
from mask2dit_jax.io.run_hold import BucketLock, folder_held
from tests.gcs_server import serve

HERE = rf"process {os.getpid()} on {re.escape(socket.gethostname())} since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d UTC"
NAME = "run/.lock"


@pytest.fixture
def server(monkeypatch):
    with serve() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        gcsfs.GCSFileSystem.clear_instance_cache()
        yield server
    gcsfs.GCSFileSystem.clear_instance_cache()


@pytest.fixture(params=["disk", "bucket"])
def folder(request, tmp_path):
    if request.param == "disk":
        return str(tmp_path / "run")
    request.getfixturevalue("server")
    return "gs://bucket/run"


def lock():
    return BucketLock(f"gs://bucket/{NAME}")


def age(server, seconds: float) -> None:
    """Make the lock in the bucket look as if nobody had refreshed it for so long."""
    generation, written = server.written[NAME]
    server.written[NAME] = generation, written - datetime.timedelta(seconds=seconds)


def test_a_second_run_learns_who_holds_the_folder(folder):
    said = rf"{re.escape(folder)} is in use by {HERE}.*; wait for it or end it"
    with folder_held(folder), pytest.raises(UserError, match=said):
        folder_held(folder).__enter__()
    with folder_held(folder):
        pass


def test_a_folder_is_free_after_a_failure(folder):
    with pytest.raises(KeyboardInterrupt), folder_held(folder):
        raise KeyboardInterrupt
    with folder_held(folder):
        pass


def test_a_killed_process_holds_no_folder(tmp_path):
    program = f"""
import time
from mask2dit_jax.io.run_hold import folder_held
with folder_held({str(tmp_path)!r}):
    print("held", flush=True)
    time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"in use by process {other.pid} on"):
            folder_held(tmp_path).__enter__()
        other.kill()
    with folder_held(tmp_path):
        pass


def test_a_stale_object_is_taken_over_by_one_of_two_that_saw_it(server):
    dead, one, other = lock(), lock(), lock()
    assert dead._write(0)
    age(server, run_hold._STALE_S - 2)
    assert not one.acquire()
    age(server, 4)
    (seen, _) = other._look()
    assert one.acquire()
    assert not other._write(seen)
    assert not other.acquire()
    one.release()
    assert NAME not in server.objects
    assert other.acquire()
    other.release()


def test_a_living_holder_refreshes_its_object(server, monkeypatch):
    monkeypatch.setattr(run_hold, "_REFRESH_S", 0.02)
    with folder_held("gs://bucket/run"):
        first = server.written[NAME]
        end = time.monotonic() + 20
        while server.written[NAME] == first and time.monotonic() < end:
            time.sleep(0.02)
        assert server.written[NAME][1] > first[1]
    assert NAME not in server.objects


def test_a_holder_that_slept_too_long_ends_and_leaves_the_object_to_the_next(server, monkeypatch, capsys):
    ended = []
    asleep, following = lock(), lock()
    monkeypatch.setattr(run_hold, "_REFRESH_S", 0.02)
    monkeypatch.setattr(run_hold.os, "_exit", lambda code: (ended.append(code), asleep._released.set()))
    assert asleep._write(0)
    age(server, run_hold._STALE_S + 2)
    assert following.acquire()
    asleep._refresh()
    assert ended == [1]
    assert "gs://bucket/run/.lock was taken over by another run" in capsys.readouterr().err
    asleep._refreshing.start()
    asleep.release()
    assert NAME in server.objects
    following.release()


def test_a_lock_whose_upload_was_answered_to_nobody_is_held(server):
    """A client tries again, and the second try fails because the first one has written the object."""
    ours = lock()
    assert ours._write(0)
    ours._generation = 0
    assert ours._write(0)
    assert ours._generation == server.written[NAME][0]


def test_a_bucket_that_refuses_to_be_written(server, monkeypatch):
    monkeypatch.setattr(server, "refused", "python")
    with pytest.raises(UserError, match=r"(?s)gs://bucket/run/.lock cannot be written .*choose another folder"):
        folder_held("gs://bucket/run").__enter__()
