"""Transitional."""

import dataclasses
import math
from collections.abc import Sequence

import jax
from jax.sharding import Mesh

from mask2dit_jax.models.codec import CodecConfig
from mask2dit_jax.models.dit import DiTConfig
from mask2dit_jax.models.sizes import scene_layout
from mask2dit_jax.parallel.mesh import make_mesh, sizes_for_any_length
from mask2dit_jax.sampling.window import SamplingConfig


def sampling_config(config) -> SamplingConfig:
    sampler = config.sampler
    return SamplingConfig(sampler, config.guidance, config.guidance_scale, config.condition)


def sampling_mesh(config, model: DiTConfig, vae: CodecConfig, devices: Sequence[jax.Device]) -> Mesh:
    """Of the devices of one host; it takes stories whose scenes have other lengths than the config's, too."""
    layout, copies = scene_layout(config, model, vae), 1 + sampling_config(config).guided
    parts = layout.text_tokens, math.prod(layout.grid)
    sizes = sizes_for_any_length(dataclasses.asdict(config.mesh), len(devices), copies, parts, model.num_heads)
    return make_mesh(sizes, devices)
