"""T5 v1.1 encoder (gated GELU, RMS norms, relative position bias), the text encoder of CogVideoX.

Reference: transformers `T5EncoderModel`, called as CogVideoX calls it: WITHOUT an attention mask. Prompts are padded to
a fixed length, and padding attends and is attended to like any other token, as when the released weights were trained.
Axes: b batch, t u text token, x width, k head, m head dimension.
"""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.nn.initializers import normal

from mask2dit_jax.axes import Floats, Ints, NpInts
from mask2dit_jax.errors import UserError
from mask2dit_jax.io.json_values import read_fields
from mask2dit_jax.models.architecture import Architecture
from mask2dit_jax.models.port_rules import LINEAR, Rule
from mask2dit_jax.parallel.mesh import TENSOR, WEIGHTS
from mask2dit_jax.parallel.sharding import ALL, P, Table

ACTIVATION = "gated-gelu"  # the tanh approximation of GELU, whatever the name says: transformers' "gelu_new"


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Sizes of the encoder.

    Attributes:
        vocab_size: number of token ids.
        width: channels of a token, x.
        hidden_width: hidden units of the feed-forward layers.
        num_layers: blocks.
        num_heads: attention heads, k.
        head_dim: channels of a head, m; `num_heads * head_dim` need not be `width`.
        num_buckets: buckets of the relative positions.
        max_distance: distance from which all positions share a bucket.
        norm_epsilon: epsilon of the RMS norms.
    """

    vocab_size: int
    width: int
    hidden_width: int
    num_layers: int
    num_heads: int
    head_dim: int
    num_buckets: int = 32
    max_distance: int = 128
    norm_epsilon: float = 1e-6

    @classmethod
    def xxl(cls) -> "T5Config":
        """Return the encoder of every CogVideoX: T5 v1.1 XXL, 4.76 B parameters."""
        return cls(vocab_size=32128, width=4096, hidden_width=10240, num_layers=24, num_heads=64, head_dim=64)

    @classmethod
    def tiny(cls) -> "T5Config":
        """Return the encoder of `assets/tiny`, whose weights are random (experiments/recipes/tiny_text.py)."""
        return cls(vocab_size=640, width=64, hidden_width=128, num_layers=2, num_heads=4, head_dim=16)

    @classmethod
    def from_json(cls, raw: Mapping) -> "T5Config":
        """Read the `config.json` of transformers; an absent key means transformers' default.

        Raises:
            UserError: it is another kind of T5, or a value is not a number.
        """
        activation = raw.get("feed_forward_proj", "relu")
        if activation != ACTIVATION:
            raise UserError(
                f"text encoder config: feed_forward_proj {activation!r} is not supported; "
                f"only T5 v1.1 encoders ({ACTIVATION!r}) are"
            )
        fields = dataclasses.fields(cls)
        return cls(**read_fields(raw, fields, "text encoder config", _JSON_NAMES, _JSON_DEFAULTS))

    def to_json(self) -> dict:
        """Return the `config.json` with which transformers' T5EncoderModel loads exported weights."""
        fixed = {
            "architectures": ["T5EncoderModel"],
            "model_type": "t5",
            "feed_forward_proj": ACTIVATION,
            "is_encoder_decoder": True,
            "tie_word_embeddings": False,
            "dropout_rate": 0.1,
            "initializer_factor": 1.0,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "decoder_start_token_id": 0,
        }
        return fixed | {key: getattr(self, name) for name, key in _JSON_NAMES.items()}


# Defaults of transformers' T5Config, which are the sizes of T5 small.
_JSON_DEFAULTS = {
    "vocab_size": 32128,
    "width": 512,
    "hidden_width": 2048,
    "num_layers": 6,
    "num_heads": 8,
    "head_dim": 64,
}
_JSON_NAMES = {
    "vocab_size": "vocab_size",
    "width": "d_model",
    "hidden_width": "d_ff",
    "num_layers": "num_layers",
    "num_heads": "num_heads",
    "head_dim": "d_kv",
    "num_buckets": "relative_attention_num_buckets",
    "max_distance": "relative_attention_max_distance",
    "norm_epsilon": "layer_norm_epsilon",
}


