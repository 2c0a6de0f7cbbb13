"""The ways to a run's batches: videos encoded inside the job, once or at each visit, or latents made before."""

import dataclasses
import itertools
import os
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from absl import logging

from configs import pretrain, sft
from mask2dit_jax import build_data
from mask2dit_jax.config import TrainConfig, read_config
from mask2dit_jax.curate import build_records
from mask2dit_jax.data.encode import Encoders
from mask2dit_jax.data.sources import Group, scan_data_file, write_pretrain_csv, write_sft_json
from mask2dit_jax.errors import UserError
from mask2dit_jax.io.atomic import FileLock
from mask2dit_jax.io.paths import ASSETS
from mask2dit_jax.pretrained.former_fingerprint import former_fingerprint
from mask2dit_jax.pretrained.pretrained import Pretrained
from mask2dit_jax.training import setup, training_data
from mask2dit_jax.training.training_data import open_training_data
from tests.data.clips import make_clip

TINY = ASSETS / "tiny"
STAGES = {"pretrain": (pretrain, "pretrain.csv"), "sft": (sft, "sft.json")}


def configure(stage, path, **data):
    config = STAGES[stage][0].get_config("tiny")
    config.update({"num_frames": 5, "height": 32, "width": 48, "num_scenes": 2, "pretrained": str(TINY)})
    config.data.update({"path": str(path), "clip_variants": 3, "max_stride": 2, "max_skipped_share": 0.3, **data})
    return read_config(config, TrainConfig, "train")


def model_of(config):
    opened = Pretrained.open(config.pretrained)
    return setup.model_from_scratch(config, opened.vae.config, opened.text_encoder.config)


def open_data(config):
    return open_training_data(config, Pretrained.open(config.pretrained), model_of(config))


def take(data, count=6, start=0, rows=range(4), seed=3):
    return list(itertools.islice(data.batches(4 * start, rows, 4, seed), count))


def encode_video(pixels):
    """Stands in for the VAE of the package, whose sizes it has: what a latent is depends on what its pixels show."""
    mean = pixels.mean((1, 2, 3))[::4].reshape(2, 1, 1, 1) * np.linspace(1, 2, 8 * 12 * 16).reshape(8, 12, 16)
    return mean, np.sin(mean)


def encode_text(captions):
    return np.stack([np.random.default_rng(len(caption)).standard_normal((48, 64)) for caption in captions])


@pytest.fixture(scope="module", autouse=True)
def encoders():
    """The real ones take long to compile; tests/mains/test_damaged_data.py takes both ways with them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_data, "load_encoders", lambda *_: Encoders(encode_video, encode_text))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six clips in two groups, one of them too short; in both formats, and their latents."""
    folder = tmp_path_factory.mktemp("data")
    clips = [make_clip(folder, f"{n}.mp4", count=4 if n == 2 else 16 + n, caption="clip" + n * "!") for n in range(6)]
    write_pretrain_csv(folder / "pretrain.csv", clips)
    write_sft_json(folder / "sft.json", [Group("a", tuple(clips[:4])), Group("b", tuple(clips[4:]))])
    for stage, (_, name) in STAGES.items():
        build_data.encode(configure(stage, ""), str(folder / name), str(folder / f"{stage}_latents"))
    return folder


@pytest.mark.parametrize("stage", STAGES)
def test_the_same_batches_both_ways(folder, stage):
    online = open_data(configure(stage, folder / STAGES[stage][1], cache=str(folder / "cache")))
    stored = open_data(configure(stage, folder / f"{stage}_latents"))
    assert list(online.skipped) == list(stored.skipped) == ["2.mp4"]
    assert online.skipped["2.mp4"] == stored.skipped["2.mp4"]
    assert len(online.samples) == len(stored.samples) == {"pretrain": 5, "sft": 2}[stage]
    for ours, theirs in zip(take(stored), take(online), strict=True):
        np.testing.assert_array_equal(ours["mean"], theirs["mean"])
        np.testing.assert_array_equal(ours["logvar"], theirs["logvar"])
        np.testing.assert_array_equal(ours["text"], theirs["text"])
        assert {array.dtype for array in ours.values()} == {np.dtype(np.float32)}
        assert ours["text"].shape == (4, 2, 48, 64)
    resumed, part = take(stored, 2, start=4), take(stored, 2, start=4, rows=[1, 3])
    for whole, again, rows in zip(take(stored)[4:], resumed, part, strict=True):
        for name in whole:
            np.testing.assert_array_equal(whole[name], again[name])
            np.testing.assert_array_equal(whole[name][[1, 3]], rows[name])


