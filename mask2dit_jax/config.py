"""Run configurations: every field once, with its type, default, meaning and check.

A config file under `configs/` starts from the defaults of `TrainConfig` or `SampleConfig` (the 5B recipe), changes what
its preset changes, and hands a `ConfigDict` to the command line, where `--config.field=value` changes a field. The
mains turn the result back into the frozen dataclass with `read_config`; nothing below them sees a `ConfigDict`.

The values are the paper's where the paper states them (section 4.1: steps, batch, learning rate, scenes, frames, size,
conditional probability). It states no sampler, step count, guidance, frame rate, optimiser or stride: those come from
the authors' code.
"""

import dataclasses
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from ml_collections import ConfigDict

from mask2dit_jax.errors import UserError

T = TypeVar("T", bound="Section")

MASKS = ("v1", "v2", "v3", "v4", "v5")
ATTENTION = ("auto", "dense", "grouped", "cudnn", "splash")
REMAT = ("none", "full", "attention", "dots")
CONDITIONS = ("clean", "noised")
GUIDANCE = ("static", "dynamic", "dynamic_sound")
CHUNKINGS = ("mask2dit", "diffusers")
SAMPLERS = ("ddim", "dpm")
PREVIOUS_TIMESTEPS = ("official", "sound")
LEARNING_RATES = ("constant", "cosine")
WEIGHTS = ("auto", "ema", "params")
PRECISIONS = ("float32", "bfloat16")
FORMATS = ("csv", "json")
FRAMES = ("stored", "fresh")
FITS = ("crop", "pad", "stretch")

NEGATIVE_PROMPT = (
    "The video is not of a high quality, it has a low resolution. Watermark present in each frame. The background is "
    "solid. Strange body and strange trajectory. Distortion. "
)

DEFAULT_PRESET = "5b"
INPUTS = {  # what no default can guess, and how to give it
    "pretrained": "weights: --config.pretrained=DIR, a diffusers directory of CogVideoX or Mask2DiT",
    "data.path": "data: --config.data.path=FILE, the csv (pretrain) or json (sft) of your clips, or their latents",
    "prompts": "a story: --story=FILE, or --config.prompts=\"('first scene', 'second scene')\"",
}

Check = Callable[[Any], str | None]  # what is wrong with a value, or None


def setting(default: Any, *checks: Check) -> Any:
    """Declare a field with its default and what its values must satisfy."""
    return dataclasses.field(default=default, metadata={"checks": checks})


def at_least(least: int | float, meaning: str = "") -> Check:
    """Return a check for numbers of at least `least`; `meaning` says what the least one stands for."""
    return lambda value: f"must be at least {least}{meaning}" if not value >= least else None


def above(bound: int | float) -> Check:
    """Return a check for numbers above `bound`."""
    return lambda value: f"must be above {bound}" if not value > bound else None


def between(least: int | float, most: int | float) -> Check:
    """Return a check for numbers between two bounds, both included."""
    return lambda value: f"must be between {least} and {most}" if not least <= value <= most else None


def one_of(choices: tuple[str, ...]) -> Check:
    """Return a check for one of the named choices."""
    return lambda value: f"does not exist; choose one of {', '.join(choices)}" if value not in choices else None


def precision(optional: bool = False) -> Check:
    """Return a check for a floating-point type that the weights survive."""

    def check(value: str) -> str | None:
        if value in PRECISIONS or (optional and not value):
            return None
        why = " (its range is too small for these weights: black video and NaN)" if value == "float16" else ""
        return f"is not supported{why}; choose one of {', '.join(PRECISIONS)}"

    return check


def valid_seed(value: Any) -> str | None:
    """Check a random seed."""
    is_seed = isinstance(value, int) and 0 <= value < 2**32
    return None if is_seed else "must be between 0 and 2^32 - 1"


def valid_texts(value: tuple) -> str | None:
    """Check a tuple of texts: what looks like a number on the command line comes as one."""
    wrong = next((text for text in value if not isinstance(text, str)), None)
    return None if wrong is None else f"holds {wrong!r}, which is no text; quote each: \"('one', 'two')\""


