"""The latent data set: what is in it, that no kill loses or doubles a record, that nothing stale is taken for it."""

import dataclasses
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import grain
import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from etils import epath

from mask2dit_jax.curate import build_records as building
from mask2dit_jax.curate.build_records import SceneLatents
from mask2dit_jax.data import latents
from mask2dit_jax.data.encode import Encoders, encode_clip
from mask2dit_jax.data.frames import SftSampling
from mask2dit_jax.data.latents import LatentSettings, RecordShapes, SceneRecords, UnreadableScene
from mask2dit_jax.data.sources import Clip, Group, Scan, Skipped
from mask2dit_jax.errors import UserError
from tests.bucket import buckets_in
from tests.data.clips import GREY_STEP, make_clip

ROOT = Path(__file__).parents[2]
SETTINGS = LatentSettings(
    SftSampling(5, 1, 2), size=(16, 16), variants=2, seed=0, max_tokens=4, encoders="stub", compute_dtype="float32"
)
SHAPES = RecordShapes((5, 1, 1, 2), (4, 8))
LENGTHS = (20, 12, 5, 9, 4, 16, 30)  # the fifth is too short


def encode_video(pixels):
    """The mean of a frame is its number; the logvar the same below zero."""
    numbers = np.rint((pixels.mean((1, 2, 3)) + 1) * 127.5 / GREY_STEP)
    moments = np.repeat(numbers, 2).reshape(5, 1, 1, 2)
    return moments, -moments


def encode_text(captions):
    return np.stack([np.full((4, 8), 1 / len(caption)) for caption in captions])


def encode(clip):
    return encode_clip(clip, SETTINGS, Encoders(encode_video, encode_text))


def clips_in(folder):
    named = [(f"{n}.mp4", count, f"caption {'x' * n}") for n, count in enumerate(LENGTHS)]
    clips = tuple(Clip(name, Path(folder, name), caption, count, 25.0, 48, 32) for name, count, caption in named)
    groups = (Group("long", clips[:5]), Group("broken", (clips[5], None, clips[6])))
    return Scan(clips, groups, {"gone.mp4": "no video"})


@pytest.fixture(scope="module")
def scan(tmp_path_factory):
    scan = clips_in(tmp_path_factory.mktemp("clips"))
    for clip in scan.clips:
        make_clip(clip.path.parent, clip.name, clip.num_frames)
    return scan


def builder(folder, scan, settings=SETTINGS, encode=encode, max_share=1.0):
    return SceneLatents(folder, settings, SHAPES, scan, encode, Skipped(scan.num_clips, max_share))


def build(folder, scan, **changes):
    made = builder(folder, scan, **changes)
    made.download_and_prepare()
    return made, made.finish()


