"""The folder of a story: that nothing in it is replaced unsaid or too early, and that it may be in a bucket."""

import json
import os

import numpy as np
import pytest
from etils import epath
from numpy.lib.npyio import NpzFile

from mask2dit_jax.media.video_reader import probe
from mask2dit_jax.story.folder import StoryFolder
from mask2dit_jax.story.store import StoryLatents, fingerprints
from mask2dit_jax.story.story import Scene
from tests.bucket import buckets_in
from tests.story.test_plan import make_plan

SIZE = (16, 32)
PLAN = make_plan([Scene(prompt) for prompt in "abcd"], default_frames=5)


def folder_of(path, seed: int = 0) -> StoryFolder:
    path = epath.Path(path)
    scenes = StoryLatents(path / "latents", fingerprints(PLAN, {"seed": seed}, {}))
    return StoryFolder(path, PLAN, "", SIZE, scenes, "", {"seed": seed})


def make(folder: StoryFolder, *scenes: int) -> None:
    for scene in scenes:
        folder.scenes[scene] = np.full((2, 2, 4, 3), scene, np.float32)
        folder.show(scene, np.full((5, *SIZE, 3), 40 * scene, np.uint8))


def seed_in_record(path) -> int:
    return json.loads((path / "run.json").read_text())["seed"]


@pytest.fixture
def finished(tmp_path):
    folder = folder_of(tmp_path)
    folder.open()
    make(folder, 0, 1, 2, 3)
    folder.finish()
    return tmp_path


def test_in_a_bucket(tmp_path, monkeypatch):
    with buckets_in(tmp_path, monkeypatch):
        folder = folder_of("gs://bucket/story")
        folder.open()
        make(folder, 0, 1, 2, 3)
        folder.finish()
        assert folder.is_generated()
    assert probe(tmp_path / "bucket/story/story.mp4").num_frames == 20
    names = {path.name for path in (tmp_path / "bucket/story").iterdir()}
    assert {"index.html", "run.json", "storyboard.png", "latents", "scene_04.mp4"} < names


def test_what_is_there_is_said_before_it_is_replaced(finished, caplog):
    caplog.set_level("INFO")
    folder_of(finished).log_contents()
    assert caplog.messages == [f"{finished}: finished already: scenes 1-4"]
    caplog.clear()
    other = folder_of(finished, seed=1)
    make(other, 0)
    other.log_contents()
    assert caplog.messages[0] == f"{finished}: finished already: scene 1"
    assert caplog.messages[1].startswith(f"{finished}: to be replaced: scenes 2-4, made with other settings or damaged")
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING"]


def test_nothing_is_said_of_a_new_folder(tmp_path, caplog):
    folder_of(tmp_path).log_contents()
    assert not caplog.records


def test_the_record_stays_until_a_scene_is_replaced(finished):
    other = folder_of(finished, seed=1)
    other.open()
    assert seed_in_record(finished) == 0
    make(other, 0)
    assert seed_in_record(finished) == 1


def test_what_killed_runs_left_half_written_goes(finished):
    left = [".1a2b3c4d.scene_01.mp4", ".1a2b3c4d.story.mp4", "latents/.1a2b3c4d.scene_01.npz"]
    for name in (*left, "notes.txt", ".hidden"):
        (finished / name).write_bytes(b"half")
    folder_of(finished).open()
    assert not any((finished / name).exists() for name in left)
    assert (finished / "notes.txt").exists()
    assert (finished / ".hidden").exists()


def test_what_is_asked_of_a_finished_story_reads_no_latents(finished, monkeypatch):
    """They are gigabytes, in a bucket perhaps; fingerprints and a few frames are all that a second run needs."""
    folder = folder_of(finished)  # before reads are counted: beartype reads a value to check the type of the mapping
    read, names = NpzFile.__getitem__, []
    monkeypatch.setattr(NpzFile, "__getitem__", lambda stored, name: (names.append(name), read(stored, name))[1])
    folder.log_contents()
    folder.open()
    assert folder.is_generated()
    assert set(names) == {"fingerprint"}
    assert all(folder.is_shown(number) for number in range(4))
    folder.finish()
    assert set(names) == {"fingerprint", "display", "frames", "statistics", "video"}
    assert folder.scenes[0].shape == (2, 2, 4, 3)
    assert names.count("latents") == 1


def test_the_video_of_another_scene_is_not_taken_for_this_one(finished):
    """Videos of one size, length and date, as when somebody has renamed them."""
    first, second = finished / "scene_01.mp4", finished / "scene_02.mp4"
    before = first.stat()
    first.write_bytes(second.read_bytes())
    os.utime(first, ns=(before.st_atime_ns, before.st_mtime_ns))
    folder = folder_of(finished)
    assert [folder.is_shown(number) for number in range(4)] == [False, True, True, True]


def test_a_story_of_an_older_version_is_finished(finished):
    """Its scenes do not say which video was made."""
    path = finished / "latents" / "scene_01.npz"
    with np.load(path) as stored:
        arrays = {name: stored[name] for name in stored.files if name != "video"}
    np.savez(path, **arrays)
    assert folder_of(finished).is_shown(0)
