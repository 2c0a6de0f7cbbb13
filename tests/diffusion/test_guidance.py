"""Tests guidance and its scale at each sampling step."""

import jax.numpy as jnp
import numpy as np
import pytest

from mask2dit_jax.diffusion.guidance import guidance_scales, guide
from mask2dit_jax.errors import UserError

TIMESTEPS = np.arange(999, -1, -20)  # 50 steps


def test_guide_moves_away_from_the_unconditional_prediction():
    uncond, cond = jnp.array([1.0, 2.0]), jnp.array([2.0, 0.0])
    np.testing.assert_array_equal(guide(uncond, cond, 0.0), uncond)
    np.testing.assert_array_equal(guide(uncond, cond, 1.0), cond)
    np.testing.assert_array_equal(guide(uncond, cond, jnp.float32(6)), [7.0, -10.0])


def test_static_scale():
    np.testing.assert_array_equal(guidance_scales("static", 6.0, TIMESTEPS), np.full(50, 6.0))


def test_sound_dynamic_scale_rises_smoothly():
    scales = guidance_scales("dynamic_sound", 6.0, TIMESTEPS)
    assert scales[0] == 1
    assert (np.diff(scales) >= 0).all()
    assert 6.5 < scales[-1] < 7
    # The official formula, with its t read as the number of steps left.
    t = np.arange(50, 0, -1)
    np.testing.assert_allclose(scales, 1 + 6 * (1 - np.cos(np.pi * ((50 - t) / 50) ** 5)) / 2, rtol=1e-12)


def test_official_dynamic_scale_jumps_about_within_its_bounds():
    scales = guidance_scales("dynamic", 6.0, TIMESTEPS)
    assert ((scales >= 1) & (scales <= 7)).all()
    assert (np.diff(scales) < -1).any()


def test_unknown_kind():
    with pytest.raises(UserError, match="static, dynamic, dynamic_sound"):
        guidance_scales("cosine", 6.0, TIMESTEPS)
