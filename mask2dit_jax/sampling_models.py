"""The models that a sampling config names: their sizes at once, their weights when they are first needed."""

import functools
import hashlib
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from mask2dit_jax.config import SampleConfig
from mask2dit_jax.diffusion.samplers import Sampler
from mask2dit_jax.diffusion.schedule import NoiseSchedule
from mask2dit_jax.io import user_cache
from mask2dit_jax.layout import SceneLayout
from mask2dit_jax.models import sizes as scene_sizes
from mask2dit_jax.models.dit import DiT
from mask2dit_jax.ops.positions import check_table
from mask2dit_jax.parallel import sharding
from mask2dit_jax.parallel.abstract import abstract_module
from mask2dit_jax.parallel.mesh import check_tokens
from mask2dit_jax.pretrained import directory as port
from mask2dit_jax.pretrained import named
from mask2dit_jax.pretrained.encoders import TextEncoder, VideoCodec
from mask2dit_jax.pretrained.tokenizer import Cut, cut_prompts, load_tokenizer
from mask2dit_jax.pretrained.transformer_source import TransformerSource
from mask2dit_jax.sampling import setup_sampling
from mask2dit_jax.sampling.memory import SamplingMemory
from mask2dit_jax.sampling.window import WindowSampler


class SamplingModels:
    """Of one process: the mesh is that of its own devices, and stories are shared out among processes.

    Raises:
        UserError: a folder of the config lacks a part, or the parts do not fit together.
    """

    def __init__(self, config: SampleConfig):
        """Reads config.json files and nothing else."""
        self._config = config
        self._pretrained = named.resolve_pretrained(config)
        self.vae, self._text_encoder = named.encoder_configs(self._pretrained)
        self._source = TransformerSource.require(config.checkpoint or self._pretrained, config.weights)
        self.model = scene_sizes.with_run_settings(self._source.config(), config)
        named.check_encoders(self.model, self._pretrained)
        scene_sizes.check_sizes(config, self.vae, self.model.patch_size)
        self.sampling = setup_sampling.sampling_config(config)
        self._dtype = jnp.dtype(config.compute_dtype)
        self._schedule = NoiseSchedule(port.load_schedule(self._pretrained))
        Sampler(self.sampling.sampler, self._schedule)  # refuses what does not go together
        for name in ("vae", "text_encoder"):
            port.require_weights(self._pretrained, name, "copy them there, or give another --config.pretrained")
        sides = config.height, config.width
        self._latent_size = tuple(side // self.vae.spatial_compression_ratio for side in sides)
        self.mesh = setup_sampling.sampling_mesh(config, self.model, self.vae, jax.local_devices())

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(h w c) of a latent frame."""
        return *self._latent_size, self.model.latent_channels

    def layout(self, frames: Sequence[int]) -> SceneLayout:
        """Of a window of scenes of so many latent frames; raises UserError if the model or the mesh cannot take it."""
        layout = self.model.layout(tuple(frames), *self._latent_size)
        if not self.model.rope:
            check_table(layout, self.model.base_frames)
        check_tokens(layout.num_tokens, self.mesh)
        return layout

    @functools.cached_property
    def _tokenizer(self):
        return load_tokenizer(f"{self._pretrained}/tokenizer")

    def cut(self, texts: Sequence[str]) -> list[Cut]:
        """What the text encoder will use of the texts."""
        return cut_prompts(self._tokenizer, texts, self.model.text_tokens)

    def memory(self, layout: SceneLayout, latent_frames: int) -> SamplingMemory:
        """
        Args:
            layout: of the largest window.
            latent_frames: of the whole story.
        """
        return SamplingMemory.of(
            self.model,
            self.vae,
            self._text_encoder,
            layout,
            dtype=self._dtype,
            copies=1 + self.sampling.guided,
            latent_bytes=4 * latent_frames * int(np.prod(self.latent_shape)),
        )

    @functools.cached_property
    def weights(self) -> dict[str, str]:
        """Fingerprints: other weights, or another noise schedule, make another story."""
        source = self._source
        parts = ("params", "ema")[: 1 + source.is_ema] if source.is_checkpoint else ("transformer",)
        return {
            "transformer": port.fingerprint(source.folder, parts),
            "text_encoder": port.fingerprint(self._pretrained, ("text_encoder", "tokenizer")),
            "vae": port.fingerprint(self._pretrained, ("vae",)),
            "scheduler": hashlib.sha256(repr(self._schedule).encode()).hexdigest()[:16],
        }

    def encode(self, texts: Iterable[str]) -> dict[str, np.ndarray]:
        """Embeddings (t x) of different texts. The text encoder is freed afterwards: it is the largest of all."""
        texts = list(dict.fromkeys(texts))
        if not texts:
            return {}
        cache = user_cache.user_cache("prompts")
        encoder = TextEncoder(self._pretrained, self.model.text_tokens, self._dtype, cache)
        return dict(zip(texts, encoder(texts), strict=True))

    @functools.cached_property
    def codec(self) -> VideoCodec:
        return VideoCodec(self._pretrained, self._dtype, self._config.decode_chunking)

    @functools.cached_property
    def sampler(self) -> WindowSampler:
        """With the transformer's parameters in the dtype of the computation, each on its devices."""
        graph, abstract = abstract_module(DiT, self.model, self._dtype, self.mesh, sharding.DIT)
        return WindowSampler(graph, self._source.load(abstract), self._schedule, self.sampling, self.mesh)


def wait_for_others() -> None:
    """A process that ends takes the others of its run with it."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("sampled")
