"""Port table of the CogVideoX transformer (diffusers CogVideoXTransformer3DModel)."""

from mask2dit_jax.models.dit import DiTConfig
from mask2dit_jax.models.port_rules import KEEP, LINEAR, Rule, Transform


def table(config: DiTConfig) -> tuple[Rule, ...]:
    """The rules; the patch size tells how the patch convolution becomes a matrix."""
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