def test_latents_need_neither_videos_nor_encoders(folder, tmp_path, monkeypatch, caplog):
    def must_not(*_):
        raise AssertionError("encoders are loaded")

    monkeypatch.setattr(training_data, "load_encoders", must_not)
    latents = shutil.copytree(folder / "sft_latents", tmp_path / "latents")
    bare = shutil.copytree(TINY, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    config = configure("sft", latents)
    with_weights = take(open_data(config))
    config = dataclasses.replace(config, pretrained=str(bare))
    caplog.set_level(logging.INFO)
    for ours, theirs in zip(take(open_data(config)), with_weights, strict=True):
        np.testing.assert_array_equal(ours["mean"], theirs["mean"])
    assert "has no encoder weights: it is not checked that" in caplog.text


def test_another_seed_draws_from_the_same_latents(folder):
    config = configure("sft", folder / "sft_latents")
    config = dataclasses.replace(config, seed=7)
    ours, theirs = take(open_data(config), seed=7), take(open_data(config), seed=3)
    assert any(not np.array_equal(one["mean"], other["mean"]) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"num_frames": 9}, "sampling.num_frames 5, not 9"),
        ({"height": 48, "width": 80}, r"size \[32, 48\], not \[48, 80\]"),
        ({"compute_dtype": "bfloat16"}, "compute_dtype float32, not bfloat16"),
        ({"data": {"clip_variants": 1}}, "variants 3, not 1"),
        ({"data": {"kind": "csv"}}, "sampling.rule SftSampling, not PretrainSampling"),
    ],
)
def test_latents_made_in_another_way_are_refused(folder, change, told):
    config = configure("sft", folder / "sft_latents")
    data = dataclasses.replace(config.data, **change.get("data", {}))
    config = dataclasses.replace(config, **{**change, "data": data})
    with pytest.raises(UserError, match=f"sft_latents was made with .*{told}"):
        open_data(config)


def test_latents_of_other_encoders_are_refused(folder, tmp_path):
    other = shutil.copytree(TINY, tmp_path / "other")
    weights = other / "vae" / "diffusion_pytorch_model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    config = configure("sft", folder / "sft_latents")
    config = dataclasses.replace(config, pretrained=str(other))
    with pytest.raises(UserError, match=r"made with encoders [0-9a-f]{16}, not [0-9a-f]{16}; set"):
        open_data(config)


def test_files_that_the_encoders_do_not_read_change_nothing(folder, tmp_path, monkeypatch):
    """The same data set serves a run on latents, a second build_data and a run on videos."""
    other = shutil.copytree(TINY, tmp_path / "other")
    for name in ("vae", "text_encoder", "tokenizer"):
        for stray in (".DS_Store", "Thumbs.db", ".config.json.swp"):
            (other / name / stray).write_text("stray")
    cached = configure("sft", folder / "sft.json", cache=str(tmp_path / "cache"))
    open_data(cached)
    monkeypatch.setattr(training_data, "load_encoders", None)
    open_data(dataclasses.replace(cached, pretrained=str(other)))
    config = dataclasses.replace(configure("sft", folder / "sft_latents"), pretrained=str(other))
    open_data(config)
    build_data.encode(config, str(folder / "sft.json"), str(folder / "sft_latents"))


def test_what_older_versions_encoded_is_still_good(folder, tmp_path, monkeypatch):
    """They hashed sizes and ends of all files, so their data sets name other encoders."""
    former = former_fingerprint(TINY, ("vae", "text_encoder", "tokenizer"))
    with monkeypatch.context() as patch:
        patch.setattr(Pretrained, "fingerprint", lambda *_: former)
        config = configure("sft", "")
        build_data.encode(config, str(folder / "sft.json"), str(tmp_path / "latents"))
        cached = configure("sft", folder / "sft.json", cache=str(tmp_path / "cache"))
        open_data(cached)
    monkeypatch.setattr(training_data, "load_encoders", None)
    open_data(configure("sft", tmp_path / "latents"))
    build_data.encode(config, str(folder / "sft.json"), str(tmp_path / "latents"))
    open_data(cached)


