"""Training on scenes of several lengths: every step draws one of a few layouts, each of which is compiled once.

The VAE is causal, and encodes 8 frames at a time, the first time also the remainder. So the first latent frames of a
stored clip are what the encoder makes of its first pixel frames, as long as those are 8k + 1, and so is the number that
is stored: a shorter scene is cut from the longer one that is stored. A single frame is the one exception: the encoder
normalises the first 9 frames together, so its latent differs a little from that of a picture encoded alone.
"""

from collections.abc import Sequence

import numpy as np

from mask2dit_jax.layout import SceneLayout

_STREAM = 7  # tells these random numbers from others of the same seed and step


def draw(layouts: Sequence[SceneLayout], seed: int, step: int) -> SceneLayout:
    """The layout of a step: the same on every process, and when a run resumes."""
    return layouts[np.random.default_rng([seed, step, _STREAM]).integers(len(layouts))]


def cut_scenes(batch: dict[str, np.ndarray], stored: SceneLayout, wanted: SceneLayout) -> dict[str, np.ndarray]:
    """The leading latent frames of each scene; what has no frames stays."""
    if stored == wanted:
        return batch
    starts = [part.start for part in stored.frame_slices]
    frames = np.concatenate([start + np.arange(n) for start, n in zip(starts, wanted.frames, strict=True)])
    return batch | {name: batch[name][:, frames] for name in ("mean", "logvar")}
