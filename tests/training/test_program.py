"""A step on a mesh equals the step on one device: the same loss, gradient and updated parameters."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from mask2dit_jax.diffusion.schedule import NoiseSchedule, ScheduleConfig
from mask2dit_jax.errors import UserError
from mask2dit_jax.models.dit import DiTConfig
from mask2dit_jax.parallel.mesh import make_mesh
from mask2dit_jax.training.optimizer import OptimizerConfig
from mask2dit_jax.training.program import TrainProgram, global_batch, local_rows
from mask2dit_jax.training.step import Objective

pytestmark = pytest.mark.slow

MODEL = DiTConfig(4, 16, 2, 4, time_embed_dim=16, text_embed_dim=8, text_tokens=6, sample_height=4, sample_width=8)
LAYOUT = MODEL.layout((1, 2, 3), 4, 8)  # 66 tokens
# Large steps and no clipping, so that a wrong gradient shows in the parameters.
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, warmup_steps=0, eps=1e-3, clip_norm=1e9)
BATCH_SIZE = 4


def make_program(*sizes, model=MODEL, batch_size=BATCH_SIZE) -> TrainProgram:
    mesh = make_mesh(
        dict(zip(("data", "fsdp", "context", "tensor"), sizes, strict=True)), jax.devices()[: np.prod(sizes)]
    )
    objective = Objective(NoiseSchedule(ScheduleConfig.cogvideox_5b()), LAYOUT, 1.0, condition_probability=0.5)
    return TrainProgram(mesh, model, objective, OPTIMIZER, batch_size, dtype=jnp.float32)


def random_batch(program: TrainProgram) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    batch = {name: rng.standard_normal(x.shape, np.float32) for name, x in program.abstract_batch.items()}
    return batch | {"logvar": batch["logvar"] - 4}


@functools.cache
def run(*sizes: int):
    """Take two steps on a mesh; return the losses and the state after them."""
    program = make_program(*sizes)
    losses, rows = [], local_rows(program.abstract_batch)
    batch = global_batch({k: v[rows] for k, v in random_batch(program).items()}, program.abstract_batch, rows)
    with jax.set_mesh(program.mesh):
        params = program.random_params()
        # Parameters from scratch make every block the identity, and attention would not matter.
        params = jax.tree.map(lambda x: x + 0.1 * jnp.sin(jnp.arange(x.size).reshape(x.shape)), params)
        state = program.start(jax.device_put(params, jax.tree.map(lambda x: x.sharding, program.abstract_params)))
        for _ in range(2):
            state, metrics = program.step(state, batch)
            losses.append(float(metrics["loss"]))
    return losses, state


@pytest.mark.parametrize("sizes", [(2, 2, 2, 1), (1, 2, 2, 2)])
def test_every_mesh_takes_the_same_steps(sizes):
    (losses, state), (losses_alone, state_alone) = run(*sizes), run(1, 1, 1, 1)
    np.testing.assert_allclose(losses, losses_alone, rtol=2e-6)
    for ours, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(state_alone), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5, rtol=0)


def test_the_state_lies_where_the_table_says():
    _, state = run(1, 2, 2, 2)
    program = make_program(1, 2, 2, 2)
    for leaf, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(program.abstract_state), strict=True):
        assert (leaf.shape, leaf.dtype, leaf.sharding) == (wanted.shape, wanted.dtype, wanted.sharding)
    kernel = state.params["blocks"]["attn"]["query"]["kernel"]
    assert kernel.sharding.spec == P(None, ("fsdp", "context"), "tensor")
    moment = state.opt_state[1][0].mu["blocks"]["attn"]["query"]["kernel"]
    assert moment.sharding == kernel.sharding


def test_rows_of_this_process():
    assert local_rows(make_program(2, 2, 2, 1).abstract_batch) == [0, 1, 2, 3]


def test_a_batch_that_does_not_divide():
    with pytest.raises(UserError, match=r"global_batch_size=6 does not divide over mesh.data x mesh.fsdp = 4"):
        make_program(2, 2, 1, 1, batch_size=6)


def test_tokens_that_do_not_divide():
    with pytest.raises(UserError, match=r"the 66 tokens of a sample do not divide over mesh.context=4"):
        make_program(1, 1, 4, 1)
