"""What identifies stored latents: the settings, the clips, the data file."""

import dataclasses
import hashlib
import os

import pytest

from mask2dit_jax.curate.build_records import describe_data_set
from mask2dit_jax.data import latents
from mask2dit_jax.data.frames import PretrainSampling, SftSampling
from mask2dit_jax.data.latents import (
    LatentSettings,
    RecordShapes,
    clip_key,
    dated_stamp,
    describe_source,
    is_source,
    json_hash,
)
from mask2dit_jax.data.sources import Clip, Group, Scan
from mask2dit_jax.io.content import file_state

SETTINGS = LatentSettings(
    SftSampling(9, 1, 3), size=(32, 48), variants=2, seed=5, max_tokens=4, encoders="abc", compute_dtype="float32"
)
SHAPES = RecordShapes((3, 4, 6, 16), (4, 8))


@pytest.fixture
def clip(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"video")
    return Clip("sub dir/a.mp4", tmp_path / "a.mp4", "a caption", 20, 25.0, 48, 32)


def name(settings, *clips, groups=None):
    return json_hash(describe_data_set(settings, SHAPES, Scan(clips, groups, {})))


@pytest.mark.parametrize(
    "change",
    [
        {"sampling": SftSampling(17, 1, 3)},
        {"sampling": SftSampling(9, 2, 3)},
        {"sampling": PretrainSampling(9, 3)},
        {"size": (48, 32)},
        {"variants": 3},
        {"seed": 6},
        {"max_tokens": 5},
        {"encoders": "abd"},
        {"compute_dtype": "bfloat16"},
        {"fit": "pad"},
        {"fit": "stretch"},
    ],
)
def test_every_setting_has_its_own_data_set(clip, change):
    assert name(dataclasses.replace(SETTINGS, **change), clip) != name(SETTINGS, clip)
    assert name(dataclasses.replace(SETTINGS), clip) == name(SETTINGS, clip)


def test_every_data_file_has_its_own_data_set(clip):
    other = dataclasses.replace(clip, caption="another")
    contents = [(clip,), (other,), (clip, other), (other, clip)]
    names = {name(SETTINGS, *clips) for clips in contents}
    names |= {name(SETTINGS, clip, other, groups=(Group("g", shots),)) for shots in ((clip, other), (clip, None))}
    assert len(names) == 6
    elsewhere = dataclasses.replace(clip, path=clip.path.parent / "moved.mp4")
    assert name(SETTINGS, elsewhere) == name(SETTINGS, clip)  # the data may lie elsewhere on another machine


def test_the_settings_say_what_made_a_data_set():
    said = SETTINGS.describe()
    assert said["sampling"] == {"rule": "SftSampling", "num_frames": 9, "min_stride": 1, "max_stride": 3}
    assert (said["size"], said["seed"], said["encoders"]) == ([32, 48], 5, "abc")


def test_other_captions_of_one_video_are_other_clips(clip):
    assert clip_key(clip) != clip_key(dataclasses.replace(clip, caption="another"))
    assert clip_key(clip) != clip_key(dataclasses.replace(clip, name="other/a.mp4"))
    assert clip_key(clip) == clip_key(dataclasses.replace(clip, path=clip.path.parent / "moved.mp4"))


def test_a_video_is_known_by_its_content(clip):
    described = describe_source(clip)
    assert described["source"] == hashlib.sha256(clip.path.read_bytes()).hexdigest()
    os.utime(clip.path, (1, 1))  # copied, or touched
    assert is_source(clip, described)
    size = clip.path.stat().st_size
    clip.path.write_bytes(b"x" * size)
    os.utime(clip.path, (1, 1))
    assert not is_source(clip, described)
    clip.path.unlink()
    assert not is_source(clip, described)
    assert describe_source(clip) == {"state": "", "source": "missing"}
    assert is_source(clip, describe_source(clip))


def test_a_video_that_stays_is_not_read_again(clip, monkeypatch):
    described = describe_source(clip)
    monkeypatch.setattr(latents, "file_hash", None)
    assert is_source(clip, described)


def test_an_older_data_set_knows_a_video_by_size_and_time(clip, monkeypatch):
    monkeypatch.setattr(latents, "file_hash", lambda path: "not asked for")
    status = clip.path.stat()
    described = {"source": f"{status.st_size} bytes, modified {status.st_mtime_ns}"}
    assert described["source"] == dated_stamp(file_state(clip.path))
    assert is_source(clip, described)
    os.utime(clip.path, (1, 1))
    assert not is_source(clip, described)


def test_starts_depend_on_seed_clip_and_variant_only(clip):
    choices = SETTINGS.sampling.choices(1000)
    start = SETTINGS.start(clip, 0, choices)
    assert start == SETTINGS.start(dataclasses.replace(clip, path=clip.path / "elsewhere"), 0, choices)
    others = [
        SETTINGS.start(clip, 1, choices),
        SETTINGS.start(dataclasses.replace(clip, name="b.mp4"), 0, choices),
        dataclasses.replace(SETTINGS, seed=6).start(clip, 0, choices),
    ]
    assert len({start, *others}) == 4


def test_data_sets_from_before_there_was_a_fit_stay_valid(clip):
    """Their settings, and so their names, have no such key."""
    assert "fit" not in SETTINGS.describe()
    assert dataclasses.replace(SETTINGS, fit="pad").describe()["fit"] == "pad"
