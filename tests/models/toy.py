"""A model of a few parameters, one of them stacked, and its port table."""

import math

import jax.numpy as jnp
from flax import nnx

from mask2dit_jax.models.port_rules import CONV2D, LINEAR, Rule

TABLE = (
    Rule("embed.weight", "embed.embedding", aliases=("tied.weight",)),
    Rule("blocks.{layer}.w.weight", "blocks.kernel", LINEAR),
    Rule("blocks.{layer}.w.bias", "blocks.bias"),
    Rule("down.{i}.conv.weight", "down.{i}.kernel", CONV2D),
)


class Toy(nnx.Module):
    """Parameters count up, so that each element has its own value."""

    def __init__(self, width: int = 6, layers: int = 3, vocabulary: int = 10):
        self.embed = nnx.Dict(embedding=_param(vocabulary, width))
        self.blocks = nnx.Dict(kernel=_param(layers, width, 2 * width), bias=_param(layers, 2 * width))
        self.down = nnx.List([nnx.Dict(kernel=_param(3, 3, 2, 4)), nnx.Dict(kernel=_param(3, 3, 4, 8))])


def _param(*shape: int) -> nnx.Param:
    return nnx.Param(jnp.arange(math.prod(shape), dtype=jnp.float32).reshape(shape))


def abstract_toy(**sizes):
    return nnx.state(nnx.eval_shape(lambda: Toy(**sizes)))
