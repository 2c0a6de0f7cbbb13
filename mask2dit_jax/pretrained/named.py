"""Transitional."""

from pathlib import Path

from mask2dit_jax.errors import UserError
from mask2dit_jax.models.codec import CodecConfig
from mask2dit_jax.models.dit import DiTConfig
from mask2dit_jax.models.t5 import T5Config
from mask2dit_jax.pretrained.directory import load_config

ASSETS = Path(__file__).parents[1] / "assets"


def resolve_pretrained(config) -> Path | str:
    """The directory of the frozen components."""
    if not config.pretrained:
        raise UserError(
            "no pretrained weights: set --config.pretrained=DIR to a diffusers directory of CogVideoX or Mask2DiT"
        )
    return pretrained_directory(config.pretrained)


def pretrained_directory(name: str) -> Path | str:
    """ "tiny" is the directory that ships with the package; any other name is a directory."""
    return ASSETS / "tiny" if name == "tiny" else name


def encoder_configs(pretrained) -> tuple[CodecConfig, T5Config]:
    return load_config(pretrained, "vae"), load_config(pretrained, "text_encoder")


def check_encoders(model: DiTConfig, pretrained) -> None:
    """Raises UserError if the transformer was made for another VAE or text encoder."""
    vae, text = encoder_configs(pretrained)
    for what, ours, theirs in (
        ("latent channels", model.latent_channels, vae.latent_channels),
        ("wide text embeddings", model.text_embed_dim, text.width),
    ):
        if ours != theirs:
            raise UserError(
                f"the transformer takes {ours} {what}, {pretrained} makes {theirs}; "
                "set --config.pretrained to the directory that it was trained with"
            )
