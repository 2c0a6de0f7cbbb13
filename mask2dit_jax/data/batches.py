"""Batches for training: scenes put together into multi-scene samples, read ahead by Grain's threads."""

import functools
from collections.abc import Iterator, Sequence

import grain
import numpy as np

from mask2dit_jax.data.encode import FreshScenes
from mask2dit_jax.data.latents import SceneRecords, UnreadableScene
from mask2dit_jax.data.samples import ConsecutiveShots, UnrelatedClips
from mask2dit_jax.data.sources import Skipped
from mask2dit_jax.errors import UserError

_NO_END = 2**48  # samples
# Reading is a copy from the page cache, and a batch of the 5B model has some 100 MB, so few are kept ready.
_READ = grain.ReadOptions(num_threads=4, prefetch_buffer_size=4)
_TRIES = 100  # samples in a row that cannot be read, before the store counts as gone


def make_batches(
    store: SceneRecords | FreshScenes,
    samples: UnrelatedClips | ConsecutiveShots,
    *,
    global_batch_size: int,
    seed: int,
    skipped: Skipped | None = None,
    start_sample: int = 0,
    rows: Sequence[int] | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Yield batches for ever; a sample depends on `seed` and its number alone, so `start_sample` resumes exactly.

    Samples are numbered through the whole run. Batches of any size cut the same row of samples, so a run that resumes
    with another batch size misses none and repeats none.

    A sample with a scene that cannot be read is replaced by another one, drawn from the same random numbers. So the
    replacement also depends on seed and number alone, and not on which process reads it or what it read before.

    Args:
        store: holds every clip of `samples`.
        samples: the items that training walks through, shuffled anew each epoch.
        global_batch_size: samples of a step, over all processes; together they see the same, however many they are.
        seed: seed of the order, of the clips drawn and of their variants.
        skipped: records the scenes that cannot be read; without it there may be none.
        start_sample: number of the first sample, which is how many were seen before.
        rows: the samples of a global batch that this process wants; None for all.

    Yields:
        These rows of a batch: `mean` and `logvar` (b f h w c), the scenes one after another along f; `text`
        (b s t x), all fp32.

    Raises:
        UserError: while iterating, too many scenes cannot be read.
    """
    rows = range(global_batch_size) if rows is None else rows
    drawn = drawn_samples(store, samples, seed=seed, skipped=skipped)

    def batch(number: int) -> dict[str, np.ndarray]:
        scenes = [scene for row in rows for scene in drawn[start_sample + number * global_batch_size + row]]
        # A store returns views of what it has read, so this is the only copy. Here bf16 becomes fp32.
        stacked = {
            name: np.stack([scene[name] for scene in scenes], dtype=np.uint8 if name == "pixels" else np.float32)
            for name in scenes[0]
            if name != "caption"
        }
        text = stacked.pop("text")
        videos = {name: x.reshape(len(rows), -1, *x.shape[2:]) for name, x in stacked.items()}
        return {**videos, "text": text.reshape(len(rows), -1, *text.shape[1:])}

    batches = iter(grain.MapDataset.range(_NO_END).map(batch).to_iter_dataset(_READ))
    return map(store.encode, batches) if isinstance(store, FreshScenes) else batches


def drawn_samples(
    store: SceneRecords | FreshScenes,
    samples: UnrelatedClips | ConsecutiveShots,
    *,
    seed: int,
    skipped: Skipped | None = None,
) -> grain.MapDataset:
    """Return all samples of a run by number, each a list of scenes as `store.read` returns them.

    Row r of a batch is number r after the samples seen before it. The arguments are those of `make_batches`.
    """
    skipped = Skipped(len(samples), 0.0) if skipped is None else skipped

    def read(item: int, rng: np.random.Generator) -> list[dict[str, np.ndarray]]:
        last = None
        for _ in range(_TRIES):
            clips = samples.draw(item, rng)
            variants = rng.integers(store.variants, size=len(clips))
            try:
                return [store.read(clip, int(variant)) for clip, variant in zip(clips, variants, strict=True)]
            except UnreadableScene as error:
                last = error
                skipped.add(error.name, str(error))
                item = int(rng.integers(len(samples)))
        raise UserError(f"{_TRIES} samples in a row cannot be read, the last for {last}; is the disk still there?")

    # Grain's own shuffle takes 8 ms for a number if there are only four, because it searches them among many.
    @functools.lru_cache(maxsize=3)
    def order(epoch: int) -> np.ndarray:
        return np.random.default_rng([seed, epoch]).permutation(len(samples))

    def item_at(position: int) -> int:
        epoch, place = divmod(position, len(samples))
        return int(order(epoch)[place])

    return grain.MapDataset.range(_NO_END).seed(seed).map(item_at).random_map(read)
