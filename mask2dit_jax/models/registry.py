"""The networks that this package knows, by the `_class_name` of a config.json. A new one is one line here."""

from collections.abc import Mapping
from typing import Any, TypeVar

from mask2dit_jax.errors import UserError
from mask2dit_jax.models.architecture import Architecture
from mask2dit_jax.models.backbone import Backbone, TransformerConfig
from mask2dit_jax.models.cogvideox import COGVIDEOX
from mask2dit_jax.models.space_to_depth import SPACE_TO_DEPTH, SpaceToDepthConfig
from mask2dit_jax.models.vae import COGVIDEOX_VAE, VAEConfig

CodecConfig = VAEConfig | SpaceToDepthConfig
A = TypeVar("A", bound=Architecture)


def _by_class_name(*architectures: A) -> dict[str, A]:
    return {name: architecture for architecture in architectures for name in architecture.class_names}


BACKBONES: dict[str, Backbone] = _by_class_name(
    COGVIDEOX,
)
CODECS: dict[str, Architecture] = _by_class_name(
    COGVIDEOX_VAE,
    SPACE_TO_DEPTH,
)
DEFAULT_BACKBONE = COGVIDEOX  # what a run from scratch trains


def backbone_of(config: TransformerConfig) -> Backbone:
    """Return the backbone that a config is for."""
    return _of(config, BACKBONES)


def codec_of(config: CodecConfig) -> Architecture:
    """Return the codec, the network between pixels and latents, that a config is for."""
    return _of(config, CODECS)


def read_transformer_config(raw: Mapping[str, Any]) -> TransformerConfig:
    """Read `transformer/config.json`, or what a checkpoint's record says of its model.

    Raises:
        UserError: no backbone has this `_class_name`, or the backbone does not support these settings.
    """
    return _named(raw, BACKBONES, "transformer").config.from_json(raw)


def read_codec_config(raw: Mapping[str, Any]) -> CodecConfig:
    """Read `vae/config.json`.

    Raises:
        UserError: no codec has this `_class_name`, or the codec does not support these settings.
    """
    return _named(raw, CODECS, "vae").config.from_json(raw)


def _of(config, architectures: Mapping[str, A]) -> A:
    for architecture in architectures.values():
        if type(config) is architecture.config:
            return architecture
    raise TypeError(f"{type(config).__name__} is not the config of one of {', '.join(architectures)}")


def _named(raw: Mapping[str, Any], architectures: Mapping[str, A], folder: str) -> A:
    """Find the architecture by its class name; a file without one means the first architecture."""
    name = raw.get("_class_name", next(iter(architectures)))
    if name not in architectures:
        known = ", ".join(architectures)
        raise UserError(f"{folder} config.json: _class_name {name!r} is not supported; use weights of one of {known}")
    return architectures[name]
