"""Finished scenes on disk: what is found again, what is not, and that a full disk loses nothing that was there."""

import dataclasses
import errno
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from mask2dit_jax.errors import UserError
from mask2dit_jax.story.folder import StoryFolder
from mask2dit_jax.story.store import Shown, StoryLatents, fingerprints
from mask2dit_jax.story.story import Scene
from tests.story.test_plan import make_plan

LATENTS = np.random.default_rng(0).standard_normal((2, 3, 4, 5), np.float32)
SCENES = tuple(Scene(prompt, "bad") for prompt in "abcdef")


def test_latents_come_back_bit_for_bit(tmp_path):
    StoryLatents(tmp_path, ["one", "two"])[1] = LATENTS
    store = StoryLatents(tmp_path, ["one", "two"])
    assert list(store) == [1]
    np.testing.assert_array_equal(store[1], LATENTS)
    assert store[1].dtype == np.float32
    shown = Shown(np.zeros((2, 3, 4, 3), np.uint8), {"mean": 0.5})
    store.show(1, "as it is", shown, "abc")
    assert store.video_hash(1) == "abc"
    assert store.shown(1, "as it is").statistics == {"mean": 0.5}
    assert store.shown(1, "otherwise") is None
    np.testing.assert_array_equal(store[1], LATENTS)


def test_what_counts_as_not_there(tmp_path):
    StoryLatents(tmp_path, ["one"])[0] = LATENTS
    assert 0 not in StoryLatents(tmp_path, ["another"])
    with pytest.raises(KeyError):
        StoryLatents(tmp_path, ["another"])[0]
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    for damage in (whole[:-100], whole[:10], b"", b"x" * 1000):
        path.write_bytes(damage)
        assert 0 not in StoryLatents(tmp_path, ["one"])


def full_disk(monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fail)


def test_a_disk_that_fills_up(tmp_path, monkeypatch):
    store = StoryLatents(tmp_path, ["one", "two"])
    store[0] = LATENTS
    full_disk(monkeypatch)
    with pytest.raises(
        UserError, match=r"cannot write .*scene_02.npz: No space left on device; choose a writable output"
    ):
        store[1] = LATENTS
    with pytest.raises(UserError, match="No space left"):
        store.show(0, "", Shown(np.zeros((1, 2, 2, 3), np.uint8), {}), "")
    np.testing.assert_array_equal(store[0], LATENTS)
    assert list(store) == [0]


def test_a_disk_without_room_is_noticed_first(tmp_path, monkeypatch):
    plan = make_plan(SCENES)
    store = StoryLatents(tmp_path / "latents", fingerprints(plan, {}, {}))
    folder = StoryFolder(epath.Path(tmp_path), plan, "", (480, 720), store, "", {"seed": 0})
    folder.open()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**20))
    with pytest.raises(UserError, match=r"the disk has 1 MiB free, the story needs about 59 MiB"):
        folder.open()


def changed(scenes=SCENES, settings=None, **plan) -> list[int]:
    """The scenes whose fingerprints differ from those of SCENES."""
    before = fingerprints(make_plan(SCENES), {"seed": 0}, {})
    after = fingerprints(make_plan(scenes, **plan), settings or {"seed": 0}, {})
    return [number for number, pair in enumerate(zip(before, after, strict=False)) if pair[0] != pair[1]]


def edited(number: int, **fields) -> tuple[Scene, ...]:
    return tuple(dataclasses.replace(s, **fields) if n == number else s for n, s in enumerate(SCENES))


def test_what_a_change_makes_again():
    """A scene depends on its window, and on what the scenes of its window depend on."""
    assert changed() == []
    assert changed(scenes=(*SCENES, Scene("g"))) == []
    assert changed(scenes=edited(4, prompt="other")) == [4, 5]
    assert changed(scenes=edited(5, seconds=3.0)) == [5]
    assert changed(scenes=edited(0, prompt="other")) == [0, 1, 2, 3, 4, 5]
    assert changed(settings={"seed": 1}) == [0, 1, 2, 3, 4, 5]
    assert changed(anchor=True) == [3, 4, 5]
    assert changed(scenes=edited(5, negative="other")) == []  # nobody reads it without guidance


@pytest.mark.parametrize(("pixels", "start"), [(b"two", 0), (b"one", 1.5)])
def test_other_pixels_or_another_part_make_another_story(tmp_path, pixels, start):
    def made(pixels, start):
        (tmp_path / "clip.mp4").write_bytes(pixels)
        given = Scene("a", given=str(tmp_path / "clip.mp4"), start=start)
        return fingerprints(make_plan((given, *SCENES)), {}, {})

    assert all(a != b for a, b in zip(made(b"one", 0), made(pixels, start), strict=True))
    assert made(b"one", 0) == made(b"one", 0.0)  # as a file says it


def test_a_generated_scene_depends_on_the_vae_only_through_given_ones(tmp_path):
    (tmp_path / "clip.mp4").write_bytes(b"one")
    given = Scene("a", given=str(tmp_path / "clip.mp4"))

    def changes(scenes):
        first, second = (fingerprints(make_plan(scenes), {}, {"vae": vae}) for vae in ("one", "two"))
        return [a != b for a, b in zip(first, second, strict=True)]

    assert not any(changes(SCENES))
    assert all(changes((given, *SCENES)))


def test_other_settings_of_generated_scenes_leave_given_ones(tmp_path):
    (tmp_path / "clip.mp4").write_bytes(b"one")
    plan = make_plan((Scene("a", given=str(tmp_path / "clip.mp4")), *SCENES))
    first, second = (fingerprints(plan, {"sampler": steps}, {}) for steps in (20, 50))
    assert [a != b for a, b in zip(first, second, strict=True)] == [False] + [True] * len(SCENES)


def test_latents_that_are_damaged_are_one_line(tmp_path):
    """Damage inside the latents shows when they are read, not when a story is asked whether they are there."""
    store = StoryLatents(tmp_path, ["one"])
    store[0] = np.zeros((2, 3, 4, 5), np.float32)
    (path,) = tmp_path.iterdir()
    stored = bytearray(path.read_bytes())
    stored[stored.index(b"latents.npy") + 200] ^= 1
    path.write_bytes(stored)
    assert 0 in store
    with pytest.raises(UserError, match=r"scene_01.npz is damaged; delete it, and the scene is made again"):
        store[0]


def test_a_given_clip_that_is_replaced_keeping_size_and_date_makes_another_story(tmp_path):
    path = tmp_path / "clip.mp4"
    plan = make_plan((Scene("a", given=str(path)), *SCENES))
    found = []
    for pixels in (b"one", b"two"):
        path.write_bytes(pixels)
        os.utime(path, (1, 1))
        found.append(fingerprints(plan, {}, {}))
    assert found[0] != found[1]
    copy = tmp_path / "moved.mp4"
    copy.write_bytes(b"two")
    assert fingerprints(make_plan((Scene("a", given=str(copy)), *SCENES)), {}, {}) == found[1]
