"""The CogVideoX 3D causal VAE (diffusers' AutoencoderKLCogVideoX), channels-last.

A clip is worked through in time chunks, and the chunks are part of the function: GroupNorm takes its statistics over
one chunk. Causal convolutions are exact across chunks, because each carries its last two input frames on; these caches
are a pytree that goes in and comes out of every call, shaped like the modules that fill it:

    features, cache = block(features, cache)        # cache None: the clip begins here

The first chunk runs on its own; the equal chunks after it run through one `jax.lax.scan`, so that neither the program
nor the memory grows with the length of the clip.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from mask2dit_jax.axes import Array, Floats
from mask2dit_jax.config import CHUNKINGS
from mask2dit_jax.errors import UserError
from mask2dit_jax.parallel.mesh import platform
from mask2dit_jax.parallel.sharding import FRAMES, constrain

Cache = Mapping[str, Any] | None

ENCODE_CHUNK = 8  # pixel frames; the first chunk takes the remainder on top
DECODE_CHUNK = 2  # latent frames
LARGE = 2**26  # elements a chunk from which a CPU convolves it frame by frame, for memory
LOGVAR_RANGE = (-30.0, 20.0)

# What the published checkpoints have and this module assumes; any other value would be another function.
_FIXED = {
    "act_fn": "silu",
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "invert_scale_latents": False,
}
_BLOCK_TYPES = {"down_block_types": "CogVideoXDownBlock3D", "up_block_types": "CogVideoXUpBlock3D"}


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """What `vae/config.json` of a diffusers directory says. Defaults are CogVideoX-2b's."""

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (128, 256, 256, 512)
    latent_channels: int = 16
    layers_per_block: int = 3
    norm_num_groups: int = 32
    norm_eps: float = 1e-6
    temporal_compression_ratio: int = 4
    scaling_factor: float = 1.15258426  # the DiT sees latents times this
    sample_height: int = 480
    sample_width: int = 720

    def __post_init__(self):
        bad = [c for c in self.block_out_channels if c % self.norm_num_groups]
        if bad:
            raise UserError(f"VAE block_out_channels {bad} cannot be split into norm_num_groups={self.norm_num_groups}")
        if 2**self.time_levels != self.temporal_compression_ratio or self.time_levels >= len(self.block_out_channels):
            raise UserError(
                f"VAE temporal_compression_ratio={self.temporal_compression_ratio} is not supported; "
                f"use a power of two up to {2 ** (len(self.block_out_channels) - 1)}"
            )

    @classmethod
    def cogvideox_2b(cls) -> "VAEConfig":
        return cls()

    @classmethod
    def cogvideox_5b(cls) -> "VAEConfig":
        return cls(scaling_factor=0.7)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> "VAEConfig":
        """Reads diffusers' config.json. Raises UserError for a setting that would change the function."""
        for key, value in _FIXED.items():
            if raw.get(key, value) != value:
                raise UserError(f"VAE config: {key}={raw[key]!r} is not supported, only {value!r}")
        for key, value in _BLOCK_TYPES.items():
            if set(raw.get(key, [value])) != {value}:
                raise UserError(f"VAE config: {key}={raw[key]!r} is not supported, only {value!r}")
        if "block_out_channels" not in raw:
            raise UserError("VAE config: block_out_channels is missing; is this the config.json of a VAE?")
        known = {f.name: raw[f.name] for f in dataclasses.fields(cls) if f.name in raw}
        return cls(**known | {"block_out_channels": tuple(raw["block_out_channels"])})

    def to_json(self) -> dict[str, Any]:
        """The dict diffusers reads back as the same model."""
        levels = len(self.block_out_channels)
        return (
            {"_class_name": "AutoencoderKLCogVideoX"}
            | dataclasses.asdict(self)
            | {"block_out_channels": list(self.block_out_channels)}
            | {key: [value] * levels for key, value in _BLOCK_TYPES.items()}
            | _FIXED
        )

    @property
    def time_levels(self) -> int:
        """How many of the levels halve the frame rate (the first ones of the encoder)."""
        return round(math.log2(self.temporal_compression_ratio))

    @property
    def sample_latents(self) -> tuple[int, int]:
        """Latent rows and columns of the videos that it was trained on."""
        ratio = self.spatial_compression_ratio
        return self.sample_height // ratio, self.sample_width // ratio

    @property
    def spatial_compression_ratio(self) -> int:
        """Pixels along a side that become one latent."""
        return 2 ** (len(self.block_out_channels) - 1)

    def encode_chunks(self, size: tuple[int, int, int]) -> list[slice]:
        """Return the time chunks in which a clip of (frames, height, width) is encoded.

        Raises:
            UserError: sizes are no multiple of 8, or the frames are neither 4k + 1 nor 4k.
        """
        frames, height, width = size
        space, time = self.spatial_compression_ratio, self.temporal_compression_ratio
        if height % space or width % space or not height or not width:
            raise UserError(f"the VAE takes heights and widths that are multiples of {space}, not {height} x {width}")
        if frames == 0 or frames % time > 1:
            raise UserError(
                f"the VAE takes clips of {time}k + 1 frames (1, {time + 1}, {2 * time + 1}, ...), not {frames}"
            )
        return _chunks(frames, frames if frames < ENCODE_CHUNK else ENCODE_CHUNK + frames % ENCODE_CHUNK, ENCODE_CHUNK)

    def decode_chunks(self, frames: int, chunking: str = "mask2dit") -> list[slice]:
        """Return the time chunks in which so many latent frames are decoded; `VAE.decode` explains `chunking`."""
        if chunking not in CHUNKINGS:
            raise UserError(f"VAE chunking {chunking!r} does not exist; choose one of {', '.join(CHUNKINGS)}")
        if frames == 0:
            raise UserError("the VAE cannot decode a clip of 0 latent frames")
        alone = chunking == "mask2dit" or frames == 1
        return _chunks(frames, 1 if alone else DECODE_CHUNK + frames % DECODE_CHUNK, DECODE_CHUNK)


