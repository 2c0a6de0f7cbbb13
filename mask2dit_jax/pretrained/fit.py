"""How the sizes that a run asks for fit the stored models. A config is anything that has the named attributes."""

import dataclasses

from absl import logging

from mask2dit_jax.errors import UserError
from mask2dit_jax.layout import SceneLayout
from mask2dit_jax.models.codec import CodecConfig
from mask2dit_jax.models.dit import DiTConfig


def check_sizes(config, vae: CodecConfig, patch_size: int) -> None:
    """Check that the VAE and the patches divide `config.height`, `.width` and `.num_frames`.

    Raises:
        UserError: they do not; the message names the field.
    """
    multiple = vae.spatial_compression_ratio * patch_size
    for name in ("height", "width"):
        value = getattr(config, name)
        if value < multiple or value % multiple:
            raise UserError(f"{name}={value} is no multiple of {multiple} (VAE times patch); choose one")
    time = vae.temporal_compression_ratio
    if config.num_frames < 1 or (config.num_frames - 1) % time:
        nearest = max(1, round((config.num_frames - 1) / time) * time + 1)
        raise UserError(f"num_frames={config.num_frames} is not of the form {time}k + 1; the nearest is {nearest}")


def scene_layout(config, model: DiTConfig, vae: CodecConfig) -> SceneLayout:
    """Return the layout of one training sample or one sampling window: `config.num_scenes` scenes of one length."""
    check_sizes(config, vae, model.patch_size)
    frames = (config.num_frames - 1) // vae.temporal_compression_ratio + 1
    space = vae.spatial_compression_ratio
    return model.layout((frames,) * config.num_scenes, config.height // space, config.width // space)


def with_run_settings(model: DiTConfig, config, remat: str = "none") -> DiTConfig:
    """Return `model` with the run's `config.mask`, `config.attention` and `remat`; warn if the mask is another one."""
    if model.mask != config.mask:
        logging.warning(
            "the weights were made with mask %s, this run takes %s (--config.mask)", model.mask, config.mask
        )
    return dataclasses.replace(model, mask=config.mask, attention=config.attention, remat=remat)
