"""Measures the share of time that a training step of given length waits for its batch.

    python benchmarks/input_pipeline.py --data=DIR [--step_s=5.5] [--sizes=2b]

The script creates a latent data set of random numbers in DIR if there is none (2b: 64 records of 10.8 MB) and reads
batches of 8 x 3 scenes, as a single host would. A host of a slice reads only its own rows. A sleep stands in for the
step. Like a step on a TPU, it leaves the processor to the reading threads. Files just written are in the page cache.
--cold drops them from the cache before each batch, as if they were read from disk for the first time.
"""

import json
import os
import sys
import time
from pathlib import Path

import numpy as np
from absl import app, flags

sys.path.insert(0, str(Path(__file__).parents[1]))

from mask2dit_jax.curate.build_records import SceneLatents
from mask2dit_jax.data.batches import make_batches
from mask2dit_jax.data.frames import SftSampling
from mask2dit_jax.data.latent_cache import CacheSettings, EncodedClip
from mask2dit_jax.data.latents import RecordShapes, SceneRecords
from mask2dit_jax.data.samples import ConsecutiveShots
from mask2dit_jax.data.skipped import Skipped
from mask2dit_jax.data.sources import Clip, Group, Scan

_DATA = flags.DEFINE_string("data", None, "Folder for the data set.", required=True)
_SIZES = flags.DEFINE_enum("sizes", "2b", ["2b", "tiny"], "Model whose sizes latents and embeddings have.")
_STEP = flags.DEFINE_float("step_s", 5.5, "Seconds per step; 5.5 s is the roofline of sft.py:2b,v5e-64.")
_STEPS = flags.DEFINE_integer("steps", 20, "Number of measured steps, after 3 to warm up.")
_COLD = flags.DEFINE_bool("cold", False, "Drop the files from the page cache before each batch.")

SHAPES = {
    "2b": RecordShapes((13, 60, 90, 16), (226, 4096)),
    "tiny": RecordShapes((3, 12, 20, 16), (48, 64)),
}
CLIPS, VARIANTS, GROUP, SCENES, BATCH, WARM_UP = 32, 2, 8, 3, 8, 3


def make_data(folder: Path, shapes: RecordShapes) -> SceneRecords:
    """Write a data set of random latents, unless it exists, and open it."""
    clips = tuple(Clip(f"{n}.mp4", folder / f"{n}.mp4", f"caption {n}", 200, 25.0, 720, 480) for n in range(CLIPS))
    groups = tuple(Group(str(start), clips[start : start + GROUP]) for start in range(0, CLIPS, GROUP))
    settings = CacheSettings(SftSampling(49), (480, 720), VARIANTS, 0, shapes.text[0], "random", "float32")

    def encode(clip: Clip) -> EncodedClip:
        rng = np.random.default_rng(int(clip.name.partition(".")[0]))
        mean, logvar = rng.standard_normal((2, VARIANTS, *shapes.latents), np.float32)
        ones = np.ones(VARIANTS, np.int32)
        return EncodedClip(mean, logvar, rng.standard_normal(shapes.text, np.float32), ones, ones)

    builder = SceneLatents(folder, settings, shapes, Scan(clips, groups, {}), encode, Skipped(CLIPS, 0.0))
    builder.download_and_prepare()
    builder.finish()
    return SceneRecords(folder)


def drop_from_page_cache(folder: Path) -> None:
    """Make the kernel forget the content of the data files, so that the next read goes to the disk."""
    for path in folder.glob("*array_record*"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main(_):
    """Measure the waiting time and the reading rate, and print them as JSON."""
    folder, shapes = Path(_DATA.value), SHAPES[_SIZES.value]
    store = make_data(folder, shapes)
    samples = ConsecutiveShots(store.groups, SCENES, store.clips)
    batches = make_batches(store, samples, global_batch_size=BATCH, seed=0)
    waited, num_bytes = [], BATCH * SCENES * shapes.num_bytes
    for step in range(WARM_UP + _STEPS.value):
        if _COLD.value:
            drop_from_page_cache(folder)
        start = time.perf_counter()
        next(batches)
        waited.append(time.perf_counter() - start)
        time.sleep(_STEP.value)
        if step == 0:
            print(f"first batch after {waited[0]:.2f} s", flush=True)
    waiting = sum(waited[WARM_UP:])
    share = waiting / (waiting + _STEPS.value * _STEP.value)

    batches, count = make_batches(store, samples, global_batch_size=BATCH, seed=1), 5
    next(batches)
    start = time.perf_counter()
    for _ in range(count):  # without steps, as fast as possible
        next(batches)
    rate = count * num_bytes / (time.perf_counter() - start)
    found = {
        "sizes": _SIZES.value,
        "step_s": _STEP.value,
        "cold": _COLD.value,
        "input_bound_share": round(share, 5),
        "longest_wait_ms": round(1000 * max(waited[WARM_UP:]), 2),
        "batch_mb": round(num_bytes / 1e6, 1),
        "needed_mb_per_s": round(num_bytes / 1e6 / _STEP.value, 1),
        "reading_mb_per_s": round(rate / 1e6),
        "processors": os.cpu_count(),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    app.run(main)
