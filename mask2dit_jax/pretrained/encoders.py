"""The frozen encoders as functions of NumPy arrays: prompts to embeddings, pixels to latents and back.

They run on the devices of one process, whatever mesh the transformer has: parameters of T5 sharded over them, frames of
the VAE cut into tiles. Processes share out the scenes among themselves.
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
from mask2dit_jax.pretrained.directory import fingerprint, load_component, load_config
from mask2dit_jax.pretrained.prompt_cache import EmbeddingCache
from mask2dit_jax.pretrained.tokenizer import load_tokenizer, tokenize


class TextEncoder:
    """Prompts -> T5 embeddings, one prompt at a time, so that one compiled program serves any number of scenes.

    T5 (9.5 GB in bfloat16) is read when the first prompt comes that `cache` does not hold.
    """

    def __init__(self, pretrained: epath.PathLike, text_tokens: int, dtype, cache: epath.PathLike | None = None):
        """`cache`: a folder for embeddings; None keeps none."""
        self._pretrained, self._dtype, self._text_tokens = pretrained, dtype, text_tokens
        self._tokenizer = load_tokenizer(epath.Path(pretrained) / "tokenizer")
        self._config = load_config(pretrained, "text_encoder")
        self._cache = None
        if cache is not None:
            folder = f"{fingerprint(pretrained, ('text_encoder',))}-{jnp.dtype(dtype).name}"
            self._cache = EmbeddingCache(epath.Path(cache) / folder, (text_tokens, self._config.width))

    def __call__(self, prompts: Sequence[str]) -> Float32[np.ndarray, "n t x"]:
        """Warns of every prompt that is cut to the text tokens of a scene, and names the words cut."""
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
        graph, params = T5.abstract(self._config, self._dtype, mesh)
        shardings = jax.tree.map(lambda x: x.sharding, params)
        params = load_component(self._pretrained, "text_encoder", self._config, dtype=self._dtype, shardings=shardings)
        encode = jax.jit(text_encode(graph))

        def run(ids):
            with jax.set_mesh(mesh):
                return np.asarray(encode(params, ids[None])[0])

        return run


class VideoCodec:
    """The VAE: frames <-> latents of one scene. It is read when the first scene comes."""

    def __init__(self, pretrained: epath.PathLike, dtype, chunking: str = "mask2dit"):
        self.config = load_config(pretrained, "vae")
        self._mesh = local_mesh(tiles=self.config.sample_latents)
        self._pretrained, self._dtype, self._chunking = pretrained, dtype, chunking

    def encode(self, pixels: Float32[np.ndarray, "f h w 3"]) -> tuple[np.ndarray, np.ndarray]:
        """Frames in [-1, 1] -> mean and logvar (f h w c) of the posterior, not scaled."""
        posterior = self._posterior(pixels)
        return posterior.mean[0], posterior.logvar[0]

    def sample(self, pixels: Float32[np.ndarray, "f h w 3"], key: Array) -> Floats["_f _h _w c"]:
        """Frames in [-1, 1] -> latents as the DiT sees them: drawn from the posterior, scaled."""
        return self._posterior(pixels).sample(key)[0] * self.config.scaling_factor

    def decode(self, latents) -> UInt8[np.ndarray, "_f _h _w 3"]:
        """Scaled latents of one scene -> its frames."""
        return np.concatenate(list(self.decode_chunks(latents)))

    def decode_chunks(self, latents) -> Iterator[UInt8[np.ndarray, "_f _h _w 3"]]:
        """The same, a time chunk after the other: memory does not grow with the scene, and the devices are at the next
        chunk while the caller writes this one."""
        latents = np.asarray(latents)
        return self._in_turn(self._decode, latents, self.config.decode_chunks(len(latents), self._chunking))

    def _posterior(self, pixels) -> Posterior:
        chunks = self._in_turn(self._encode, pixels, self.config.encode_chunks(pixels.shape[:3]))
        return jax.tree.map(lambda *parts: np.concatenate(parts, axis=1), *chunks)

    @functools.cached_property
    def _model(self) -> tuple[nnx.GraphDef, nnx.State]:
        dtype = self._dtype
        graph, params = codec_of(self.config).abstract(self.config, dtype, self._mesh)
        shardings = jax.tree.map(lambda x: x.sharding, params)
        return graph, load_component(self._pretrained, "vae", self.config, dtype=dtype, shardings=shardings)

    @functools.cached_property
    def _encode(self):
        return jax.jit(video_encode(self._model[0]), donate_argnums=2)

    @functools.cached_property
    def _decode(self):
        return jax.jit(video_decode(self._model[0], self.config.scaling_factor), donate_argnums=2)

    def _in_turn(self, run: Callable, x: np.ndarray, chunks: Sequence[slice]) -> Iterator:
        """Every chunk's result, fetched when the next chunk is under way."""
        cache, under_way = None, []
        for chunk in chunks:
            with jax.set_mesh(self._mesh):
                result, cache = run(self._model[1], x[chunk], cache)
            under_way.append(result)
            if len(under_way) > 1:
                yield jax.device_get(under_way.pop(0))
        yield from map(jax.device_get, under_way)


def text_encode(graph: nnx.GraphDef):
    """`(params, ids (n t)) -> embeddings (n t x)`, fp32."""
    return lambda params, ids: nnx.merge(graph, params)(ids).astype(jnp.float32)


def video_encode(graph: nnx.GraphDef):
    """`(params, chunk of pixels (f h w 3), cache) -> (Posterior, cache)` of one scene."""
    return lambda params, pixels, cache: nnx.merge(graph, params).encode_chunk(pixels[None], cache)


def video_decode(graph: nnx.GraphDef, scaling_factor: float):
    """`(params, chunk of scaled latents (f h w c), cache) -> (frames (f h w 3) as bytes, cache)` of one scene."""

    def run(params, latents, cache):
        pixels, cache = nnx.merge(graph, params).decode_chunk(latents[None] / scaling_factor, cache)
        return to_uint8(pixels[0]), cache

    return run


def to_uint8(pixels: Floats["f h w c"]) -> Array:
    """[-1, 1], clipped, to 0..255; done on the device, so that a quarter of the bytes leave it."""
    return jnp.round((jnp.clip(pixels, -1, 1) + 1) * 127.5).astype(jnp.uint8)
