"""Training on scenes of several lengths: each step draws one of a few layouts, and each layout is compiled once.

Shorter scenes are cut from longer stored ones. That is exact because the VAE is causal and encodes 8 frames at a time,
after a first chunk that also takes the remainder: where both lengths are 8k + 1 pixel frames, the first latent frames
of a clip are what the encoder makes of its first pixel frames. A single frame is the exception. The encoder normalises
the first 9 frames together, so its latent differs slightly from that of a picture encoded alone.
"""

from collections.abc import Sequence

import numpy as np

from mask2dit_jax.layout import SceneLayout

_STREAM = 7  # keeps these random numbers apart from others of the same seed and step


def draw(layouts: Sequence[SceneLayout], seed: int, step: int) -> SceneLayout:
    """Draw the layout of a step. Every process draws the same one, and so does a run that resumes."""
    return layouts[np.random.default_rng([seed, step, _STREAM]).integers(len(layouts))]


def cut_scenes(batch: dict[str, np.ndarray], stored: SceneLayout, wanted: SceneLayout) -> dict[str, np.ndarray]:
    """Cut every scene of a batch to its leading latent frames.

    Args:
        batch: arrays of the samples; only `mean` and `logvar`, (b f h w c), have frames.
        stored: layout of the batch.
        wanted: layout with as many scenes, none of them longer.
    """
    if stored == wanted:
        return batch
    starts = [part.start for part in stored.frame_slices]
    frames = np.concatenate([start + np.arange(n) for start, n in zip(starts, wanted.frames, strict=True)])
    return batch | {name: batch[name][:, frames] for name in ("mean", "logvar")}
