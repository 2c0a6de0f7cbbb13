"""Batches for training: cached clips put together into multi-scene samples, read ahead by Grain's threads."""

from collections.abc import Iterator

import grain
import numpy as np

from mask2dit_jax.data.cache import LatentCache
from mask2dit_jax.data.scenes import ConsecutiveShots, UnrelatedClips
from mask2dit_jax.errors import UserError

# Reading is a copy from the page cache; a batch of the 5B model is some 100 MB, so few are kept ready.
_READ = grain.ReadOptions(num_threads=4, prefetch_buffer_size=4)


def make_batches(
    cache: LatentCache,
    samples: UnrelatedClips | ConsecutiveShots,
    *,
    global_batch_size: int,
    seed: int,
    start_step: int = 0,
    shard: tuple[int, int] = (0, 1),
) -> Iterator[dict[str, np.ndarray]]:
    """Endless batches; the batch of a step depends on `seed` and the step alone, so `start_step` resumes exactly.

    Args:
        cache: holds every clip of `samples`.
        samples: what training walks through, shuffled anew each epoch.
        global_batch_size: of all processes together; what they see together does not depend on their number.
        seed: of the order, of the clips drawn and of their variants.
        start_step: the first batch wanted.
        shard: number of this process, and of all.

    Yields:
        This process's part of a batch: `mean` and `logvar` (b f h w c), the scenes one after another along f; `text`
        (b s t x).

    Raises:
        UserError: the batch cannot be shared out evenly; while iterating, a cached file is gone or damaged.
    """
    index, count = shard
    if global_batch_size % count:
        raise UserError(f"global_batch_size={global_batch_size} cannot be shared out over {count} processes evenly")

    def read(item: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        scenes = [cache.read(clip, int(rng.integers(cache.settings.variants))) for clip in samples.draw(item, rng)]
        return {
            "mean": np.concatenate([scene["mean"] for scene in scenes]),
            "logvar": np.concatenate([scene["logvar"] for scene in scenes]),
            "text": np.stack([scene["text"] for scene in scenes]),
        }

    batches = (
        grain.MapDataset.range(len(samples))
        .seed(seed)
        .shuffle()
        .repeat()
        .random_map(read)[index::count]
        .batch(global_batch_size // count, drop_remainder=True)[start_step:]
    )
    return iter(batches.to_iter_dataset(_READ))
