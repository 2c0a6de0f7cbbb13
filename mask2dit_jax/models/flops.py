"""What a DiT must compute: matrix FLOPs of one forward pass, counted from sizes alone.

A product of (a, b) and (b, c) is 2 a b c. A training step is three forward passes (values, and the gradients of inputs
and of weights); what rematerialisation repeats is not needed by the model and not counted.
"""

from mask2dit_jax.layout import SceneLayout
from mask2dit_jax.models.dit import DiTConfig
from mask2dit_jax.ops.masks import allowed_pairs

TRAINING = 3  # forward passes in a training step


def matmul_flops(config: DiTConfig, layout: SceneLayout) -> int:
    """Of one sample, attention's products of queries, keys and values excepted."""
    d, e, scenes = config.width, config.time_embed_dim, layout.num_scenes
    video = layout.num_tokens - layout.num_text_tokens
    patch = config.patch_size**2 * config.latent_channels
    block = layout.num_tokens * 12 * d * d + scenes * e * 12 * d  # projections 4, feed-forward 8; two adaLN of 6 each
    ends = layout.num_text_tokens * config.text_embed_dim * d + 2 * video * patch * d + scenes * e * 2 * d
    time = scenes * (d * e + e * e)
    return 2 * (config.num_layers * block + ends + time)


def attention_flops(config: DiTConfig, layout: SceneLayout) -> int:
    """Of one sample: logits and weighted values of the pairs that the mask allows."""
    return 2 * 2 * config.width * allowed_pairs(config.mask, layout) * config.num_layers


def training_flops(config: DiTConfig, layout: SceneLayout, trained_share: float = 1.0) -> float:
    """Of one sample: a training step that needs the gradients of this share of the weights, by size."""
    passes = TRAINING - 1 + trained_share
    return passes * matmul_flops(config, layout) + TRAINING * attention_flops(config, layout)
