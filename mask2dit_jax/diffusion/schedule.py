"""The noise schedule: how much of a latent is signal at timestep t, and the v-prediction target.

    noisy    =  sqrt(abar_t) x0    + sqrt(1 - abar_t) noise
    velocity =  sqrt(abar_t) noise - sqrt(1 - abar_t) x0

abar is made in three steps, all in float64 (the order matters): scaled-linear betas; the SNR shift of SD3,
abar / (s + (1 - s) abar); the rescale to zero terminal SNR (Lin et al. 2023, algorithm 1), after which the last
timestep is pure noise. Reference: diffusers' CogVideoXDDIMScheduler and CogVideoXDPMScheduler, which share all this.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from mask2dit_jax.axes import Floats, Ints, NpFloats
from mask2dit_jax.errors import UserError

PREDICTION_TYPE = "v_prediction"  # what models predict: `NoiseSchedule.velocity`
# Of each key that chooses between formulas: the one value implemented here, and what diffusers takes if it is absent.
_CHOICES = {
    "beta_schedule": ("scaled_linear", "scaled_linear"),
    "prediction_type": (PREDICTION_TYPE, "epsilon"),
    "timestep_spacing": ("trailing", "leading"),
    "trained_betas": (None, None),
}


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """What of a `scheduler/scheduler_config.json` makes a difference. The defaults are those of the diffusers classes.

    Attributes:
        num_train_timesteps: timesteps are 0 (nearly clean) .. num_train_timesteps - 1 (pure noise).
        snr_shift_scale: s above; 1 leaves the schedule as it is, more means more noise at every timestep.
        set_alpha_to_one: sampling ends at abar = 1 (clean); otherwise at abar of timestep 0.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    rescale_betas_zero_snr: bool = False
    snr_shift_scale: float = 3.0
    set_alpha_to_one: bool = True

    @classmethod
    def cogvideox_2b(cls) -> "ScheduleConfig":
        return cls(rescale_betas_zero_snr=True, snr_shift_scale=3.0)

    @classmethod
    def cogvideox_5b(cls) -> "ScheduleConfig":
        return cls(rescale_betas_zero_snr=True, snr_shift_scale=1.0)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> "ScheduleConfig":
        """Reads a diffusers scheduler config. A key that is absent means what it means to diffusers.

        `clip_sample` is not looked at: the CogVideoX schedulers have that key but never clip.

        Raises:
            UserError: a value that changes the mathematics and is not implemented.
        """
        for key, (implemented, if_absent) in _CHOICES.items():
            value = raw.get(key, if_absent)
            if value != implemented:
                raise UserError(
                    f"scheduler config: {key} {value!r} is not supported, only {implemented!r} is; "
                    "use the scheduler directory of a CogVideoX or Mask2DiT checkpoint"
                )
        return cls(
            **{field.name: field.type(raw[field.name]) for field in dataclasses.fields(cls) if field.name in raw}
        )

    def to_json(self) -> dict[str, Any]:
        """A scheduler config that diffusers loads, as the sampler of the authors' examples (DDIM)."""
        return {
            "_class_name": "CogVideoXDDIMScheduler",
            **dataclasses.asdict(self),
            **{key: implemented for key, (implemented, _) in _CHOICES.items()},
            "clip_sample": False,
        }


@dataclasses.dataclass(frozen=True)
class NoiseSchedule:
    """Hashable, so that a jitted function may close over it or take it as a static argument."""

    config: ScheduleConfig

    @functools.cached_property
    def alphas_cumprod(self) -> NpFloats[" timesteps"]:
        """abar of every training timestep, float64."""
        config = self.config
        betas = np.linspace(config.beta_start**0.5, config.beta_end**0.5, config.num_train_timesteps) ** 2
        alphas = np.cumprod(1.0 - betas)
        alphas = alphas / (config.snr_shift_scale + (1 - config.snr_shift_scale) * alphas)
        return _zero_terminal_snr(alphas) if config.rescale_betas_zero_snr else alphas

    @property
    def final_alpha_cumprod(self) -> float:
        """abar that sampling ends at."""
        return 1.0 if self.config.set_alpha_to_one else float(self.alphas_cumprod[0])

    def add_noise(self, x0: Floats["b f h w c"], noise: Floats["b f h w c"], t: Ints["b f"]) -> Floats["b f h w c"]:
        """Noises every latent frame to its own timestep. Works under jit; t must be in 0 .. num_train_timesteps - 1."""
        signal, sigma = self._weights(t, x0.dtype)
        return signal * x0 + sigma * noise

    def velocity(self, x0: Floats["b f h w c"], noise: Floats["b f h w c"], t: Ints["b f"]) -> Floats["b f h w c"]:
        """What the model learns to predict, at each latent frame's own timestep."""
        signal, sigma = self._weights(t, x0.dtype)
        return signal * noise - sigma * x0

    def _weights(self, t, dtype):
        """sqrt(abar_t) and sqrt(1 - abar_t), ready to broadcast over `b f h w c`.

        abar is rounded to the sample's dtype BEFORE the square roots, as the reference does: in bfloat16 abar_0 of the
        5B schedule rounds to 1, and "noised at t = 0" is then exactly clean. Done in NumPy, where no compiler keeps
        more bits than that.
        """
        alphas = self.alphas_cumprod.astype(np.float32).astype(dtype)
        signal, sigma = np.sqrt(alphas), np.sqrt(alphas.dtype.type(1) - alphas)
        return tuple(jnp.asarray(weight)[t][:, :, None, None, None] for weight in (signal, sigma))


def _zero_terminal_snr(alphas: np.ndarray) -> np.ndarray:
    """Shifts and stretches sqrt(abar): the last value becomes 0, the first stays."""
    roots = np.sqrt(alphas)
    return ((roots - roots[-1]) * (roots[0] / (roots[0] - roots[-1]))) ** 2
