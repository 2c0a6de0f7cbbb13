"""Tests the samplers' steps and coefficients. tests/parity compares them with diffusers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mask2dit_jax.diffusion.samplers import Sampler, SamplerConfig
from mask2dit_jax.diffusion.schedule import NoiseSchedule, ScheduleConfig
from mask2dit_jax.errors import UserError

SCHEDULE = NoiseSchedule(ScheduleConfig.cogvideox_5b())
KINDS = pytest.mark.parametrize("kind", ["ddim", "dpm"])


def sampler_of(kind="ddim", num_steps=7, previous_timestep="official"):
    return Sampler(SamplerConfig(kind, num_steps, previous_timestep), SCHEDULE)


def normal(seed, shape=(2, 3, 4, 4, 2)):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def denoise_towards(x0, sampler):
    """Sample with a perfect model, whose velocity points to x0 from any x_t and t."""
    alphas = jnp.asarray(SCHEDULE.alphas_cumprod, jnp.float32)
    x = normal(1, x0.shape)
    state = sampler.init(x)
    for step in range(sampler.config.num_steps):
        alpha = alphas[sampler.timestep(state)]
        velocity = (jnp.sqrt(alpha) * x - x0) / jnp.sqrt(1 - alpha)
        noise = normal(100 + step, x0.shape) if sampler.uses_noise else None
        state, x, _ = sampler.step(state, velocity, x, noise)
    return x


@KINDS
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 50, 61, 1000])
def test_every_coefficient_is_finite(kind, steps):
    for previous_timestep in ("official", "sound"):
        sampler = sampler_of(kind, steps, previous_timestep)
        assert sampler.coefficients.shape == (steps, 6)
        assert np.isfinite(sampler.coefficients).all()


@KINDS
@pytest.mark.parametrize("steps", [1, 4, 7, 30])
def test_sound_steps_end_exactly_at_the_predicted_clean_latents(kind, steps):
    x0 = normal(0)
    np.testing.assert_allclose(denoise_towards(x0, sampler_of(kind, steps, "sound")), x0, atol=1e-5)


@KINDS
def test_official_steps_stop_short_of_clean_where_the_count_does_not_divide(kind):
    x0 = normal(0)
    assert sampler_of(kind, 7).previous_timesteps[-1] == 0
    assert np.abs(denoise_towards(x0, sampler_of(kind, 7)) - x0).max() > 1e-3
    np.testing.assert_allclose(denoise_towards(x0, sampler_of(kind, 4)), x0, atol=1e-5)


def test_official_and_sound_differ_only_where_the_count_does_not_divide():
    for steps in (4, 25, 40, 50):
        official, sound = (sampler_of("dpm", steps, name) for name in ("official", "sound"))
        np.testing.assert_array_equal(official.coefficients, sound.coefficients)
    official, sound = (sampler_of("ddim", 7, name).previous_timesteps for name in ("official", "sound"))
    assert (official != sound).sum() == 6
    np.testing.assert_array_equal(sound, [856, 713, 570, 428, 285, 142, -1])


@pytest.mark.parametrize("previous_timestep", ["official", "sound"])
def test_dpm_keeps_the_right_amount_of_noise(previous_timestep):
    """With a perfect model, x_t ~ N(sqrt(abar) x0, 1 - abar) after a step from pure noise."""
    sampler = sampler_of("dpm", 10, previous_timestep)
    shape = (1, 1, 100, 100, 4)
    x0, x = jnp.full(shape, 0.5), normal(1, shape)
    _, x_prev, _ = sampler.step(sampler.init(x), -x0, x, normal(2, shape))
    alpha = SCHEDULE.alphas_cumprod[sampler.previous_timesteps[0]]
    np.testing.assert_allclose(x_prev.mean(), np.sqrt(alpha) * 0.5, atol=0.02)
    np.testing.assert_allclose(x_prev.var(), 1 - alpha, rtol=0.02)


@KINDS
def test_one_compiled_step_serves_every_step(kind):
    sampler = sampler_of(kind)
    traces = []

    @jax.jit
    def step(state, velocity, x, noise):
        traces.append(None)
        return sampler.step(state, velocity, x, noise if sampler.uses_noise else None)

    x = compiled = normal(0)
    state = compiled_state = sampler.init(x)
    for i in range(sampler.config.num_steps):
        velocity, noise = normal(2 * i + 1), normal(2 * i + 2)
        state, x, _ = sampler.step(state, velocity, x, noise if sampler.uses_noise else None)
        compiled_state, compiled, _ = step(compiled_state, velocity, compiled, noise)
    assert len(traces) == 1
    np.testing.assert_allclose(compiled, x, atol=1e-5)


@KINDS
def test_bfloat16_latents_are_stepped_in_float32(kind):
    sampler = sampler_of(kind)
    x, velocity = (normal(seed).astype(jnp.bfloat16) for seed in (0, 1))
    noise = normal(2) if sampler.uses_noise else None
    _, x_prev, x0 = sampler.step(sampler.init(x), velocity, x, noise)
    assert (x_prev.dtype, x0.dtype) == (jnp.bfloat16, jnp.float32)
    wide = sampler.step(sampler.init(x), velocity.astype(jnp.float32), x.astype(jnp.float32), noise)
    np.testing.assert_array_equal(x0, wide[2])
    np.testing.assert_array_equal(x_prev, wide[1].astype(jnp.bfloat16))


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_step_count_out_of_range(steps):
    with pytest.raises(UserError, match=r"between 1 and 1000|must be at least 1"):
        sampler_of(num_steps=steps)


@pytest.mark.parametrize("setting", [{"kind": "euler"}, {"previous_timestep": "best"}])
def test_unknown_setting(setting):
    with pytest.raises(UserError, match="does not exist; choose one of"):
        SamplerConfig(**setting)


@KINDS
def test_noise_must_fit_the_kind(kind):
    sampler, x = sampler_of(kind), normal(0)
    with pytest.raises(ValueError, match="noise"):
        sampler.step(sampler.init(x), x, x, None if sampler.uses_noise else x)
