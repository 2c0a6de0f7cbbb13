"""How a batch becomes new parameters: in parts, averaged, for some parameters only, or not at all."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mask2dit_jax.errors import UserError
from mask2dit_jax.models import lora
from mask2dit_jax.models.dit import DiT
from mask2dit_jax.parallel import sharding
from mask2dit_jax.training.optimizer import OptimizerConfig
from mask2dit_jax.training.program import TrainProgram
from mask2dit_jax.training.step import UpdateConfig, evaluated_params
from mask2dit_jax.training.trainable import split
from tests.training.test_program import MODEL, make_program, random_batch

RATE = OptimizerConfig(learning_rate=1e-2, warmup_steps=0, eps=1e-3, clip_norm=1e9)
LORA = lora.LoRAConfig(rank=3, alpha=6.0)


def changed(update: UpdateConfig, sizes=(1, 1, 1, 1), **fields) -> TrainProgram:
    return dataclasses.replace(make_program(*sizes), optimizer=RATE, update=update, **fields)


def shaken(params, seed=0):
    """Away from the zeros that a model starts with, so that every gradient matters."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    shake = jax.jit(lambda x, key: x + 0.1 * jax.random.normal(key, x.shape, x.dtype))
    return tree.unflatten([shake(x, key) for x, key in zip(leaves, keys, strict=True)])


def run(program: TrainProgram, num_steps=2, spoil=()):
    """The state and the metrics of each step; the batches of the steps in `spoil` hold a NaN."""
    history, batch = [], random_batch(program)
    with jax.set_mesh(program.mesh):
        state = program.start(shaken(program.random_params()))
        for step in range(num_steps):
            given = batch | {"mean": batch["mean"] * np.float32("nan")} if step in spoil else batch
            placed = jax.device_put(given, jax.tree.map(lambda x: x.sharding, program.abstract_batch))
            state, metrics = program.step(state, placed)
            history.append(jax.device_get(metrics))
    return state, history


def assert_close(a, b, **tolerance):
    jax.tree.map(functools.partial(np.testing.assert_allclose, **tolerance), a, b)


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (1, 2, 1, 1)])
def test_a_batch_in_parts_is_the_same_step(sizes):
    (whole, (metrics, _)), (parts, (in_parts, _)) = run(changed(UpdateConfig())), run(changed(UpdateConfig(2), sizes))
    assert_close(parts.params, whole.params, atol=2e-5)
    assert in_parts.keys() == metrics.keys()
    for name in metrics:  # each sample's timestep and kind are what they were, too
        np.testing.assert_allclose(in_parts[name], metrics[name], rtol=2e-5)


def test_parts_that_do_not_divide():
    with pytest.raises(UserError, match="global_batch_size=4 is no multiple of accumulate_steps=3"):
        changed(UpdateConfig(3))
    with pytest.raises(UserError, match=r"accumulate_steps=2 does not divide over mesh\.data x mesh\.fsdp = 4"):
        changed(UpdateConfig(2), (2, 2, 1, 1))


def test_average():
    program = changed(UpdateConfig(ema_decay=0.5))
    states = [run(program, n)[0] for n in (0, 1, 2)]
    expected = states[0].params
    assert_close(states[0].ema, expected)
    for step, state in enumerate(states[1:]):
        decay = min(0.5, (1 + step) / (10 + step))
        expected = jax.tree.map(lambda e, x, d=decay: d * e + (1 - d) * x, expected, state.params)
        assert_close(state.ema, expected, rtol=1e-6, atol=1e-7)
    assert evaluated_params(states[2], program.update) == states[2].ema


def test_average_is_fp32_and_lies_as_its_parameters():
    program = changed(UpdateConfig(ema_decay=0.9), (1, 2, 2, 1), param_dtype=jnp.bfloat16)
    state = program.abstract_state
    pairs = zip(jax.tree.leaves(state.ema), jax.tree.leaves(state.params), strict=True)
    for average, parameter in pairs:
        assert (average.shape, average.sharding) == (parameter.shape, parameter.sharding)
        assert (average.dtype, parameter.dtype) == (jnp.float32, jnp.bfloat16)


