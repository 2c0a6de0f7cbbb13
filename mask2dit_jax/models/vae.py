"""The CogVideoX 3D causal VAE (diffusers' AutoencoderKLCogVideoX), channels-last.

A clip is processed in time chunks. The chunks are part of the function, because GroupNorm takes its statistics over one
chunk. Causal convolutions are exact across chunks, because each passes its last two input frames on to the next chunk.
These caches are a pytree that goes into and comes out of every call, with the structure of the modules that fill it:

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

from mask2dit_jax.axes import Array, Floats
from mask2dit_jax.config import CHUNKINGS
from mask2dit_jax.errors import UserError
from mask2dit_jax.io.json_values import read_fields
from mask2dit_jax.models import port_vae
from mask2dit_jax.models.architecture import Architecture
from mask2dit_jax.models.causal_conv import CausalConv3d, Frames, is_frame_by_frame, map_frames, take_frame
from mask2dit_jax.parallel.sharding import FRAMES, P, Table, constrain

Cache = Mapping[str, Any] | None

CLASS_NAME = "AutoencoderKLCogVideoX"  # of the same model in diffusers
ENCODE_CHUNK = 8  # pixel frames; the first chunk takes the remainder on top
DECODE_CHUNK = 2  # latent frames
LOGVAR_RANGE = (-30.0, 20.0)

# Settings of all published checkpoints that this module assumes; any other value would change the function.
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
    """Sizes of the VAE, with the names of `vae/config.json` in a diffusers directory. Defaults are CogVideoX-2B's."""

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (128, 256, 256, 512)
    latent_channels: int = 16
    layers_per_block: int = 3
    norm_num_groups: int = 32
    norm_eps: float = 1e-6
    temporal_compression_ratio: int = 4
    scaling_factor: float = 1.15258426  # the transformer sees latents times this
    sample_height: int = 480
    sample_width: int = 720

    def __post_init__(self):
        """Raise UserError for sizes that do not go together."""
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
        """Return the config of CogVideoX-2B."""
        return cls()

    @classmethod
    def cogvideox_5b(cls) -> "VAEConfig":
        """Return the config of CogVideoX-5B and of the released Mask2DiT."""
        return cls(scaling_factor=0.7)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> "VAEConfig":
        """Read diffusers' config.json; an absent key means diffusers' default.

        Raises:
            UserError: it is not the config of a VAE, or a setting would change the function.
        """
        for key, value in _FIXED.items():
            if raw.get(key, value) != value:
                raise UserError(f"VAE config: {key}={raw[key]!r} is not supported, only {value!r}")
        for key, value in _BLOCK_TYPES.items():
            if set(raw.get(key, [value])) != {value}:
                raise UserError(f"VAE config: {key}={raw[key]!r} is not supported, only {value!r}")
        fields = {field.name: field for field in dataclasses.fields(cls)}
        if not any(name in raw for name in fields):
            raise UserError("VAE config: it holds no size; is this the config.json of a VAE?")
        widths = raw.get("block_out_channels", fields.pop("block_out_channels").default)
        if not isinstance(widths, list | tuple) or not widths or not all(type(width) is int for width in widths):
            raise UserError(f"VAE config: block_out_channels={widths!r} is not a list of whole numbers")
        return cls(block_out_channels=tuple(widths), **read_fields(raw, fields.values(), "VAE config"))

    def to_json(self) -> dict[str, Any]:
        """Return the config.json that diffusers reads as the same model."""
        levels = len(self.block_out_channels)
        return (
            {"_class_name": CLASS_NAME}
            | dataclasses.asdict(self)
            | {"block_out_channels": list(self.block_out_channels)}
            | {key: [value] * levels for key, value in _BLOCK_TYPES.items()}
            | _FIXED
        )

    @property
    def time_levels(self) -> int:
        """Number of levels that halve the frame rate; they are the first ones of the encoder."""
        return round(math.log2(self.temporal_compression_ratio))

    @property
    def sample_latents(self) -> tuple[int, int]:
        """Latent rows and columns of the videos that the VAE was trained on."""
        ratio = self.spatial_compression_ratio
        return self.sample_height // ratio, self.sample_width // ratio

    @property
    def spatial_compression_ratio(self) -> int:
        """Number of pixels along a side that become one latent."""
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
        """Return the time chunks in which `frames` latent frames are decoded; `VAE.decode` explains `chunking`."""
        if chunking not in CHUNKINGS:
            raise UserError(f"VAE chunking {chunking!r} does not exist; choose one of {', '.join(CHUNKINGS)}")
        if frames == 0:
            raise UserError("the VAE cannot decode a clip of 0 latent frames")
        alone = chunking == "mask2dit" or frames == 1
        return _chunks(frames, 1 if alone else DECODE_CHUNK + frames % DECODE_CHUNK, DECODE_CHUNK)


