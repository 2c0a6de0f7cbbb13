"""The counted FLOPs equal those that XLA counts for the same model with dense, unmasked attention."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from mask2dit_jax.models.cogvideox import attention_flops, matmul_flops
from mask2dit_jax.models.dit import DiT, DiTConfig


@pytest.mark.parametrize("rope", [True, False])
def test_against_xla(rope):
    config = DiTConfig(2, 64, 1, text_embed_dim=256, text_tokens=64, rope=rope, mask="v5", attention="dense")
    layout = config.layout((2, 2), 16, 16)
    model = nnx.eval_shape(lambda: DiT(config, rngs=nnx.Rngs(0)))
    inputs = (
        jax.ShapeDtypeStruct((1, layout.num_frames, 16, 16, 16), jnp.float32),
        jax.ShapeDtypeStruct((1, 2, 64, 256), jnp.float32),
        jax.ShapeDtypeStruct((1, 2), jnp.int32),
    )
    graph, params = nnx.split(model)
    run = jax.jit(lambda params, *inputs: nnx.merge(graph, params)(*inputs, layout=layout))
    counted = run.lower(params, *inputs).cost_analysis()["flops"]
    ours = matmul_flops(config, layout) + attention_flops(config, layout)
    assert ours < counted < 1.15 * ours  # XLA counts norms, softmax and one-hot products too


def test_masks_need_less():
    config = DiTConfig.cogvideox_5b()
    layout = config.layout((13, 13, 13), 60, 90)
    tokens = layout.num_tokens
    assert tokens == 53_328
    assert attention_flops(config, layout) < 4 * config.width * tokens**2 * config.num_layers
    v1 = DiTConfig.cogvideox_5b(mask="v1")
    assert attention_flops(v1, layout) == 4 * config.width * tokens**2 // 3 * config.num_layers
