"""What the encoders are shown of a clip: the frames of each stored variant, and of each visit where they are fresh."""

import dataclasses
import itertools
import shutil
import threading

import numpy as np
import pytest

from mask2dit_jax.curate.build_records import SceneLatents
from mask2dit_jax.data.batches import make_batches
from mask2dit_jax.data.encode import Encoders, FreshScenes, encode_clip
from mask2dit_jax.data.frames import PretrainSampling, SftSampling, TooShort
from mask2dit_jax.data.latents import LatentSettings, RecordShapes, SceneRecords
from mask2dit_jax.data.samples import ConsecutiveShots, UnrelatedClips
from mask2dit_jax.data.sources import Group, Scan, Skipped
from mask2dit_jax.errors import UserError
from tests.data.clips import GREY_STEP, make_clip

SETTINGS = LatentSettings(
    SftSampling(9, 1, 3), size=(16, 16), variants=3, seed=0, max_tokens=4, encoders="stub", compute_dtype="float32"
)


def encode_video(pixels):
    """The mean of a frame is its number; the logvar the same below zero."""
    assert (pixels.shape, pixels.dtype) == ((9, 16, 16, 3), np.float32)
    numbers = np.rint((pixels.mean((1, 2, 3)) + 1) * 127.5 / GREY_STEP)
    return numbers.reshape(9, 1, 1, 1), -numbers.reshape(9, 1, 1, 1)


def encode_text(captions):
    return np.full((len(captions), 4, 8), len(captions[0]), np.float32)


ENCODERS = Encoders(encode_video, encode_text)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    return [make_clip(folder, f"{count}.mp4", count, caption="x" * count) for count in (9, 20, 40)]


def test_the_frames_of_each_variant(clips):
    for clip, stride in zip(clips, (1, 2, 3), strict=True):  # the largest that fits
        encoded = encode_clip(clip, SETTINGS, ENCODERS)
        starts = [SETTINGS.start(clip, v, SETTINGS.sampling.choices(clip.num_frames)) for v in range(3)]
        np.testing.assert_array_equal(encoded.starts, starts)
        np.testing.assert_array_equal(encoded.strides, [stride] * 3)
        for start, mean in zip(starts, encoded.mean, strict=True):
            np.testing.assert_array_equal(mean[:, 0, 0, 0], start + stride * np.arange(9))
        np.testing.assert_array_equal(encoded.logvar, -encoded.mean)
        assert (encoded.text == len(clip.caption)).all()
        assert {array.dtype for array in (encoded.mean, encoded.logvar, encoded.text)} == {np.dtype(np.float32)}


def test_without_variants_only_the_caption_is_encoded(clips):
    def must_not(_):
        raise AssertionError("a video is encoded")

    encoded = encode_clip(clips[1], dataclasses.replace(SETTINGS, variants=0), Encoders(must_not, encode_text))
    assert (encoded.mean, encoded.logvar, len(encoded.starts)) == (None, None, 0)
    assert (encoded.text == 20).all()


def test_short_and_damaged_clips(clips, tmp_path):
    pretrain = dataclasses.replace(SETTINGS, sampling=PretrainSampling(9, 3))
    with pytest.raises(TooShort, match=r"a clip of 20 frames is too short: its middle \(5% to 95%\) holds 6 of 9"):
        encode_clip(clips[1], pretrain, ENCODERS)
    cut = dataclasses.replace(clips[1], path=tmp_path / "cut.mp4")
    cut.path.write_bytes(clips[1].path.read_bytes()[:900])
    with pytest.raises(UserError, match="truncated"):
        encode_clip(cut, SETTINGS, ENCODERS)


def test_a_wrong_number_of_frames_in_the_data_file_is_reported(clips, caplog):
    encode_clip(dataclasses.replace(clips[1], num_frames=33), SETTINGS, ENCODERS)
    assert "20.mp4 holds 20 frames, the data file says 33" in caplog.text


