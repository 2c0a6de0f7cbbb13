"""Tests the conditional mask: which scenes are known, what the model sees of them, and which scenes the loss counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mask2dit_jax.diffusion import conditioning
from mask2dit_jax.diffusion.schedule import NoiseSchedule, ScheduleConfig
from mask2dit_jax.errors import UserError
from mask2dit_jax.layout import SceneLayout

LAYOUT = SceneLayout(frames=(2, 1, 3), grid=(1, 1), text_tokens=1)
SCHEDULE = NoiseSchedule(ScheduleConfig.cogvideox_5b())
EXTENSION = jnp.array([[True, True, False]])
FIXED = jnp.zeros((1, 3), bool)


def latents(seed: int):
    return jax.random.normal(jax.random.key(seed), (1, 6, 2, 2, 3))


def test_the_decision_is_made_for_each_sample():
    known = np.asarray(conditioning.draw_is_known(jax.random.key(0), 2000, 3, 0.3))
    assert not known[:, 2].any()
    np.testing.assert_array_equal(known[:, 0], known[:, 1])
    assert 0.25 < known[:, 0].mean() < 0.35


@pytest.mark.parametrize(("probability", "share"), [(0.0, 0), (1.0, 1)])
def test_never_and_always(probability, share):
    known = np.asarray(conditioning.draw_is_known(jax.random.key(0), 64, 3, probability))
    assert known[:, :2].mean() == share


def test_known_scenes_have_timestep_zero():
    timesteps = conditioning.scene_timesteps(jnp.array([700, 20]), jnp.array([[True, True, False], [False] * 3]))
    np.testing.assert_array_equal(timesteps, [[0, 0, 700], [20, 20, 20]])


def test_clean_condition_shows_known_scenes_as_they_are():
    x, noise = latents(0), latents(1)
    seen = conditioning.noisy_latents(
        SCHEDULE, x, noise, jnp.array([[0, 0, 999]]), EXTENSION, layout=LAYOUT, condition="clean"
    )
    np.testing.assert_array_equal(seen[:, :3], x[:, :3])
    np.testing.assert_allclose(seen[:, 3:], noise[:, 3:], atol=1e-6)  # t = 999 is pure noise


def test_noised_condition_adds_the_noise_of_timestep_zero():
    x, noise = latents(0), latents(1)
    seen = conditioning.noisy_latents(
        SCHEDULE, x, noise, jnp.array([[0, 0, 999]]), EXTENSION, layout=LAYOUT, condition="noised"
    )
    alpha = SCHEDULE.alphas_cumprod[0]
    expected = np.sqrt(alpha) * x + np.sqrt(1 - alpha) * noise
    np.testing.assert_allclose(seen[:, :3], expected[:, :3], atol=1e-6)
    assert np.abs(seen - x)[:, :3].max() > 0.01


def test_loss_counts_the_unknown_scenes_alone():
    error = jnp.arange(6.0).reshape(1, 6, 1, 1, 1) * jnp.ones((1, 6, 2, 2, 3))
    assert conditioning.scene_losses(error, EXTENSION, layout=LAYOUT)[0] == pytest.approx((3 + 4 + 5) / 3)
    assert conditioning.scene_losses(error, FIXED, layout=LAYOUT)[0] == pytest.approx(2.5)


def test_samples_weigh_the_same_whatever_they_know():
    error = jnp.stack([jnp.full((6, 2, 2, 3), 1.0), jnp.full((6, 2, 2, 3), 3.0)])
    loss, per_sample = conditioning.scene_losses(error, jnp.concatenate([EXTENSION, FIXED]), layout=LAYOUT)
    np.testing.assert_allclose(per_sample, [1, 3])
    assert loss == pytest.approx(2)


def test_unknown_condition_names_the_choices():
    with pytest.raises(UserError, match="condition 'dirty' does not exist; choose one of clean, noised"):
        conditioning.check_condition("dirty")
