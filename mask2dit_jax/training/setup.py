"""From a `TrainConfig` to the programs that train it, and what a checkpoint records of the run."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from absl import logging
from jax.sharding import Mesh

from mask2dit_jax.config import TrainConfig
from mask2dit_jax.diffusion.schedule import NoiseSchedule, ScheduleConfig
from mask2dit_jax.models import sizes
from mask2dit_jax.models.backbone import TransformerConfig
from mask2dit_jax.models.lora import PATTERN
from mask2dit_jax.models.registry import DEFAULT_BACKBONE, CodecConfig
from mask2dit_jax.models.t5 import T5Config
from mask2dit_jax.pretrained.transformer_source import TransformerSource
from mask2dit_jax.training.program import TrainProgram
from mask2dit_jax.training.step import Objective, UpdateConfig


def model_from_scratch(config: TrainConfig, vae: CodecConfig, text_encoder: T5Config) -> TransformerConfig:
    """Return the sizes of a transformer that is trained from scratch between this VAE and this text encoder."""
    ends = {"latent_channels": vae.latent_channels, "text_embed_dim": text_encoder.width}
    return DEFAULT_BACKBONE.config(**dataclasses.asdict(config.model), **ends, mask=config.mask)


def stored_model(source: TransformerSource, wanted: TransformerConfig, config: TrainConfig) -> TransformerConfig:
    """Return the sizes that stored weights bring, and log which sizes of `config.model` they overrule."""
    stored = source.config()
    names = [field.name for field in dataclasses.fields(config.model) if hasattr(stored, field.name)]
    overruled = [name for name in names if getattr(stored, name) != getattr(wanted, name)]
    if overruled:
        changed = ", ".join(f"{name} {getattr(stored, name)}, not {getattr(wanted, name)}" for name in overruled)
        logging.warning("the weights of %s decide the model's sizes: %s", source, changed)
    return stored


def train_program(
    config: TrainConfig, mesh: Mesh, model: TransformerConfig, vae: CodecConfig, schedule: ScheduleConfig
) -> TrainProgram:
    """Return what the config trains on `mesh`, for samples whose scenes have the stored length.

    Raises:
        UserError: sizes, batch or tokens do not fit the models or the mesh.
    """
    lora = config.lora if config.lora.rank else None
    model = dataclasses.replace(sizes.with_run_settings(model, config, config.remat), lora=lora)
    layout = sizes.scene_layout(config, model, vae)
    objective = Objective(
        NoiseSchedule(schedule), layout, vae.scaling_factor, config.condition_probability, config.condition
    )
    trainable = (*config.trainable, *((PATTERN,) if lora else ()))
    return TrainProgram(
        mesh,
        model,
        objective,
        config.scheduled_optimizer,
        config.global_batch_size,
        config.seed,
        jnp.dtype(config.compute_dtype),
        jnp.dtype(config.param_dtype),
        jnp.dtype(config.frozen_dtype or config.param_dtype),
        UpdateConfig(config.accumulate_steps, config.ema_decay, trainable),
        layout,
    )


def train_programs(
    config: TrainConfig, mesh: Mesh, model: TransformerConfig, vae: CodecConfig, schedule: ScheduleConfig
) -> tuple[TrainProgram, ...]:
    """Return a program for each layout of scenes in `scene_frames`; they share their state."""
    program = train_program(config, mesh, model, vae, schedule)
    time = vae.temporal_compression_ratio
    layouts = [
        dataclasses.replace(program.stored_layout, frames=tuple((count - 1) // time + 1 for count in frames))
        for frames in config.scene_frames or ((config.num_frames,) * config.num_scenes,)
    ]
    objectives = [dataclasses.replace(program.objective, layout=layout) for layout in dict.fromkeys(layouts)]
    return tuple(dataclasses.replace(program, objective=objective) for objective in objectives)


def run_record(config: TrainConfig, model: TransformerConfig) -> dict[str, Any]:
    """Return what a checkpoint records of its run: enough to sample from it, to export it and to name changes."""
    return {
        "model": model.to_json(),
        "lora": model.lora and dataclasses.asdict(model.lora),
        "pretrained": str(config.pretrained),
        "config": dataclasses.asdict(config),
        "data": "a sample is a function of seed, its number and data files alone; all else random, of seed and step",
    }