@pytest.fixture(scope="module")
def complete(scan, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "latents"
    build(folder, scan)
    return folder


def contents(folder):
    """Everything that a reader sees: the records byte by byte, and the index."""
    files = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    assert not [name for name in files if name.startswith(".")]
    files.pop("metadata.json", None)  # TFDS adds this one, empty, when it writes a data set's information again
    return files


def decoded(folder):
    """The records as text: their bytes are in another order in each process (protobuf maps)."""
    source = tfds.builder_from_directory(folder).as_data_source("train")
    return [{name: np.asarray(value).tolist() for name, value in record.items()} for record in source]


def test_what_a_record_holds(complete, scan):
    source = tfds.builder_from_directory(complete).as_data_source("train")
    usable = [clip for clip in scan.clips if clip.num_frames >= 5]
    assert len(source) == 2 * len(usable) == 12
    for number, record in enumerate(source):
        clip, variant = usable[number // 2], number % 2
        choices = SETTINGS.sampling.choices(clip.num_frames)
        start = SETTINGS.start(clip, variant, choices)
        assert (record["start"], record["stride"], record["variant"]) == (start, choices.stride, variant)
        np.testing.assert_array_equal(record["mean"][:, 0, 0, 0], choices.indices(start))
        np.testing.assert_array_equal(record["logvar"], -record["mean"])
        assert record["text"].dtype.name == "bfloat16"
        np.testing.assert_allclose(record["text"].astype(np.float32), 1 / len(clip.caption), rtol=2**-8)
        assert record["caption"].decode() == clip.caption
        assert record["video"].decode() == clip.name
        assert record["source"].decode() == hashlib.sha256(clip.path.read_bytes()).hexdigest()
        assert record["settings"].decode() == SETTINGS.fingerprint()


def test_the_index(complete):
    store = SceneRecords(complete)
    assert [clip.name for clip in store.clips] == ["0.mp4", "1.mp4", "2.mp4", "3.mp4", "5.mp4", "6.mp4"]
    groups = {group.name: [clip and clip.name for clip in group.clips] for group in store.groups}
    assert groups == {"long": ["0.mp4", "1.mp4", "2.mp4", "3.mp4", None], "broken": ["5.mp4", None, "6.mp4"]}
    assert sorted(store.index.skipped) == ["4.mp4", "gone.mp4"]
    assert "a clip of 4 frames is too short" in store.index.skipped["4.mp4"]


def test_grain_reads_the_shards(complete):
    shards = sorted(str(path) for path in Path(complete).glob("*array_record*"))
    source = grain.sources.ArrayRecordDataSource(shards)
    assert len(source) == 12
    assert len({source[number] for number in range(12)}) == 12


def test_a_complete_data_set_is_left_as_it_is(complete, scan):
    before = contents(complete)
    build(complete, scan, encode=must_not)
    assert contents(complete) == before


@pytest.mark.parametrize("count", [2, 3, 9])
def test_processes_share_the_shards(complete, scan, tmp_path, count):
    written = []
    for index in reversed(range(count)):
        written.append(builder(tmp_path / "d", scan).download_and_prepare(process_index=index, process_count=count))
        if index:
            with pytest.raises(UserError, match=r"of 7 shards are not there yet, the first scene_latents-train"):
                builder(tmp_path / "d", scan).finish()
    assert sum(written) == 7
    builder(tmp_path / "d", scan).finish()
    assert contents(tmp_path / "d") == contents(complete)


PROGRAM = """
import os, sys, time
from tests.curate.test_build_records import build, clips_in, encode

def waiting_for_its_end(clip):
    while os.path.exists(sys.argv[2]) and len(os.listdir(sys.argv[2])) >= int(sys.argv[3]):
        time.sleep(0.01)
    return encode(clip)

build(sys.argv[2], clips_in(sys.argv[1]), encode=waiting_for_its_end)
"""


def test_kill_9_at_any_moment(complete, scan, tmp_path):
    target = tmp_path / "latents"
    program = [sys.executable, "-c", PROGRAM, str(scan.clips[0].path.parent), str(target)]
    for num_files in (1, 9):  # killed when so many are there, some of them hidden and half written
        with subprocess.Popen([*program, str(num_files)], cwd=ROOT, stderr=subprocess.DEVNULL) as process:
            while process.poll() is None and not (target.exists() and len(os.listdir(target)) >= num_files):
                time.sleep(0.002)
            process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
        assert not (target / latents.INDEX).exists()
    build(target, scan)
    assert decoded(target) == decoded(complete)
    assert SceneRecords(target).index == SceneRecords(complete).index


class Killed(BaseException):
    """Like kill -9, nothing of ours runs after it: what writers clean up on the way out is put back."""


def test_killed_between_any_two_file_operations(scan, tmp_path, monkeypatch):
    """The process stops before, and after, each move of a file; leftovers stay as a kill leaves them."""
    monkeypatch.setattr(building, "_LEAST_SHARDS", 3)
    moves = count_moves(scan, tmp_path / "complete", monkeypatch)
    assert moves == 1 + 2 * 3 + 1  # the settings, three shards with their reports, the index
    for at in range(moves):
        for after in (False, True):
            folder = tmp_path / f"{at}{after}"
            with monkeypatch.context() as patch:
                stop_at(at, after, patch)
                with pytest.raises(Killed):
                    build(folder, scan)
            build(folder, scan)
            assert contents(folder) == contents(tmp_path / "complete")


def count_moves(scan, folder, monkeypatch):
    replace, done = type(epath.Path("/")).replace, []
    with monkeypatch.context() as patch:
        patch.setattr(type(epath.Path("/")), "replace", lambda *paths: (done.append(paths), replace(*paths)))
        build(folder, scan)
    return len(done)


def stop_at(at, after, patch):
    path_class = type(epath.Path("/"))
    replace, done = path_class.replace, []

    def stop(source, target):
        if len(done) == at and not after:
            raise Killed
        replace(source, target)
        done.append(target)
        if len(done) == at + 1:
            raise Killed

    patch.setattr(path_class, "replace", stop)
    patch.setattr(path_class, "unlink", lambda *_, **__: None)


def test_a_video_that_was_replaced_is_encoded_again(scan, tmp_path):
    for clip in scan.clips:
        make_clip(tmp_path, clip.name, clip.num_frames)
    build(tmp_path / "latents", clips_in(tmp_path))
    before = contents(tmp_path / "latents")
    make_clip(tmp_path, "3.mp4", 30)
    made = builder(tmp_path / "latents", clips_in(tmp_path))
    assert made.download_and_prepare() == 1
    with pytest.raises(UserError, match="is not complete"):
        SceneRecords(tmp_path / "latents")
    made.finish()
    after = contents(tmp_path / "latents")
    assert {name for name in before if before[name] != after[name] and "array" in name} == {shard(3)}
    assert SceneRecords(tmp_path / "latents").read(SceneRecords(tmp_path / "latents").clips[3], 0)


def must_not(clip):
    raise AssertionError(clip)


def test_a_video_of_the_same_size_and_date_is_encoded_again(scan, tmp_path):
    for clip in scan.clips:
        shutil.copy2(clip.path, tmp_path / clip.name)
    build(tmp_path / "latents", clips_in(tmp_path))
    replaced = tmp_path / "3.mp4"
    content, before = bytearray(replaced.read_bytes()), replaced.stat()
    content[len(content) // 2] ^= 1
    replaced.write_bytes(content)
    os.utime(replaced, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert builder(tmp_path / "latents", clips_in(tmp_path)).download_and_prepare() == 1


def test_videos_that_were_copied_elsewhere_are_the_same(scan, complete, tmp_path):
    """A copy has other times and another inode; its content is what was encoded."""
    for clip in scan.clips:
        shutil.copyfile(clip.path, tmp_path / clip.name)
    copied = Path(shutil.copytree(complete, tmp_path / "latents"))
    assert builder(copied, clips_in(tmp_path), encode=must_not).download_and_prepare() == 0


@pytest.fixture
def older(complete, scan, tmp_path):
    """A data set that an older version wrote: its reports know videos by size and time."""
    folder = Path(shutil.copytree(complete, tmp_path / "older"))
    clips = {clip.name: clip for clip in scan.clips}
    for path in folder.glob("shard-*.json"):
        report = json.loads(path.read_text())
        for outcome in report["clips"]:
            status = clips[outcome["name"]].path.stat()
            outcome["source"] = f"{status.st_size} bytes, modified {status.st_mtime_ns}"
            del outcome["state"]
        path.write_text(json.dumps(report))
    return folder


def test_a_data_set_of_an_older_version_is_complete_and_lends_its_records(older, scan, tmp_path, monkeypatch):
    before = contents(older)
    build(older, scan, encode=must_not)
    assert contents(older) == before
    encoded = []
    made = SceneLatents(
        tmp_path / "new",
        SETTINGS,
        SHAPES,
        scan,
        lambda clip: (encoded.append(clip.name), encode(clip))[1],
        Skipped(scan.num_clips, 1.0),
        reuse=[older],
    )
    made.download_and_prepare()
    made.finish()
    assert encoded == ["4.mp4"]  # the clip that cannot be used
    assert decoded(tmp_path / "new") == decoded(older)
    build(tmp_path / "new", scan, encode=must_not)


def shard(number):
    return f"scene_latents-train.array_record-{number:05d}-of-00007"


@pytest.fixture
def copied(complete, tmp_path):
    return Path(shutil.copytree(complete, tmp_path / "copy"))


def test_a_report_cut_off_counts_as_none(copied, complete, scan):
    os.truncate(copied / "shard-00001-of-00007.json", 20)
    assert builder(copied, scan).download_and_prepare() == 1
    builder(copied, scan).finish()
    assert contents(copied) == contents(complete)


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: os.truncate(path, 100)])
def test_a_damaged_shard_is_named_and_written_again(copied, complete, scan, damage):
    damage(copied / shard(2))
    with pytest.raises(UserError, match=f"{shard(2)} missing or cut short; start its build_data --encode again"):
        SceneRecords(copied)
    assert builder(copied, scan).download_and_prepare() == 1
    builder(copied, scan).finish()
    assert contents(copied) == contents(complete)


def test_a_flipped_bit_costs_its_record(copied):
    path = copied / shard(1)
    whole = bytearray(path.read_bytes())
    place = whole.index(b"caption x")  # in the first record of the second clip
    whole[place] ^= 1
    path.write_bytes(whole)
    store = SceneRecords(copied)
    told = r"record 2 \(variant 0\) cannot be read \(Corrupted.*; delete " + shard(1) + " and start its build_data"
    with pytest.raises(UnreadableScene, match=told) as error:
        store.read(store.clips[1], 0)
    assert error.value.name == "1.mp4"
    store.read(store.clips[0], 1)
    store.read(store.clips[2], 0)


def test_every_shard_may_be_open_at_once(complete, monkeypatch):
    """TFDS keeps them open, and a process may often open no more than 1024 files."""
    limits = []
    monkeypatch.setattr(latents.resource, "getrlimit", lambda _: (100, 4096))
    monkeypatch.setattr(latents.resource, "setrlimit", lambda _, limit: limits.append(limit))
    SceneRecords(complete)
    assert limits == [(7 + 512, 4096)]
    monkeypatch.setattr(latents.resource, "getrlimit", lambda _: (100, 500))
    with pytest.raises(UserError, match="7 shards need 519 open files, 500 are allowed; start with ulimit -n 519"):
        SceneRecords(complete)


OTHERS = {
    "size": ((32, 16), r"size \[16, 16\], not \[32, 16\]"),
    "sampling": (SftSampling(9, 1, 3), r"sampling.num_frames 5, not 9; sampling.max_stride 2, not 3"),
    "variants": (3, "variants 2, not 3"),
    "seed": (1, "seed 0, not 1"),
    "max_tokens": (226, "max_tokens 4, not 226"),
    "encoders": ("other", "encoders stub, not other; set these in the config .encoders: set pretrained to the direc"),
    "compute_dtype": ("bfloat16", "compute_dtype float32, not bfloat16"),
    "fit": ("pad", "fit crop, not pad"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_setting_is_refused_by_name(complete, scan, name):
    value, told = OTHERS[name]
    settings = dataclasses.replace(SETTINGS, **{name: value})
    with pytest.raises(UserError, match=f"latents was made with {told}"):
        builder(complete, scan, settings)
    latents.check_settings(complete, settings, ignored=(name,))


def test_all_differences_are_named_at_once(complete, scan):
    with pytest.raises(UserError, match=r"variants 2, not 3; seed 0, not 7; max_tokens 4, not 8; set"):
        builder(complete, scan, dataclasses.replace(SETTINGS, variants=3, seed=7, max_tokens=8))


def test_another_data_file_is_refused(complete, scan):
    fewer = dataclasses.replace(scan, clips=scan.clips[:6])
    with pytest.raises(UserError, match=r"was made of another data file: clips 7, not 6; .*give a new folder"):
        builder(complete, fewer)
    other = dataclasses.replace(scan, groups=scan.groups[::-1])
    with pytest.raises(UserError, match="was made of another data file: content"):
        builder(complete, other)


def test_a_folder_in_use_is_refused(scan, tmp_path):
    (tmp_path / "thesis.txt").write_text("")
    with pytest.raises(UserError, match="is not empty and no latent data set; give a new folder"):
        builder(tmp_path, scan)
    with pytest.raises(UserError, match="is no latent data set; build_data --encode makes one"):
        SceneRecords(tmp_path)
    with pytest.raises(UserError, match=r"thesis.txt is not empty and no latent data set; give a new folder"):
        builder(tmp_path / "thesis.txt", scan)
    (tmp_path / "settings.json").write_text('{"editor.tabSize": 4}')
    for use in (lambda: builder(tmp_path, scan), lambda: SceneRecords(tmp_path)):
        with pytest.raises(UserError, match=r"its settings.json is another program's; give another folder"):
            use()


def test_too_many_that_cannot_be_used(scan, tmp_path):
    made = builder(tmp_path / "few", scan, max_share=0.15)  # 2 of 8 are 25 %
    made.download_and_prepare()
    with pytest.raises(UserError, match=r"2 of 8 items cannot be used, more than data.max_skipped_share=0.15"):
        made.finish()
    assert not (tmp_path / "few" / latents.INDEX).exists()
    with pytest.raises(UserError, match=r"1 of 8 items cannot be used"):
        builder(tmp_path / "none", scan, max_share=0.1).download_and_prepare()


def test_a_full_disk(scan, tmp_path, monkeypatch):
    class Full:
        def __init__(self, *_):
            pass

        def write(self, _):
            raise RuntimeError("write() failed: No space left on device")

    monkeypatch.setattr(building, "ArrayRecordWriter", Full)
    with pytest.raises(UserError, match=r"cannot write .*No space left on device; make room, then start again"):
        build(tmp_path / "latents", scan)
    monkeypatch.undo()
    build(tmp_path / "latents", scan)


def test_many_clips_share_a_shard(scan, tmp_path, monkeypatch):
    monkeypatch.setattr(building, "_LEAST_SHARDS", 2)
    _, index = build(tmp_path / "latents", scan)
    assert [shard.num_records for shard in index.shards] == [8, 4]  # the fifth clip of the second one is too short
    monkeypatch.setattr(building, "_SHARD_BYTES", SHAPES.num_bytes * 2 * 3)
    _, index = build(tmp_path / "small", scan)
    assert [shard.num_records for shard in index.shards] == [6, 4, 2]


def test_a_shard_without_a_usable_clip_is_empty(complete):
    store = SceneRecords(complete)
    assert [shard.num_records for shard in store.index.shards] == [2, 2, 2, 2, 0, 2, 2]
    assert all(np.isfinite(store.read(clip, 1)["mean"]).all() for clip in store.clips)


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    (tmp_path / "bucket").mkdir()
    # ArrayRecord opens gs:// itself, in C++.
    reader = array_record_module.ArrayRecordReader
    monkeypatch.setattr(
        array_record_module,
        "ArrayRecordReader",
        lambda path, *rest, **options: reader(path.replace("gs://", f"{tmp_path}/"), *rest, **options),
    )
    with buckets_in(tmp_path, monkeypatch):
        yield "gs://bucket/latents"


def test_in_a_bucket(bucket, complete, scan, tmp_path):
    made = builder(bucket, scan)
    assert made.download_and_prepare(process_index=1, process_count=2) == 3
    assert builder(bucket, scan).download_and_prepare() == 4
    builder(bucket, scan).finish()
    assert contents(tmp_path / "bucket" / "latents") == contents(complete)
    assert latents.is_data_set(bucket)
    store, local = SceneRecords(bucket), SceneRecords(complete)
    for clip in store.clips:
        np.testing.assert_array_equal(store.read(clip, 1)["mean"], local.read(clip, 1)["mean"])
    with pytest.raises(UserError, match="gs://bucket/latents was made with variants 2, not 3"):
        builder(bucket, scan, dataclasses.replace(SETTINGS, variants=3))
    (tmp_path / "bucket" / "latents" / shard(0)).unlink()
    with pytest.raises(UserError, match=f"gs://bucket/latents: {shard(0)} missing"):
        SceneRecords(bucket)