@dataclasses.dataclass(frozen=True)
class Section:
    """A group of fields. Building one checks its values.

    Raises:
        UserError: a value fails its field's check; the message names field and value.
    """

    PREFIX: typing.ClassVar[str] = ""  # how the section is called inside a config: "optimizer."

    def __post_init__(self):
        """Run the checks of all fields, then `check`."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            for check in field.metadata.get("checks", ()):
                wrong = check(value)
                if wrong:
                    shown = f" {value!r}" if isinstance(value, str) else f"={value}"
                    raise UserError(f"{self.PREFIX}{field.name}{'' if wrong.startswith('holds') else shown} {wrong}")
        self.check()

    def check(self) -> None:
        """Check values that depend on each other; sections override it."""


@dataclasses.dataclass(frozen=True)
class MeshConfig(Section):
    """Devices along each axis of the mesh; 0 leaves the choice to `parallel.mesh.choose_sizes`."""

    PREFIX = "mesh."
    data: int = setting(0)  # samples, parameters replicated: the axis between slices
    fsdp: int = setting(0)  # samples, parameters sharded
    context: int = setting(0)  # tokens of one sample
    tensor: int = setting(0)  # heads and hidden units


@dataclasses.dataclass(frozen=True)
class SamplerConfig(Section):
    """How a window of scenes is denoised; `diffusion/samplers.py` explains the choices."""

    PREFIX = "sampler."
    kind: str = setting("ddim", one_of(SAMPLERS))  # ddim: deterministic, as in the authors' examples; dpm: stochastic
    num_steps: int = setting(50, at_least(1))  # calls of the model
    # official: t - 1000 // steps, as released; sound: the next timestep of the list.
    previous_timestep: str = setting("official", one_of(PREVIOUS_TIMESTEPS))


@dataclasses.dataclass(frozen=True)
class LoRAConfig(Section):
    """Adapters on attention and feed-forward layers (Hu et al. 2021); all other parameters are frozen."""

    PREFIX = "lora."
    rank: int = setting(0, at_least(0, ", which is never"))  # of the two matrices of an adapter; 0: no adapters
    alpha: float = setting(16.0, above(0))  # adapters are scaled by alpha / rank

    @property
    def scale(self) -> float:
        """Factor on what the adapters add."""
        return self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(Section):
    """AdamW. Learning rate, moments, decay and clipping are those of the authors' script."""

    PREFIX = "optimizer."
    learning_rate: float = setting(1e-5)  # the peak
    schedule: str = setting("constant", one_of(LEARNING_RATES))  # what follows the warm-up
    warmup_steps: int = setting(100, at_least(0))  # steps of a linear rise from 0
    # Step at which "cosine" reaches 0; 0: the run's num_steps. Named, it makes a run and a longer one the same run.
    decay_steps: int = setting(0, at_least(0, ", which is num_steps"))
    b1: float = setting(0.9)  # decay of the mean of gradients
    b2: float = setting(0.999)  # decay of the mean of squared gradients
    eps: float = setting(1e-10)  # added to the root of the second moment
    weight_decay: float = setting(3e-2)  # decoupled, on every trained parameter
    # Global norm that gradients are scaled down to; 0: never. The authors' script passes 0.05, but their DeepSpeed
    # configuration has no gradient_clipping, and then Accelerate's call does nothing (docs/training.md).
    clip_norm: float = setting(0.05, at_least(0, ", which never clips"))

    def check(self) -> None:
        """Check that a cosine ends after its warm-up."""
        if self.schedule == "cosine" and 0 < self.decay_steps <= self.warmup_steps:
            raise UserError(
                f"optimizer.decay_steps={self.decay_steps} must be more than optimizer.warmup_steps={self.warmup_steps}"
            )


def cosine_end(num_steps: int, decay_steps: int, warmup_steps: int) -> int:
    """Return the step at which a cosine reaches 0; a run that ends within its warm-up sees nothing of it."""
    return decay_steps or max(num_steps, warmup_steps + 1)


@dataclasses.dataclass(frozen=True)
class ModelConfig(Section):
    """Sizes of a transformer that is trained from scratch; stored weights bring their own sizes."""

    PREFIX = "model."
    num_heads: int = setting(48, at_least(1))  # attention heads; 30 at 2B
    head_dim: int = setting(64, at_least(1))  # channels of a head
    num_layers: int = setting(42, at_least(1))  # blocks; 30 at 2B
    rope: bool = setting(True)  # rotary positions (5B); False: sin-cos positions (2B)
    time_embed_dim: int = setting(512, at_least(1))  # width of the timestep's embedding
    text_tokens: int = setting(226, at_least(1))  # tokens of a prompt, padding included
    sample_height: int = setting(60, at_least(1))  # latent rows that the base model was trained on
    sample_width: int = setting(90, at_least(1))  # latent columns
    sample_frames: int = setting(49, at_least(1))  # pixel frames of one scene
    temporal_compression: int = setting(4, at_least(1))  # pixel frames that become one latent frame


