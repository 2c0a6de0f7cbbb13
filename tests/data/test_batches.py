import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mask2dit_jax import data
from mask2dit_jax.curate.build_records import SceneLatents
from mask2dit_jax.data.batches import make_batches
from mask2dit_jax.data.encode import EncodedClip
from mask2dit_jax.data.frames import SftSampling
from mask2dit_jax.data.latents import LatentSettings, RecordShapes, SceneRecords
from mask2dit_jax.data.samples import ConsecutiveShots, UnrelatedClips
from mask2dit_jax.data.sources import Clip, Group, Scan, Skipped
from mask2dit_jax.errors import UserError

VARIANTS, FRAMES = 2, 3


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Five clips whose latents say clip and variant: mean = 10 * clip + variant, logvar = -mean, text = clip."""
    folder = tmp_path_factory.mktemp("data")
    settings = LatentSettings(SftSampling(9), (16, 16), VARIANTS, 0, 4, "tiny", "float32")
    clips = tuple(Clip(f"{n}.mp4", folder / f"{n}.mp4", f"caption {n}", 20, 25.0, 48, 32) for n in range(5))

    def encode(clip):
        number = clips.index(clip)
        mean = np.full((VARIANTS, FRAMES, 2, 2, 16), 10 * number, np.float32)
        mean += np.arange(VARIANTS, dtype=np.float32).reshape(VARIANTS, 1, 1, 1, 1)
        ones = np.ones(VARIANTS, np.int32)
        return EncodedClip(mean, -mean, np.full((4, 8), number, np.float32), ones, ones)

    shapes, scan = RecordShapes((FRAMES, 2, 2, 16), (4, 8)), Scan(clips, None, {})
    builder = SceneLatents(folder / "latents", settings, shapes, scan, encode, Skipped(5, 0.0))
    builder.download_and_prepare()
    builder.finish()
    store = SceneRecords(folder / "latents")
    return store, store.clips


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def scene_numbers(batch):
    """(b, s): 10 * clip + variant of each scene."""
    return batch["mean"][:, ::FRAMES, 0, 0, 0].astype(int)


def assert_equal(batches, others):
    for batch, other in zip(batches, others, strict=True):
        for name in ("mean", "logvar", "text"):
            np.testing.assert_array_equal(batch[name], other[name])


def test_shapes_and_order_of_scenes(stored):
    store, clips = stored
    batch = next(make_batches(store, UnrelatedClips(clips, 3), global_batch_size=4, seed=0))
    assert batch["mean"].shape == batch["logvar"].shape == (4, 3 * FRAMES, 2, 2, 16)
    assert batch["text"].shape == (4, 3, 4, 8)
    np.testing.assert_array_equal(batch["mean"], -batch["logvar"])
    scenes = scene_numbers(batch)
    np.testing.assert_array_equal(batch["mean"][..., 0, 0, 0], scenes.repeat(FRAMES, axis=1))
    np.testing.assert_array_equal(batch["text"][..., 0, 0], scenes // 10)
    assert all(len(set(row // 10)) == 3 for row in scenes)


def test_sft_takes_neighbours_in_order(stored):
    store, clips = stored
    samples = ConsecutiveShots([Group("g", tuple(clips))], 3, clips)  # fewer groups than samples in a batch
    for batch in take(make_batches(store, samples, global_batch_size=4, seed=0), 5):
        assert (np.diff(scene_numbers(batch) // 10, axis=1) == 1).all()


def test_every_clip_once_an_epoch_in_changing_order_and_every_variant(stored):
    store, clips = stored
    batches = take(make_batches(store, UnrelatedClips(clips, 1), global_batch_size=5, seed=0), 12)
    orders = [tuple(scene_numbers(batch)[:, 0] // 10) for batch in batches]
    assert all(sorted(order) == [0, 1, 2, 3, 4] for order in orders)
    assert len(set(orders)) > 1
    seen = {number for batch in batches for number in scene_numbers(batch)[:, 0]}
    assert len(seen) == 5 * VARIANTS


@pytest.mark.parametrize("start", [1, 7])
def test_resume_is_exact(stored, start):
    store, clips = stored
    samples = UnrelatedClips(clips, 3)
    whole = take(make_batches(store, samples, global_batch_size=2, seed=3), 10)
    assert_equal(whole, take(make_batches(store, samples, global_batch_size=2, seed=3), 10))
    tail = take(make_batches(store, samples, global_batch_size=2, seed=3, start_sample=2 * start), 10 - start)
    assert_equal(whole[start:], tail)


@pytest.mark.parametrize("sizes", [(4, 8, 4), (6, 1, 9), (8, 8)])
def test_batches_of_other_sizes_miss_no_sample_and_repeat_none(stored, sizes):
    store, clips = stored

    def read(size, start, count):
        options = {"global_batch_size": size, "seed": 3, "start_sample": start}
        return take(make_batches(store, UnrelatedClips(clips, 3), **options), count)

    def joined(batches):
        return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}

    seen, parts = 0, []
    for size in sizes:  # two steps of each
        parts += read(size, seen, 2)
        seen += 2 * size
    assert_equal([joined(parts)], [joined(read(1, 0, seen))])


def test_another_seed_is_another_order(stored):
    store, clips = stored
    one, other = (
        [
            scene_numbers(batch).tolist()
            for batch in take(make_batches(store, UnrelatedClips(clips, 3), global_batch_size=2, seed=seed), 4)
        ]
        for seed in (0, 1)
    )
    assert one != other


def test_processes_share_the_same_global_batches(stored):
    store, clips = stored
    samples = UnrelatedClips(clips, 2)
    alone = take(make_batches(store, samples, global_batch_size=4, seed=0), 5)
    for rows in ([0, 1], [2, 3], [3], [0, 2]):
        part = take(make_batches(store, samples, global_batch_size=4, seed=0, rows=rows), 5)
        assert_equal(part, [{name: array[rows] for name, array in batch.items()} for batch in alone])


def test_the_data_side_needs_no_jax(stored):
    """None of our modules imports it. Grain does, but starts no device: on the platform set here that would fail."""
    modules = sorted(path.stem for path in Path(data.__file__).parent.glob("*.py") if path.stem != "batches")
    store, _ = stored
    program = f"""
