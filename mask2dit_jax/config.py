"""From a run config (ml_collections) to the frozen dataclasses and sizes that the package works with."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mask2dit_jax.diffusion import conditioning, guidance
from mask2dit_jax.diffusion.samplers import SamplerConfig
from mask2dit_jax.diffusion.schedule import NoiseSchedule, ScheduleConfig
from mask2dit_jax.errors import UserError
from mask2dit_jax.layout import SceneLayout
from mask2dit_jax.models import dit, vae
from mask2dit_jax.models.backbone import TransformerConfig
from mask2dit_jax.models.lora import PATTERN, LoRAConfig
from mask2dit_jax.models.registry import DEFAULT_BACKBONE, CodecConfig
from mask2dit_jax.models.t5 import T5Config
from mask2dit_jax.ops import masks
from mask2dit_jax.ops.attention import api
from mask2dit_jax.parallel.mesh import make_mesh, sizes_for_any_length
from mask2dit_jax.pretrained.directory import load_config
from mask2dit_jax.pretrained.transformer_source import WEIGHTS, TransformerSource
from mask2dit_jax.sampling.window import SamplingConfig
from mask2dit_jax.training.optimizer import OptimizerConfig
from mask2dit_jax.training.program import TrainProgram
from mask2dit_jax.training.step import Objective, UpdateConfig

ASSETS = Path(__file__).parent / "assets"
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}

_COUNTS = (
    *("num_scenes", "num_steps", "global_batch_size", "checkpoint_every", "keep_checkpoints", "log_every", "fps"),
    *("accumulate_steps", "max_skipped_updates", "sample_steps"),
    *("max_scenes", "data.clip_variants", "data.min_stride", "data.max_stride", "sampler.num_steps"),
    *("model.num_heads", "model.head_dim", "model.num_layers", "model.time_embed_dim", "model.text_tokens"),
)
_AT_LEAST_0 = ("keep_every", "validate_every", "sample_every", "lora.rank")
_CHOICES = {
    "mask": masks.PREDICATES,
    "attention": ("auto", *api.IMPLEMENTATIONS),
    "remat": dit.REMAT_POLICIES,
    "condition": conditioning.CONDITIONS,
    "guidance": guidance.KINDS,
    "decode_chunking": vae.CHUNKINGS,
    "weights": WEIGHTS,
    "data.kind": ("pretrain", "sft"),
}


def check_values(config: ConfigDict, program: str, own_field: str) -> None:
    """Raises UserError for what the config alone shows to be wrong, before anything is read or computed.

    Args:
        program: the main that runs.
        own_field: a field that only configs for this main have.
    """
    if own_field not in config:
        raise UserError(f"this config has no field {own_field!r}; give one that is made for {program}")
    for name in _COUNTS:
        value = _find(config, name)
        if value is not None and value < 1:
            raise UserError(f"{name}={value} must be at least 1")
    for name in _AT_LEAST_0:
        value = _find(config, name)
        if value is not None and value < 0:
            raise UserError(f"{name}={value} must be at least 0, which is never")
    for name, known in _CHOICES.items():
        value = _find(config, name)
        if value is not None and value not in known:
            raise UserError(f"{name} {value!r} does not exist; choose one of {', '.join(known)}")
    for seed in (config.seed, *config.get("seeds", ())):
        if not isinstance(seed, int) or not 0 <= seed < 2**32:
            raise UserError(f"seed={seed} must be between 0 and 2^32 - 1")
    for name in ("condition_probability", "data.max_skipped_share"):
        value = _find(config, name)
        if value is not None and not 0 <= value <= 1:
            raise UserError(f"{name}={value} must be between 0 and 1")
    if "data" in config and config.data.min_stride > config.data.max_stride:
        raise UserError(
            f"data.min_stride={config.data.min_stride} is more than data.max_stride={config.data.max_stride}"
        )
    _check_training_values(config)


def _check_training_values(config: ConfigDict) -> None:
    patterns, steps = config.get("trainable", ()), config.get("profile_steps", ())
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise UserError(f"trainable holds {pattern!r}, which is no text; quote each: --config.trainable=\"('a',)\"")
    if steps and (len(steps) != 2 or not all(isinstance(step, int) for step in steps) or not 0 < steps[0] <= steps[1]):
        raise UserError(f"profile_steps={steps} must be a first and a last step, such as (10, 13)")
    for frames in config.get("scene_frames", ()):
        if not isinstance(frames, tuple) or len(frames) != config.num_scenes:
            raise UserError(
                f"scene_frames holds {frames!r}; give the pixel frames of num_scenes={config.num_scenes} scenes each "
                "time, such as ((49, 49, 49), (25, 49, 25))"
            )
        for count in frames:
            if not isinstance(count, int) or not (count == config.num_frames or 0 < count < config.num_frames):
                raise UserError(f"scene_frames: {count!r} must be from 1 to num_frames={config.num_frames}, as stored")
            if count != config.num_frames and count % 8 != 1:
                raise UserError(
                    f"scene_frames: {count} is not of the form 8k + 1, the VAE encodes 8 frames at a time, so such a "
                    f"scene is no part of the stored one; the nearest is {max(1, round((count - 1) / 8) * 8 + 1)}"
                )


def _find(config: ConfigDict, name: str):
    """The value of a field such as "data.kind"; None where a config has no such field."""
    section, _, field = name.rpartition(".")
    return (config.get(section, {}) if section else config).get(field)


def resolve_dtype(name: str):
    if name not in DTYPES:
        why = " (its range is too small for these weights: black video and NaN)" if name == "float16" else ""
        raise UserError(f"precision {name!r} is not supported{why}; choose one of {', '.join(DTYPES)}")
    return DTYPES[name]


def resolve_pretrained(config: ConfigDict) -> Path | str:
    """The directory of the frozen components."""
    if not config.pretrained:
        raise UserError(
            "no pretrained weights: set --config.pretrained=DIR to a diffusers directory of CogVideoX or Mask2DiT"
        )
    return pretrained_directory(config.pretrained)


def pretrained_directory(name: str) -> Path | str:
    """ "tiny" is the directory that ships with the package; any other name is a directory."""
    return ASSETS / "tiny" if name == "tiny" else name


def check_sizes(config: ConfigDict, vae: CodecConfig, patch_size: int) -> None:
    multiple = vae.spatial_compression_ratio * patch_size
    for name in ("height", "width"):
        if config[name] < multiple or config[name] % multiple:
            raise UserError(f"{name}={config[name]} is no multiple of {multiple} (VAE times patch); choose one")
    time = vae.temporal_compression_ratio
    if config.num_frames < 1 or (config.num_frames - 1) % time:
        nearest = max(1, round((config.num_frames - 1) / time) * time + 1)
        raise UserError(f"num_frames={config.num_frames} is not of the form {time}k + 1; the nearest is {nearest}")


def scene_layout(config: ConfigDict, model: TransformerConfig, vae: CodecConfig) -> SceneLayout:
    """Of one training sample, or of one sampling window."""
    check_sizes(config, vae, model.patch_size)
    frames = (config.num_frames - 1) // vae.temporal_compression_ratio + 1
    space = vae.spatial_compression_ratio
    return model.layout((frames,) * config.num_scenes, config.height // space, config.width // space)


def model_from_scratch(config: ConfigDict, vae: CodecConfig, text_encoder: T5Config) -> TransformerConfig:
    """The sizes in the config, between the VAE and the text encoder."""
    sizes = {"latent_channels": vae.latent_channels, "text_embed_dim": text_encoder.width}
    return DEFAULT_BACKBONE.config(**config.model.to_dict(), **sizes, mask=config.mask)


def encoder_configs(pretrained) -> tuple[CodecConfig, T5Config]:
    return load_config(pretrained, "vae"), load_config(pretrained, "text_encoder")


def train_program(
    config: ConfigDict, mesh: Mesh, model: TransformerConfig, vae: CodecConfig, schedule: ScheduleConfig
) -> TrainProgram:
    """What the config trains, on `mesh`; of several layouts of scenes, that of the data."""
    lora = LoRAConfig(config.lora.rank, config.lora.alpha) if config.lora.rank else None
    model = dataclasses.replace(with_run_settings(model, config), lora=lora)
    layout = scene_layout(config, model, vae)
    objective = Objective(
        NoiseSchedule(schedule), layout, vae.scaling_factor, config.condition_probability, config.condition
    )
    trainable = (*config.trainable, *((PATTERN,) if lora else ()))
    return TrainProgram(
        mesh,
        model,
        objective,
        OptimizerConfig(**config.optimizer.to_dict()),
        config.global_batch_size,
        config.seed,
        resolve_dtype(config.compute_dtype),
        resolve_dtype(config.param_dtype),
        resolve_dtype(config.frozen_dtype or config.param_dtype),
        UpdateConfig(config.accumulate_steps, config.ema_decay, trainable),
        layout,
    )


def train_programs(
    config: ConfigDict, mesh: Mesh, model: TransformerConfig, vae: CodecConfig, schedule: ScheduleConfig
) -> tuple[TrainProgram, ...]:
    """One for each layout of scenes in `scene_frames`; they share their state."""
    program = train_program(config, mesh, model, vae, schedule)
    time = vae.temporal_compression_ratio
    layouts = [
        dataclasses.replace(program.stored_layout, frames=tuple((count - 1) // time + 1 for count in frames))
        for frames in config.scene_frames or ((config.num_frames,) * config.num_scenes,)
    ]
    objectives = [dataclasses.replace(program.objective, layout=layout) for layout in dict.fromkeys(layouts)]
    return tuple(dataclasses.replace(program, objective=objective) for objective in objectives)


def samples_at_once(config: ConfigDict) -> int:
    """Of a training step: what the mesh divides."""
    return max(1, config.global_batch_size // config.accumulate_steps)


def run_record(config: ConfigDict, model: TransformerConfig) -> dict[str, Any]:
    """What a checkpoint says of its run."""
    return {
        "model": model.to_json(),
        "lora": model.lora and dataclasses.asdict(model.lora),
        "pretrained": str(config.pretrained),
        "config": config.to_dict(),
        "data": "the batch of a step is a function of seed, step and data files alone; so is all that is random in it",
    }


def log_changes(before: Mapping[str, Any], config: ConfigDict) -> None:
    """Names what a resumed run does otherwise than the run that left the checkpoint."""
    was, now = _flat(before), _flat(config.to_dict())
    changed = [f"{name} {now[name]!r}, not {was[name]!r}" for name in now if name in was and was[name] != now[name]]
    if changed:
        logging.warning("resumed with other settings: %s", "; ".join(changed))


def _flat(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in fields.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: _listed(value)}
    return flat


def _listed(value):
    """JSON has no tuples."""
    return [_listed(part) for part in value] if isinstance(value, (list, tuple)) else value


def stored_model(source: TransformerSource, wanted: TransformerConfig, config: ConfigDict) -> TransformerConfig:
    """The sizes that stored weights bring; those of `config.model` that they overrule are named."""
    stored = source.config()
    overruled = [name for name in config.model if getattr(stored, name) != getattr(wanted, name)]
    if overruled:
        sizes = ", ".join(f"{name} {getattr(stored, name)}, not {getattr(wanted, name)}" for name in overruled)
        logging.warning("the weights of %s decide the model's sizes: %s", source, sizes)
    return stored


def sampling_config(config: ConfigDict) -> SamplingConfig:
    sampler = SamplerConfig(**config.sampler.to_dict())
    return SamplingConfig(sampler, config.guidance, config.guidance_scale, config.condition)


def sampling_mesh(
    config: ConfigDict, model: TransformerConfig, vae: CodecConfig, devices: Sequence[jax.Device]
) -> Mesh:
    """Of the devices of one host; it takes stories whose scenes have other lengths than the config's, too."""
    layout, copies = scene_layout(config, model, vae), 1 + sampling_config(config).guided
    parts = layout.text_tokens, math.prod(layout.grid)
    sizes = sizes_for_any_length(config.mesh.to_dict(), len(devices), copies, parts, model.num_heads)
    return make_mesh(sizes, devices)


def check_encoders(model: TransformerConfig, pretrained) -> None:
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


def with_run_settings(model: TransformerConfig, config: ConfigDict) -> TransformerConfig:
    """The sizes of `model`, run as the config says."""
    if model.mask != config.mask:
        logging.warning(
            "the weights were made with mask %s, this run takes %s (--config.mask)", model.mask, config.mask
        )
    remat = config.get("remat", "none")
    return dataclasses.replace(model, mask=config.mask, attention=config.attention, remat=remat)
