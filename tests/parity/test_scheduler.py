"""Noise schedule, samplers and guidance against the authors' numbers and the live diffusers schedulers."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler
from diffusers.schedulers import scheduling_dpm_cogvideox

from mask2dit_jax.diffusion.guidance import guidance_scales, guide
from mask2dit_jax.diffusion.samplers import Sampler, SamplerConfig
from mask2dit_jax.diffusion.schedule import NoiseSchedule, ScheduleConfig
from tests.parity.cases import Case, cases

TOLERANCE = 5e-5
SCHEDULER_CASES = pytest.mark.parametrize("case", cases("scheduler"))
PIPELINE_CASES = pytest.mark.parametrize("case", cases("pipeline"))


def channels_last(x) -> jax.Array:
    """Return .. f c h w (torch) as .. f h w c."""
    return jnp.asarray(np.moveaxis(np.asarray(x), -3, -1))


def assert_close(actual, torch_layout, tolerance=TOLERANCE):
    np.testing.assert_allclose(np.asarray(actual, np.float32), channels_last(torch_layout), rtol=0, atol=tolerance)


def schedule_of(case: Case, **changes) -> NoiseSchedule:
    return NoiseSchedule(dataclasses.replace(ScheduleConfig.from_json(case.config["scheduler"]), **changes))


def numbered(arrays, pattern):
    """Return every array whose whole name matches, as (match, array)."""
    return [(match, array) for name, array in arrays.items() if (match := re.fullmatch(pattern, name))]


def run_sampler(sampler: Sampler, x, velocities, noises=None):
    """Run the whole trajectory in one `lax.scan`; return the latents after and the x0 predicted at every step."""

    def body(carry, given):
        state, x = carry
        state, x, x0 = sampler.step(state, given[0], x, given[1] if sampler.uses_noise else None)
        return (state, x), (x, x0)

    given = (velocities, velocities if noises is None else noises)
    return jax.jit(lambda x, given: jax.lax.scan(body, (sampler.init(x), x), given)[1])(x, given)


@SCHEDULER_CASES
def test_alphas_cumprod(case):
    for match, expected in numbered(case.arrays, r"alphas_cumprod_snr(\d+)(_norescale)?"):
        changes = {"snr_shift_scale": float(match[1]), "rescale_betas_zero_snr": not match[2]}
        np.testing.assert_allclose(schedule_of(case, **changes).alphas_cumprod, expected, rtol=0, atol=1e-12)


@SCHEDULER_CASES
def test_timesteps_and_where_each_step_leads(case):
    for name in ("timesteps", "previous_timesteps"):
        fixture_name = name.replace("previous", "prev")
        for match, expected in numbered(case.arrays, fixture_name + r"_(\d+)"):
            sampler = Sampler(SamplerConfig(num_steps=int(match[1])), schedule_of(case))
            np.testing.assert_array_equal(getattr(sampler, name), expected)


@SCHEDULER_CASES
def test_trajectories(case):
    arrays = case.arrays
    for match, expected in numbered(arrays, r"(ddim|dpm)(\d*)_samples"):
        name, steps = match[1] + match[2], len(expected)
        sampler = Sampler(SamplerConfig(match[1], steps), schedule_of(case))
        velocities = channels_last(arrays["model_outputs"][:steps])
        noises = channels_last(arrays[f"{name}_noise_used"]) if sampler.uses_noise else None
        samples, x0 = run_sampler(sampler, channels_last(arrays["x_init"]), velocities, noises)
        assert_close(samples, expected)
        assert_close(x0, arrays[f"{name}_pred_x0"])


@SCHEDULER_CASES
def test_add_noise_and_velocity(case):
    arrays = case.arrays
    x0, noise = channels_last(arrays["an_x0"]), channels_last(arrays["an_noise"])
    t = jnp.broadcast_to(jnp.asarray(arrays["an_timesteps"], jnp.int32)[:, None], x0.shape[:2])
    for match, expected in numbered(arrays, r"an_(noisy|velocity)(?:_snr(\d+))?"):
        schedule = schedule_of(case, snr_shift_scale=float(match[2] or 1))
        method = schedule.add_noise if match[1] == "noisy" else schedule.velocity
        assert_close(jax.jit(method)(x0, noise, t), expected)


@SCHEDULER_CASES
def test_bfloat16_noise_is_that_of_the_rounded_schedule(case):
    arrays = case.arrays
    x0, noise = (channels_last(arrays[name]).astype(jnp.bfloat16) for name in ("an_x0", "an_noise"))
    timesteps = arrays["an_timesteps"]
    t = jnp.broadcast_to(jnp.asarray(timesteps, jnp.int32)[:, None], x0.shape[:2])
    schedule = schedule_of(case, snr_shift_scale=1.0)
    expected = arrays["an_noisy_bf16_as_f32"]
    assert_close(schedule.add_noise(x0, noise, t), expected, 0)  # operation by operation: the same bits
    noisy = jax.jit(schedule.add_noise)(x0, noise, t)  # compiled: the compiler may round less often
    assert_close(noisy, expected, 2**-8 * np.abs(expected).max())
    np.testing.assert_array_equal(noisy[timesteps == 0], x0[timesteps == 0])


def expected_guidance(case) -> np.ndarray:
    settings, arrays = case.config["case"], case.arrays
    kind = "dynamic" if settings["use_dynamic_cfg"] else "static"
    return guidance_scales(kind, settings["guidance_scale"], arrays["timesteps"])


@PIPELINE_CASES
def test_guidance_scale_of_each_step(case):
    np.testing.assert_allclose(expected_guidance(case), case.arrays["guidance_scale_per_step"], rtol=1e-12)
    for match, expected in numbered(case.arrays, r"dynamic_scale_(\d+)_steps"):  # extras of the dynamic cases
        sampler = Sampler(SamplerConfig(num_steps=int(match[1])), schedule_of(case))
        scales = guidance_scales("dynamic", case.config["case"]["guidance_scale"], sampler.timesteps)
        np.testing.assert_allclose(scales, expected, rtol=1e-12)


@PIPELINE_CASES
def test_guided_ddim_steps_of_the_pipelines(case):
    """Guidance and sampler together, from recorded transformer outputs. Extension denoises the last frames only."""
    arrays = case.arrays
    sampler = Sampler(SamplerConfig("ddim", case.config["case"]["steps"]), schedule_of(case))
    np.testing.assert_array_equal(sampler.timesteps, arrays["timesteps"])
    x = channels_last(arrays["latents_init"])
    frames = x.shape[1]
    uncond, cond = jnp.split(channels_last(arrays["transformer_out_steps"]), 2, axis=1)
    scales = jnp.asarray(expected_guidance(case), jnp.float32)
    velocities = jax.vmap(guide)(uncond, cond, scales)[:, :, -frames:]
    samples, _ = run_sampler(sampler, x, velocities)
    assert_close(samples, arrays["latents_steps"][:, :, -frames:])


def live_scheduler(kind, schedule):
    reference_class = {"ddim": CogVideoXDDIMScheduler, "dpm": CogVideoXDPMScheduler}[kind]
    return reference_class.from_config(schedule.config.to_json())


def live_trajectory(scheduler, x, velocities, monkeypatch):
    """Run diffusers' loop; return also the noises that entered its results (of two draws in a step, the last)."""
    draws, generator = [], torch.Generator().manual_seed(5)

    def recorded(shape, **_):
        draws.append(torch.randn(shape, generator=generator))
        return draws[-1]

    monkeypatch.setattr(scheduling_dpm_cogvideox, "randn_tensor", recorded)
    samples, x0s, noises = [], [], []
    x, x0 = torch.tensor(x), None
    for i, t in enumerate(scheduler.timesteps):
        velocity = torch.tensor(velocities[i])
        if isinstance(scheduler, CogVideoXDPMScheduler):
            back = scheduler.timesteps[i - 1] if i > 0 else None
            x, x0 = scheduler.step(velocity, x0, t, back, x, return_dict=False)
            noises.append(draws[-1])
        else:
            x, x0 = scheduler.step(velocity, t, x, return_dict=False)
        samples.append(x)
        x0s.append(x0)
    return [np.stack(arrays) if arrays else None for arrays in (samples, x0s, noises)]


