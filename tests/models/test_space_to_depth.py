"""The lossless codec takes the place of the VAE and is exact both ways."""

import jax
import numpy as np
import pytest
from flax import nnx

from mask2dit_jax.errors import UserError
from mask2dit_jax.models.registry import codec_of, read_codec_config
from mask2dit_jax.models.space_to_depth import SpaceToDepth, SpaceToDepthConfig
from mask2dit_jax.models.vae import VAE, VAEConfig
from mask2dit_jax.pretrained.directory import load_config
from mask2dit_jax.pretrained.encoders import VideoCodec
from mask2dit_jax.pretrained.pretrained import Pretrained
from mask2dit_jax.pretrained.safetensors import write_json

CONFIG = SpaceToDepthConfig(2, scaling_factor=1.5, sample_height=4, sample_width=6)


@pytest.fixture
def pretrained(tmp_path):
    (tmp_path / "vae").mkdir()
    write_json(tmp_path / "vae" / "config.json", CONFIG.to_json())
    return tmp_path


def test_bytes_survive_the_way_there_and_back(pretrained):
    frames = np.random.default_rng(0).integers(0, 256, (3, 4, 6, 3)).astype(np.uint8)
    door = VideoCodec(Pretrained.open(pretrained), np.float32)
    latents = door.sample(frames.astype(np.float32) / 127.5 - 1, jax.random.key(0))
    assert latents.shape == (3, 2, 3, 12)
    np.testing.assert_array_equal(door.decode(latents), frames)


def test_a_latent_is_a_square_of_pixels(pretrained):
    pixels = np.arange(4 * 6 * 3, dtype=np.float32).reshape(1, 4, 6, 3)
    mean, logvar = VideoCodec(Pretrained.open(pretrained), np.float32).encode(pixels)
    np.testing.assert_array_equal(mean[0, 1, 2], pixels[0, 2:4, 4:6].reshape(-1))
    assert logvar.max() < -20


def test_the_class_name_in_the_config_decides(pretrained):
    assert load_config(pretrained, "vae") == CONFIG
    assert codec_of(CONFIG).module is SpaceToDepth
    stored = VAEConfig().to_json()
    assert read_codec_config(stored) == VAEConfig()
    assert codec_of(VAEConfig()).module is VAE


def test_it_has_no_parameters():
    assert not jax.tree.leaves(nnx.state(SpaceToDepth(CONFIG, rngs=nnx.Rngs(0)), nnx.Param))


def test_a_config_without_its_sizes_is_named():
    with pytest.raises(UserError, match="spatial_compression_ratio missing"):
        read_codec_config({"_class_name": "SpaceToDepth", "scaling_factor": 1.0, "sample_height": 8, "sample_width": 8})
