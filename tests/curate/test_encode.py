import dataclasses

import numpy as np
import pytest

from mask2dit_jax.curate.encode import Encoders, encode_clips
from mask2dit_jax.data.frames import PretrainSampling, SftSampling
from mask2dit_jax.data.latent_cache import CacheSettings, LatentCache
from mask2dit_jax.data.skipped import Skipped
from mask2dit_jax.errors import UserError
from tests.data.clips import GREY_STEP, make_clip

SETTINGS = CacheSettings(
    SftSampling(9, 1, 3), size=(16, 16), variants=3, seed=0, max_tokens=4, encoders="stub", compute_dtype="float32"
)


class Counting:
    """Stand-ins that count their calls: the mean of a frame is its number, the logvar the same below zero."""

    def __init__(self, fail_at=None):
        self.videos, self.texts, self.fail_at = 0, [], fail_at

    def video(self, pixels):
        assert (pixels.shape, pixels.dtype) == ((9, 16, 16, 3), np.float32)
        if self.videos == self.fail_at:
            raise KeyboardInterrupt
        self.videos += 1
        numbers = np.rint((pixels.mean((1, 2, 3)) + 1) * 127.5 / GREY_STEP)
        return numbers.reshape(9, 1, 1, 1), -numbers.reshape(9, 1, 1, 1)

    def text(self, captions):
        self.texts += captions
        return np.full((len(captions), 4, 8), len(captions[0]), np.float32)


def encode(clips, cache, encoders, max_share=0.0):
    skipped = Skipped(len(clips), max_share)
    encoded = encode_clips(clips, cache, Encoders(encoders.video, encoders.text), skipped)
    return encoded.usable, encoded.num_new, dict(skipped)


@pytest.fixture
def cache(tmp_path):
    return LatentCache.open(tmp_path / "cache", SETTINGS)


@pytest.fixture
def clips(tmp_path):
    return [make_clip(tmp_path, f"{count}.mp4", count) for count in (9, 20, 40)]


def test_what_is_stored(cache, clips):
    assert encode(clips, cache, Counting()) == (tuple(clips), 3, {})
    for clip, stride in zip(clips, (1, 2, 3), strict=True):  # the largest that fits
        for variant in range(3):
            stored = cache.read(clip, variant)
            numbers = stored["mean"][:, 0, 0, 0]
            start = SETTINGS.start(clip, variant, SETTINGS.sampling.choices(clip.num_frames))
            np.testing.assert_array_equal(numbers, start + stride * np.arange(9))
            np.testing.assert_array_equal(stored["logvar"], -stored["mean"])
            assert (stored["text"] == len(clip.caption)).all()
            assert {array.dtype for array in stored.values()} == {np.dtype(np.float32)}


def test_everything_is_encoded_once(cache, clips):
    encoders = Counting()
    encode([*clips, clips[0]], cache, encoders)
    assert (encoders.videos, len(encoders.texts)) == (9, 3)
    assert encode(clips, cache, encoders) == (tuple(clips), 0, {})
    assert encoders.videos == 9


def test_goes_on_after_a_kill(cache, clips):
    with pytest.raises(KeyboardInterrupt):
        encode(clips, cache, Counting(fail_at=4))  # in the second clip
    assert [cache.has(clip) for clip in clips] == [True, False, False]
    encoders = Counting()
    assert encode(clips, cache, encoders)[1] == 2
    assert encoders.videos == 6


def test_a_damaged_cache_file_is_made_again(cache, clips):
    encode(clips, cache, Counting())
    before = cache.read(clips[1], 2)
    cache.path(clips[1]).write_bytes(cache.path(clips[1]).read_bytes()[:-10])
    assert encode(clips, cache, Counting())[1] == 1
    after = cache.read(clips[1], 2)
    assert all((after[name] == before[name]).all() for name in before)


def test_short_clips_are_skipped_by_name(tmp_path, clips, caplog):
    cache = LatentCache.open(tmp_path / "cache", dataclasses.replace(SETTINGS, sampling=PretrainSampling(9, 3)))
    usable, _, skipped = encode(clips, cache, Counting(), max_share=0.7)
    assert usable == (clips[2],)
    assert list(skipped) == ["9.mp4", "20.mp4"]
    assert "20.mp4 is skipped: a clip of 20 frames is too short: its middle (5% to 95%) holds 6 of 9" in caplog.text


def test_a_damaged_video(cache, clips, caplog):
    clips[1].path.write_bytes(clips[1].path.read_bytes()[:900])
    told = (
        r"1 of 3 items cannot be used, more than data.max_skipped_share=0.3 \(20.mp4: .*truncated.*; correct or remove"
    )
    with pytest.raises(UserError, match=told):
        encode(clips, cache, Counting(), max_share=0.3)
    usable, _, skipped = encode(clips, cache, Counting(), max_share=0.34)
    assert usable == (clips[0], clips[2])
    assert "truncated" in skipped["20.mp4"]
    assert "20.mp4 is skipped" in caplog.text


def test_a_wrong_number_of_frames_in_the_data_file_is_reported(cache, clips, caplog):
    encode([dataclasses.replace(clips[1], num_frames=33)], cache, Counting())
    assert "20.mp4 holds 20 frames, the data file says 33" in caplog.text


def test_a_full_disk_is_no_damaged_clip(cache, clips, tmp_path):
    blocked = cache.path(clips[0])
    blocked.mkdir()
    with pytest.raises(UserError, match=rf"cannot write .*{blocked.name}"):
        encode(clips, cache, Counting(), max_share=1.0)