def position_buckets(num_tokens: int, num_buckets: int, max_distance: int) -> NpInts["t u"]:
    """Return the bucket of the distance from each query t to each key u.

    The upper half of the buckets is for keys after the query. In each half, the first half of the buckets holds one
    distance each, and the others grow logarithmically up to `max_distance`. Farther keys share the last bucket.
    """
    offsets = np.arange(num_tokens)[None, :] - np.arange(num_tokens)[:, None]
    half = num_buckets // 2
    exact = half // 2
    distances = np.abs(offsets)
    # fp32, as in the reference, so that a distance on the edge of two buckets falls on the same side.
    fractions = np.log(np.maximum(distances, 1).astype(np.float32) / exact) / np.float32(math.log(max_distance / exact))
    logarithmic = np.minimum(exact + (fractions * (half - exact)).astype(np.int32), half - 1)
    return (np.where(offsets > 0, half, 0) + np.where(distances < exact, distances, logarithmic)).astype(np.int32)


class T5Attention(nnx.Module):
    """Self-attention of T5, without biases and without scaling of the logits, which the initial queries absorb."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs, **dtypes):
        """Build the projections; `dtypes` are dtype and param_dtype, as in all classes below."""
        width, inner = config.width, config.num_heads * config.head_dim
        self.head_dim = config.head_dim
        self.query = _linear(width, inner, (width * config.head_dim) ** -0.5, rngs=rngs, **dtypes)
        self.key = _linear(width, inner, width**-0.5, rngs=rngs, **dtypes)
        self.value = _linear(width, inner, width**-0.5, rngs=rngs, **dtypes)
        self.out = _linear(inner, width, inner**-0.5, rngs=rngs, **dtypes)

    def __call__(self, x: Floats["b t x"], bias: Floats["k t t"]) -> Floats["b t x"]:
        """Attend, with `bias` added to the logits."""
        query, key, value = (self._split(project(x)) for project in (self.query, self.key, self.value))
        mixed = jax.nn.dot_product_attention(query, key, value, bias=bias[None], scale=1.0)
        return self.out(mixed.reshape(*x.shape[:-1], -1))

    def _split(self, x: Floats["b t km"]) -> Floats["b t k m"]:
        return x.reshape(*x.shape[:-1], -1, self.head_dim)


class Mlp(nnx.Module):
    """Gated feed-forward: `down(gelu(gate x) * up x)`."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs, **dtypes):
        """Build the layers."""
        width, hidden = config.width, config.hidden_width
        self.gate = _linear(width, hidden, width**-0.5, rngs=rngs, **dtypes)
        self.up = _linear(width, hidden, width**-0.5, rngs=rngs, **dtypes)
        self.down = _linear(hidden, width, hidden**-0.5, rngs=rngs, **dtypes)

    def __call__(self, x: Floats["b t x"]) -> Floats["b t x"]:
        """Apply the layers to every token."""
        return self.down(jax.nn.gelu(self.gate(x), approximate=True) * self.up(x))


