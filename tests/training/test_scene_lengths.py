"""A shorter scene is exactly the beginning of a stored one, and every process draws the same lengths for a step."""

import collections

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mask2dit_jax.io.paths import ASSETS
from mask2dit_jax.layout import SceneLayout
from mask2dit_jax.models.vae import VAE
from mask2dit_jax.pretrained.directory import load_module
from mask2dit_jax.training.scene_lengths import cut_scenes, draw

STORED, SHORT = SceneLayout((3, 3, 3), (2, 2), 4), SceneLayout((1, 3, 2), (2, 2), 4)


def test_cut():
    frames = np.arange(9.0)[None, :, None, None, None]
    batch = {"mean": frames, "logvar": frames + 0.5, "text": np.ones((1, 3, 4, 2))}
    found = cut_scenes(batch, STORED, SHORT)
    assert found["mean"].ravel().tolist() == [0, 3, 4, 5, 6, 7]
    assert found["logvar"].ravel().tolist() == [0.5, 3.5, 4.5, 5.5, 6.5, 7.5]
    assert found["text"] is batch["text"]
    assert cut_scenes(batch, STORED, STORED) is batch


def test_draw():
    drawn = [draw((STORED, SHORT), seed=3, step=step) for step in range(200)]
    assert drawn == [draw((STORED, SHORT), seed=3, step=step) for step in range(200)]
    assert 70 < collections.Counter(drawn)[SHORT] < 130
    assert drawn != [draw((STORED, SHORT), seed=4, step=step) for step in range(200)]


@pytest.mark.parametrize("frames", [9, 17])
@pytest.mark.slow
def test_the_vae_encodes_a_shorter_clip_as_the_beginning_of_the_longer(frames):
    vae: VAE = load_module(ASSETS / "tiny", "vae", dtype=jnp.float32)
    clip = np.random.default_rng(0).uniform(-1, 1, (1, 25, 16, 16, 3)).astype(np.float32)
    encode = nnx.jit(lambda vae, pixels: vae.encode(pixels).mean)
    count = (frames - 1) // 4 + 1
    np.testing.assert_allclose(encode(vae, clip[:, :frames]), encode(vae, clip)[:, :count], atol=2e-5)
    assert np.abs(encode(vae, clip[:, 4 : 4 + frames]) - encode(vae, clip)[:, :count]).max() > 1e-2
