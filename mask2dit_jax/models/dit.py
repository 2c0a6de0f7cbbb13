"""The CogVideoX diffusion transformer for multi-scene video (reference: MultiPromptCogVideoXTransformer3DModel).

Text and video tokens of all scenes go through every block as one sequence `[T_1 .. T_n ; V_1 .. V_n]`. Modulation tells
them apart: every segment (scene x {text, video}) has a shift, scale and gate that are made from the timestep of its
scene. So a conditional scene needs no code of its own; it is a scene with t = 0.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Float

from mask2dit_jax.axes import Floats, Ints, NpInts
from mask2dit_jax.config import MASKS, LoRAConfig
from mask2dit_jax.errors import UserError
from mask2dit_jax.io.json_values import read_fields
from mask2dit_jax.layout import SceneLayout
from mask2dit_jax.models.lora import AdaptedLinear
from mask2dit_jax.ops import positions
from mask2dit_jax.ops.attention.api import attend
from mask2dit_jax.ops.attention.residuals import RESIDUALS
from mask2dit_jax.parallel.sharding import HEADS, HIDDEN, SAMPLES, TOKENS, constrain

# What the same model is called in diffusers, and in the authors' code.
CLASS_NAMES = ("CogVideoXTransformer3DModel", "MultiPromptCogVideoXTransformer3DModel")
QK_NORM_EPS = 1e-6  # fixed in the reference; the other norms read norm_eps

_DOTS = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
_ATTENTION = jax.checkpoint_policies.save_only_these_names(RESIDUALS)
REMAT_POLICIES = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "attention": _ATTENTION,
    "dots": jax.checkpoint_policies.save_from_both_policies(_DOTS, _ATTENTION),
}


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    """Sizes of the model, and how it is run. `_JSON_NAMES` maps the sizes to the names in config.json.

    Attributes:
        num_heads: attention heads.
        head_dim: channels of a head.
        num_layers: blocks.
        latent_channels: channels of the VAE's latents.
        patch_size: latent rows and columns of one video token.
        time_embed_dim: width of the timestep embedding.
        text_embed_dim: width of the text encoder's embeddings.
        text_tokens: text tokens of each scene, padding included.
        rope: rotary positions (5B); otherwise a table of sines and cosines (2B).
        sample_height: latent rows that the base model was trained with; with the next two it fixes the base grid of the
            positions.
        sample_width: latent columns that the base model was trained with.
        sample_frames: pixel frames of one scene that the base model was trained with.
        temporal_compression: pixel frames that become one latent frame.
        spatial_interpolation_scale: divides rows and columns in the position table (2B).
        temporal_interpolation_scale: divides frames in the position table (2B).
        flip_sin_to_cos: whether cosines come first in the timestep's sinusoid.
        freq_shift: of the frequencies of that sinusoid.
        norm_eps: epsilon of the layer norms, except those of queries and keys.
        attention_bias: whether the projections to queries, keys and values have a bias.
        mask: attention mask variant, v1..v5.
        attention: implementation of `ops.attention.api.attend`.
        remat: what the backward pass computes again in a block: "none" nothing, "full" everything, "attention"
            everything but attention (which saves a seventh of the 5B's roofline step), "dots" everything but matrix
            products and attention.
        lora: adapters to train instead of the weights; diffusers' config.json has no such field.
    """

    num_heads: int
    head_dim: int
    num_layers: int
    latent_channels: int = 16
    patch_size: int = 2
    time_embed_dim: int = 512
    text_embed_dim: int = 4096
    text_tokens: int = 226
    rope: bool = True
    sample_height: int = 60
    sample_width: int = 90
    sample_frames: int = 49
    temporal_compression: int = 4
    spatial_interpolation_scale: float = 1.875
    temporal_interpolation_scale: float = 1.0
    flip_sin_to_cos: bool = True
    freq_shift: float = 0.0
    norm_eps: float = 1e-5
    attention_bias: bool = True
    mask: str = "v2"
    attention: str = "grouped"
    remat: str = "none"
    lora: LoRAConfig | None = None

    def __post_init__(self):
        """Raise UserError for widths that the axes of the positions cannot share."""
        split, dim = ("head_dim", self.head_dim) if self.rope else ("num_heads * head_dim", self.width)
        if dim % 16:  # a quarter for time and three eighths for each spatial axis, all in pairs
            raise UserError(f"{split}={dim} cannot be split over the axes of the positions; give a multiple of 16")

    @classmethod
    def cogvideox_2b(cls, **overrides) -> "DiTConfig":
        """Return the sizes of CogVideoX-2B, with fields replaced by `overrides`."""
        return cls(num_heads=30, head_dim=64, num_layers=30, rope=False, **overrides)

    @classmethod
    def cogvideox_5b(cls, **overrides) -> "DiTConfig":
        """Return the sizes of CogVideoX-5B and of the released Mask2DiT, with fields replaced by `overrides`."""
        return cls(num_heads=48, head_dim=64, num_layers=42, rope=True, **overrides)

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.num_heads * self.head_dim

    @property
    def base_grid(self) -> tuple[int, int]:
        """Rows and columns of tokens of the base model."""
        return self.sample_height // self.patch_size, self.sample_width // self.patch_size

    @property
    def base_frames(self) -> int:
        """Latent frames of one scene of the base model."""
        return (self.sample_frames - 1) // self.temporal_compression + 1

    @property
    def activation_width(self) -> int:
        """Channels per token that a block holds at once: two residual streams and the feed-forward's hidden units."""
        return (2 + 4) * self.width

    def layout(self, frames: tuple[int, ...], height: int, width: int) -> SceneLayout:
        """Return the layout of scenes of `frames` latent frames each, at latent height x width.

        Raises:
            UserError: patches do not divide height and width.
        """
        if height % self.patch_size or width % self.patch_size:
            raise UserError(f"latents of {height} x {width} cannot be cut into patches of {self.patch_size}")
        return SceneLayout(tuple(frames), (height // self.patch_size, width // self.patch_size), self.text_tokens)

    def check_positions(self, layout: SceneLayout) -> None:
        """Raise UserError if the model has no positions for a layout: the table of the 2B ends, rotations do not."""
        if not self.rope:
            positions.check_table(layout, self.base_frames)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> "DiTConfig":
        """Read the `transformer/config.json` of a diffusers directory.

        An absent key means diffusers' default: sin-cos positions, and the sizes of CogVideoX-2b.

        Raises:
            UserError: it is not the config of a transformer, or a value is not supported.
        """
        for key, wanted in _SUPPORTED.items():
            if raw.get(key, wanted) != wanted:
                raise UserError(f"transformer config.json: {key}={raw[key]!r} is not supported, only {wanted!r} is")
        if not any(key in raw for key in _JSON_NAMES.values()):
            raise UserError("transformer config.json: it holds no size; is it a CogVideoX transformer?")
        stored = [field for field in dataclasses.fields(cls) if field.name in _JSON_NAMES]
        fields = read_fields(raw, stored, "transformer config.json", _JSON_NAMES, _JSON_DEFAULTS)
        out_channels = raw.get("out_channels", 16)
        if out_channels not in (None, fields["latent_channels"]):
            raise UserError(
                f"transformer config.json: out_channels={out_channels} differs from "
                f"in_channels={fields['latent_channels']}; image-to-video and inpainting models are not supported"
            )
        mask = f"v{raw.get('attn_msk_version', 2)}"
        if mask not in MASKS:
            raise UserError(
                f"transformer config.json: attn_msk_version={raw['attn_msk_version']!r} is not one of "
                f"{', '.join(name.removeprefix('v') for name in MASKS)}"
            )
        return cls(mask=mask, **fields)

    def to_json(self) -> dict[str, Any]:
        """Return the `transformer/config.json` that diffusers and the authors' code read."""
        return {
            "_class_name": CLASS_NAMES[0],
            **{key: getattr(self, name) for name, key in _JSON_NAMES.items()},
            **_SUPPORTED,
            "out_channels": self.latent_channels,
            "attn_msk_version": int(self.mask.removeprefix("v")),
        }


_JSON_NAMES = {
    "num_heads": "num_attention_heads",
    "head_dim": "attention_head_dim",
    "num_layers": "num_layers",
    "latent_channels": "in_channels",
    "patch_size": "patch_size",
    "time_embed_dim": "time_embed_dim",
    "text_embed_dim": "text_embed_dim",
    "text_tokens": "max_text_seq_length",
    "rope": "use_rotary_positional_embeddings",
    "sample_height": "sample_height",
    "sample_width": "sample_width",
    "sample_frames": "sample_frames",
    "temporal_compression": "temporal_compression_ratio",
    "spatial_interpolation_scale": "spatial_interpolation_scale",
    "temporal_interpolation_scale": "temporal_interpolation_scale",
    "flip_sin_to_cos": "flip_sin_to_cos",
    "freq_shift": "freq_shift",
    "norm_eps": "norm_eps",
    "attention_bias": "attention_bias",
}
# Defaults of diffusers' CogVideoXTransformer3DModel where ours are those of the 5B or there is none.
_JSON_DEFAULTS = {"num_heads": 30, "head_dim": 64, "num_layers": 30, "rope": False}
_SUPPORTED = {
    "patch_size_t": None,
    "activation_fn": "gelu-approximate",
    "timestep_activation_fn": "silu",
    "norm_elementwise_affine": True,
    "dropout": 0.0,
    "use_learned_positional_embeddings": False,
    "patch_bias": True,
}


class Modulation(nnx.Module):
    """adaLN: makes `parts` vectors for each of `kinds` token kinds from the time embedding of each scene.

    Its kernel starts at zero when trained from scratch, so that every block starts as the identity.
    """

    def __init__(self, config: DiTConfig, kinds: int, parts: int, **kwargs):
        """Build the layer; `kwargs` are those of every layer below: rngs, dtype and param_dtype."""
        self.kinds, self.parts = kinds, parts
        zeros = nnx.initializers.zeros_init()
        self.linear = nnx.Linear(config.time_embed_dim, kinds * parts * config.width, kernel_init=zeros, **kwargs)

    def __call__(self, time: Floats["b s e"]) -> Floats["b kinds s parts d"]:
        """Make the vectors of every scene and kind."""
        flat = constrain(self.linear(jax.nn.silu(time)), SAMPLES)
        return rearrange(flat, "b s (kinds parts d) -> b kinds s parts d", kinds=self.kinds, parts=self.parts)


def _layer_norm(width: int, epsilon: float, **kwargs) -> nnx.LayerNorm:
    # The fast variance, E[x^2] - E[x]^2, loses digits that parity with the reference needs.
    return nnx.LayerNorm(width, epsilon=epsilon, use_fast_variance=False, **kwargs)


def _per_token(one_hot: Float[np.ndarray, "l g"], per_group: Floats["b g p d"]) -> list[Floats["b l d"]]:
    """Return the vectors of each token's group, one array for each of the p parts.

    It is a product with a one-hot matrix instead of a gather, so that its gradient is a product instead of a scatter.
    """
    one_hot = jnp.broadcast_to(one_hot.astype(per_group.dtype), (len(per_group), *one_hot.shape))
    return [jnp.einsum("blg,bgd->bld", one_hot, part, precision="highest") for part in jnp.unstack(per_group, axis=2)]


class AdaLayerNormZero(nnx.Module):
    """LayerNorm with a shift, scale and gate for each segment (reference: CogVideoXLayerNormZero)."""

    def __init__(self, config: DiTConfig, **kwargs):
        """Build the layer."""
        self.modulation = Modulation(config, kinds=2, parts=3, **kwargs)
        self.norm = _layer_norm(config.width, config.norm_eps, **kwargs)

    def __call__(self, x: Floats["b l d"], time: Floats["b s e"], segments: Float[np.ndarray, "l g"]):
        """Return (normalised tokens, gate), both (b l d); `segments` is the one-hot matrix of the tokens' segments."""
        video, text = jnp.unstack(self.modulation(time), axis=1)  # the reference's order of kinds
        per_segment = jnp.concatenate([text, video], axis=1)  # segments in token order: all texts, all videos
        shift, scale, gate = _per_token(segments, per_segment)
        return self.norm(x) * (1 + scale) + shift, gate


class JointAttention(nnx.Module):
    """Joint self-attention of text and video tokens, with a LayerNorm on every head's queries and keys."""

    def __init__(self, config: DiTConfig, **kwargs):
        """Build the projections and norms."""
        self.config = config
        width = config.width
        self.query, self.key, self.value = (
            AdaptedLinear(width, width, use_bias=config.attention_bias, lora=config.lora, **kwargs) for _ in range(3)
        )
        self.out = AdaptedLinear(width, width, lora=config.lora, **kwargs)
        self.norm_q = _layer_norm(config.head_dim, QK_NORM_EPS, **kwargs)
        self.norm_k = _layer_norm(config.head_dim, QK_NORM_EPS, **kwargs)

    def __call__(self, x: Floats["b l d"], rope, layout: SceneLayout) -> Floats["b l d"]:
        """Attend under the config's mask; `rope` is the table of rotations, None without any."""
        heads = (rearrange(f(x), "b l (k m) -> b l k m", m=self.config.head_dim) for f in self._projections())
        q, k, v = heads
        q, k = self.norm_q(q), self.norm_k(k)
        if rope is not None:
            q, k = positions.rotate(q, rope), positions.rotate(k, rope)
        q, k, v = (constrain(x, HEADS) for x in (q, k, v))
        out = attend(q, k, v, mask=self.config.mask, layout=layout, implementation=self.config.attention)
        return self.out(rearrange(out, "b l k m -> b l (k m)"))

    def _projections(self):
        return self.query, self.key, self.value


class FeedForward(nnx.Module):
    """Two linear layers with GELU between them, four times as wide inside."""

    def __init__(self, config: DiTConfig, **kwargs):
        """Build the layers."""
        self.up = AdaptedLinear(config.width, 4 * config.width, lora=config.lora, **kwargs)
        self.down = AdaptedLinear(4 * config.width, config.width, lora=config.lora, **kwargs)

    def __call__(self, x: Floats["b l d"]) -> Floats["b l d"]:
        """Apply the layers to every token."""
        return self.down(constrain(jax.nn.gelu(self.up(x), approximate=True), HIDDEN))


class DiTBlock(nnx.Module):
    """Attention, then feed-forward, each behind its adaLN and gated into the residual stream."""

    def __init__(self, config: DiTConfig, **kwargs):
        """Build the layers."""
        self.norm1 = AdaLayerNormZero(config, **kwargs)
        self.attn = JointAttention(config, **kwargs)
        self.norm2 = AdaLayerNormZero(config, **kwargs)
        self.mlp = FeedForward(config, **kwargs)

    def __call__(self, x: Floats["b l d"], time: Floats["b s e"], rope, segments, layout: SceneLayout):
        """Run the block on the tokens of all scenes."""
        h, gate = self.norm1(x, time, segments)
        x = x + gate * self.attn(h, rope, layout)
        h, gate = self.norm2(x, time, segments)
        return x + gate * self.mlp(h)


class TimeEmbedding(nnx.Module):
    """Sinusoid of the timestep, then two linear layers (reference: Timesteps and TimestepEmbedding)."""

    def __init__(self, config: DiTConfig, **kwargs):
        """Build the layers."""
        self.config = config
        self.linear_1 = nnx.Linear(config.width, config.time_embed_dim, **kwargs)
        self.linear_2 = nnx.Linear(config.time_embed_dim, config.time_embed_dim, **kwargs)

    def __call__(self, timesteps: Ints["b s"]) -> Floats["b s e"]:
        """Embed the timestep of every scene."""
        half = self.config.width // 2
        frequencies = np.exp(-math.log(10_000) * np.arange(half) / (half - self.config.freq_shift))
        angles = timesteps[..., None].astype(jnp.float32) * frequencies.astype(np.float32)
        waves = [jnp.sin(angles), jnp.cos(angles)]
        if self.config.flip_sin_to_cos:
            waves.reverse()
        return self.linear_2(jax.nn.silu(self.linear_1(jnp.concatenate(waves, axis=-1))))


class DiT(nnx.Module):
    """Predicts v for every scene of a multi-scene video.

    The parameters of all blocks are stacked along a leading layer axis and run by one scan, so that compile time does
    not grow with depth.
    """

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs, dtype=jnp.float32, param_dtype=jnp.float32):
        """Build the model.

        Args:
            config: sizes and run settings.
            rngs: of the initial parameters.
            dtype: of the computation. Norm statistics, softmax and rotations are in fp32 in any case.
            param_dtype: of the parameters.
        """
        if config.remat not in REMAT_POLICIES:
            raise UserError(f"remat {config.remat!r} does not exist; choose one of {', '.join(REMAT_POLICIES)}")
        kwargs = {"dtype": dtype, "param_dtype": param_dtype}
        self.config, self.dtype = config, dtype
        patch_dim = config.patch_size**2 * config.latent_channels
        self.patch_embed = nnx.Linear(patch_dim, config.width, rngs=rngs, **kwargs)
        self.text_embed = nnx.Linear(config.text_embed_dim, config.width, rngs=rngs, **kwargs)
        self.time_embed = TimeEmbedding(config, rngs=rngs, **kwargs)
        self.blocks = _stack(lambda r: DiTBlock(config, rngs=r, **kwargs), config.num_layers, rngs)
        self.norm_final = _layer_norm(config.width, config.norm_eps, rngs=rngs, **kwargs)
        self.modulation_out = Modulation(config, kinds=1, parts=2, rngs=rngs, **kwargs)
        self.norm_out = _layer_norm(config.width, config.norm_eps, rngs=rngs, **kwargs)
        zeros = nnx.initializers.zeros_init()
        self.proj_out = nnx.Linear(config.width, patch_dim, kernel_init=zeros, rngs=rngs, **kwargs)

    def __call__(
        self,
        latents: Floats["b f h w c"],
        text: Floats["b s t x"],
        timesteps: Ints["b s"],
        *,
        layout: SceneLayout,
        intermediates: bool = False,
    ):
        """Predict v for all frames.

        Args:
            latents: noisy latents of the scenes, joined along f and already multiplied by the VAE's scaling factor.
            text: T5 embeddings of each scene's prompt. Padding is attended to, as in the reference.
            timesteps: timestep of each scene, 0..999.
            layout: of the scenes.
            intermediates: also return {"time", "embedded", "blocks"}, with which a parity test bisects a difference.

        Returns:
            v, (b f h w c), and the intermediates if asked for.
        """
        self._check(latents, text, layout)
        time = self.time_embed(timesteps)
        x = embedded = self._embed(latents, text, layout)
        x, blocks = self._run_blocks(x, time, layout, keep_all=intermediates)
        out = self._unembed(x, time, layout)
        if not intermediates:
            return out
        return out, {"time": time, "embedded": embedded, "blocks": blocks}

    def _check(self, latents, text, layout):
        p = self.config.patch_size
        shapes = latents.shape[1:4], text.shape[1:3]
        wanted = (layout.num_frames, layout.grid[0] * p, layout.grid[1] * p), (layout.num_scenes, layout.text_tokens)
        if shapes != wanted:
            raise UserError(f"latents (f h w) and text (s t) are {shapes}, but {layout} wants {wanted}")

    def _embed(self, latents, text, layout) -> Floats["b l d"]:
        p = self.config.patch_size
        num_text = layout.num_text_tokens
        patches = rearrange(latents, "b f (h p) (w q) c -> b (f h w) (p q c)", p=p, q=p)
        # Padded to all tokens before the projection, because neither part alone divides over the mesh.
        video = constrain(self.patch_embed(constrain(_after_text(patches, num_text), TOKENS)), TOKENS)
        if not self.config.rope:
            table = positions.sincos_table(
                layout,
                (self.config.base_frames, *self.config.base_grid),
                self.config.width,
                self.config.spatial_interpolation_scale,
                self.config.temporal_interpolation_scale,
            )
            video += _after_text(table, num_text).astype(video.dtype)
        token = jnp.arange(layout.num_tokens)[:, None]
        # One-hot again, because the gradient of a gather would bring the tokens of all chips to each chip.
        place = (token == jnp.arange(num_text)).astype(video.dtype)
        text = constrain(rearrange(self.text_embed(text), "b s t d -> b (s t) d"), SAMPLES)
        text = jnp.einsum("lt,btd->bld", place, text, precision="highest")
        return constrain(jnp.where(token < num_text, text, video), TOKENS)

    def _run_blocks(self, x, time, layout, keep_all):
        rope = None
        if self.config.rope:
            rope = positions.rope_table(layout, self.config.base_grid, self.config.head_dim)
        lengths = [segment.stop - segment.start for segment in layout.segments]
        segments = _one_hot(np.repeat(np.arange(len(lengths)), lengths), len(lengths))
        graph, params = nnx.split(self.blocks)

        def body(x, layer):
            x = constrain(nnx.merge(graph, layer)(x, time, rope, segments, layout), TOKENS)
            return x, x if keep_all else None

        if self.config.remat != "none":
            # The scan already prevents the merging of computations that prevent_cse guards against.
            body = jax.checkpoint(body, policy=REMAT_POLICIES[self.config.remat], prevent_cse=False)
        return jax.lax.scan(body, x, params)

    def _unembed(self, x, time, layout) -> Floats["b f h w c"]:
        (h, w), p = layout.grid, self.config.patch_size
        scenes = _one_hot(layout.token_scenes, layout.num_scenes)
        shift, scale = _per_token(scenes, self.modulation_out(time)[:, 0])
        x = self.proj_out(self.norm_out(self.norm_final(x)) * (1 + scale) + shift)
        video = constrain(constrain(x, TOKENS)[:, layout.num_text_tokens :], SAMPLES)
        # The reference's patches have their channels first.
        return rearrange(video, "b (f h w) (c p q) -> b f (h p) (w q) c", h=h, w=w, p=p, q=p)


def _stack(make, num_layers: int, rngs: nnx.Rngs):
    """Build num_layers modules as one whose parameters have a leading layer axis."""
    return nnx.split_rngs(splits=num_layers)(nnx.vmap(make))(rngs)


def _one_hot(groups: NpInts[" l"], count: int) -> Float[np.ndarray, "l g"]:
    """Return the matrix whose row l has its 1 at the group of token l."""
    return np.eye(count, dtype=np.float32)[groups]


def _after_text(x: Floats["... v c"], num_text_tokens: int) -> Floats["... l c"]:
    """Place video tokens among all tokens, with zeros for the text tokens."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(num_text_tokens, 0), (0, 0)])
