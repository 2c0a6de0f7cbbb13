"""Which model stands between pixels and latents: `_class_name` of `vae/config.json` says it."""

from collections.abc import Mapping
from typing import Any

from flax import nnx

from mask2dit_jax.models import vae
from mask2dit_jax.models.space_to_depth import SpaceToDepth, SpaceToDepthConfig
from mask2dit_jax.models.vae import VAE, VAEConfig

CodecConfig = VAEConfig | SpaceToDepthConfig


def read_config(raw: Mapping[str, Any]) -> CodecConfig:
    is_lossless = raw.get("_class_name") == SpaceToDepthConfig.CLASS_NAME
    return (SpaceToDepthConfig if is_lossless else VAEConfig).from_json(raw)


def module_class(config: CodecConfig) -> type[nnx.Module]:
    return SpaceToDepth if isinstance(config, SpaceToDepthConfig) else VAE


def encode_chunks(config: CodecConfig, size: tuple[int, int, int]) -> list[slice]:
    """The runs of a clip of (frames, height, width) that are encoded one after the other."""
    return [slice(0, size[0])] if isinstance(config, SpaceToDepthConfig) else vae.encode_chunks(config, size)


def decode_chunks(config: CodecConfig, frames: int, chunking: str) -> list[slice]:
    """The runs of so many latent frames that are decoded one after the other."""
    return [slice(0, frames)] if isinstance(config, SpaceToDepthConfig) else vae.decode_chunks(frames, chunking)
