"""Samplers, which turn a velocity predicted at one timestep into the latents of the next.

DDIM (deterministic) and the stochastic form of DPM-Solver++ 2M are the same step with different coefficients:

    x0     = signal x - sigma velocity
    x_prev = keep x + now x0 + before x0_of_the_step_before + fresh noise

The coefficients form a table with one row per step, which is computed once in float64. One compiled step serves all
rows. Source: CogVideoXDDIMScheduler and CogVideoXDPMScheduler of diffusers with trailing timesteps.

The next timestep. The authors' code steps to `t - T // steps` (T = 1000), which is not the next timestep of the list if
`steps` does not divide T. With 7 steps, five of the six differ. The latents are then denoised to one noise level and
treated as if they had another, and the last step stops at timestep 0 instead of ending clean. This is
`previous_timestep="official"`, the default, because published results were made with it. "sound" steps to the next
timestep of the list and ends clean. With 4, 25, 40 and 50 steps there is no difference.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from mask2dit_jax.axes import Array, Floats, Ints, NpFloats, NpInts
from mask2dit_jax.config import SamplerConfig
from mask2dit_jax.diffusion.schedule import NoiseSchedule
from mask2dit_jax.errors import UserError


class SamplerState(NamedTuple):
    """The state between two steps. Its structure is constant, so `lax.scan` and `fori_loop` can carry it.

    Attributes:
        step: Number of steps done.
        previous_x0: Clean latents predicted by the previous step, (b f h w c) in float32. None for DDIM, which does not
            need them.
    """

    step: Array
    previous_x0: Array | None


@dataclasses.dataclass(frozen=True)
class Sampler:
    """A sampler for one noise schedule. It is hashable, and `init` and `step` are pure functions.

    Raises:
        UserError: The number of steps is not in 1 .. num_train_timesteps.
    """

    config: SamplerConfig
    schedule: NoiseSchedule

    def __post_init__(self):
        """Check the number of steps."""
        most = self.schedule.config.num_train_timesteps
        if not 1 <= self.config.num_steps <= most:
            raise UserError(f"the number of sampling steps must be between 1 and {most}, not {self.config.num_steps}")

    @property
    def uses_noise(self) -> bool:
        """Whether `step` needs noise."""
        return self.config.kind == "dpm"

    @functools.cached_property
    def timesteps(self) -> NpInts[" steps"]:
        """The timestep of each step, descending from num_train_timesteps - 1 ("trailing" spacing)."""
        total, steps = self.schedule.config.num_train_timesteps, self.config.num_steps
        # The formula is that of diffusers, because its floating-point rounding decides ties (at 48 or 96 steps). The
        # slice is needed because arange may stop just above 0 (at 61, 103, .. steps), where diffusers makes one more
        # step, at timestep -1.
        spaced = np.round(np.arange(total, 0, -total / steps))[:steps]
        return spaced.astype(np.int32) - 1

    @functools.cached_property
    def previous_timesteps(self) -> NpInts[" steps"]:
        """The timestep that each step leads to. A negative timestep stands for clean."""
        if self.config.previous_timestep == "sound":
            return np.append(self.timesteps[1:], np.int32(-1))
        return self.timesteps - np.int32(self.schedule.config.num_train_timesteps // self.config.num_steps)

    @functools.cached_property
    def coefficients(self) -> NpFloats["steps 6"]:
        """The coefficients signal, sigma, keep, now, before and fresh of each step, in float64."""
        alphas = self.schedule.alphas_cumprod[self.timesteps]
        lands_clean = self.previous_timesteps < 0
        previous = np.where(
            lands_clean, self.schedule.final_alpha_cumprod, self.schedule.alphas_cumprod[self.previous_timesteps]
        )
        moves = _ddim(alphas, previous) if self.config.kind == "ddim" else _dpm(alphas, previous, lands_clean)
        return np.stack([np.sqrt(alphas), np.sqrt(1 - alphas), *moves], axis=-1)

    def init(self, x: Floats["b f h w c"]) -> SamplerState:
        """Return the state before the first step. `x` is the initial standard normal noise."""
        previous_x0 = jnp.zeros(x.shape, jnp.float32) if self.uses_noise else None
        return SamplerState(jnp.zeros((), jnp.int32), previous_x0)

    def step(
        self,
        state: SamplerState,
        velocity: Floats["b f h w c"],
        x: Floats["b f h w c"],
        noise: Floats["b f h w c"] | None = None,
    ) -> tuple[SamplerState, Floats["b f h w c"], Floats["b f h w c"]]:
        """Denoise from `timesteps[state.step]` to the next timestep.

        Args:
            state: State before the step.
            velocity: Model prediction at x, with guidance applied.
            x: Latents at `timesteps[state.step]`.
            noise: Standard normal noise, drawn anew for each step (fold the step into a key). DPM needs it, DDIM takes
                none. It is the noise that enters the result. In most DPM steps, diffusers draws twice and drops the
                first draw.

        Returns:
            The next state, the next latents in the dtype of x, and the predicted clean latents in float32.

        Raises:
            ValueError: `noise` is missing or not wanted.
        """
        if (noise is not None) != self.uses_noise:
            raise ValueError(f"{self.config.kind} {'needs' if self.uses_noise else 'takes no'} noise")
        row = jnp.asarray(self.coefficients, jnp.float32)[state.step]
        signal, sigma, keep, now, before, fresh = row
        sample = x.astype(jnp.float32)
        x0 = signal * sample - sigma * velocity.astype(jnp.float32)
        x_prev = keep * sample + now * x0
        if self.uses_noise:
            x_prev += before * state.previous_x0 + fresh * noise.astype(jnp.float32)
        next_state = SamplerState(state.step + 1, x0 if self.uses_noise else None)
        return next_state, x_prev.astype(x.dtype), x0

    def timestep(self, state: SamplerState) -> Ints[""]:
        """Return the timestep that the next step starts from, which the model takes. Works under jit."""
        return jnp.asarray(self.timesteps)[state.step]


def _ddim(alphas, previous):
    keep = np.sqrt((1 - previous) / (1 - alphas))
    now = np.sqrt(previous) - np.sqrt(alphas) * keep
    return keep, now, np.zeros_like(keep), np.zeros_like(keep)


def _dpm(alphas, previous, lands_clean):
    """Return the coefficients of DPM-Solver++ 2M as an SDE, in the half log-SNR lambda = log sqrt(abar / (1 - abar)).

    lambda is -inf at abar = 0 and +inf at abar = 1, but all limits that are used are finite. A first step from pure
    noise has h = inf, so keep = 0. The step after it has r = inf, so its extrapolation vanishes.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        half_log_snr = 0.5 * (np.log(alphas) - np.log(1 - alphas))
        h = 0.5 * (np.log(previous) - np.log(1 - previous)) - half_log_snr
        keep = np.sqrt((1 - previous) / (1 - alphas)) * np.exp(-h)
        first_order = -np.expm1(-2 * h) * np.sqrt(previous)
        fresh = np.sqrt(1 - previous) * np.sqrt(-np.expm1(-2 * h))
        # Second order: x0 is extrapolated along lambda from the previous step, which diffusers assumes was made at the
        # previous timestep of the list. The first step has no history, and a step that ends clean ignores it.
        h_last = np.diff(half_log_snr, prepend=np.nan)
        extrapolation = np.where((np.arange(len(h)) == 0) | lands_clean, 0.0, 0.5 * h / h_last)
    return keep, first_order * (1 + extrapolation), -first_order * extrapolation, fresh
