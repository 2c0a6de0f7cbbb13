"""From a config's pixels and frames to a model's tokens, and a stored model run as a config says."""

import dataclasses

from absl import logging

from mask2dit_jax.config import RunConfig
from mask2dit_jax.errors import UserError
from mask2dit_jax.layout import SceneLayout
from mask2dit_jax.models.backbone import TransformerConfig
from mask2dit_jax.models.registry import CodecConfig


def check_sizes(config: RunConfig, vae: CodecConfig, patch_size: int) -> None:
    """Check that the VAE and the transformer's patches divide the config's frames and pixels.

    Raises:
        UserError: a side or the number of frames does not fit; the message names the nearest that does.
    """
    multiple = vae.spatial_compression_ratio * patch_size
    for name in ("height", "width"):
        side = getattr(config, name)
        if side < multiple or side % multiple:
            raise UserError(f"{name}={side} is no multiple of {multiple} (VAE times patch); choose one")
    time = vae.temporal_compression_ratio
    if config.num_frames < 1 or (config.num_frames - 1) % time:
        nearest = max(1, round((config.num_frames - 1) / time) * time + 1)
        raise UserError(f"num_frames={config.num_frames} is not of the form {time}k + 1; the nearest is {nearest}")


def scene_layout(config: RunConfig, model: TransformerConfig, vae: CodecConfig) -> SceneLayout:
    """Return the layout of one training sample, or of one sampling window.

    Raises:
        UserError: the sizes do not fit, as `check_sizes`.
    """
    check_sizes(config, vae, model.patch_size)
    frames = (config.num_frames - 1) // vae.temporal_compression_ratio + 1
    space = vae.spatial_compression_ratio
    return model.layout((frames,) * config.num_scenes, config.height // space, config.width // space)


def with_run_settings(model: TransformerConfig, config: RunConfig, remat: str = "none") -> TransformerConfig:
    """Return `model` with the run's mask, attention and `remat`; warn if its weights were made with another mask."""
    if model.mask != config.mask:
        logging.warning("the weights were made with mask %s, this run uses %s (--config.mask)", model.mask, config.mask)
    return dataclasses.replace(model, mask=config.mask, attention=config.attention, remat=remat)
