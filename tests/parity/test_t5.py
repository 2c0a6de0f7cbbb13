"""The T5 encoder against the authors' run, block by block, and against the live transformers class."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import T5Config as TorchT5Config
from transformers import T5EncoderModel

from mask2dit_jax.models.t5 import PORT_TABLE, T5Config, T5Encoder
from tests.parity.cases import assert_close, cases, load

TOLERANCE = 5e-5


def ported(raw_config, tensors, **dtypes) -> T5Encoder:
    config = T5Config.from_json(raw_config)
    return load(lambda: T5Encoder(config, rngs=nnx.Rngs(0), **dtypes), PORT_TABLE, tensors)


def case_encoder(case, **dtypes) -> T5Encoder:
    return ported(case.config["model"], case.weights(case.config["weights"]), **dtypes)


def block_outputs(encoder: T5Encoder, input_ids):
    """Return the text after each block, run one at a time instead of in a scan."""
    graph, stacked = nnx.split(encoder.blocks)
    x, bias = encoder.token_embedding(input_ids), encoder.position_bias(input_ids.shape[1])
    for layer in range(encoder.config.num_layers):
        x = nnx.merge(graph, jax.tree.map(lambda leaf, layer=layer: leaf[layer], stacked))(x, bias)
        yield x


def relative_error(actual, expected) -> float:
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("case", cases("t5"))
def test_equals_the_authors_run(case):
    encoder, arrays = case_encoder(case), case.arrays
    input_ids = jnp.asarray(arrays["input_ids"])
    assert_close(encoder.position_bias(input_ids.shape[1]), arrays["position_bias"][0], TOLERANCE)
    blocks = list(block_outputs(encoder, input_ids))
    for key in (key for key in arrays if key.startswith("dbg_block")):
        assert_close(blocks[int(key.removeprefix("dbg_block"))], arrays[key], TOLERANCE)
    assert_close(nnx.jit(encoder)(input_ids), arrays["output"], TOLERANCE)


@pytest.mark.parametrize("case", cases("t5"))
def test_bf16_stays_close(case):
    encoder = case_encoder(case, dtype=jnp.bfloat16)
    out = nnx.jit(encoder)(jnp.asarray(case.arrays["input_ids"]))
    assert out.dtype == jnp.bfloat16
    assert relative_error(out, case.arrays["output"]) < 2e-2


GATED = {"feed_forward_proj": "gated-gelu"}
CONFIGS = {
    "one-layer-long": {"num_layers": 1, "num_heads": 4, "d_kv": 16, "d_model": 64, "d_ff": 96, "tokens": 226},
    "heads-wider-than-model": {"num_layers": 3, "num_heads": 5, "d_kv": 24, "d_model": 40, "d_ff": 112, "tokens": 37},
    "few-buckets": {
        **{"num_layers": 2, "num_heads": 2, "d_kv": 8, "d_model": 48, "d_ff": 32, "tokens": 90},
        **{"relative_attention_num_buckets": 12, "relative_attention_max_distance": 40, "layer_norm_epsilon": 1e-3},
    },
}


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_live_transformers(name):
    sizes = dict(CONFIGS[name])
    ids = np.random.default_rng(0).integers(2, 77, (2, sizes.pop("tokens")))
    ids[0, ids.shape[1] // 3 :] = 0
    raw_config, tensors, expected = live_reference(
        TorchT5Config(vocab_size=77, **sizes, **GATED), torch.from_numpy(ids)
    )
    out = nnx.jit(ported(raw_config, tensors))(jnp.asarray(ids))
    assert_close(out, expected, TOLERANCE)
    out_bf16 = nnx.jit(ported(raw_config, tensors, dtype=jnp.bfloat16))(jnp.asarray(ids))
    assert relative_error(out_bf16, expected) < 2e-2


@torch.no_grad()
def live_reference(config, ids):
    torch.manual_seed(3)
    model = T5EncoderModel(config).eval()
    for name, parameter in model.named_parameters():  # so that no norm is one, and the bias is felt
        if "norm" in name or "relative_attention_bias" in name:
            parameter.add_(0.3 * torch.randn_like(parameter))
    tensors = {key: value.numpy() for key, value in model.state_dict().items()}
    return config.to_dict(), tensors, model(ids).last_hidden_state.numpy()
