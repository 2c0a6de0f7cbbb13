"""A small training state and the checkpoints of a run with it."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mask2dit_jax.models.dit import DiT, DiTConfig
from mask2dit_jax.training import checkpoint
from mask2dit_jax.training.optimizer import OptimizerConfig, make_optimizer
from mask2dit_jax.training.step import TrainState, init_state

CONFIG = DiTConfig(2, 16, 1, 4, time_embed_dim=16, text_embed_dim=8, text_tokens=5)
RECORD = {"model": CONFIG.to_json(), "pretrained": "tiny", "config": {"seed": 0}}


@functools.cache
def make_state(seed=0, config=CONFIG) -> TrainState:
    params = nnx.state(DiT(config, rngs=nnx.Rngs(seed)))
    state = init_state(params, make_optimizer(OptimizerConfig()))
    return state._replace(step=jnp.array(seed, jnp.int32))


def abstract(tree):
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def save_run(folder):
    """Saves steps 1, 2 and 3, of which two are kept."""
    with checkpoint.open_manager(folder, keep=2) as manager:
        for step in (1, 2, 3):
            checkpoint.save(manager, make_state(step), RECORD)
    return folder


def remove_manifest(params):
    next(Path(params).rglob("manifest.ocdbt")).unlink()


def cut_metadata(params):
    file = params / "_METADATA"
    file.write_bytes(file.read_bytes()[:-20])


def cut_data(params):
    for file in Path(params).rglob("d/*"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
