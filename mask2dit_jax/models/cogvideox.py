"""CogVideoX as a backbone: the tables and FLOPs of `models.dit`."""

from mask2dit_jax.layout import SceneLayout
from mask2dit_jax.models.backbone import Backbone
from mask2dit_jax.models.dit import CLASS_NAMES, DiT, DiTConfig
from mask2dit_jax.models.port_rules import KEEP, LINEAR, Rule, Transform
from mask2dit_jax.ops.masks import allowed_pairs
from mask2dit_jax.parallel.mesh import TENSOR, WEIGHTS
from mask2dit_jax.parallel.sharding import ALL, P, Table

# Kernels are (layer, in, out) in the blocks and (in, out) outside. The large axis of each is sharded over WEIGHTS;
# heads and hidden units over TENSOR, so that a block exchanges activations twice, after `out` and after `down`.
SHARDING: Table = (
    (r"blocks\.attn\.(query|key|value)\.kernel", P(None, WEIGHTS, TENSOR)),
    (r"blocks\.attn\.(query|key|value)\.bias", P(None, TENSOR)),
    (r"blocks\.attn\.out\.kernel", P(None, TENSOR, WEIGHTS)),
    (r"blocks\.attn\.norm_[qk]\.(scale|bias)", P()),
    (r"blocks\.mlp\.up\.kernel", P(None, WEIGHTS, TENSOR)),
    (r"blocks\.mlp\.up\.bias", P(None, TENSOR)),
    (r"blocks\.mlp\.down\.kernel", P(None, TENSOR, WEIGHTS)),
    (r"blocks\.norm[12]\.modulation\.linear\.kernel", P(None, None, ALL)),
    (r"blocks\.norm[12]\.modulation\.linear\.bias", P(None, ALL)),
    (r"blocks\.(attn\.out|mlp\.down|norm[12]\.norm)\.(scale|bias)", P()),
    (r"modulation_out\.linear\.kernel", P(None, ALL)),
    (r"(text_embed|time_embed\.linear_[12])\.kernel", P(ALL, None)),
    (r"(patch_embed|proj_out)\.kernel", P()),  # small, and used on all tokens
    (r"(patch_embed|text_embed|time_embed\.linear_[12]|modulation_out\.linear|proj_out)\.bias", P()),
    (r"norm_(final|out)\.(scale|bias)", P()),
    # LoRA: each adapter is sharded as the side of the kernel that it stands beside.
    (r"blocks\.(attn\.(query|key|value)|mlp\.up)\.lora_a", P(None, WEIGHTS, None)),
    (r"blocks\.(attn\.(query|key|value)|mlp\.up)\.lora_b", P(None, None, TENSOR)),
    (r"blocks\.(attn\.out|mlp\.down)\.lora_a", P(None, TENSOR, None)),
    (r"blocks\.(attn\.out|mlp\.down)\.lora_b", P(None, None, WEIGHTS)),
)


def port_table(config: DiTConfig) -> tuple[Rule, ...]:
    """Return the port rules of diffusers' CogVideoXTransformer3DModel.

    They depend on the patch size, by which the patch convolution becomes a matrix.
    """
    p = config.patch_size
    patch_in = Transform(  # (d, c, p, q) <-> (p q c, d): a convolution of stride p is a product with flattened patches
        lambda x: x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0]),
        lambda x: x.reshape(p, p, -1, x.shape[-1]).transpose(3, 2, 0, 1),
    )
    block = "transformer_blocks.{layer}."
    return (
        Rule("patch_embed.proj.weight", "patch_embed.kernel", patch_in),
        Rule("patch_embed.proj.bias", "patch_embed.bias"),
        *_linear("patch_embed.text_proj", "text_embed"),
        *_linear("time_embedding.linear_1", "time_embed.linear_1"),
        *_linear("time_embedding.linear_2", "time_embed.linear_2"),
        *(rule for i in "12" for rule in _linear(f"{block}norm{i}.linear", f"blocks.norm{i}.modulation.linear")),
        *(rule for i in "12" for rule in _norm(f"{block}norm{i}.norm", f"blocks.norm{i}.norm")),
        *_linear(f"{block}attn1.to_q", "blocks.attn.query"),
        *_linear(f"{block}attn1.to_k", "blocks.attn.key"),
        *_linear(f"{block}attn1.to_v", "blocks.attn.value"),
        *_linear(f"{block}attn1.to_out.0", "blocks.attn.out"),
        *_norm(f"{block}attn1.norm_q", "blocks.attn.norm_q"),
        *_norm(f"{block}attn1.norm_k", "blocks.attn.norm_k"),
        *_linear(f"{block}ff.net.0.proj", "blocks.mlp.up"),
        *_linear(f"{block}ff.net.2", "blocks.mlp.down"),
        *_norm("norm_final", "norm_final"),
        *_linear("norm_out.linear", "modulation_out.linear"),
        *_norm("norm_out.norm", "norm_out"),
        *_linear("proj_out", "proj_out"),
    )


def _linear(key: str, path: str) -> tuple[Rule, ...]:
    return Rule(f"{key}.weight", f"{path}.kernel", LINEAR), Rule(f"{key}.bias", f"{path}.bias", KEEP)


def _norm(key: str, path: str) -> tuple[Rule, ...]:
    return Rule(f"{key}.weight", f"{path}.scale"), Rule(f"{key}.bias", f"{path}.bias")


def matmul_flops(config: DiTConfig, layout: SceneLayout) -> int:
    """Return the FLOPs of one sample's forward pass, without attention's products of queries, keys and values.

    They are counted from sizes alone; a product of (a, b) and (b, c) takes 2 a b c.
    """
    d, e, scenes = config.width, config.time_embed_dim, layout.num_scenes
    video = layout.num_tokens - layout.num_text_tokens
    patch = config.patch_size**2 * config.latent_channels
    block = layout.num_tokens * 12 * d * d + scenes * e * 12 * d  # projections 4, feed-forward 8; two adaLN of 6 each
    ends = layout.num_text_tokens * config.text_embed_dim * d + 2 * video * patch * d + scenes * e * 2 * d
    time = scenes * (d * e + e * e)
    return 2 * (config.num_layers * block + ends + time)


def attention_flops(config: DiTConfig, layout: SceneLayout) -> int:
    """Return the FLOPs of one sample's attention: logits and weighted values of the pairs that the mask allows."""
    return 2 * 2 * config.width * allowed_pairs(config.mask, layout) * config.num_layers


COGVIDEOX = Backbone(
    class_names=CLASS_NAMES,
    module=DiT,
    config=DiTConfig,
    port_table=port_table,
    sharding_table=SHARDING,
    sizes={"2b": DiTConfig.cogvideox_2b, "5b": DiTConfig.cogvideox_5b},
    matmul_flops=matmul_flops,
    attention_flops=attention_flops,
    supports_lora=True,
)