@pytest.mark.parametrize("snr_shift_scale", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 2, 7, 30, 50])
@pytest.mark.parametrize("kind", ["ddim", "dpm"])
def test_live_diffusers_trajectories(kind, steps, snr_shift_scale, monkeypatch):
    schedule = NoiseSchedule(ScheduleConfig(rescale_betas_zero_snr=True, snr_shift_scale=snr_shift_scale))
    rng = np.random.default_rng(steps)
    x, *velocities = rng.standard_normal((steps + 1, 2, 3, 4, 2, 5), np.float32)
    scheduler = live_scheduler(kind, schedule)
    scheduler.set_timesteps(steps)
    samples, x0s, noises = live_trajectory(scheduler, x, velocities, monkeypatch)
    sampler = Sampler(SamplerConfig(kind, steps), schedule)
    ours, ours_x0 = run_sampler(
        sampler,
        channels_last(x),
        channels_last(np.stack(velocities)),
        None if noises is None else channels_last(noises),
    )
    assert_close(ours, samples)
    assert_close(ours_x0, x0s)


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("set_alpha_to_one", [True, False])
@pytest.mark.parametrize("kind", ["ddim", "dpm"])
def test_live_diffusers_other_schedules(kind, set_alpha_to_one, rescale, monkeypatch):
    """Every key that is read makes the same difference as in diffusers."""
    config = ScheduleConfig(400, 0.001, 0.02, rescale, 2.0, set_alpha_to_one)
    rng = np.random.default_rng(0)
    x, *velocities = rng.standard_normal((9, 1, 3, 4, 2, 5), np.float32)
    scheduler = live_scheduler(kind, NoiseSchedule(config))
    scheduler.set_timesteps(8)
    samples, _, noises = live_trajectory(scheduler, x, velocities, monkeypatch)
    sampler = Sampler(SamplerConfig(kind, 8), NoiseSchedule(ScheduleConfig.from_json(scheduler.config)))
    ours, _ = run_sampler(
        sampler,
        channels_last(x),
        channels_last(np.stack(velocities)),
        None if noises is None else channels_last(noises),
    )
    assert sampler.schedule.config == config
    assert_close(ours, samples)


