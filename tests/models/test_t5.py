"""The T5 encoder's configuration, its position buckets and its treatment of padding."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mask2dit_jax.errors import UserError
from mask2dit_jax.models.t5 import T5Config, T5Encoder, position_buckets


@pytest.mark.parametrize("config", [T5Config.xxl(), T5Config.tiny()])
def test_config_survives_json(config):
    assert T5Config.from_json(config.to_json()) == config


def test_old_config_without_the_later_fields():
    raw = T5Config.xxl().to_json()
    del raw["relative_attention_max_distance"]  # configs from before transformers 4.17 lack it
    assert T5Config.from_json(raw) == T5Config.xxl()


@pytest.mark.parametrize("kind", ["relu", "gated-silu"])
def test_other_kinds_of_t5_are_refused(kind):
    with pytest.raises(UserError, match=f"feed_forward_proj '{kind}' is not supported"):
        T5Config.from_json(T5Config.tiny().to_json() | {"feed_forward_proj": kind})


def test_position_buckets_drawn():
    # 8 buckets, distances up to 8: before the query 0 1 | 2 (distances 2 and 3) | 3 (the rest), after it 4 more.
    assert position_buckets(6, num_buckets=8, max_distance=8).tolist() == [
        [0, 5, 6, 6, 7, 7],
        [1, 0, 5, 6, 6, 7],
        [2, 1, 0, 5, 6, 6],
        [2, 2, 1, 0, 5, 6],
        [3, 2, 2, 1, 0, 5],
        [3, 3, 2, 2, 1, 0],
    ]


def test_padding_is_attended():
    encoder = nnx.jit(T5Encoder(T5Config.tiny(), rngs=nnx.Rngs(0)))
    short, long = (encoder(jnp.asarray([[5, 6, 1] + [0] * pads]))[0, :3] for pads in (1, 9))
    assert np.abs(short - long).max() > 0.1


def test_fresh_encoder_gives_unit_embeddings():
    out = nnx.jit(T5Encoder(T5Config.tiny(), rngs=nnx.Rngs(0)))(jnp.arange(2, 102).reshape(2, 50))
    assert 0.9 < float(out.std()) < 1.1
    assert np.abs(out[0] - out[1]).mean() > 0.5