@dataclasses.dataclass(frozen=True)
class DataConfig(Section):
    """What a run trains on."""

    PREFIX = "data."
    kind: str = setting("json", one_of(FORMATS))  # csv: single clips (pretraining); json: groups of shots (SFT)
    path: str = setting("")  # that file, or a folder of latents that `build_data --encode` wrote
    cache: str = setting("data/cache")  # folder for the latents of a csv or json, which are encoded once
    # stored: clip_variants choices of frames are encoded once; fresh: every visit draws and encodes its frames anew.
    frames: str = setting("stored", one_of(FRAMES))
    fit: str = setting("crop", one_of(FITS))  # frames of another shape: centre crop, black bars, or distorted
    clip_variants: int = setting(8, at_least(1))  # choices of frames stored for each clip
    max_stride: int = setting(3, at_least(1))  # frames between two that are used, at most
    min_stride: int = setting(1, at_least(1))  # at least (json)
    max_skipped_share: float = setting(0.05, between(0, 1))  # share of unusable clips at which the run stops

    def check(self) -> None:
        """Check the order of the strides."""
        if self.min_stride > self.max_stride:
            raise UserError(f"data.min_stride={self.min_stride} is more than data.max_stride={self.max_stride}")


@dataclasses.dataclass(frozen=True)
class RunConfig(Section):
    """The fields that training and sampling share."""

    kind: str = setting("sft")  # what the config is for: pretrain, sft or sample
    preset: str = setting("5b")  # name of the preset that made it
    seed: int = setting(0, valid_seed)  # of everything random: parameters, order of samples, noise, stories
    # Diffusers directory, or a workdir that port_weights made: VAE, text encoder, tokenizer, scheduler, and the
    # transformer if it is there. "tiny" is the one that ships with the package.
    pretrained: str = setting("")
    mask: str = setting("v2", one_of(MASKS))  # attention mask, see ops/masks.py
    attention: str = setting("auto", one_of(ATTENTION))  # implementation; auto: the best for the platform
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    compute_dtype: str = setting("bfloat16", precision())  # of activations
    num_scenes: int = setting(3, at_least(1))  # of a training sample, and of a window when sampling
    num_frames: int = setting(49, at_least(1))  # pixel frames of a scene, 4k + 1
    height: int = setting(480)  # pixels, a multiple of 16
    width: int = setting(720)  # pixels, a multiple of 16
    condition: str = setting("clean", one_of(CONDITIONS))  # how known scenes are shown: clean, or noised at t = 0

    @property
    def name(self) -> str:
        """What the run is called: `sft`, or `sft-tiny` for a preset other than the default."""
        return self.kind if self.preset == DEFAULT_PRESET else f"{self.kind}-{self.preset}"

    def require(self, *inputs: str) -> None:
        """Check that fields without a sensible default are set.

        Raises:
            UserError: some are empty; one message names all of them.
        """
        missing = [name for name in inputs if not _value(self, name)]
        if missing:
            raise UserError(f"this run needs {'; and '.join(INPUTS[name] for name in missing)}")


def _value(config: Section, path: str) -> Any:
    for name in path.split("."):
        config = getattr(config, name)
    return config