import importlib, sys
for module in {modules}:
    importlib.import_module("mask2dit_jax.data." + module)
assert not {{"jax", "flax"}} & set(sys.modules)
from mask2dit_jax.data.batches import make_batches
from mask2dit_jax.data.latents import SceneRecords
from mask2dit_jax.data.samples import UnrelatedClips
store = SceneRecords({str(store.folder)!r})
next(make_batches(store, UnrelatedClips(store.clips, 3), global_batch_size=2, seed=0))
"""
    environment = {**os.environ, "JAX_PLATFORMS": "no_such_platform"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def damage(store, number):
    """Overwrite a part of the shard that holds this clip, as a failing disk does."""
    path = Path(store.folder) / store.index.shards[number].file
    raw = bytearray(path.read_bytes())
    raw[100:3000] = bytes(2900)  # in both of its records
    path.write_bytes(raw)


@pytest.fixture
def damaged(stored, tmp_path):
    """The data set with its third clip unreadable."""
    store, _ = stored
    copy = SceneRecords(shutil.copytree(store.folder, tmp_path / "latents"))
    damage(copy, 2)
    return copy, copy.clips


@pytest.mark.parametrize("kind", ["pretrain", "sft"])
def test_an_unreadable_scene_is_replaced_the_same_everywhere(damaged, kind):
    store, clips = damaged
    groups = [Group("broken", tuple(clips[:3])), Group("whole", tuple(clips[2:])), Group("short", tuple(clips[3:]))]
    samples = UnrelatedClips(clips, 3) if kind == "pretrain" else ConsecutiveShots(groups, 2, clips)

    def read(count, **part):
        skipped = Skipped(len(clips), max_share=0.2)
        batches = make_batches(store, samples, global_batch_size=4, seed=1, skipped=skipped, **part)
        return take(batches, count), skipped

    alone, skipped = read(8)
    assert list(skipped) == ["2.mp4"]
    assert "cannot be read (Corrupted" in skipped["2.mp4"]
    scenes = np.concatenate([scene_numbers(batch) for batch in alone]) // 10
    assert set(scenes.flat) == {0, 1, 3, 4}
    if kind == "pretrain":
        assert all(len(set(row)) == 3 for row in scenes)
    else:
        assert {tuple(row) for row in scenes} == {(0, 1), (3, 4)}
    for rows in ([0, 1], [2, 3], [3]):
        part, _ = read(8, rows=rows)
        assert_equal(part, [{name: array[rows] for name, array in batch.items()} for batch in alone])
    assert_equal(alone[5:], read(3, start_sample=20)[0])


def test_too_many_unreadable_scenes_stop_the_run(damaged):
    store, clips = damaged
    damage(store, 4)
    skipped = Skipped(len(clips), max_share=0.2)
    batches = make_batches(store, UnrelatedClips(clips, 2), global_batch_size=5, seed=0, skipped=skipped)
    with pytest.raises(
        UserError, match=r"2 of 5 items cannot be used, more than data.max_skipped_share=0.2 \(\d.mp4: "
    ):
        take(batches, 5)


def test_a_disk_that_is_gone_ends_the_run(stored, tmp_path):
    empty = SceneRecords(shutil.copytree(stored[0].folder, tmp_path / "latents"))
    shutil.rmtree(empty.folder)
    clips, skipped = empty.clips, Skipped(5, max_share=1.0)
    with pytest.raises(
        UserError, match=r"100 samples in a row cannot be read, the last for .*; is the disk still there"
    ):
        next(make_batches(empty, UnrelatedClips(clips, 1), global_batch_size=1, seed=0, skipped=skipped))