class Posterior(NamedTuple):
    """The encoder's Gaussian over latents, fp32, NOT multiplied by scaling_factor."""

    mean: Array
    logvar: Array

    def sample(self, key: Array) -> Floats["b f h w c"]:
        return self.mean + jnp.exp(0.5 * self.logvar) * jax.random.normal(key, self.mean.shape)


class Frames(NamedTuple):
    """Frames still to be made: `make(*parts)`, of all frames at once or of any run of them.

    A norm and its activation hand these on, so that a convolution that goes frame by frame has few of them in memory.
    """

    parts: tuple[Array, ...]  # (b f ...) each
    make: Callable[..., Array]

    def __getitem__(self, run: slice) -> "Frames":
        return Frames(tuple(part[:, run] for part in self.parts), self.make)

    def all(self) -> Floats["b f h w c"]:
        return self.make(*self.parts)

    @classmethod
    def of(cls, x: Floats["b f h w c"]) -> "Frames":
        return cls((x,), lambda x: x)


def _is_frame_by_frame(x: Array) -> bool:
    return platform() == "cpu" and x.size >= LARGE


def _frame(x: Floats["b f ..."], i) -> Floats["b 1 ..."]:
    """Frame `i`. Without the barrier XLA widens all frames to float32 before the loop, where `x` is narrower."""
    x, i = jax.lax.optimization_barrier((x, i))
    return jax.lax.dynamic_slice_in_dim(x, i, 1, axis=1)


def _in_place(step: Callable, carry, x: Floats["b f h w i"], features: int):
    """`carry, frame = step(carry, frame of x, number)` for one frame after the other -> (carry, frames of `features`).

    Where the widths agree, frames are written over those they are made from. Where not, the result begins as what there
    is of `x`: XLA makes a result that begins as zeros when the program begins, those of all loops together.
    """
    width = x.shape[-1]
    out = x[..., :features] if features <= width else jnp.pad(x, [(0, 0)] * 4 + [(0, features - width)])

    def body(i, state):
        carry, out = state
        carry, frame = step(carry, _frame(out if features == width else x, i), i)
        return carry, jax.lax.dynamic_update_slice_in_dim(out, frame, i, axis=1)

    return jax.lax.fori_loop(0, x.shape[1], body, (carry, out))