@pytest.mark.parametrize("stage", STAGES)
def test_too_many_clips_that_cannot_be_used(folder, stage):
    for path in (folder / STAGES[stage][1], folder / f"{stage}_latents"):
        config = configure(stage, path, max_skipped_share=0.1, cache=str(folder / "cache"))
        with pytest.raises(
            UserError, match=r"1 of 6 items cannot be used, more than data.max_skipped_share=0.1 \(2.mp4"
        ):
            open_data(config)


def test_unreadable_records_are_replaced_named_and_gathered(folder, tmp_path):
    latents = Path(shutil.copytree(folder / "pretrain_latents", tmp_path / "latents"))
    shard = sorted(latents.glob("*array_record*"))[3]
    raw = bytearray(shard.read_bytes())
    raw[1000:3000] = bytes(2000)
    shard.write_bytes(raw)
    data = open_data(configure("pretrain", latents, max_skipped_share=0.4))
    batches = take(data, 12)
    assert set(data.skipped) == {"2.mp4", "3.mp4"}
    assert "cannot be read (Corrupted" in data.skipped["3.mp4"]
    assert data.gather_skipped() == dict(data.skipped)
    for whole, part in zip(batches, take(data, 12, rows=[2]), strict=True):
        np.testing.assert_array_equal(whole["mean"][[2]], part["mean"])
    strict = open_data(configure("pretrain", latents, max_skipped_share=0.2))
    with pytest.raises(UserError, match="2 of 6 items cannot be used"):
        take(strict, 12)


class Counting:
    """Encoders that keep what they are asked for, and stop the process at the video number `fail_at`."""

    def __init__(self, monkeypatch, fail_at=None):
        self.videos, self.captions = 0, []

        def video(pixels):
            if self.videos == fail_at:
                raise KeyboardInterrupt
            self.videos += 1
            return encode_video(pixels)

        def text(captions):
            self.captions += captions
            return encode_text(captions)

        monkeypatch.setattr(training_data, "load_encoders", lambda *_: Encoders(video, text))


@pytest.fixture
def clips(tmp_path):
    return [make_clip(tmp_path, f"{n}.mp4", count=16 + n, caption="clip" + n * "!") for n in range(6)]


def in_job(clips, stage="pretrain", **data):
    """The config of a run that encodes these clips itself."""
    folder = clips[0].path.parent
    write_pretrain_csv(folder / "pretrain.csv", clips)
    write_sft_json(folder / "sft.json", [Group("a", tuple(clips[:3])), Group("b", tuple(clips[3:]))])
    return configure(stage, folder / STAGES[stage][1], **{"cache": str(folder / "cache"), **data})


def test_a_job_that_was_killed_goes_on_and_encodes_no_clip_twice(clips, monkeypatch):
    config = in_job(clips)
    Counting(monkeypatch, fail_at=7)  # in the third clip, of three variants each
    with pytest.raises(KeyboardInterrupt):
        open_data(config)
    encoders = Counting(monkeypatch)
    first = take(open_data(config))
    assert (encoders.videos, len(encoders.captions)) == (12, 4)
    monkeypatch.setattr(training_data, "load_encoders", None)  # what is complete needs none
    for one, other in zip(first, take(open_data(config)), strict=True):
        np.testing.assert_array_equal(one["mean"], other["mean"])


def test_an_edited_data_file_costs_the_clips_that_are_new(clips, monkeypatch, tmp_path):
    open_data(in_job(clips))
    edits = {
        "a caption": [*clips[:2], dataclasses.replace(clips[2], caption="edited"), *clips[3:]],
        "a row less": clips[1:],
        "a row more": [make_clip(tmp_path, "new.mp4", count=20, caption="new"), *clips],
        "another order": clips[::-1],
    }
    for what, edited in edits.items():
        encoders = Counting(monkeypatch)
        data = open_data(in_job(edited))
        new = [clip.caption for clip in edited if clip not in clips]
        assert encoders.captions == new, what
        assert encoders.videos == 3 * len(new)
        assert [clip.name for clip in data.store.clips] == [clip.name for clip in edited]
        for stored, clip in zip(data.store.clips, edited, strict=True):
            text = data.store.read(stored, 0)["text"].astype(np.float32)
            np.testing.assert_allclose(text, encode_text([clip.caption])[0], rtol=2**-8)
    encoders = Counting(monkeypatch)
    open_data(in_job(clips))  # as it was before the edits
    assert encoders.captions == []