class Posterior(NamedTuple):
    """The encoder's Gaussian over latents, in fp32 and NOT multiplied by scaling_factor."""

    mean: Array
    logvar: Array

    def sample(self, key: Array) -> Floats["b f h w c"]:
        """Draw latents."""
        return self.mean + jnp.exp(0.5 * self.logvar) * jax.random.normal(key, self.mean.shape)


class GroupNorm(nnx.Module):
    """GroupNorm with SiLU. Statistics are taken over a chunk, in fp32 and in two passes as in torch."""

    def __init__(self, features: int, config: VAEConfig, eps: float, *, rngs: nnx.Rngs, dtype, param_dtype):
        """Build scale and bias."""
        self.scale = nnx.Param(nnx.initializers.ones(rngs.params(), (features,), param_dtype))
        self.bias = nnx.Param(nnx.initializers.zeros(rngs.params(), (features,), param_dtype))
        self.groups, self.eps, self.dtype = config.norm_num_groups, eps, dtype

    def normaliser(self, x: Floats["b f h w c"]) -> Callable[[Array], Array]:
        """Return a function that normalises any frames of the chunk `x`."""
        mean = self._mean(x, lambda x: x)
        variance = self._mean(x, lambda x: jnp.square(x - mean))
        factor = jax.lax.rsqrt(variance + self.eps) * self.scale[...]
        return lambda x: ((x - mean) * factor + self.bias[...]).astype(self.dtype)

    def _mean(self, x: Floats["b f h w c"], of: Callable) -> Floats["b 1 1 1 c"]:
        """Return the mean of `of(x)` over each channel's group, first of each frame, so that CPU threads share it."""

        def of_frames(x):
            return of(x.astype(jnp.float32)).mean(axis=(2, 3))

        if is_frame_by_frame(x):
            means = jax.lax.map(lambda i: of_frames(take_frame(x, i))[:, 0], jnp.arange(x.shape[1])).swapaxes(0, 1)
        else:
            means = of_frames(x)
        means = means.reshape(*means.shape[:2], self.groups, -1).mean(axis=(1, 3))
        return jnp.repeat(means, x.shape[-1] // self.groups, axis=1)[:, None, None, None]

    def __call__(self, x: Floats["b f h w c"]) -> Frames:
        """Normalised and activated."""
        normalise = self.normaliser(x)
        return Frames((x,), lambda x: nnx.silu(normalise(x)))


class SpatialNorm(nnx.Module):
    """GroupNorm with SiLU whose scale and shift come from the latents (diffusers' CogVideoXSpatialNorm3D).

    Scale and shift are computed on the grid of the latents and then repeated to that of the features. The reference
    resizes the latents by nearest neighbour first, which gives the same at many times the work, because the projections
    see single points.
    """

    def __init__(self, features: int, config: VAEConfig, **kinds):
        """Build the norm and projections; `kinds` are rngs, dtype and param_dtype, as in all classes below."""
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
    """Repeat every frame but a lone first one: the first frame of a clip shares its latent with no other."""
    if not lone_first:
        return jnp.repeat(x, times, axis=1)
    return jnp.concatenate([x[:, :1], jnp.repeat(x[:, 1:], times, axis=1)], axis=1)


def _pool_time(x: Floats["b f_x h w c"]) -> Floats["b f h w c"]:
    """Average pairs of frames; if their number is odd, the first frame stays as it is."""
    first, rest = jnp.split(x, [x.shape[1] % 2], axis=1)
    pairs = rest.reshape(x.shape[0], -1, 2, *x.shape[2:])
    return jnp.concatenate([first, pairs.mean(axis=2, dtype=jnp.float32).astype(x.dtype)], axis=1)


class EncoderResnet(nnx.Module):
    """Residual block of the encoder."""

    def __init__(self, in_features: int, out_features: int, config: VAEConfig, **kinds):
        """Build norms and convolutions."""
        self.norm1 = GroupNorm(in_features, config, config.norm_eps, **kinds)
        self.conv1 = CausalConv3d(in_features, out_features, **kinds)
        self.norm2 = GroupNorm(out_features, config, config.norm_eps, **kinds)
        self.conv2 = CausalConv3d(out_features, out_features, **kinds)
        self.conv_shortcut = _shortcut(in_features, out_features, **kinds)

    def __call__(self, x: Floats["b f h w i"], cache: Cache):
        """Run a chunk; return (features, cache)."""
        y, past1 = self.conv1(self.norm1(x), cache and cache["conv1"])
        y, past2 = self.conv2(self.norm2(y), cache and cache["conv2"])
        return y + map_frames(self.conv_shortcut, x, y.shape[-1]), {"conv1": past1, "conv2": past2}


class DecoderResnet(nnx.Module):
    """Residual block of the decoder, whose norms see the latents `z`."""

    def __init__(self, in_features: int, out_features: int, config: VAEConfig, **kinds):
        """Build norms and convolutions."""
        self.norm1 = SpatialNorm(in_features, config, **kinds)
        self.conv1 = CausalConv3d(in_features, out_features, **kinds)
        self.norm2 = SpatialNorm(out_features, config, **kinds)
        self.conv2 = CausalConv3d(out_features, out_features, **kinds)
        self.conv_shortcut = _shortcut(in_features, out_features, **kinds)

    def __call__(self, x: Floats["b f h w i"], z: Floats["b f_z h_z w_z c_z"], lone_first: bool, cache: Cache):
        """Run a chunk; return (features, cache)."""
        y, past1 = self.conv1(self.norm1(x, z, lone_first), cache and cache["conv1"])
        y, past2 = self.conv2(self.norm2(y, z, lone_first), cache and cache["conv2"])
        return y + map_frames(self.conv_shortcut, x, y.shape[-1]), {"conv1": past1, "conv2": past2}


def _shortcut(in_features: int, out_features: int, **kinds) -> Callable:
    """Return a projection if the channel counts differ (a 1x1x1 convolution in the checkpoint), else the identity."""
    return nnx.identity if in_features == out_features else nnx.Linear(in_features, out_features, **kinds)


def _through(blocks, x, cache: Cache, *args):
    """Run `blocks` one after the other, each with its own part of the cache."""
    filled = {}
    for i, block in enumerate(blocks):
        x, filled[str(i)] = block(x, *args, cache and cache[str(i)])
    return x, filled


class DownBlock(nnx.Module):
    """Residual blocks, then half the height and width, and half the frames where `pool_time`."""

    def __init__(self, in_features: int, features: int, config: VAEConfig, *, down: bool, pool_time: bool, **kinds):
        """Build the blocks; without `down` height and width stay."""
        widths = [in_features] + [features] * config.layers_per_block
        self.resnets = nnx.List(EncoderResnet(i, o, config, **kinds) for i, o in itertools.pairwise(widths))
        padding = ((0, 1), (0, 1))  # stride 2 reaches over the far edges only
        self.downsampler = (
            nnx.Conv(features, features, (3, 3), strides=2, padding=padding, **kinds) if down else nnx.identity
        )
        self.pool_time = pool_time

    def __call__(self, x: Floats["b f h w c"], cache: Cache):
        """Run a chunk; return (features, cache)."""
        x, cache = _through(self.resnets, x, cache)
        return self.downsampler(_pool_time(x) if self.pool_time else x), cache


class UpBlock(nnx.Module):
    """Residual blocks, then twice the height and width, and twice the frames where `repeat_time`."""

    def __init__(self, in_features: int, features: int, config: VAEConfig, *, up: bool, repeat_time: bool, **kinds):
        """Build the blocks; without `up` height and width stay."""
        widths = [in_features] + [features] * (config.layers_per_block + 1)
        self.resnets = nnx.List(DecoderResnet(i, o, config, **kinds) for i, o in itertools.pairwise(widths))
        self.upsampler = nnx.Conv(features, features, (3, 3), padding="SAME", **kinds) if up else None
        self.repeat_time = repeat_time

    def __call__(self, x: Floats["b f h w c"], z: Floats["b f_z h_z w_z c_z"], lone_first: bool, cache: Cache):
        """Run a chunk; return (features, cache)."""
        x, cache = _through(self.resnets, x, cache, z, lone_first)
        if self.repeat_time:
            x = _repeat_time(x, 2, lone_first)
        if self.upsampler:
            x = map_frames(self.upsampler, jnp.repeat(jnp.repeat(x, 2, axis=2), 2, axis=3), x.shape[-1])
        return x, cache


class Encoder(nnx.Module):
    """From pixels to the moments of the posterior."""

    def __init__(self, config: VAEConfig, **kinds):
        """Build the levels."""
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
        """Encode a chunk; return (moments, cache)."""
        filled = {}
        x, filled["conv_in"] = self.conv_in(Frames.of(pixels), cache and cache["conv_in"])
        x, filled["down_blocks"] = _through(self.down_blocks, x, cache and cache["down_blocks"])
        x, filled["mid"] = _through(self.mid, x, cache and cache["mid"])
        x, filled["conv_out"] = self.conv_out(self.norm_out(x), cache and cache["conv_out"])
        return x, filled


class Decoder(nnx.Module):
    """From latents to pixels."""

    def __init__(self, config: VAEConfig, **kinds):
        """Build the levels."""
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
        """Decode a chunk; return (pixels, cache). Only the first chunk of a clip can hold the lone first frame."""
        lone_first = cache is None and z.shape[1] % 2 == 1
        filled = {}
        x, filled["conv_in"] = self.conv_in(Frames.of(z), cache and cache["conv_in"])
        x, filled["mid"] = _through(self.mid, x, cache and cache["mid"], z, lone_first)
        x, filled["up_blocks"] = _through(self.up_blocks, x, cache and cache["up_blocks"], z, lone_first)
        x = self.norm_out(x, z, lone_first)
        x, filled["conv_out"] = self.conv_out(x, cache and cache["conv_out"])
        return x, filled


class VAE(nnx.Module):
    """Encodes pixels in [-1, 1] and decodes latents. A call is one scene; nothing is carried over to the next call."""

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs, dtype=jnp.float32, param_dtype=jnp.float32):
        """Build both halves.

        Args:
            config: sizes.
            rngs: of the initial parameters.
            dtype: of the computation; statistics of norms are in fp32 in any case.
            param_dtype: of the parameters.
        """
        kinds = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        self.config = config
        self.dtype = dtype
        self.encoder = Encoder(config, **kinds)
        self.decoder = Decoder(config, **kinds)

    def encode(self, pixels: Floats["b f h w c"]) -> Posterior:
        """Encode a clip: return the posterior, (b, 1 + (f-1)/4, h/8, w/8, latent_channels). One frame is an image.

        Raises:
            UserError: sizes are no multiple of 8, or the frames are neither 4k + 1 nor 4k.
        """
        first, *_ = self.config.encode_chunks(pixels.shape[1:4])
        moments = _in_chunks(self.encoder, self._placed(pixels), first.stop, ENCODE_CHUNK)
        return _posterior(moments)

    def decode(self, latents: Floats["b f h w c"], chunking: str = "mask2dit") -> Floats["b f_p h_p w_p c_p"]:
        """Decode latents to pixels about [-1, 1], in fp32.

        Args:
            latents: as the encoder makes them, with scaling_factor divided out.
            chunking: "mask2dit" decodes latent 0 alone and then two at a time, as the authors' code does; "diffusers"
                decodes two at a time, and three at first if their number is odd.
        """
        first, *_ = self.config.decode_chunks(latents.shape[1], chunking)
        return _in_chunks(self.decoder, self._placed(latents), first.stop, DECODE_CHUNK).astype(jnp.float32)

    def encode_chunk(self, pixels: Floats["b f h w c"], cache: Cache) -> tuple[Posterior, Cache]:
        """Encode one of the `encode_chunks` of a clip, for a caller that goes from chunk to chunk."""
        moments, cache = self.encoder(self._placed(pixels), cache)
        return _posterior(moments), _placed_cache(cache)

    def decode_chunk(self, latents: Floats["b f h w c"], cache: Cache) -> tuple[Floats["b f_p h_p w_p c_p"], Cache]:
        """Decode one of the `decode_chunks` of a clip."""
        pixels, cache = self.decoder(self._placed(latents), cache)
        return pixels.astype(jnp.float32), _placed_cache(cache)

    def _placed(self, x: Floats["b f h w c"]) -> Floats["b f h w c"]:
        return constrain(x.astype(self.dtype), FRAMES)


def _chunks(frames: int, first: int, size: int) -> list[slice]:
    edges = [0, *range(first, frames, size), frames]
    return [slice(start, stop) for start, stop in itertools.pairwise(edges)]


def _placed_cache(cache: Cache) -> Cache:
    """Shard the cache the same way after every chunk, so that one compiled program serves all that follow."""
    return jax.tree.map(lambda x: constrain(x, FRAMES), cache)


def _posterior(moments: Floats["b f h w c"]) -> Posterior:
    mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
    return Posterior(mean, jnp.clip(logvar, *LOGVAR_RANGE))


def _in_chunks(coder: Callable, x: Floats["b f h w c"], first: int, size: int) -> Floats["b f_y h_y w_y c_y"]:
    """Run `first` frames, then `size` at a time in one scan, then the rest, which only "mask2dit" leaves."""
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


SHARDING: Table = ((r".*", P()),)  # 0.2 B parameters, on every device; its activations are what is large

COGVIDEOX_VAE = Architecture((CLASS_NAME,), VAE, VAEConfig, lambda config: port_vae.TABLE, SHARDING)
