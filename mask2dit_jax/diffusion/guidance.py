"""Classifier-free guidance, and its scale at every sampling step.

"static" is the default: it is what the paper and the authors' examples sample with.

"dynamic" is meant to raise the scale along a cosine while sampling goes on. As released (and in diffusers) its
progress is (steps - t) / steps with t the TIMESTEP, 0..999, where the number of steps left was surely meant. The
argument of the cosine then runs to 1e6 (50 steps) or 1e12 (4 steps), and the scale jumps about within [1, 1 + scale]
as if drawn by chance. It is kept under its name because results made with it can only be repeated with it; the numbers
need Python doubles, so the table is made on the host. "dynamic_sound" is the same formula with progress = step / steps:
the scale rises smoothly from 1 towards 1 + scale.
"""

import math

import numpy as np

from mask2dit_jax.axes import Floats, NpFloats, NpInts
from mask2dit_jax.config import GUIDANCE
from mask2dit_jax.errors import UserError


def guide(uncond: Floats["*shape"], cond: Floats["*shape"], scale: int | float | Floats[""]) -> Floats["*shape"]:
    """Goes `scale` times the way from the unconditional prediction to the conditional one; 1 gives `cond`."""
    return uncond + scale * (cond - uncond)


def guidance_scales(kind: str, scale: int | float, timesteps: NpInts[" steps"]) -> NpFloats[" steps"]:
    """The guidance scale of each sampling step, float64.

    Args:
        kind: "static", "dynamic" or "dynamic_sound", see the top of this file.
        scale: the scale itself if static (6.0 in the paper); the rise above 1 if dynamic.
        timesteps: `Sampler.timesteps`.
    """
    steps = len(timesteps)
    match kind:
        case "static":
            return np.full(steps, float(scale))
        case "dynamic":
            progress = [(steps - t) / steps for t in timesteps.tolist()]
        case "dynamic_sound":
            progress = [step / steps for step in range(steps)]
        case _:
            raise UserError(f"guidance {kind!r} is unknown; use one of {', '.join(GUIDANCE)}")
    return np.array([1 + scale * ((1 - math.cos(math.pi * p**5.0)) / 2) for p in progress])