def test_an_edited_data_file_shares_the_files_that_stay_as_they_are(clips, monkeypatch):
    monkeypatch.setattr(build_records, "_LEAST_SHARDS", 3)  # two clips in each

    def files(clips):
        store = open_data(in_job(clips)).store
        return [(Path(store.folder) / shard.file).stat().st_ino for shard in store.index.shards]

    before = files(clips)
    after = files([*clips[:3], dataclasses.replace(clips[3], caption="edited"), *clips[4:]])
    assert [one == other for one, other in zip(before, after, strict=True)] == [True, False, True]

    def no_links(*_):
        raise OSError("not supported")

    monkeypatch.setattr(os, "link", no_links)
    encoders = Counting(monkeypatch)
    shortened = files(clips[:4])
    assert not set(shortened) & {*before, *after}
    assert encoders.captions == []


def test_a_damaged_record_is_not_taken_over(clips, monkeypatch):
    monkeypatch.setattr(build_records, "_LEAST_SHARDS", 3)
    store = open_data(in_job(clips)).store
    shard = Path(store.folder) / store.index.shards[0].file
    raw = bytearray(shard.read_bytes())
    raw[raw.index(b"clip!") + 1] ^= 1  # the caption of the second clip
    shard.write_bytes(raw)
    encoders = Counting(monkeypatch)
    data = open_data(in_job([*clips[:5], dataclasses.replace(clips[5], caption="edited")]))
    assert encoders.captions == ["clip!", "edited"]
    assert all(data.store.read(clip, 2)["mean"].any() for clip in data.store.clips)


def test_a_replaced_video_is_encoded_again_and_no_other(clips, monkeypatch):
    config = in_job(clips)
    monkeypatch.setattr(build_records, "_LEAST_SHARDS", 2)  # three clips in each

    def read_all():
        store = open_data(config).store
        return [store.read(clip, 2)["mean"] for clip in store.clips]

    before = read_all()
    make_clip(clips[1].path.parent, clips[1].name, count=17, first=30)
    encoders = Counting(monkeypatch)
    after = read_all()
    assert (encoders.videos, encoders.captions) == (3, [clips[1].caption])
    same = [np.array_equal(one, other) for one, other in zip(before, after, strict=True)]
    assert same == [True, False, True, True, True, True]


def test_other_settings_never_meet_old_latents(clips, monkeypatch):
    open_data(in_job(clips))
    for change in ({"clip_variants": 2}, {"max_stride": 1}):
        encoders = Counting(monkeypatch)
        open_data(in_job(clips, **change))
        assert encoders.videos == 6 * change.get("clip_variants", 3)
    encoders = Counting(monkeypatch)
    open_data(in_job(clips, "sft"))  # the two stages take their frames by other rules
    assert encoders.videos == 18
    encoders = Counting(monkeypatch)
    for stage in STAGES:
        open_data(in_job(clips, stage))
    assert encoders.videos == 0


def test_a_shard_that_was_cut_short_is_encoded_again(clips, monkeypatch):
    config = in_job(clips)
    store = open_data(config).store
    shard = Path(store.folder) / store.index.shards[4].file
    shard.write_bytes(shard.read_bytes()[:-1])
    encoders = Counting(monkeypatch)
    open_data(config)
    assert encoders.captions == [clips[4].caption]


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(clips, monkeypatch):
    config, writer, opened = in_job(clips), build_records.ArrayRecordWriter, []

    def full(*arguments):
        opened.append(writer(*arguments))
        if len(opened) == 4:
            raise RuntimeError("write() failed: No space left on device")
        return opened[-1]

    with monkeypatch.context() as patch:
        patch.setattr(build_records, "ArrayRecordWriter", full)
        with pytest.raises(UserError, match=r"cannot write .*No space left on device; make room, then start again"):
            open_data(config)
    encoders = Counting(monkeypatch)
    open_data(config)
    assert len(encoders.captions) == 3


def test_a_cache_that_cannot_be_written(clips):
    (clips[0].path.parent / "file").write_text("")
    with pytest.raises(UserError, match=r"file/cache cannot be written"):
        open_data(in_job(clips, cache=str(clips[0].path.parent / "file" / "cache")))
    with pytest.raises(UserError, match=r"data.cache=gs://bucket is no folder on a disk; for a bucket, use build_data"):
        open_data(in_job(clips, cache="gs://bucket"))


