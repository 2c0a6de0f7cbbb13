"""The frozen encoders as functions of NumPy arrays: prompts to embeddings, pixels to latents and back."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jaxtyping import Float32, UInt8

from mask2dit_jax.axes import Array, Floats
from mask2dit_jax.data.text import load_tokenizer, tokenize
from mask2dit_jax.models.vae import VAE
from mask2dit_jax.port.pretrained import load_module


class TextEncoder:
    """Prompts -> T5 embeddings, one prompt at a time, so that one compiled program serves any number of scenes."""

    def __init__(self, pretrained: epath.PathLike, text_tokens: int, dtype):
        self._tokenizer = load_tokenizer(epath.Path(pretrained) / "tokenizer")
        self._text_tokens = text_tokens
        graph, self._params = nnx.split(load_module(pretrained, "text_encoder", dtype=dtype, param_dtype=dtype))
        self._run = jax.jit(lambda params, ids: nnx.merge(graph, params)(ids).astype(jnp.float32))

    def __call__(self, prompts: Sequence[str]) -> Float32[np.ndarray, "n t x"]:
        """Warns of every prompt that is cut to the text tokens of a scene, and names the words cut."""
        ids = tokenize(self._tokenizer, prompts, self._text_tokens)
        return np.concatenate([np.asarray(self._run(self._params, row[None])) for row in ids])


class VideoCodec:
    """The VAE: frames <-> latents of one scene."""

    def __init__(self, pretrained: epath.PathLike, dtype, chunking: str = "mask2dit"):
        vae = load_module(pretrained, "vae", dtype=dtype, param_dtype=dtype)
        graph, self._params = nnx.split(vae)
        self.config = vae.config

        def encode(params, pixels):
            return VAE.encode(nnx.merge(graph, params), pixels[None])

        def decode(params, latents):
            pixels = VAE.decode(nnx.merge(graph, params), latents[None] / self.config.scaling_factor, chunking)
            return to_uint8(pixels[0])

        self._encode, self._decode = jax.jit(encode), jax.jit(decode)

    def encode(self, pixels: Float32[np.ndarray, "f h w 3"]) -> tuple[np.ndarray, np.ndarray]:
        """Frames in [-1, 1] -> mean and logvar (f h w c) of the posterior, not scaled."""
        mean, logvar = self._encode(self._params, pixels)
        return np.asarray(mean[0]), np.asarray(logvar[0])

    def sample(self, pixels: Float32[np.ndarray, "f h w 3"], key: Array) -> Floats["f h w c"]:
        """Frames in [-1, 1] -> latents as the DiT sees them: drawn from the posterior, scaled."""
        posterior = self._encode(self._params, pixels)
        return posterior.sample(key)[0] * self.config.scaling_factor

    def decode(self, latents: Floats["f h w c"]) -> UInt8[np.ndarray, "_f _h _w 3"]:
        """Scaled latents of one scene -> its frames."""
        return np.asarray(self._decode(self._params, latents))

    def latent_frames(self, num_frames: int) -> int:
        """Latent frames of a clip of so many frames (4k + 1 -> k + 1)."""
        return -(-num_frames // self.config.temporal_compression_ratio)


def to_uint8(pixels: Floats["f h w c"]) -> Array:
    """[-1, 1], clipped, to 0..255; done on the device, so that a quarter of the bytes leave it."""
    return jnp.round((jnp.clip(pixels, -1, 1) + 1) * 127.5).astype(jnp.uint8)
