"""A file's identity is its content, and a file that has not changed is read once."""

import hashlib
import os
import subprocess
import sys
import time

import pytest

from mask2dit_jax.io import content
from mask2dit_jax.io.content import file_hash
from tests.bucket import buckets_in

SIZE = 3 << 20


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "mask2dit_jax" / "hashes"


@pytest.fixture
def reads(monkeypatch):
    """The paths of the files that are read, whose clocks settle at once."""
    paths, read = [], content._sha256
    monkeypatch.setattr(content, "_sha256", lambda path: (paths.append(path), read(path))[1])
    monkeypatch.setattr(content, "_SETTLED_NS", 0)
    return paths


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(bytes(SIZE))
    time.sleep(0.02)  # a tick of the file system's clock
    return path


def flip_middle_byte(path) -> None:
    """Change one byte in place; size and modification time stay."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(SIZE // 2)
        file.write(b"\1")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


def test_the_hash_is_that_of_all_bytes(weights, monkeypatch):
    monkeypatch.setattr(content, "_BLOCK", 1000)
    assert file_hash(weights) == hashlib.sha256(bytes(SIZE)).hexdigest()
    (weights.parent / "empty").touch()
    assert file_hash(weights.parent / "empty") == hashlib.sha256().hexdigest()


def test_a_file_that_stays_is_read_once(weights, reads, monkeypatch):
    first = file_hash(weights)
    monkeypatch.chdir(weights.parent)
    assert file_hash(weights.name) == first
    program = f"from mask2dit_jax.io import content; content._sha256 = None; print(content.file_hash({str(weights)!r}))"
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert finished.stdout.strip() == first, finished.stderr
    assert reads == [str(weights)]


def test_a_changed_byte_in_the_middle_is_seen_by_the_change_time(weights, reads):
    first = file_hash(weights)
    flip_middle_byte(weights)
    assert file_hash(weights) != first
    assert len(reads) == 2


def test_another_file_of_one_size_and_date_is_seen(weights, reads):
    first, before = file_hash(weights), weights.stat()
    other = weights.with_name("other")
    other.write_bytes(bytes(SIZE - 1) + b"\1")
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(weights)
    assert file_hash(weights) != first


def test_a_file_that_was_changed_just_now_is_not_trusted(weights):
    """Two changes within one tick of the clock leave the same times."""
    for byte in (b"\1", b"\2", b"\3"):
        weights.write_bytes(byte)
        assert file_hash(weights) == hashlib.sha256(byte).hexdigest()


def test_a_copy_is_the_same(weights):
    copy = weights.with_name("copy")
    copy.write_bytes(weights.read_bytes())
    assert file_hash(copy) == file_hash(weights)


def test_names_that_are_no_text(tmp_path, reads):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.mp4")
    with open(path, "wb") as file:
        file.write(b"x")
    time.sleep(0.02)
    assert file_hash(path) == file_hash(path) == hashlib.sha256(b"x").hexdigest()
    assert len(reads) == 1


@pytest.mark.parametrize("spoil", [lambda cache: cache.parent.write_text(""), lambda cache: _write_rubbish(cache)])
def test_without_a_cache_files_are_hashed_each_time(weights, cache, reads, spoil, caplog):
    cache.parent.parent.mkdir()
    spoil(cache)
    assert file_hash(weights) == file_hash(weights) == hashlib.sha256(bytes(SIZE)).hexdigest()
    assert len(reads) == 2
    assert "so files are hashed again in each run; delete it" in caplog.text


def _write_rubbish(cache) -> None:
    cache.mkdir(parents=True)
    (cache / "sha256.sqlite").write_bytes(b"rubbish" * 1000)


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        file_hash(tmp_path / "gone")


def test_in_a_bucket_small_objects_are_read_and_large_ones_go_by_length_and_time(tmp_path, monkeypatch):
    (tmp_path / "bucket").mkdir()
    small, large = tmp_path / "bucket" / "config.json", tmp_path / "bucket" / "weights"
    small.write_bytes(b"{}")
    large.write_bytes(bytes(content._SMALL + 1))
    with buckets_in(tmp_path, monkeypatch):
        assert file_hash("gs://bucket/config.json") == file_hash(small)
        first = file_hash("gs://bucket/weights")
        assert first.startswith(f"{content._SMALL + 1} bytes, modified ")
        os.utime(large, (1, 1))
        assert file_hash("gs://bucket/weights") != first
