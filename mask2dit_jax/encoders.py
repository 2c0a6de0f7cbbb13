"""The frozen encoders as functions of NumPy arrays: prompts to embeddings, pixels to latents and back.

They run on the devices of one process, whatever mesh the transformer has: parameters of T5 sharded over them, frames of
the VAE cut into tiles. Processes share out the scenes among themselves.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jaxtyping import Float32, UInt8

from mask2dit_jax.axes import Array, Floats
from mask2dit_jax.data.text import load_tokenizer, tokenize
from mask2dit_jax.models import codec
from mask2dit_jax.models.t5 import T5Encoder
from mask2dit_jax.models.vae import Posterior
from mask2dit_jax.parallel import sharding
from mask2dit_jax.parallel.mesh import local_mesh
from mask2dit_jax.parallel.module import abstract_module
from mask2dit_jax.port.pretrained import load_config, load_params


class TextEncoder:
    """Prompts -> T5 embeddings, one prompt at a time, so that one compiled program serves any number of scenes."""

    def __init__(self, pretrained: epath.PathLike, text_tokens: int, dtype):
        self._tokenizer = load_tokenizer(epath.Path(pretrained) / "tokenizer")
        self._text_tokens = text_tokens
        config = load_config(pretrained, "text_encoder")
        self._mesh = local_mesh()
        graph, params = abstract_module(T5Encoder, config, dtype, self._mesh, sharding.T5)
        shardings = jax.tree.map(lambda x: x.sharding, params)
        self._params = load_params(pretrained, "text_encoder", config, dtype=dtype, shardings=shardings)
        self._run = jax.jit(text_encode(graph))

    def __call__(self, prompts: Sequence[str]) -> Float32[np.ndarray, "n t x"]:
        """Warns of every prompt that is cut to the text tokens of a scene, and names the words cut."""
        ids = tokenize(self._tokenizer, prompts, self._text_tokens)
        with jax.set_mesh(self._mesh):
            return np.concatenate([np.asarray(self._run(self._params, row[None])) for row in ids])


class VideoCodec:
    """The VAE: frames <-> latents of one scene."""

    def __init__(self, pretrained: epath.PathLike, dtype, chunking: str = "mask2dit"):
        self.config = load_config(pretrained, "vae")
        self._mesh = local_mesh(tiles=self.config.sample_latents)
        graph, params = abstract_module(codec.module_class(self.config), self.config, dtype, self._mesh, sharding.VAE)
        shardings = jax.tree.map(lambda x: x.sharding, params)
        self._params = load_params(pretrained, "vae", self.config, dtype=dtype, shardings=shardings)
        self._encode = jax.jit(video_encode(graph))
        self._decode = jax.jit(video_decode(graph, self.config.scaling_factor, chunking))

    def encode(self, pixels: Float32[np.ndarray, "f h w 3"]) -> tuple[np.ndarray, np.ndarray]:
        """Frames in [-1, 1] -> mean and logvar (f h w c) of the posterior, not scaled."""
        posterior = self._posterior(pixels)
        return np.asarray(posterior.mean[0]), np.asarray(posterior.logvar[0])

    def sample(self, pixels: Float32[np.ndarray, "f h w 3"], key: Array) -> Floats["_f _h _w c"]:
        """Frames in [-1, 1] -> latents as the DiT sees them: drawn from the posterior, scaled."""
        posterior = jax.tree.map(np.asarray, self._posterior(pixels))
        return posterior.sample(key)[0] * self.config.scaling_factor

    def decode(self, latents) -> UInt8[np.ndarray, "_f _h _w 3"]:
        """Scaled latents of one scene -> its frames."""
        with jax.set_mesh(self._mesh):
            return np.asarray(self._decode(self._params, np.asarray(latents)))

    def _posterior(self, pixels) -> Posterior:
        with jax.set_mesh(self._mesh):
            return self._encode(self._params, pixels)


def text_encode(graph: nnx.GraphDef):
    """`(params, ids (n t)) -> embeddings (n t x)`, fp32."""
    return lambda params, ids: nnx.merge(graph, params)(ids).astype(jnp.float32)


def video_encode(graph: nnx.GraphDef):
    """`(params, pixels (f h w 3)) -> Posterior` of one scene."""
    return lambda params, pixels: nnx.merge(graph, params).encode(pixels[None])


def video_decode(graph: nnx.GraphDef, scaling_factor: float, chunking: str):
    """`(params, scaled latents (f h w c)) -> frames (f h w 3)` of one scene, as bytes."""
    return lambda params, latents: to_uint8(
        nnx.merge(graph, params).decode(latents[None] / scaling_factor, chunking)[0]
    )


def to_uint8(pixels: Floats["f h w c"]) -> Array:
    """[-1, 1], clipped, to 0..255; done on the device, so that a quarter of the bytes leave it."""
    return jnp.round((jnp.clip(pixels, -1, 1) + 1) * 127.5).astype(jnp.uint8)
