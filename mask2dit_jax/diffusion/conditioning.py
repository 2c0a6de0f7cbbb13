"""The segment-level conditional mask (paper, section 3.3): a timestep and a loss weight per scene.

An extension sample shows its first n-1 scenes clean, at t = 0, and trains on its last scene only (Eq. 2). Any other
sample has all scenes at the same t and trains on all of them (Eq. 3). The difference is only data, arrays of shape
(b, s), so that one compiled step serves both and each sample of a batch is decided separately.
"""

import jax
import jax.numpy as jnp
import numpy as np

from mask2dit_jax.axes import Array, Floats, Ints
from mask2dit_jax.config import CONDITIONS
from mask2dit_jax.diffusion.schedule import NoiseSchedule
from mask2dit_jax.errors import UserError
from mask2dit_jax.layout import SceneLayout


def check_condition(condition: str) -> str:
    """Return `condition`: how a model is shown the scenes that it knows.

    "clean" shows clean latents (the authors' training), "noised" latents noised at t = 0 (the authors' sampling). In
    bfloat16 with the 5B schedule the two are equal.

    Raises:
        UserError: it is neither.
    """
    if condition not in CONDITIONS:
        raise UserError(f"condition {condition!r} does not exist; choose one of {', '.join(CONDITIONS)}")
    return condition


def draw_is_known(key: Array, batch: int, num_scenes: int, probability: float) -> Array:
    """Draw which scenes each sample knows, (b, s).

    With `probability` a sample is an extension sample, which knows all scenes except the last. Otherwise it knows none.
    """
    is_extension = jax.random.bernoulli(key, probability, (batch, 1))
    is_context = np.arange(num_scenes) < num_scenes - 1
    return is_extension & is_context


def scene_timesteps(timesteps: Ints[" b"], is_known: Array) -> Ints["b s"]:
    """Return the timestep of each scene: the sample's for scenes to denoise, 0 for known scenes."""
    return jnp.where(is_known, 0, timesteps[:, None])


def noisy_latents(
    schedule: NoiseSchedule,
    latents: Floats["b f h w c"],
    noise: Floats["b f h w c"],
    timesteps: Ints["b s"],
    is_known: Array,
    *,
    layout: SceneLayout,
    condition: str,
) -> Floats["b f h w c"]:
    """Return the latents that the model sees.

    Args:
        schedule: Noise schedule.
        latents: Clean latents.
        noise: Standard normal noise.
        timesteps: Timestep of each scene.
        is_known: Whether a scene is known, (b, s).
        layout: Scenes of the f latent frames.
        condition: "clean" leaves known scenes exactly clean; "noised" noises them at their timestep, too.
    """
    noisy = schedule.add_noise(latents, noise, timesteps[:, layout.frame_scenes])
    if check_condition(condition) == "noised":
        return noisy
    return jnp.where(is_known[:, layout.frame_scenes, None, None, None], latents, noisy)


def scene_losses(
    error: Floats["b f h w c"], is_known: Array, *, layout: SceneLayout
) -> tuple[Floats[""], Floats[" b"]]:
    """Return the mean of `error` over the frames of the scenes to denoise, over all samples and for each sample.

    A scene weighs in proportion to its number of frames, so scenes of equal length give the paper's plain mean.
    """
    weights = (~is_known)[:, layout.frame_scenes].astype(error.dtype)
    per_frame = error.mean(axis=(2, 3, 4))
    per_sample = (per_frame * weights).sum(axis=1) / weights.sum(axis=1)
    return per_sample.mean(), per_sample
