import dataclasses
import json

import numpy as np
import pytest

from mask2dit_jax.data.frames import PretrainSampling, SftSampling
from mask2dit_jax.data.latent_cache import CacheSettings, EncodedClip, LatentCache
from mask2dit_jax.data.sources import Clip
from mask2dit_jax.errors import UserError

SETTINGS = CacheSettings(
    SftSampling(9, 1, 3), size=(32, 48), variants=2, seed=5, max_tokens=4, encoders="abc", compute_dtype="float32"
)


def encoded(rng):
    mean, logvar = rng.standard_normal((2, 2, 3, 4, 6, 16), np.float32)
    return EncodedClip(mean, logvar, rng.standard_normal((4, 8), np.float32), np.int32([0, 3]), np.int32([2, 2]))


@pytest.fixture
def clip(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"video")
    return Clip("sub dir/a.mp4", tmp_path / "a.mp4", "a caption", 20, 25.0, 48, 32)


@pytest.fixture
def cache(tmp_path):
    return LatentCache.open(tmp_path / "cache", SETTINGS)


def test_round_trip(cache, clip):
    stored = encoded(np.random.default_rng(0))
    assert not cache.has(clip)
    cache.write(clip, stored)
    assert cache.has(clip)
    for variant in range(2):
        read = cache.read(clip, variant)
        np.testing.assert_array_equal(read["mean"], stored.mean[variant])
        np.testing.assert_array_equal(read["logvar"], stored.logvar[variant])
        np.testing.assert_array_equal(read["text"], stored.text)
    assert {path.suffix for path in cache.folder.iterdir()} == {".json", ".safetensors"}  # nothing half written stays


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-1], lambda data: data[:10], lambda data: b"", lambda data: b"?" * 500]
)
def test_damage_is_noticed(cache, clip, damage):
    cache.write(clip, encoded(np.random.default_rng(0)))
    path = cache.path(clip)
    path.write_bytes(damage(path.read_bytes()))
    assert not cache.has(clip)
    with pytest.raises(UserError, match=rf"{path.name}.*encode sub dir/a.mp4 again") as error:
        cache.read(clip, 0)
    assert "\n" not in str(error.value)


def test_a_replaced_video_is_noticed(cache, clip):
    cache.write(clip, encoded(np.random.default_rng(0)))
    clip.path.write_bytes(b"another video")
    assert not cache.has(clip)


def test_a_clip_not_stored(cache, clip):
    with pytest.raises(UserError, match=r"encode sub dir/a.mp4 again"):
        cache.read(clip, 0)


def test_other_captions_of_one_video_are_other_clips(cache, clip):
    assert cache.path(clip) != cache.path(dataclasses.replace(clip, caption="another"))
    assert cache.path(clip) != cache.path(dataclasses.replace(clip, name="other/a.mp4"))
    moved = dataclasses.replace(clip, path=clip.path.parent / "moved.mp4")
    assert cache.path(clip) == cache.path(moved)  # the data set may lie elsewhere on another machine


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
    ],
)
def test_every_setting_has_its_own_folder(tmp_path, cache, change):
    other = LatentCache.open(tmp_path / "cache", dataclasses.replace(SETTINGS, **change))
    assert other.folder != cache.folder
    again = LatentCache.open(tmp_path / "cache", dataclasses.replace(SETTINGS))
    assert again.folder == cache.folder


def test_the_folder_says_what_made_it(cache):
    said = json.loads((cache.folder / "cache.json").read_text())
    assert said["sampling"] == {"rule": "SftSampling", "num_frames": 9, "min_stride": 1, "max_stride": 3}
    assert (said["size"], said["seed"], said["encoders"]) == ([32, 48], 5, "abc")


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


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*file/cache"):
        LatentCache.open(tmp_path / "file" / "cache", SETTINGS)