def test_two_jobs_that_want_the_same_clips_encode_them_once(clips, monkeypatch, caplog):
    """The second one waits while the first one is at work, and finds everything done."""
    caplog.set_level(logging.INFO)
    config = in_job(clips)
    folder = open_data(config).store.folder
    shutil.rmtree(folder)
    encoders, lock = Counting(monkeypatch), FileLock(f"{folder}.lock")
    assert lock.acquire()
    opened = []
    job = threading.Thread(target=lambda: opened.append(open_data(config)))
    job.start()
    while " is encoding these clips; waiting for it" not in caplog.text:
        time.sleep(0.01)
    assert encoders.videos == 0
    lock.release()
    job.join()
    assert encoders.videos == 18
    take(opened[0])
    assert lock.acquire()  # it was released


@pytest.mark.parametrize("stage", STAGES)
def test_fresh_frames(clips, monkeypatch, stage):
    encoders = Counting(monkeypatch)
    data = open_data(in_job(clips, stage, frames="fresh"))
    assert (encoders.videos, len(encoders.captions)) == (0, 6)
    stored = open_data(in_job(clips, stage))
    batches = take(data)
    for fresh, batch in zip(batches, take(stored), strict=True):
        assert {name: (x.shape, x.dtype) for name, x in fresh.items()} == {
            name: (x.shape, x.dtype) for name, x in batch.items()
        }
    for whole, resumed, part in zip(batches[4:], take(data, 2, 4), take(data, 2, 4, rows=[1, 3]), strict=True):
        for name in whole:
            np.testing.assert_array_equal(whole[name], resumed[name])
            np.testing.assert_array_equal(whole[name][[1, 3]], part[name])
    encoders = Counting(monkeypatch)
    config = in_job(clips, stage, frames="fresh")
    config = dataclasses.replace(config, seed=11)
    take(open_data(config), 1)
    assert (encoders.videos, encoders.captions) == (4 * 2, [])  # captions are stored for every seed


def test_fresh_frames_need_videos(folder, tmp_path):
    with pytest.raises(UserError, match=r"data.frames=fresh encodes videos, and .*sft_latents holds latents; set"):
        open_data(configure("sft", folder / "sft_latents", frames="fresh"))
    with pytest.raises(UserError, match=r"data.frames=fresh stores no latents; set data.frames=stored"):
        build_data.encode(configure("sft", "", frames="fresh"), str(folder / "sft.json"), str(tmp_path / "latents"))
    with pytest.raises(UserError, match=r"data.frames 'never' does not exist; choose one of stored, fresh"):
        open_data(configure("sft", folder / "sft.json", frames="never"))


def test_no_data():
    with pytest.raises(UserError, match=r"no data: set --config\.data\.path"):
        open_data(configure("sft", ""))


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("frames", ["stored", "fresh"])
def test_storyboards_are_captioned_with_what_their_texts_embed(folder, stage, frames, tmp_path):
    data = open_data(configure(stage, folder / STAGES[stage][1], cache=str(tmp_path), frames=frames))
    for seed in range(3):
        text = take(data, 1, seed=seed)[0]["text"][0]
        np.testing.assert_allclose(text, encode_text(data.captions(seed)), rtol=2**-8)


@pytest.mark.parametrize("stage", STAGES)
def test_what_is_cropped_is_said_where_clips_are_encoded(folder, stage, tmp_path, caplog):
    upright = {"height": 64, "width": 32}
    config = configure(stage, folder / STAGES[stage][1], cache=str(tmp_path))
    training_data.log_cropped(config, scan_data_file(config.data.kind, config.data.path))
    assert "cropped" not in caplog.text
    config = dataclasses.replace(config, **upright)
    training_data.log_cropped(config, scan_data_file(config.data.kind, config.data.path))
    assert "more than a fifth of the picture is cropped in 6 of 6 clips, up to 67 %" in caplog.text
    caplog.clear()
    padded = dataclasses.replace(config, data=dataclasses.replace(config.data, fit="pad"))
    training_data.log_cropped(padded, scan_data_file(config.data.kind, config.data.path))
    assert "cropped" not in caplog.text


def test_a_check_says_what_is_cropped(folder, capsys):
    config = dataclasses.replace(configure("sft", ""), height=64, width=32)
    for fit, told in (("crop", True), ("stretch", False)):
        with pytest.raises(UserError, match="1 of 6 clips"):  # one is too short
            build_data.check(
                dataclasses.replace(config, data=dataclasses.replace(config.data, fit=fit)), str(folder / "sft.json")
            )
        assert ("cropped in 5 of 5 clips" in capsys.readouterr().out) == told