@pytest.fixture
def fresh(clips, tmp_path):
    """Clips of 20, 40, 41 and 42 frames with fresh frames; all are one group."""
    videos = [clips[1], clips[2], *(make_clip(tmp_path, f"{n}.mp4", n, caption="x" * n) for n in (41, 42))]
    settings = dataclasses.replace(SETTINGS, variants=0)
    scan = Scan(tuple(videos), (Group("all", tuple(videos)),), {})
    builder = SceneLatents(
        *(tmp_path / "texts", settings, RecordShapes(None, (4, 8)), scan),
        *(lambda clip: encode_clip(clip, settings, ENCODERS), Skipped(4, 0.0)),
    )
    builder.download_and_prepare()
    builder.finish()
    return FreshScenes(SceneRecords(tmp_path / "texts"), builder.usable_clips(), SETTINGS, encode_video)


def take(store, count, **options):
    samples = UnrelatedClips(store.clips, 2)
    return list(itertools.islice(make_batches(store, samples, global_batch_size=3, seed=4, **options), count))


def test_fresh_frames_follow_the_rule_of_the_stage_and_differ_from_visit_to_visit(fresh):
    starts = {length: set() for length in (20, 40, 41, 42)}
    for batch in take(fresh, 40):
        assert {name: array.shape for name, array in batch.items()} == {
            "mean": (3, 18, 1, 1, 1),
            "logvar": (3, 18, 1, 1, 1),
            "text": (3, 2, 4, 8),
        }
        assert {array.dtype for array in batch.values()} == {np.dtype(np.float32)}
        np.testing.assert_array_equal(batch["logvar"], -batch["mean"])
        scenes = batch["mean"].reshape(6, 9)
        for numbers, text in zip(scenes, batch["text"].reshape(6, 4, 8), strict=True):
            length = int(text[0, 0])  # the caption of a clip is as long as the clip
            choices = SETTINGS.sampling.choices(length)
            np.testing.assert_array_equal(np.diff(numbers), choices.stride)
            assert int(numbers[0]) in choices.starts
            starts[length].add(int(numbers[0]))
    assert len(starts[20]) == len(SETTINGS.sampling.choices(20).starts) == 4
    assert min(len(found) for length, found in starts.items() if length > 20) > 8  # more than would be stored


def test_a_fresh_batch_depends_on_seed_step_and_row_alone(fresh):
    whole = take(fresh, 6)
    for one, other in zip(whole[4:], take(fresh, 2, start_sample=12), strict=True):
        assert all((one[name] == other[name]).all() for name in one)
    for one, part in zip(whole, take(fresh, 6, rows=[2, 0]), strict=True):
        assert all((one[name][[2, 0]] == part[name]).all() for name in one)


def test_fresh_frames_are_encoded_by_the_thread_that_wants_the_batch(fresh):
    threads = []
    fresh._encode_video = lambda pixels: (threads.append(threading.get_ident()), encode_video(pixels))[1]
    take(fresh, 2)
    assert set(threads) == {threading.get_ident()}


def test_neighbours_stay_neighbours(fresh):
    samples = ConsecutiveShots(fresh.groups, 3, fresh.clips)
    batch = next(make_batches(fresh, samples, global_batch_size=2, seed=0))
    assert {tuple(lengths) for lengths in batch["text"][..., 0, 0].astype(int)} <= {(20, 40, 41), (40, 41, 42)}


def test_a_video_that_disappears_is_replaced_by_another_sample(fresh):
    fresh._videos[3].path.unlink()
    skipped = Skipped(4, max_share=0.3)
    batches = take(fresh, 10, skipped=skipped)
    assert list(skipped) == ["42.mp4"]
    assert "no such file" in skipped["42.mp4"]
    assert not any((batch["text"] == 42).any() for batch in batches)
    shutil.rmtree(fresh._videos[3].path.parent)
    with pytest.raises(UserError, match=r"cannot be used, more than data.max_skipped_share=0\.3"):
        take(fresh, 10, skipped=Skipped(4, max_share=0.3))


@pytest.mark.parametrize(("fit", "black"), [("crop", 0), ("pad", 1 / 3), ("stretch", 0)])
def test_frames_of_another_shape_come_to_size_as_the_fit_says(clips, fit, black):
    shown = []

    def look(pixels):
        shown.append(pixels)
        return encode_video(np.full_like(pixels, pixels.max()))

    (clip,) = clips[1:2]  # 32 x 48
    encode_clip(clip, dataclasses.replace(SETTINGS, fit=fit, variants=1), Encoders(look, encode_text))
    assert (shown[0][-1] == -1).all(-1).mean() == pytest.approx(black, abs=0.05)