def test_live_diffusers_timesteps_for_every_step_count():
    """Diffusers makes one step too many, at timestep -1, where its floating-point range overshoots; ours does not."""
    schedule = NoiseSchedule(ScheduleConfig.cogvideox_5b())
    scheduler = live_scheduler("ddim", schedule)
    for steps in range(1, schedule.config.num_train_timesteps + 1):
        scheduler.set_timesteps(steps)
        expected = scheduler.timesteps.numpy()
        assert len(expected) == steps or (len(expected) == steps + 1 and expected[-1] == -1)
        np.testing.assert_array_equal(Sampler(SamplerConfig(num_steps=steps), schedule).timesteps, expected[:steps])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("snr_shift_scale", [1.0, 3.0])
def test_live_diffusers_noise_with_a_timestep_a_frame(snr_shift_scale, dtype):
    """Diffusers has one timestep for each sample, so a frame of ours is a sample of theirs."""
    schedule = NoiseSchedule(ScheduleConfig(rescale_betas_zero_snr=True, snr_shift_scale=snr_shift_scale))
    scheduler = live_scheduler("dpm", schedule)
    rng = np.random.default_rng(1)
    x0, noise = rng.standard_normal((2, 2, 5, 4, 6, 8), np.float32)
    t = rng.integers(0, 1000, (2, 5), np.int32)
    t[0, :3] = 0, 1, 999
    frames = [torch.tensor(a).flatten(0, 1).to(getattr(torch, dtype)) for a in (x0, noise)]
    for theirs, ours in ((scheduler.add_noise, schedule.add_noise), (scheduler.get_velocity, schedule.velocity)):
        expected = theirs(*frames, torch.tensor(t.flatten())).float().unflatten(0, (2, 5)).numpy()
        actual = ours(*(channels_last(a).astype(dtype) for a in (x0, noise)), jnp.asarray(t))
        assert actual.dtype == dtype
        assert_close(actual, expected, TOLERANCE if dtype == "float32" else 0)
