"""Batches for training: cached clips put together into multi-scene samples, read ahead by Grain's threads."""

from collections.abc import Iterator, Sequence

import grain
import numpy as np

from mask2dit_jax.data.cache import LatentCache
from mask2dit_jax.data.scenes import ConsecutiveShots, UnrelatedClips

# Reading is a copy from the page cache; a batch of the 5B model is some 100 MB, so few are kept ready.
_NO_END = 2**31
_READ = grain.ReadOptions(num_threads=4, prefetch_buffer_size=4)


def make_batches(
    cache: LatentCache,
    samples: UnrelatedClips | ConsecutiveShots,
    *,
    global_batch_size: int,
    seed: int,
    start_step: int = 0,
    rows: Sequence[int] | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Endless batches; the batch of a step depends on `seed` and the step alone, so `start_step` resumes exactly.

    Args:
        cache: holds every clip of `samples`.
        samples: what training walks through, shuffled anew each epoch.
        global_batch_size: of all processes together; what they see together does not depend on their number.
        seed: of the order, of the clips drawn and of their variants.
        start_step: the first batch wanted.
        rows: the samples of a global batch that this process wants; all if not given.

    Yields:
        These rows of a batch: `mean` and `logvar` (b f h w c), the scenes one after another along f; `text`
        (b s t x).

    Raises:
        UserError: while iterating, a cached file is gone or damaged.
    """
    rows = range(global_batch_size) if rows is None else rows

    def read(item: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        scenes = [cache.read(clip, int(rng.integers(cache.settings.variants))) for clip in samples.draw(item, rng)]
        return {
            "mean": np.concatenate([scene["mean"] for scene in scenes]),
            "logvar": np.concatenate([scene["logvar"] for scene in scenes]),
            "text": np.stack([scene["text"] for scene in scenes]),
        }

    drawn = grain.MapDataset.range(len(samples)).seed(seed).shuffle().repeat().random_map(read)

    def batch(step: int) -> dict[str, np.ndarray]:
        parts = [drawn[step * global_batch_size + row] for row in rows]
        return {name: np.stack([part[name] for part in parts]) for name in parts[0]}

    return iter(grain.MapDataset.range(start_step, _NO_END).map(batch).to_iter_dataset(_READ))
