"""The noise schedule, which gives the shares of signal and noise at each timestep, and the v-prediction target.

    noisy    =  sqrt(abar_t) x0    + sqrt(1 - abar_t) noise
    velocity =  sqrt(abar_t) noise - sqrt(1 - abar_t) x0

abar is computed in three steps, all in float64, whose order matters: scaled-linear betas; the SNR shift of SD3,
abar / (s + (1 - s) abar); and the rescaling to zero terminal SNR (Lin et al. 2023, algorithm 1), after which the last
timestep is pure noise. Source: CogVideoXDDIMScheduler and CogVideoXDPMScheduler of diffusers, which share all of this.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from mask2dit_jax.axes import Floats, Ints, NpFloats
from mask2dit_jax.errors import UserError
from mask2dit_jax.io.json_values import read_fields

CLASS_NAMES = ("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler")  # in diffusers; they share the schedule
PREDICTION_TYPE = "v_prediction"  # what models predict: `NoiseSchedule.velocity`
# For each key that selects a formula: the only value implemented here, and diffusers' default.
_CHOICES = {
    "beta_schedule": ("scaled_linear", "scaled_linear"),
    "prediction_type": (PREDICTION_TYPE, "epsilon"),
    "timestep_spacing": ("trailing", "leading"),
    "trained_betas": (None, None),
}


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """The fields of `scheduler/scheduler_config.json` that affect the result, with the defaults of diffusers.

    Attributes:
        num_train_timesteps: Timesteps are 0 (nearly clean) .. num_train_timesteps - 1 (pure noise).
        beta_start: First beta of the scaled-linear schedule.
        beta_end: Last beta.
        rescale_betas_zero_snr: Whether the last timestep is rescaled to pure noise.
        snr_shift_scale: s of the SNR shift. 1 shifts nothing; a larger s means more noise at every timestep.
        set_alpha_to_one: Whether sampling ends at abar = 1 (clean) or at abar of timestep 0.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    rescale_betas_zero_snr: bool = False
    snr_shift_scale: float = 3.0
    set_alpha_to_one: bool = True

    @classmethod
    def cogvideox_2b(cls) -> "ScheduleConfig":
        """Return the schedule of CogVideoX-2B."""
        return cls(rescale_betas_zero_snr=True, snr_shift_scale=3.0)

    @classmethod
    def cogvideox_5b(cls) -> "ScheduleConfig":
        """Return the schedule of CogVideoX-5B."""
        return cls(rescale_betas_zero_snr=True, snr_shift_scale=1.0)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> "ScheduleConfig":
        """Build a config from diffusers' JSON. Absent keys take diffusers' defaults.

        `clip_sample` is ignored, because the CogVideoX schedulers have that key but never clip.

        Raises:
            UserError: A value selects a formula that is not implemented, or is not a number.
        """
        name = raw.get("_class_name", CLASS_NAMES[0])
        if name not in CLASS_NAMES:
            raise UserError(
                f"scheduler config: _class_name {name!r} is not supported, because other schedulers have no SNR shift; "
                f"use one of {', '.join(CLASS_NAMES)}"
            )
        for key, (implemented, if_absent) in _CHOICES.items():
            value = raw.get(key, if_absent)
            if value != implemented:
                raise UserError(
                    f"scheduler config: {key} {value!r} is not supported, only {implemented!r} is; "
                    "use the scheduler directory of a CogVideoX or Mask2DiT checkpoint"
                )
        return cls(**read_fields(raw, dataclasses.fields(cls), "scheduler config"))

    def to_json(self) -> dict[str, Any]:
        """Return JSON that diffusers loads as DDIM, the sampler of the authors' examples."""
        return {
            "_class_name": CLASS_NAMES[0],
            **dataclasses.asdict(self),
            **{key: implemented for key, (implemented, _) in _CHOICES.items()},
            "clip_sample": False,
        }


@dataclasses.dataclass(frozen=True)
class NoiseSchedule:
    """A noise schedule. It is hashable, so a jitted function may close over it or take it as a static argument."""

    config: ScheduleConfig

    @functools.cached_property
    def alphas_cumprod(self) -> NpFloats[" timesteps"]:
        """The cumulative product abar at each training timestep, in float64."""
        config = self.config
        betas = np.linspace(config.beta_start**0.5, config.beta_end**0.5, config.num_train_timesteps) ** 2
        alphas = np.cumprod(1.0 - betas)
        alphas = alphas / (config.snr_shift_scale + (1 - config.snr_shift_scale) * alphas)
        return _zero_terminal_snr(alphas) if config.rescale_betas_zero_snr else alphas

    @property
    def final_alpha_cumprod(self) -> float:
        """The value of abar at the end of sampling."""
        return 1.0 if self.config.set_alpha_to_one else float(self.alphas_cumprod[0])

    def add_noise(self, x0: Floats["b f h w c"], noise: Floats["b f h w c"], t: Ints["b f"]) -> Floats["b f h w c"]:
        """Noise each latent frame to its own timestep. Works under jit.

        Args:
            x0: Clean latents.
            noise: Standard normal noise.
            t: Timesteps in 0 .. num_train_timesteps - 1.
        """
        signal, sigma = self._weights(t, x0.dtype)
        return signal * x0 + sigma * noise

    def velocity(self, x0: Floats["b f h w c"], noise: Floats["b f h w c"], t: Ints["b f"]) -> Floats["b f h w c"]:
        """Return the target of the model, at each latent frame's own timestep t."""
        signal, sigma = self._weights(t, x0.dtype)
        return signal * noise - sigma * x0

    def _weights(self, t, dtype):
        """Return sqrt(abar_t) and sqrt(1 - abar_t), ready to broadcast over `b f h w c`.

        abar is rounded to the sample's dtype BEFORE the square roots, as in diffusers. In bfloat16, abar_0 of the 5B
        schedule rounds to 1, so that latents "noised at t = 0" are exactly clean. The rounding is done in NumPy,
        because a compiler might keep more bits.
        """
        alphas = self.alphas_cumprod.astype(np.float32).astype(dtype)
        signal, sigma = np.sqrt(alphas), np.sqrt(alphas.dtype.type(1) - alphas)
        return tuple(jnp.asarray(weight)[t][:, :, None, None, None] for weight in (signal, sigma))


def _zero_terminal_snr(alphas: np.ndarray) -> np.ndarray:
    """Shift and scale sqrt(abar) so that the last value becomes 0 and the first stays."""
    roots = np.sqrt(alphas)
    return ((roots - roots[-1]) * (roots[0] / (roots[0] - roots[-1]))) ** 2
