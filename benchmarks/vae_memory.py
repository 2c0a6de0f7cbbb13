"""Measures the peak memory of the full-size VAE, by decoding a scene of 49 x 480 x 720 chunk by chunk.

    JAX_PLATFORMS=cpu python benchmarks/vae_memory.py --dtype=bfloat16 [--frames=17]

The weights are random, have CogVideoX's sizes and are read from a folder like a checkpoint. All chunks after the first
run the same program, so a shorter scene has the same peak.
"""

import resource
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from flax import nnx

sys.path.insert(0, str(Path(__file__).parents[1]))

from mask2dit_jax.models.vae import VAE, VAEConfig
from mask2dit_jax.parallel.abstract import memoryless
from mask2dit_jax.pretrained import directory as port
from mask2dit_jax.pretrained.encoders import VideoCodec
from mask2dit_jax.pretrained.pretrained import Pretrained

DTYPE = flags.DEFINE_string("dtype", "bfloat16", "Type of weights and computation.")
FRAMES = flags.DEFINE_integer("frames", 49, "Number of frames of the scene.")
SIZE = flags.DEFINE_list("size", ["480", "720"], "Height and width in pixels.")


def peak_gb() -> float:
    """Return the peak memory of this process in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def write_random_weights(folder: str, config: VAEConfig) -> None:
    """Write norms of 1, and kernels scaled by their number of inputs, which preserve the size of activations."""
    random = np.random.default_rng(0)

    def leaf(x):
        spread = np.prod(x.shape[:-1]) ** -0.5
        return jnp.asarray(random.standard_normal(x.shape, np.float32) * spread if x.ndim > 1 else np.ones(x.shape))

    state = nnx.state(memoryless(VAE, config))
    port.save_diffusers(folder, "vae", config, jax.tree.map(leaf, state), dtype=jnp.bfloat16)


def main(_):
    """Decode the scene and print the peak after each chunk."""
    config = VAEConfig.cogvideox_5b()
    frames = 1 + (FRAMES.value - 1) // config.temporal_compression_ratio
    height, width = (int(side) // config.spatial_compression_ratio for side in SIZE.value)
    latents = np.random.default_rng(1).standard_normal((frames, height, width, config.latent_channels), np.float32)
    with tempfile.TemporaryDirectory() as folder:
        write_random_weights(folder, config)
        print(f"before: {peak_gb():.1f} GB", flush=True)
        start, done = time.perf_counter(), 0
        for pixels in VideoCodec(Pretrained.open(folder), jnp.dtype(DTYPE.value)).decode_chunks(latents):
            done += len(pixels)
            print(f"{done} frames: {time.perf_counter() - start:.0f} s, at most {peak_gb():.2f} GB so far", flush=True)


if __name__ == "__main__":
    app.run(main)