def _each_frame(layer: Callable, x: Floats["b f h w i"], features: int) -> Floats["b f h_y w_y o"]:
    """`layer(x)`, of a layer that keeps frames apart."""
    if layer is nnx.identity or not _is_frame_by_frame(x):
        return layer(x)
    return _in_place(lambda carry, frame, i: (carry, layer(frame)), (), x, features)[1]


class CausalConv3d(nnx.Module):
    """3x3x3 convolution, zero-padded in space, causal in time: before the clip its first frame stands still.

    XLA's 3-D convolution serves TPUs alone. A CPU sums a 2-D convolution a time tap, two to four times as fast there. A
    GPU runs one 2-D convolution over the three frames' channels side by side: 1.2 to 1.3 times as fast on an H200 as a
    3-D convolution in bfloat16, and twice as fast as one with fp32 output (docs/gpu.md).
    """

    TAPS = 3

    def __init__(self, in_features: int, out_features: int, *, rngs: nnx.Rngs, dtype, param_dtype):
        shape = (self.TAPS, 3, 3, in_features, out_features)
        self.kernel = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), shape, param_dtype))
        self.bias = nnx.Param(jnp.zeros((out_features,), param_dtype))
        self.dtype = dtype

    def __call__(self, frames: Frames, past: Floats["b 2 h w i"] | None):
        """Returns (output, the last two input frames)."""
        if past is None:
            past = jnp.repeat(frames[:1].all(), self.TAPS - 1, axis=1)
        if _is_frame_by_frame(frames.parts[0]):
            return self._frame_by_frame(frames, past)
        x = jnp.concatenate([past, frames.all()], axis=1)
        convolve = CONVOLUTIONS.get(platform(), _conv_3d)
        return self._finish(convolve(x, self.kernel[...].astype(self.dtype))), x[:, -(self.TAPS - 1) :]

    def _frame_by_frame(self, frames: Frames, past):
        kernel = self.kernel[...].astype(self.dtype)
        x, *rest = frames.parts

        def convolve(past, x, i):
            now = frames.make(x, *(_frame(part, i) for part in rest))
            window = jnp.concatenate([past, now], axis=1)
            return window[:, 1:], self._finish(_conv_by_taps(window, kernel))

        past, out = _in_place(convolve, past, x, kernel.shape[-1])
        return out, past

    def _finish(self, out) -> Floats["b f h w o"]:
        return (out + self.bias[...]).astype(self.dtype)


def _conv_3d(x: Floats["b f_x h w i"], kernel: Floats["t 3 3 i o"]) -> Floats["b f h w o"]:
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(1, 1, 1),
        padding=((0, 0), (1, 1), (1, 1)),
        dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
        preferred_element_type=jnp.float32,
    )


def _conv_by_taps(x: Floats["b f_x h w i"], kernel: Floats["t 3 3 i o"]) -> Floats["b f h w o"]:
    """The same, to rounding."""
    frames = x.shape[1] - len(kernel) + 1
    return sum(_conv_frames(x[:, tap : tap + frames], kernel[tap]) for tap in range(len(kernel)))


def _conv_over_channels(x: Floats["b f_x h w i"], kernel: Floats["t 3 3 i o"]) -> Floats["b f h w o"]:
    """The same, to rounding: the frames of all time taps are joined along the channels. Holds the input t times."""
    frames = x.shape[1] - len(kernel) + 1
    x = jnp.concatenate([x[:, tap : tap + frames] for tap in range(len(kernel))], axis=-1)
    # cuDNN accumulates in fp32 whatever it returns; with fp32 results its autotuning takes minutes.
    return _conv_frames(x, jnp.concatenate(list(kernel), axis=2), x.dtype)


CONVOLUTIONS = {"cpu": _conv_by_taps, "gpu": _conv_over_channels}  # by platform; `_conv_3d` elsewhere