def test_only_what_is_named_trains():
    program = changed(UpdateConfig(ema_decay=0.9, trainable=(r"blocks\.attn\..*", r".*\.bias")))
    before, (after, _) = run(program, 0)[0], run(program, 1)
    moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), before.params, after.params)
    trained, frozen = split(moved, program.update.trainable)
    assert all(jax.tree.leaves(trained))
    assert not any(jax.tree.leaves(frozen))
    count = len(jax.tree.leaves(trained))
    assert len(jax.tree.leaves(after.ema)) == len(jax.tree.leaves(after.opt_state[1][0].mu)) == count
    assert jax.tree.structure(evaluated_params(after, program.update)) == jax.tree.structure(after.params)


@pytest.mark.parametrize(
    ("pattern", "told"), [(r"attn", "matches no parameter; they are called like"), ("(", "is no regular expression")]
)
def test_a_pattern_that_is_wrong(pattern, told):
    with pytest.raises(UserError, match=told):
        changed(UpdateConfig(trainable=(pattern,)))


def test_an_update_that_is_not_finite_is_left_out():
    program = changed(UpdateConfig(ema_decay=0.9))
    good, _ = run(program, 1)
    state, history = run(program, 3, spoil=(1, 2))
    for name in ("params", "opt_state", "ema"):
        assert_close(getattr(state, name), getattr(good, name), rtol=0)
    assert (int(state.step), int(state.skipped), int(state.skipped_in_a_row)) == (3, 2, 2)
    assert [bool(metrics["is_updated"]) for metrics in history] == [True, False, False]
    assert history[1]["num_fixed"] + history[1]["num_extension"] == 0
    recovered, history = run(program, 3, spoil=(1,))
    assert (int(recovered.skipped), int(recovered.skipped_in_a_row)) == (1, 0)
    assert np.isfinite(history[2]["loss"])


def test_loss_by_timestep():
    _, (metrics,) = run(changed(UpdateConfig()), 1)
    assert metrics["loss_bucket_sum"].shape == metrics["num_bucket"].shape == (10,)
    assert metrics["num_bucket"].sum() == 4
    np.testing.assert_allclose(metrics["loss_bucket_sum"].sum() / 4, metrics["loss"], rtol=1e-5)


def lora_program(sizes=(1, 1, 1, 1), **fields) -> TrainProgram:
    model = dataclasses.replace(MODEL, lora=LORA)
    return changed(UpdateConfig(trainable=(lora.PATTERN,)), sizes, model=model, **fields)


def test_adapters_begin_as_no_change_and_merge_into_the_same_model():
    program = lora_program(frozen_dtype=jnp.bfloat16)
    with jax.set_mesh(program.mesh):
        plain = shaken(lora.without_adapters(program.random_params()))
        params = program.adapted(jax.tree.map(jnp.copy, plain))
    types = {leaf.dtype for leaf in jax.tree.leaves(lora.adapters_of(params))}
    assert types == {jnp.dtype(jnp.float32)}
    assert {leaf.dtype for leaf in jax.tree.leaves(plain)} == {jnp.dtype(jnp.bfloat16)}
    plain_graph = nnx.split(nnx.eval_shape(lambda: DiT(MODEL, rngs=nnx.Rngs(0))))[0]
    batch, layout = random_batch(program), program.objective.layout

    @functools.partial(jax.jit, static_argnums=0)
    def predict(graph, params):
        model = nnx.merge(graph, jax.tree.map(lambda x: x.astype(jnp.float32), params))
        return model(batch["mean"], batch["text"], jnp.full((4, layout.num_scenes), 500), layout=layout)

    expected = predict(plain_graph, plain)
    np.testing.assert_array_equal(predict(program.graph, params), expected)
    params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    trained = nnx.merge_state(params, shaken(lora.adapters_of(params)))
    adapted = predict(program.graph, trained)
    assert np.abs(adapted - expected).max() > 1e-2
    np.testing.assert_allclose(predict(plain_graph, lora.merge(trained, LORA)), adapted, atol=2e-5)


def test_adapters_train_alone_and_on_every_mesh():
    (state, (metrics, _)), (sharded, _) = run(lora_program()), run(lora_program((1, 2, 1, 2)))
    assert_close(sharded.params, state.params, atol=2e-5)
    assert metrics["grad_norm"] > 0
    names = {sharding.name_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(state.opt_state[1][0].mu)}
    targets = [f"attn.{name}" for name in ("query", "key", "value", "out")] + ["mlp.up", "mlp.down"]
    assert names == {f"blocks.{target}.lora_{side}" for target in targets for side in "ab"}


def test_rank_and_alpha():
    with pytest.raises(UserError, match=r"lora.rank=2 and lora.alpha=0.0 must be above 0"):
        lora.LoRAConfig(2, 0.0)
