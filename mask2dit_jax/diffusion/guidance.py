"""Classifier-free guidance and its scale at each sampling step.

"static" keeps the scale constant. It is the default of the authors' code.

"dynamic" is meant to raise the scale along a cosine during sampling. In the authors' code (and in diffusers), progress
is (steps - t) / steps, where t is the TIMESTEP, 0..999; the number of remaining steps was surely meant. The argument of
the cosine thus grows to 1e6 (50 steps) or 1e12 (4 steps), and the scale jumps seemingly at random within
[1, 1 + scale]. It is available because results made with it can only be reproduced with it. Its values need double
precision, so the table is made on the host.

"dynamic_sound" is the same formula with progress = step / steps. The scale rises smoothly from 1 towards 1 + scale.
"""

import math

import numpy as np

from mask2dit_jax.axes import Floats, NpFloats, NpInts
from mask2dit_jax.config import GUIDANCE
from mask2dit_jax.errors import UserError


def guide(uncond: Floats["*shape"], cond: Floats["*shape"], scale: int | float | Floats[""]) -> Floats["*shape"]:
    """Return uncond + scale * (cond - uncond). A scale of 1 gives `cond`."""
    return uncond + scale * (cond - uncond)


def guidance_scales(kind: str, scale: int | float, timesteps: NpInts[" steps"]) -> NpFloats[" steps"]:
    """Return the guidance scale of each sampling step, in float64.

    Args:
        kind: "static", "dynamic" or "dynamic_sound"; see the module docstring.
        scale: The scale itself if static (6.0 in the authors' code), the rise above 1 if dynamic.
        timesteps: `Sampler.timesteps`.

    Raises:
        UserError: `kind` is unknown.
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
