"""Tests the noise schedule and its config. tests/parity compares it with diffusers."""

import jax.numpy as jnp
import numpy as np
import pytest

from mask2dit_jax.diffusion.schedule import NoiseSchedule, ScheduleConfig
from mask2dit_jax.errors import UserError

RELEASED = ScheduleConfig.cogvideox_5b().to_json()


@pytest.mark.parametrize("config", [ScheduleConfig.cogvideox_2b(), ScheduleConfig.cogvideox_5b(), ScheduleConfig()])
def test_config_survives_export_and_import(config):
    assert ScheduleConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("prediction_type", "epsilon"),
        ("beta_schedule", "linear"),
        ("timestep_spacing", "leading"),
        ("trained_betas", [0.1]),
    ],
)
def test_unsupported_value_is_named(key, value):
    with pytest.raises(UserError, match=key):
        ScheduleConfig.from_json({**RELEASED, key: value})


def test_whole_numbers_are_as_good_as_fractions():
    assert ScheduleConfig.from_json({**RELEASED, "snr_shift_scale": 1}) == ScheduleConfig.cogvideox_5b()


def test_absent_prediction_type_means_what_it_means_to_diffusers():
    with pytest.raises(UserError, match="prediction_type 'epsilon'"):
        ScheduleConfig.from_json({key: value for key, value in RELEASED.items() if key != "prediction_type"})


def test_last_timestep_is_pure_noise_and_noise_grows():
    alphas = NoiseSchedule(ScheduleConfig.cogvideox_2b()).alphas_cumprod
    assert alphas.dtype == np.float64
    assert alphas[-1] == 0
    assert (np.diff(alphas) < 0).all()


def test_each_frame_has_its_own_timestep():
    schedule = NoiseSchedule(ScheduleConfig.cogvideox_5b())
    x0, noise = np.random.default_rng(0).standard_normal((2, 2, 3, 2, 2, 1), np.float32)
    t = np.array([[0, 500, 999], [999, 0, 1]], np.int32)
    together = schedule.add_noise(*map(jnp.asarray, (x0, noise, t)))
    np.testing.assert_array_equal(together[0, 2], noise[0, 2])  # pure noise at the last timestep
    for b, f in np.ndindex(t.shape):
        alone = schedule.add_noise(*(jnp.asarray(a[b : b + 1, f : f + 1]) for a in (x0, noise, t)))
        np.testing.assert_array_equal(together[b, f], alone[0, 0])


def test_noisy_and_velocity_give_back_the_clean_sample():
    schedule = NoiseSchedule(ScheduleConfig.cogvideox_2b())
    x0, noise = jnp.asarray(np.random.default_rng(0).standard_normal((2, 1, 4, 2, 2, 3), np.float32))
    t = jnp.array([[0, 10, 700, 999]], jnp.int32)
    alphas = schedule.alphas_cumprod[np.asarray(t)][:, :, None, None, None]
    noisy, velocity = schedule.add_noise(x0, noise, t), schedule.velocity(x0, noise, t)
    np.testing.assert_allclose(np.sqrt(alphas) * noisy - np.sqrt(1 - alphas) * velocity, x0, atol=2e-6)
