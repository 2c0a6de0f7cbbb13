"""Peak memory of the full-size VAE on this machine: decodes a scene of 49 x 480 x 720, chunk by chunk.

    JAX_PLATFORMS=cpu python benchmarks/vae_memory.py --dtype=bfloat16 [--frames=17]

The weights are random, of CogVideoX's own sizes, and read from a directory as a checkpoint is. From the second chunk on
a chunk is the same program: a shorter scene has the same peak.
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

DTYPE = flags.DEFINE_string("dtype", "bfloat16", "Of weights and computation.")
FRAMES = flags.DEFINE_integer("frames", 49, "Of the scene.")
SIZE = flags.DEFINE_list("size", ["480", "720"], "Height and width, pixels.")


def peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def write_random_weights(folder: str, config: VAEConfig) -> None:
    """Norms of 1 and kernels by their number of inputs, which keep activations as large as they are."""
    random = np.random.default_rng(0)

    def leaf(x):
        spread = np.prod(x.shape[:-1]) ** -0.5
        return jnp.asarray(random.standard_normal(x.shape, np.float32) * spread if x.ndim > 1 else np.ones(x.shape))

    state = nnx.state(memoryless(VAE, config))
    port.save_diffusers(folder, "vae", config, jax.tree.map(leaf, state), dtype=jnp.bfloat16)


def main(_):
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