class T5Block(nnx.Module):
    """Attention, then feed-forward, each behind its norm and added to the residual stream."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs, **dtypes):
        """Build the layers."""
        self.attn_norm = _rms_norm(config, rngs=rngs, **dtypes)
        self.attn = T5Attention(config, rngs=rngs, **dtypes)
        self.mlp_norm = _rms_norm(config, rngs=rngs, **dtypes)
        self.mlp = Mlp(config, rngs=rngs, **dtypes)

    def __call__(self, x: Floats["b t x"], bias: Floats["k t t"]) -> Floats["b t x"]:
        """Run the block; `bias` is that of the relative positions."""
        x = x + self.attn(self.attn_norm(x), bias)
        return x + self.mlp(self.mlp_norm(x))


class T5Encoder(nnx.Module):
    """Embeds token ids. The parameters of all blocks are stacked along a leading layer axis and run by one scan.

    Random parameters follow T5's initialisation, so that an untrained encoder already gives O(1) embeddings.
    """

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs, dtype=jnp.float32, param_dtype=jnp.float32):
        """Build the encoder.

        Args:
            config: sizes.
            rngs: of the initial parameters.
            dtype: of the computation.
            param_dtype: of the parameters.
        """
        dtypes = {"dtype": dtype, "param_dtype": param_dtype}
        self.config = config
        self.token_embedding = nnx.Embed(
            config.vocab_size, config.width, embedding_init=normal(1.0), rngs=rngs, **dtypes
        )
        self.relative_bias = nnx.Embed(
            config.num_buckets, config.num_heads, embedding_init=normal(config.width**-0.5), rngs=rngs, **dtypes
        )

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stacked_blocks(rngs):
            return T5Block(config, rngs=rngs, **dtypes)

        self.blocks = stacked_blocks(rngs)
        self.final_norm = _rms_norm(config, rngs=rngs, **dtypes)

    def __call__(self, input_ids: Ints["b t"]) -> Floats["b t x"]:
        """Embed padded prompts; padding is not masked (see the module's docstring)."""
        block_def, block_params = nnx.split(self.blocks)
        bias = self.position_bias(input_ids.shape[1])

        def run_block(x, params):
            return nnx.merge(block_def, params)(x, bias), None

        x, _ = jax.lax.scan(run_block, self.token_embedding(input_ids), block_params)
        return self.final_norm(x)

    def position_bias(self, num_tokens: int) -> Floats["k t t"]:
        """Return the bias of every block's attention logits; torch checkpoints store it with block 0."""
        buckets = position_buckets(num_tokens, self.config.num_buckets, self.config.max_distance)
        return self.relative_bias(jnp.asarray(buckets)).transpose(2, 0, 1)


def _linear(inputs: int, outputs: int, stddev: float, **kwargs) -> nnx.Linear:
    return nnx.Linear(inputs, outputs, use_bias=False, kernel_init=normal(stddev), **kwargs)


def _rms_norm(config: T5Config, **kwargs) -> nnx.RMSNorm:
    return nnx.RMSNorm(config.width, epsilon=config.norm_epsilon, **kwargs)


_BLOCK = "encoder.block.{layer}.layer"

PORT_TABLE = (  # of transformers' T5EncoderModel
    # One tensor with two names; files hold either or both.
    Rule("shared.weight", "token_embedding.embedding", aliases=("encoder.embed_tokens.weight",)),
    # Only block 0 stores a bias; all blocks use it.
    Rule("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "relative_bias.embedding"),
    Rule(f"{_BLOCK}.0.layer_norm.weight", "blocks.attn_norm.scale"),
    Rule(f"{_BLOCK}.0.SelfAttention.q.weight", "blocks.attn.query.kernel", LINEAR),
    Rule(f"{_BLOCK}.0.SelfAttention.k.weight", "blocks.attn.key.kernel", LINEAR),
    Rule(f"{_BLOCK}.0.SelfAttention.v.weight", "blocks.attn.value.kernel", LINEAR),
    Rule(f"{_BLOCK}.0.SelfAttention.o.weight", "blocks.attn.out.kernel", LINEAR),
    Rule(f"{_BLOCK}.1.layer_norm.weight", "blocks.mlp_norm.scale"),
    Rule(f"{_BLOCK}.1.DenseReluDense.wi_0.weight", "blocks.mlp.gate.kernel", LINEAR),
    Rule(f"{_BLOCK}.1.DenseReluDense.wi_1.weight", "blocks.mlp.up.kernel", LINEAR),
    Rule(f"{_BLOCK}.1.DenseReluDense.wo.weight", "blocks.mlp.down.kernel", LINEAR),
    Rule("encoder.final_layer_norm.weight", "final_norm.scale"),
)

# The encoder only runs forward: its parameters are sharded for memory, not for speed.
SHARDING: Table = (
    (r"token_embedding\.embedding", P(None, ALL)),
    (r"relative_bias\.embedding", P()),
    (r"blocks\.attn\.(query|key|value)\.kernel", P(None, WEIGHTS, TENSOR)),
    (r"blocks\.attn\.out\.kernel", P(None, TENSOR, WEIGHTS)),
    (r"blocks\.mlp\.(gate|up)\.kernel", P(None, WEIGHTS, TENSOR)),
    (r"blocks\.mlp\.down\.kernel", P(None, TENSOR, WEIGHTS)),
    (r"(blocks\.(attn|mlp)_norm|final_norm)\.scale", P()),
)

T5 = Architecture(("T5EncoderModel",), T5Encoder, T5Config, lambda config: PORT_TABLE, SHARDING)
