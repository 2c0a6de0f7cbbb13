"""Samplers: from a predicted velocity at one timestep to the latents of the next.

DDIM (deterministic) and DPM-Solver++ 2M in its stochastic form are the same step with other numbers:

    x0     = signal x - sigma velocity
    x_prev = keep x + now x0 + before x0_of_the_step_before + fresh noise

so the numbers are a table with a row a step, made once in float64, and one compiled step serves all of them.
Reference: CogVideoXDDIMScheduler and CogVideoXDPMScheduler of diffusers with trailing timesteps.

WHICH TIMESTEP COMES NEXT. The released model was sampled with `t - T // steps` (T = 1000), which is not the next
timestep of the list when `steps` does not divide T: with 7 steps five of six differ, so that latents are denoised to
one level and then treated as if they were at another, and the last step stops at timestep 0 instead of clean. That is
`previous_timestep="official"`, the default because published numbers were made with it. "sound" goes to the next
timestep of the list, and to clean at the end. For 4, 25, 40 and 50 steps there is no difference.
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
    """What a sampler remembers: a pytree of constant structure, so it can be carried by `lax.scan` or `fori_loop`.

    Attributes:
        step: how many steps have been made.
        previous_x0: the clean latents predicted by the step before, float32; DDIM has no use for them.
    """

    step: Array
    previous_x0: Array | None


@dataclasses.dataclass(frozen=True)
class Sampler:
    """The settings and the schedule, hashable; `init` and `step` are pure.

    Raises:
        UserError: the number of steps is not within 1 .. num_train_timesteps.
    """

    config: SamplerConfig
    schedule: NoiseSchedule

    def __post_init__(self):
        most = self.schedule.config.num_train_timesteps
        if not 1 <= self.config.num_steps <= most:
            raise UserError(f"the number of sampling steps must be between 1 and {most}, not {self.config.num_steps}")

    @property
    def uses_noise(self) -> bool:
        """Whether `step` wants noise."""
        return self.config.kind == "dpm"

    @functools.cached_property
    def timesteps(self) -> NpInts[" steps"]:
        """The timestep of each step, falling from num_train_timesteps - 1 ("trailing" spacing)."""
        total, steps = self.schedule.config.num_train_timesteps, self.config.num_steps
        # Written as in the reference, for its floating-point rounding (which decides the ties at 48 or 96 steps). Cut,
        # because the sum may stop just above 0: there (61, 103, .. steps) the reference makes one step more, at -1.
        spaced = np.round(np.arange(total, 0, -total / steps))[:steps]
        return spaced.astype(np.int32) - 1

    @functools.cached_property
    def previous_timesteps(self) -> NpInts[" steps"]:
        """The timestep that each step leads to; -1 stands for clean."""
        if self.config.previous_timestep == "sound":
            return np.append(self.timesteps[1:], np.int32(-1))
        return self.timesteps - np.int32(self.schedule.config.num_train_timesteps // self.config.num_steps)

    @functools.cached_property
    def coefficients(self) -> NpFloats["steps 6"]:
        """signal, sigma, keep, now, before, fresh of each step, float64."""
        alphas = self.schedule.alphas_cumprod[self.timesteps]
        lands_clean = self.previous_timesteps < 0
        previous = np.where(
            lands_clean, self.schedule.final_alpha_cumprod, self.schedule.alphas_cumprod[self.previous_timesteps]
        )
        moves = _ddim(alphas, previous) if self.config.kind == "ddim" else _dpm(alphas, previous, lands_clean)
        return np.stack([np.sqrt(alphas), np.sqrt(1 - alphas), *moves], axis=-1)

    def init(self, x: Floats["b f h w c"]) -> SamplerState:
        """The state before the first step of latents shaped like x, which start as standard normal noise."""
        previous_x0 = jnp.zeros(x.shape, jnp.float32) if self.uses_noise else None
        return SamplerState(jnp.zeros((), jnp.int32), previous_x0)

    def step(
        self,
        state: SamplerState,
        velocity: Floats["b f h w c"],
        x: Floats["b f h w c"],
        noise: Floats["b f h w c"] | None = None,
    ) -> tuple[SamplerState, Floats["b f h w c"], Floats["b f h w c"]]:
        """One step, from `timesteps[state.step]` on.

        Args:
            velocity: the model's prediction at x, guidance applied.
            noise: standard normal, new at each step (fold the step into a key); DPM needs it, DDIM takes none. It is
                the noise that enters the result: diffusers draws twice at most DPM steps and drops the first draw.

        Returns:
            The next state, the next latents in x's dtype, and the predicted clean latents in float32.
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
        """The timestep that the next step starts from, for the model; works under jit."""
        return jnp.asarray(self.timesteps)[state.step]


def _ddim(alphas, previous):
    keep = np.sqrt((1 - previous) / (1 - alphas))
    now = np.sqrt(previous) - np.sqrt(alphas) * keep
    return keep, now, np.zeros_like(keep), np.zeros_like(keep)


def _dpm(alphas, previous, lands_clean):
    """DPM-Solver++ 2M as an SDE, in the half log-SNR lambda = log sqrt(abar / (1 - abar)).

    lambda is -inf at abar = 0 and +inf at abar = 1. Every limit that is used is finite: a first step from pure noise
    has h = inf, so keep = 0; the step after it has r = inf, so its extrapolation vanishes.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        half_log_snr = 0.5 * (np.log(alphas) - np.log(1 - alphas))
        h = 0.5 * (np.log(previous) - np.log(1 - previous)) - half_log_snr
        keep = np.sqrt((1 - previous) / (1 - alphas)) * np.exp(-h)
        first_order = -np.expm1(-2 * h) * np.sqrt(previous)
        fresh = np.sqrt(1 - previous) * np.sqrt(-np.expm1(-2 * h))
        # Second order: x0 is extrapolated along lambda from the step before, which the reference takes to have been
        # made at the timestep before. No history at the first step, and no use of it in a step that ends clean.
        h_last = np.diff(half_log_snr, prepend=np.nan)
        extrapolation = np.where((np.arange(len(h)) == 0) | lands_clean, 0.0, 0.5 * h / h_last)
    return keep, first_order * (1 + extrapolation), -first_order * extrapolation, fresh
