"""The frozen encoders as functions of NumPy arrays: prompts to embeddings, pixels to latents and back.

They run on the devices of one process, whatever mesh the transformer has. The parameters of T5 are sharded over them,
and the frames of the VAE are cut into tiles. Each process encodes and decodes its own scenes.
"""

import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jaxtyping import Float32, Int32, UInt8

from mask2dit_jax.axes import Array, Floats
from mask2dit_jax.models.registry import codec_of
from mask2dit_jax.models.t5 import T5
from mask2dit_jax.models.vae import Posterior
from mask2dit_jax.parallel.mesh import local_mesh
from mask2dit_jax.pretrained.pretrained import Pretrained
from mask2dit_jax.pretrained.prompt_cache import EmbeddingCache
from mask2dit_jax.pretrained.tokenizer import tokenize


class TextEncoder:
    """Embeds prompts with T5, one at a time, so that one compiled program serves any number of scenes.

    T5 (9.5 GB in bfloat16) is loaded for the first prompt that the cache does not hold.
    """

    def __init__(self, pretrained: Pretrained, text_tokens: int, dtype, cache: epath.PathLike | None = None):
        """Read the tokenizer and the encoder's config.

        Args:
            pretrained: where the text encoder and its tokenizer are.
            text_tokens: text tokens of a scene; prompts are padded or cut to them.
            dtype: of parameters and computation.
            cache: folder that keeps embeddings; None keeps none.
        """
        self._stored, self._dtype, self._text_tokens = pretrained.text_encoder, dtype, text_tokens
        self._tokenizer, self._cache = pretrained.tokenizer, None
        if cache is not None:
            folder = f"{pretrained.fingerprint('text_encoder')}-{jnp.dtype(dtype).name}"
            self._cache = EmbeddingCache(epath.Path(cache) / folder, (text_tokens, self._stored.config.width))

    def __call__(self, prompts: Sequence[str]) -> Float32[np.ndarray, "n t x"]:
        """Return the embedding of every prompt.

        Logs a warning for each prompt that is cut to the text tokens of a scene, with the words that are lost.
        """
        return np.stack([self._embed(ids) for ids in tokenize(self._tokenizer, prompts, self._text_tokens)])

    def _embed(self, ids: Int32[np.ndarray, " t"]) -> Float32[np.ndarray, "t x"]:
        known = self._cache and self._cache.read(ids)
        if known is not None:
            return known
        embedding = self._run(ids)
        if self._cache:
            self._cache.write(ids, embedding)
        return embedding

    @functools.cached_property
    def _run(self) -> Callable[[np.ndarray], np.ndarray]:
        mesh = local_mesh()
        graph, params = T5.abstract(self._stored.config, self._dtype, mesh)
        params = self._stored.load(dtype=self._dtype, shardings=jax.tree.map(lambda x: x.sharding, params))
        encode = jax.jit(text_encode(graph))

        def run(ids):
            with jax.set_mesh(mesh):
                return np.asarray(encode(params, ids[None])[0])

        return run


class VideoCodec:
    """Encodes and decodes one scene at a time with the VAE, which is loaded for the first one.

    Attributes:
        config: of the VAE.
    """

    def __init__(self, pretrained: Pretrained, dtype, chunking: str = "mask2dit"):
        """Read the VAE's config.

        Args:
            pretrained: where the VAE is.
            dtype: of parameters and computation.
            chunking: how latents are cut into time chunks for the decoder, see `models.vae.CHUNKINGS`.
        """
        self._stored, self._dtype, self._chunking = pretrained.vae, dtype, chunking
        self.config = self._stored.config
        self._mesh = local_mesh(tiles=self.config.sample_latents)

    def encode(self, pixels: Float32[np.ndarray, "f h w 3"]) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and logvar (f h w c) of the posterior of frames in [-1, 1], not scaled."""
        posterior = self._posterior(pixels)
        return posterior.mean[0], posterior.logvar[0]

    def sample(self, pixels: Float32[np.ndarray, "f h w 3"], key: Array) -> Floats["_f _h _w c"]:
        """Draw latents of frames in [-1, 1] from the posterior, scaled as the transformer expects them."""
        return self._posterior(pixels).sample(key)[0] * self.config.scaling_factor

    def decode(self, latents) -> UInt8[np.ndarray, "_f _h _w 3"]:
        """Return the frames of one scene from its scaled latents."""
        return np.concatenate(list(self.decode_chunks(latents)))

    def decode_chunks(self, latents) -> Iterator[UInt8[np.ndarray, "_f _h _w 3"]]:
        """Yield the frames of one scene, one time chunk after the other.

        Memory does not grow with the scene, and the devices decode the next chunk while the caller writes this one.
        """
        latents = np.asarray(latents)
        return self._in_turn(self._decode, latents, self.config.decode_chunks(len(latents), self._chunking))

    def _posterior(self, pixels) -> Posterior:
        chunks = self._in_turn(self._encode, pixels, self.config.encode_chunks(pixels.shape[:3]))
        return jax.tree.map(lambda *parts: np.concatenate(parts, axis=1), *chunks)

    @functools.cached_property
    def _model(self) -> tuple[nnx.GraphDef, nnx.State]:
        graph, params = codec_of(self.config).abstract(self.config, self._dtype, self._mesh)
        return graph, self._stored.load(dtype=self._dtype, shardings=jax.tree.map(lambda x: x.sharding, params))

    @functools.cached_property
    def _encode(self):
        return jax.jit(video_encode(self._model[0]), donate_argnums=2)

    @functools.cached_property
    def _decode(self):
        return jax.jit(video_decode(self._model[0], self.config.scaling_factor), donate_argnums=2)

    def _in_turn(self, run: Callable, x: np.ndarray, chunks: Sequence[slice]) -> Iterator:
        """Yield the result of every chunk. It is fetched while the next chunk is being computed."""
        cache, under_way = None, []
        for chunk in chunks:
            with jax.set_mesh(self._mesh):
                result, cache = run(self._model[1], x[chunk], cache)
            under_way.append(result)
            if len(under_way) > 1:
                yield jax.device_get(under_way.pop(0))
        yield from map(jax.device_get, under_way)


def text_encode(graph: nnx.GraphDef):
    """Return the function `(params, ids (n t)) -> embeddings (n t x)`, in float32."""
    return lambda params, ids: nnx.merge(graph, params)(ids).astype(jnp.float32)


def video_encode(graph: nnx.GraphDef):
    """Return the function `(params, chunk of pixels (f h w 3), cache) -> (Posterior, cache)` for one scene."""
    return lambda params, pixels, cache: nnx.merge(graph, params).encode_chunk(pixels[None], cache)


def video_decode(graph: nnx.GraphDef, scaling_factor: float):
    """Return the function `(params, chunk of scaled latents (f h w c), cache) -> (frames (f h w 3), cache)`."""

    def run(params, latents, cache):
        pixels, cache = nnx.merge(graph, params).decode_chunk(latents[None] / scaling_factor, cache)
        return to_uint8(pixels[0]), cache

    return run


def to_uint8(pixels: Floats["f h w c"]) -> Array:
    """Convert pixels in [-1, 1] to bytes. Runs on the device, so that only a quarter of the bytes leave it."""
    return jnp.round((jnp.clip(pixels, -1, 1) + 1) * 127.5).astype(jnp.uint8)
