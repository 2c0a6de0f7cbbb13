"""Port table of the T5 encoder: transformers `T5EncoderModel` <-> `models.t5.T5Encoder`."""

from mask2dit_jax.models.port_rules import LINEAR, Rule

_BLOCK = "encoder.block.{layer}.layer"

TABLE = (
    # One tensor under two names; files hold either or both.
    Rule("shared.weight", "token_embedding.embedding", aliases=("encoder.embed_tokens.weight",)),
    # Only block 0 has a bias of its own; all blocks use it.
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