def _conv_frames(
    x: Floats["b f h w i"], kernel: Floats["3 3 i o"], out_dtype: DTypeLike = jnp.float32
) -> Floats["b f h w o"]:
    """A 2-D convolution of every frame. fp32 by default: time taps are not rounded before their sum."""
    b, f, h, w, _ = x.shape
    out = jax.lax.conv_general_dilated(
        x.reshape(b * f, h, w, -1),
        kernel,
        window_strides=(1, 1),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        preferred_element_type=out_dtype,
    )
    return out.reshape(b, f, h, w, -1)


class GroupNorm(nnx.Module):
    """Statistics over a chunk, fp32 whatever the compute type, two-pass as in torch."""

    def __init__(self, features: int, config: VAEConfig, eps: float, *, rngs: nnx.Rngs, dtype, param_dtype):
        self.scale = nnx.Param(nnx.initializers.ones(rngs.params(), (features,), param_dtype))
        self.bias = nnx.Param(nnx.initializers.zeros(rngs.params(), (features,), param_dtype))
        self.groups, self.eps, self.dtype = config.norm_num_groups, eps, dtype

    def normaliser(self, x: Floats["b f h w c"]) -> Callable[[Array], Array]:
        """What normalises any frames of the chunk `x`."""
        mean = self._mean(x, lambda x: x)
        variance = self._mean(x, lambda x: jnp.square(x - mean))
        factor = jax.lax.rsqrt(variance + self.eps) * self.scale[...]
        return lambda x: ((x - mean) * factor + self.bias[...]).astype(self.dtype)

    def _mean(self, x: Floats["b f h w c"], of: Callable) -> Floats["b 1 1 1 c"]:
        """The mean of `of(x)` over each channel's group; of each frame first, which XLA's CPU threads share out."""

        def of_frames(x):
            return of(x.astype(jnp.float32)).mean(axis=(2, 3))

        if _is_frame_by_frame(x):
            means = jax.lax.map(lambda i: of_frames(_frame(x, i))[:, 0], jnp.arange(x.shape[1])).swapaxes(0, 1)
        else:
            means = of_frames(x)
        means = means.reshape(*means.shape[:2], self.groups, -1).mean(axis=(1, 3))
        return jnp.repeat(means, x.shape[-1] // self.groups, axis=1)[:, None, None, None]

    def __call__(self, x: Floats["b f h w c"]) -> Frames:
        """Normalised and activated."""
        normalise = self.normaliser(x)
        return Frames((x,), lambda x: nnx.silu(normalise(x)))


class SpatialNorm(nnx.Module):
    """GroupNorm whose scale and shift are read off the latents (diffusers' CogVideoXSpatialNorm3D).

    Scale and shift are made on the latents' own grid and repeated onto the features' grid. That equals the reference,
    which resizes the latents by nearest neighbour first, at a fraction of its work: the projections see single points.
    """

    def __init__(self, features: int, config: VAEConfig, **kinds):
        self.norm = GroupNorm(features, config, 1e-6, **kinds)  # not norm_eps: fixed in the reference
        self.scale = nnx.Linear(config.latent_channels, features, bias_init=nnx.initializers.ones, **kinds)
        self.shift = nnx.Linear(config.latent_channels, features, **kinds)

    def __call__(self, x: Floats["b f h w c"], z: Floats["b f_z h_z w_z c_z"], lone_first: bool) -> Frames:
        """Normalised and activated."""
        normalise = self.norm.normaliser(x)
        times = (x.shape[1] - lone_first) // max(z.shape[1] - lone_first, 1)
        scale, shift = (_repeat_time(project(z), times, lone_first) for project in (self.scale, self.shift))

        def make(x, scale, shift):
            return nnx.silu(normalise(x) * _repeat_space(scale, x.shape) + _repeat_space(shift, x.shape))

        return Frames((x, scale, shift), make)


def _repeat_space(z: Floats["b f h_z w_z c"], shape) -> Floats["b f h w c"]:
    return jnp.repeat(jnp.repeat(z, shape[2] // z.shape[2], axis=2), shape[3] // z.shape[3], axis=3)


def _repeat_time(x: Floats["b f_x h w c"], times: int, lone_first: bool) -> Floats["b f h w c"]:
    """Repeats every frame, but for a lone first one: the clip's first frame has no neighbour to share a latent with."""
    if not lone_first:
        return jnp.repeat(x, times, axis=1)
    return jnp.concatenate([x[:, :1], jnp.repeat(x[:, 1:], times, axis=1)], axis=1)


def _pool_time(x: Floats["b f_x h w c"]) -> Floats["b f h w c"]:
    """Means of frame pairs; of an odd count the first frame stays as it is."""
    first, rest = jnp.split(x, [x.shape[1] % 2], axis=1)
    pairs = rest.reshape(x.shape[0], -1, 2, *x.shape[2:])
    return jnp.concatenate([first, pairs.mean(axis=2, dtype=jnp.float32).astype(x.dtype)], axis=1)


class EncoderResnet(nnx.Module):
    def __init__(self, in_features: int, out_features: int, config: VAEConfig, **kinds):
        self.norm1 = GroupNorm(in_features, config, config.norm_eps, **kinds)
        self.conv1 = CausalConv3d(in_features, out_features, **kinds)
        self.norm2 = GroupNorm(out_features, config, config.norm_eps, **kinds)
        self.conv2 = CausalConv3d(out_features, out_features, **kinds)
        self.conv_shortcut = _shortcut(in_features, out_features, **kinds)

    def __call__(self, x: Floats["b f h w i"], cache: Cache):
        y, past1 = self.conv1(self.norm1(x), cache and cache["conv1"])
        y, past2 = self.conv2(self.norm2(y), cache and cache["conv2"])
        return y + _each_frame(self.conv_shortcut, x, y.shape[-1]), {"conv1": past1, "conv2": past2}


class DecoderResnet(nnx.Module):
    def __init__(self, in_features: int, out_features: int, config: VAEConfig, **kinds):
        self.norm1 = SpatialNorm(in_features, config, **kinds)
        self.conv1 = CausalConv3d(in_features, out_features, **kinds)
        self.norm2 = SpatialNorm(out_features, config, **kinds)
        self.conv2 = CausalConv3d(out_features, out_features, **kinds)
        self.conv_shortcut = _shortcut(in_features, out_features, **kinds)

    def __call__(self, x: Floats["b f h w i"], z: Floats["b f_z h_z w_z c_z"], lone_first: bool, cache: Cache):
        y, past1 = self.conv1(self.norm1(x, z, lone_first), cache and cache["conv1"])
        y, past2 = self.conv2(self.norm2(y, z, lone_first), cache and cache["conv2"])
        return y + _each_frame(self.conv_shortcut, x, y.shape[-1]), {"conv1": past1, "conv2": past2}


def _shortcut(in_features: int, out_features: int, **kinds) -> Callable:
    """Channel counts that differ need a projection (a 1x1x1 convolution in the checkpoint)."""
    return nnx.identity if in_features == out_features else nnx.Linear(in_features, out_features, **kinds)


def _through(blocks, x, cache: Cache, *args):
    """Runs `blocks` one after the other, each with its own part of the cache."""
    filled = {}
    for i, block in enumerate(blocks):
        x, filled[str(i)] = block(x, *args, cache and cache[str(i)])
    return x, filled


class DownBlock(nnx.Module):
    """Residual blocks, then half the height and width, and half the frames where `pool_time`."""

    def __init__(self, in_features: int, features: int, config: VAEConfig, *, down: bool, pool_time: bool, **kinds):
        widths = [in_features] + [features] * config.layers_per_block
        self.resnets = nnx.List(EncoderResnet(i, o, config, **kinds) for i, o in itertools.pairwise(widths))
        padding = ((0, 1), (0, 1))  # stride 2 reaches over the far edges only
        self.downsampler = (
            nnx.Conv(features, features, (3, 3), strides=2, padding=padding, **kinds) if down else nnx.identity
        )
        self.pool_time = pool_time

    def __call__(self, x: Floats["b f h w c"], cache: Cache):
        x, cache = _through(self.resnets, x, cache)
        return self.downsampler(_pool_time(x) if self.pool_time else x), cache


class UpBlock(nnx.Module):
    """Residual blocks, then twice the height and width, and twice the frames where `repeat_time`."""

    def __init__(self, in_features: int, features: int, config: VAEConfig, *, up: bool, repeat_time: bool, **kinds):
        widths = [in_features] + [features] * (config.layers_per_block + 1)
        self.resnets = nnx.List(DecoderResnet(i, o, config, **kinds) for i, o in itertools.pairwise(widths))
        self.upsampler = nnx.Conv(features, features, (3, 3), padding="SAME", **kinds) if up else None
        self.repeat_time = repeat_time

    def __call__(self, x: Floats["b f h w c"], z: Floats["b f_z h_z w_z c_z"], lone_first: bool, cache: Cache):
        x, cache = _through(self.resnets, x, cache, z, lone_first)
        if self.repeat_time:
            x = _repeat_time(x, 2, lone_first)
        if self.upsampler:
            x = _each_frame(self.upsampler, jnp.repeat(jnp.repeat(x, 2, axis=2), 2, axis=3), x.shape[-1])
        return x, cache


class Encoder(nnx.Module):
    def __init__(self, config: VAEConfig, **kinds):
        widths = config.block_out_channels
        last = len(widths) - 1
        self.conv_in = CausalConv3d(config.in_channels, widths[0], **kinds)
        self.down_blocks = nnx.List(
            DownBlock(widths[max(i - 1, 0)], width, config, down=i < last, pool_time=i < config.time_levels, **kinds)
            for i, width in enumerate(widths)
        )
        self.mid = nnx.List(EncoderResnet(widths[-1], widths[-1], config, **kinds) for _ in range(2))
        self.norm_out = GroupNorm(widths[-1], config, 1e-6, **kinds)
        self.conv_out = CausalConv3d(widths[-1], 2 * config.latent_channels, **kinds)

    def __call__(self, pixels: Floats["b f h w c"], cache: Cache):
        """One chunk -> (moments, cache)."""
        filled = {}
        x, filled["conv_in"] = self.conv_in(Frames.of(pixels), cache and cache["conv_in"])
        x, filled["down_blocks"] = _through(self.down_blocks, x, cache and cache["down_blocks"])
        x, filled["mid"] = _through(self.mid, x, cache and cache["mid"])
        x, filled["conv_out"] = self.conv_out(self.norm_out(x), cache and cache["conv_out"])
        return x, filled


class Decoder(nnx.Module):
    def __init__(self, config: VAEConfig, **kinds):
        widths = config.block_out_channels[::-1]
        last = len(widths) - 1
        self.conv_in = CausalConv3d(config.latent_channels, widths[0], **kinds)
        self.mid = nnx.List(DecoderResnet(widths[0], widths[0], config, **kinds) for _ in range(2))
        self.up_blocks = nnx.List(
            UpBlock(widths[max(i - 1, 0)], width, config, up=i < last, repeat_time=i < config.time_levels, **kinds)
            for i, width in enumerate(widths)
        )
        self.norm_out = SpatialNorm(widths[-1], config, **kinds)
        self.conv_out = CausalConv3d(widths[-1], config.out_channels, **kinds)

    def __call__(self, z: Floats["b f h w c"], cache: Cache):
        """One chunk -> (pixels, cache). Only the clip's first chunk can hold the lone first frame."""
        lone_first = cache is None and z.shape[1] % 2 == 1
        filled = {}
        x, filled["conv_in"] = self.conv_in(Frames.of(z), cache and cache["conv_in"])
        x, filled["mid"] = _through(self.mid, x, cache and cache["mid"], z, lone_first)
        x, filled["up_blocks"] = _through(self.up_blocks, x, cache and cache["up_blocks"], z, lone_first)
        x = self.norm_out(x, z, lone_first)
        x, filled["conv_out"] = self.conv_out(x, cache and cache["conv_out"])
        return x, filled


class VAE(nnx.Module):
    """Pixels in [-1, 1] <-> latents. A call is one scene: nothing is carried from one call to the next."""

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs, dtype=jnp.float32, param_dtype=jnp.float32):
        kinds = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        self.config = config
        self.dtype = dtype
        self.encoder = Encoder(config, **kinds)
        self.decoder = Decoder(config, **kinds)

    def encode(self, pixels: Floats["b f h w c"]) -> Posterior:
        """Clip -> posterior of (b, 1 + (f-1)/4, h/8, w/8, latent_channels). One frame is an image.

        Raises:
            UserError: sizes are no multiple of 8, or the frames are neither 4k + 1 nor 4k.
        """
        first, *_ = self.config.encode_chunks(pixels.shape[1:4])
        moments = _in_chunks(self.encoder, self._placed(pixels), first.stop, ENCODE_CHUNK)
        return _posterior(moments)

    def decode(self, latents: Floats["b f h w c"], chunking: str = "mask2dit") -> Floats["b f_p h_p w_p c_p"]:
        """Latents as the encoder makes them (scaling_factor already divided out) -> pixels about [-1, 1], fp32.

        Args:
            chunking: "mask2dit" decodes latent 0 alone, then two at a time (the authors' code, what the released
                weights were sampled with); "diffusers" two at a time, an odd one joining the first two.
        """
        first, *_ = self.config.decode_chunks(latents.shape[1], chunking)
        return _in_chunks(self.decoder, self._placed(latents), first.stop, DECODE_CHUNK).astype(jnp.float32)

    def encode_chunk(self, pixels: Floats["b f h w c"], cache: Cache) -> tuple[Posterior, Cache]:
        """One of the `encode_chunks` of a clip, for whoever goes from chunk to chunk himself."""
        moments, cache = self.encoder(self._placed(pixels), cache)
        return _posterior(moments), _placed_cache(cache)

    def decode_chunk(self, latents: Floats["b f h w c"], cache: Cache) -> tuple[Floats["b f_p h_p w_p c_p"], Cache]:
        """One of the `decode_chunks` of a clip."""
        pixels, cache = self.decoder(self._placed(latents), cache)
        return pixels.astype(jnp.float32), _placed_cache(cache)

    def _placed(self, x: Floats["b f h w c"]) -> Floats["b f h w c"]:
        return constrain(x.astype(self.dtype), FRAMES)


def _chunks(frames: int, first: int, size: int) -> list[slice]:
    edges = [0, *range(first, frames, size), frames]
    return [slice(start, stop) for start, stop in itertools.pairwise(edges)]


def _placed_cache(cache: Cache) -> Cache:
    """Cut into the same tiles after every chunk, so that the program of one chunk serves all that follow."""
    return jax.tree.map(lambda x: constrain(x, FRAMES), cache)


def _posterior(moments: Floats["b f h w c"]) -> Posterior:
    mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
    return Posterior(mean, jnp.clip(logvar, *LOGVAR_RANGE))


def _in_chunks(coder: Callable, x: Floats["b f h w c"], first: int, size: int) -> Floats["b f_y h_y w_y c_y"]:
    """`first` frames, then `size` at a time through one scan, then what is left (only "mask2dit" leaves anything)."""
    out, cache = coder(x[:, :first], None)
    outs = [out]
    count = (x.shape[1] - first) // size
    if count > 1:  # a loop of one round would hide its convolutions from XLA's CPU threads: gradients 5 times slower
        middle, x, first = x[:, first : first + count * size], x[:, first + count * size :], 0
        chunks = jnp.moveaxis(middle.reshape(x.shape[0], count, size, *x.shape[2:]), 1, 0)
        cache, ys = jax.lax.scan(lambda cache, chunk: coder(chunk, cache)[::-1], cache, chunks)
        outs.append(jnp.moveaxis(ys, 0, 1).reshape(x.shape[0], -1, *ys.shape[3:]))
    for start in range(first, x.shape[1], size):
        out, cache = coder(x[:, start : start + size], cache)
        outs.append(out)
    return jnp.concatenate(outs, axis=1)