@dataclasses.dataclass(frozen=True)
class TrainConfig(RunConfig):
    """A training run. The defaults are the 5B recipe of both stages; `configs/pretrain.py` and `sft.py` differ."""

    init_from: str = setting("")  # workdir or checkpoint whose parameters the run starts from; empty: `pretrained`
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    condition_probability: float = setting(0.5, between(0, 1))  # share of samples whose last scene is denoised alone
    num_steps: int = setting(10_000, at_least(1))  # optimiser steps of the whole run
    global_batch_size: int = setting(8, at_least(1))  # samples of a step, over all devices
    accumulate_steps: int = setting(1, at_least(1))  # parts in which a batch goes through the model
    checkpoint_every: int = setting(500, at_least(1))  # steps
    keep_checkpoints: int = setting(2, at_least(1))  # newest ones that are kept
    keep_every: int = setting(0, at_least(0, ", which is never"))  # also keep steps that are a multiple; 0: none
    log_every: int = setting(10, at_least(1))  # steps
    validate_every: int = setting(500, at_least(0, ", which is never"))  # steps between validation losses; 0: never
    sample_every: int = setting(0, at_least(0, ", which is never"))  # steps between storyboards; 0: never
    sample_steps: int = setting(10, at_least(1))  # denoising steps of such a storyboard
    profile_steps: tuple = setting(())  # first and last step of a profiler trace in WORKDIR/profile, such as (10, 13)
    # Pixel frames of each scene, each num_frames or 8k + 1; a step draws one of several choices, such as
    # ((49, 49, 49), (25, 49, 25)). (): every scene has num_frames.
    scene_frames: tuple = setting(())
    ema_decay: float = setting(0.0)  # of the moving average of the parameters, such as 0.9999; 0: no average
    max_skipped_updates: int = setting(10, at_least(1))  # updates in a row that are not finite before the run stops
    trainable: tuple = setting((), valid_texts)  # regular expressions over parameter paths, (".*attn.*",); (): all
    lora: LoRAConfig = dataclasses.field(default_factory=LoRAConfig)
    remat: str = setting("attention", one_of(REMAT))  # what the backward pass computes again, see models/dit.py
    param_dtype: str = setting("float32", precision())  # of trained parameters and the optimiser's moments
    frozen_dtype: str = setting("", precision(optional=True))  # of parameters that do not train; empty: param_dtype
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)

    @property
    def scheduled_optimizer(self) -> OptimizerConfig:
        """The optimiser with the step at which a cosine ends: `num_steps` unless it is named."""
        chosen = self.optimizer
        if chosen.schedule != "cosine" or chosen.decay_steps:
            return chosen
        return dataclasses.replace(chosen, decay_steps=cosine_end(self.num_steps, 0, chosen.warmup_steps))

    @property
    def samples_at_once(self) -> int:
        """Number of samples one forward pass sees; the mesh must divide it."""
        return max(1, self.global_batch_size // self.accumulate_steps)

    def check(self) -> None:
        """Check the length of the run, profile steps and scene lengths."""
        end = self.scheduled_optimizer.decay_steps
        if self.optimizer.schedule == "cosine" and self.num_steps > end:
            raise UserError(
                f"num_steps={self.num_steps} is beyond optimizer.decay_steps={end}, from where the learning rate is 0; "
                "raise decay_steps, or set it to 0, which is num_steps"
            )
        steps = self.profile_steps
        if steps and (
            len(steps) != 2 or not all(isinstance(step, int) for step in steps) or not 0 < steps[0] <= steps[1]
        ):
            raise UserError(f"profile_steps={steps} must be a first and a last step, such as (10, 13)")
        for frames in self.scene_frames:
            self._check_scene_frames(frames)

    def remarks(self) -> list[str]:
        """Return what is unusual about the length of the run, a line each."""
        chosen = self.scheduled_optimizer
        if self.num_steps <= chosen.warmup_steps:
            return [
                f"num_steps={self.num_steps} ends within optimizer.warmup_steps={chosen.warmup_steps}: the learning "
                "rate does not reach its peak"
            ]
        if chosen.schedule == "cosine" and self.num_steps < chosen.decay_steps:
            return [
                f"num_steps={self.num_steps} ends before optimizer.decay_steps={chosen.decay_steps}: the learning rate "
                "does not come down to 0"
            ]
        return []

    def _check_scene_frames(self, frames: Any) -> None:
        if not isinstance(frames, tuple) or len(frames) != self.num_scenes:
            raise UserError(
                f"scene_frames holds {frames!r}; give the pixel frames of num_scenes={self.num_scenes} scenes each "
                "time, such as ((49, 49, 49), (25, 49, 25))"
            )
        for count in frames:
            if not isinstance(count, int) or not (count == self.num_frames or 0 < count < self.num_frames):
                raise UserError(f"scene_frames: {count!r} must be from 1 to num_frames={self.num_frames}, as stored")
            if count != self.num_frames and count % 8 != 1:
                raise UserError(
                    f"scene_frames: {count} is not of the form 8k + 1, the VAE encodes 8 frames at a time, so such a "
                    f"scene is no part of the stored one; the nearest is {max(1, round((count - 1) / 8) * 8 + 1)}"
                )


@dataclasses.dataclass(frozen=True)
class SampleConfig(RunConfig):
    """A sampling run. The defaults are the settings of the authors' examples at 5B."""

    kind: str = setting("sample")  # what the config is for
    condition: str = setting("noised", one_of(CONDITIONS))  # how known scenes are shown; noised: as released
    checkpoint: str = setting("")  # training workdir or checkpoint; empty: the transformer of `pretrained`
    weights: str = setting("auto", one_of(WEIGHTS))  # of a checkpoint: ema, params, or auto (ema where there is one)
    prompts: tuple = setting((), valid_texts)  # one a scene, the given scenes included; or a story file: --story
    negative_prompt: str = setting(NEGATIVE_PROMPT)  # of every scene, unless its story file has another
    given: tuple = setting((), valid_texts)  # clips or pictures that are the first scenes
    seeds: tuple = setting(())  # several: a result for each; (): that of `seed`
    anchor: bool = setting(False)  # keep scene 1 in every window: less drift, one recent scene less
    max_scenes: int = setting(100, at_least(1))  # more are taken for a slip
    fps: int = setting(8, at_least(1))  # frames a second of the videos
    sampler: SamplerConfig = dataclasses.field(default_factory=SamplerConfig)
    guidance: str = setting("static", one_of(GUIDANCE))  # classifier-free guidance, see diffusion/guidance.py
    guidance_scale: float = setting(6.0)  # 1: no unconditional prediction is made
    decode_chunking: str = setting("mask2dit", one_of(CHUNKINGS))  # time chunks of the VAE's decoder

    def check(self) -> None:
        """Check every seed."""
        for value in self.seeds:
            wrong = valid_seed(value)
            if wrong:
                raise UserError(f"seed={value} {wrong}")


KINDS: Mapping[str, type[RunConfig]] = types.MappingProxyType(
    {"pretrain": TrainConfig, "sft": TrainConfig, "sample": SampleConfig}
)


def read_config(config: ConfigDict | Mapping[str, Any], kind: type[T], program: str = "this program") -> T:
    """Turn what a config file and the command line said into a checked dataclass.

    Args:
        config: what a config file returned, or the fields of an earlier run.
        kind: `TrainConfig` or `SampleConfig`, what the caller runs, or `RunConfig` for either.
        program: name of the caller in messages.

    Raises:
        UserError: the config is for another main, lacks a field, or a value fails its check.
    """
    fields = config.to_dict() if isinstance(config, ConfigDict) else dict(config)
    found = KINDS.get(fields.get("kind", ""))
    if found is None or not issubclass(found, kind):
        names = " or ".join(name for name, of in KINDS.items() if issubclass(of, kind))
        raise UserError(f"this config is of kind {fields.get('kind')!r}; {program} takes one of kind {names}")
    return _section(found, fields)


def _section(kind: type[T], fields: Mapping[str, Any]) -> T:
    known = {field.name: field for field in dataclasses.fields(kind)}
    unknown = [name for name in fields if name not in known]
    missing = [name for name in known if name not in fields]
    if unknown or missing:
        what = f"no field {unknown[0]!r}" if unknown else f"a field {kind.PREFIX}{missing[0]}"
        raise UserError(f"a config of kind {kind.__name__} has {what}; start from a file of configs/")
    types_of = typing.get_type_hints(kind)
    values = {
        name: _section(types_of[name], value) if _is_section(types_of[name]) else _as_tuple(value)
        for name, value in fields.items()
    }
    return kind(**values)


def _is_section(of: Any) -> bool:
    return isinstance(of, type) and issubclass(of, Section)


def _as_tuple(value: Any) -> Any:
    """JSON has no tuples: a run.json holds lists."""
    return tuple(_as_tuple(part) for part in value) if isinstance(value, (list, tuple)) else value


def to_config_dict(config: Section) -> ConfigDict:
    """Return the fields as a `ConfigDict`, for the command line to change."""
    return ConfigDict(dataclasses.asdict(config))


def changes(before: Mapping[str, Any], config: Section) -> list[str]:
    """Name what differs from the fields of an earlier run: `["lora.rank 0, not 4"]`."""
    was, now = _flat(before), _flat(dataclasses.asdict(config))
    return [f"{name} {now[name]!r}, not {was[name]!r}" for name in now if name in was and was[name] != now[name]]


def _flat(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in fields.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: _as_tuple(value)}
    return flat
