"""Which model stands between pixels and latents: `_class_name` of `vae/config.json` says it."""

from collections.abc import Mapping
from typing import Any

from flax import nnx

from mask2dit_jax.models.space_to_depth import SpaceToDepth, SpaceToDepthConfig
from mask2dit_jax.models.vae import VAE, VAEConfig

CodecConfig = VAEConfig | SpaceToDepthConfig


def read_config(raw: Mapping[str, Any]) -> CodecConfig:
    is_lossless = raw.get("_class_name") == SpaceToDepthConfig.CLASS_NAME
    return (SpaceToDepthConfig if is_lossless else VAEConfig).from_json(raw)


def module_class(config: CodecConfig) -> type[nnx.Module]:
    return SpaceToDepth if isinstance(config, SpaceToDepthConfig) else VAE
