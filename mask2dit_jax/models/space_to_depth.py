"""A lossless codec in place of the VAE: squares of pixels become channels, frame by frame, and back.

The experiments at desk scale train on it (`_class_name` SpaceToDepth in `vae/config.json`). It costs nothing and blurs
nothing, so what a sampled picture shows can be compared exactly with the truth.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from mask2dit_jax.axes import Floats
from mask2dit_jax.errors import UserError
from mask2dit_jax.models.architecture import Architecture
from mask2dit_jax.models.vae import LOGVAR_RANGE, Posterior


@dataclasses.dataclass(frozen=True)
class SpaceToDepthConfig:
    """Sizes of the codec.

    Attributes:
        spatial_compression_ratio: side, in pixels, of the squares that become channels.
        scaling_factor: the transformer sees latents times this.
        sample_height: pixel rows of the videos it is meant for.
        sample_width: pixel columns of those videos.
    """

    spatial_compression_ratio: int
    scaling_factor: float = 1.0
    sample_height: int = 8
    sample_width: int = 8

    CLASS_NAME = "SpaceToDepth"
    temporal_compression_ratio = 1

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> "SpaceToDepthConfig":
        """Read a config.json. Raises UserError if a field is missing."""
        missing = [f.name for f in dataclasses.fields(cls) if f.name not in raw]
        if missing:
            raise UserError(f"{cls.CLASS_NAME} config: {', '.join(missing)} missing; write the file anew")
        return cls(**{f.name: f.type(raw[f.name]) for f in dataclasses.fields(cls)})

    def to_json(self) -> dict[str, Any]:
        """Return the config.json that `from_json` reads."""
        return {"_class_name": self.CLASS_NAME, **dataclasses.asdict(self)}

    @property
    def latent_channels(self) -> int:
        """Channels of a latent frame."""
        return 3 * self.spatial_compression_ratio**2

    @property
    def sample_latents(self) -> tuple[int, int]:
        """Latent rows and columns of the videos it is meant for."""
        return self.sample_height // self.spatial_compression_ratio, self.sample_width // self.spatial_compression_ratio

    def encode_chunks(self, size: tuple[int, int, int]) -> list[slice]:
        """Return the one chunk of a clip of (frames, height, width): frames do not depend on each other."""
        return [slice(0, size[0])]

    def decode_chunks(self, frames: int, chunking: str = "mask2dit") -> list[slice]:
        """Return the one chunk of a clip of `frames` latent frames, whatever the chunking."""
        return [slice(0, frames)]


class SpaceToDepth(nnx.Module):
    """The methods of the VAE, without parameters. The posterior has the smallest variance that a VAE's can have."""

    def __init__(self, config: SpaceToDepthConfig, *, rngs: nnx.Rngs, dtype=jnp.float32, param_dtype=jnp.float32):
        """Keep the config; the other arguments are those of every codec."""
        self.config = config

    def encode(self, pixels: Floats["b f h w c"]) -> Posterior:
        """Turn squares of pixels into channels."""
        side = self.config.spatial_compression_ratio
        mean = rearrange(pixels.astype(jnp.float32), "b f (h p) (w q) c -> b f h w (p q c)", p=side, q=side)
        return Posterior(mean, jnp.full_like(mean, LOGVAR_RANGE[0]))

    def decode(self, latents: Floats["b f h w c"], chunking: str = "") -> Floats["b f _h _w 3"]:
        """Turn channels back into squares of pixels. `chunking` makes no difference, because frames are independent."""
        side = self.config.spatial_compression_ratio
        return rearrange(latents.astype(jnp.float32), "b f h w (p q c) -> b f (h p) (w q) c", p=side, q=side)

    def encode_chunk(self, pixels: Floats["b f h w c"], cache: None) -> tuple[Posterior, None]:
        """Encode one of the `encode_chunks` of a clip."""
        return self.encode(pixels), cache

    def decode_chunk(self, latents: Floats["b f h w c"], cache: None) -> tuple[Floats["b f _h _w 3"], None]:
        """Decode one of the `decode_chunks` of a clip."""
        return self.decode(latents), cache


SPACE_TO_DEPTH = Architecture((SpaceToDepthConfig.CLASS_NAME,), SpaceToDepth, SpaceToDepthConfig, lambda config: (), ())
