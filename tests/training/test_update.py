"""How a batch updates the parameters: in parts, with an average, for some parameters only, or not at all."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mask2dit_jax.diffusion.schedule import NoiseSchedule, ScheduleConfig
from mask2dit_jax.errors import UserError
from mask2dit_jax.models import lora
from mask2dit_jax.models.dit import DiT, DiTConfig
from mask2dit_jax.parallel import sharding
from mask2dit_jax.parallel.mesh import AXES, make_mesh
from mask2dit_jax.pretrained.directory import save_diffusers
from mask2dit_jax.pretrained.transformer_source import TransformerSource
from mask2dit_jax.training.optimizer import OptimizerConfig
from mask2dit_jax.training.program import TrainProgram
from mask2dit_jax.training.step import Objective, UpdateConfig, evaluated_params
from mask2dit_jax.training.trainable import split
from tests.training.test_program import random_batch

MODEL = DiTConfig(
    2, 16, 1, 4, time_embed_dim=16, text_embed_dim=8, text_tokens=4, sample_height=4, sample_width=4, attention="dense"
)
LORA = lora.LoRAConfig(rank=3, alpha=6.0)
ALONE = (1, 1, 1, 1)
PLAIN = UpdateConfig()


@functools.cache
def program(update=PLAIN, sizes=ALONE, model=MODEL, **fields) -> TrainProgram:
    """Make a program whose steps are large and not clipped, so that a wrong gradient shows in the parameters."""
    mesh = make_mesh(dict(zip(AXES, sizes, strict=True)), jax.devices()[: np.prod(sizes)])
    objective = Objective(NoiseSchedule(ScheduleConfig.cogvideox_5b()), model.layout((1, 2), 4, 4), 1.0, 0.5)
    optimizer = OptimizerConfig(learning_rate=1e-2, warmup_steps=0, eps=1e-3, clip_norm=1e9)
    return TrainProgram(mesh, model, objective, optimizer, 4, dtype=jnp.float32, update=update, **fields)


def random_params(abstract: nnx.State) -> nnx.State:
    """Make parameters of which none is zero, so that every gradient matters, and which depend on their names alone."""

    def draw(path, leaf):
        rng = np.random.default_rng(list(sharding.name_of(path).encode()))
        return jax.device_put((0.2 * rng.standard_normal(leaf.shape)).astype(leaf.dtype), leaf.sharding)

    return jax.tree_util.tree_map_with_path(draw, abstract)


def run(program: TrainProgram, num_steps=2, spoil=()):
    """Return the state and the metrics of each step; the batches of the steps in `spoil` hold a NaN."""
    history, batch = [], random_batch(program)
    with jax.set_mesh(program.mesh):
        state = program.start(random_params(program.abstract_params))
        for step in range(num_steps):
            given = batch | {"mean": batch["mean"] * np.float32("nan")} if step in spoil else batch
            placed = jax.device_put(given, jax.tree.map(lambda x: x.sharding, program.abstract_batch))
            state, metrics = program.step(state, placed)
            history.append(jax.device_get(metrics))
    return state, history


def assert_close(a, b, **tolerance):
    jax.tree.map(functools.partial(np.testing.assert_allclose, **tolerance), a, b)


@pytest.mark.parametrize("sizes", [ALONE, (1, 2, 1, 1)])
@pytest.mark.slow
def test_a_batch_in_parts_is_the_same_step(sizes):
    whole, (metrics, _) = run(program())
    parts, (in_parts, _) = run(program(UpdateConfig(accumulate_steps=2), sizes))
    assert_close(parts.params, whole.params, atol=2e-5)
    assert in_parts.keys() == metrics.keys()
    for name in metrics:  # each sample's timestep and kind are what they were, too
        np.testing.assert_allclose(in_parts[name], metrics[name], rtol=2e-5)


def test_parts_that_do_not_divide():
    with pytest.raises(UserError, match="global_batch_size=4 is not a multiple of accumulate_steps=3"):
        program(UpdateConfig(3))
    with pytest.raises(UserError, match=r"accumulate_steps=2 does not divide over mesh\.data x mesh\.fsdp = 4"):
        program(UpdateConfig(2), (2, 2, 1, 1))


@pytest.mark.slow
def test_average():
    averaging = program(UpdateConfig(ema_decay=0.5))
    states = [run(averaging, n)[0] for n in (0, 1, 2)]
    expected = states[0].params
    assert_close(states[0].ema, expected)
    for step, state in enumerate(states[1:]):
        decay = min(0.5, (1 + step) / (10 + step))
        expected = jax.tree.map(lambda e, x, d=decay: d * e + (1 - d) * x, expected, state.params)
        assert_close(state.ema, expected, rtol=1e-6, atol=1e-7)
    assert evaluated_params(states[2], averaging.update) == states[2].ema


def test_average_is_fp32_and_lies_as_its_parameters():
    state = program(UpdateConfig(ema_decay=0.9), (1, 2, 2, 1), param_dtype=jnp.bfloat16).abstract_state
    pairs = zip(jax.tree.leaves(state.ema), jax.tree.leaves(state.params), strict=True)
    for average, parameter in pairs:
        assert (average.shape, average.sharding) == (parameter.shape, parameter.sharding)
        assert (average.dtype, parameter.dtype) == (jnp.float32, jnp.bfloat16)


def test_only_what_is_named_trains():
    chosen = program(UpdateConfig(ema_decay=0.9, trainable=(r"blocks\.attn\..*", r".*\.bias")))
    before, (after, _) = run(chosen, 0)[0], run(chosen, 1)
    moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), before.params, after.params)
    trained, frozen = split(moved, chosen.update.trainable)
    assert all(jax.tree.leaves(trained))
    assert not any(jax.tree.leaves(frozen))
    count = len(jax.tree.leaves(trained))
    assert len(jax.tree.leaves(after.ema)) == len(jax.tree.leaves(after.opt_state[1][0].mu)) == count
    assert jax.tree.structure(evaluated_params(after, chosen.update)) == jax.tree.structure(after.params)


def test_weights_are_read_in_the_type_that_each_is_kept_in(tmp_path):
    save_diffusers(tmp_path, "transformer", MODEL, random_params(program().abstract_params))
    chosen = program(UpdateConfig(trainable=(r".*mlp.*",)), frozen_dtype=jnp.bfloat16, param_dtype=jnp.float32)
    loaded = TransformerSource.require(tmp_path).load(chosen.abstract_plain)
    trained, frozen = split(loaded, chosen.update.trainable)
    assert {leaf.dtype for leaf in jax.tree.leaves(trained)} == {jnp.dtype(jnp.float32)}
    assert {leaf.dtype for leaf in jax.tree.leaves(frozen)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize(
    ("pattern", "told"), [(r"attn", "matches no parameter; their paths look like"), ("(", "is no regular expression")]
)
def test_a_pattern_that_is_wrong(pattern, told):
    with pytest.raises(UserError, match=told):
        program(UpdateConfig(trainable=(pattern,)))


def test_an_update_that_is_not_finite_is_left_out():
    averaging = program(UpdateConfig(ema_decay=0.5))
    good, _ = run(averaging, 1)
    state, history = run(averaging, 3, spoil=(1, 2))
    for name in ("params", "opt_state", "ema"):
        assert_close(getattr(state, name), getattr(good, name), rtol=0)
    assert (int(state.step), int(state.skipped), int(state.skipped_in_a_row)) == (3, 2, 2)
    assert [bool(metrics["is_updated"]) for metrics in history] == [True, False, False]
    assert history[1]["num_fixed"] + history[1]["num_extension"] == 0
    recovered, history = run(averaging, 3, spoil=(1,))
    assert (int(recovered.skipped), int(recovered.skipped_in_a_row)) == (1, 0)
    assert np.isfinite(history[2]["loss"])


def test_loss_by_timestep():
    _, (metrics,) = run(program(), 1)
    assert metrics["loss_bucket_sum"].shape == metrics["num_bucket"].shape == (10,)
    assert metrics["num_bucket"].sum() == 4
    np.testing.assert_allclose(metrics["loss_bucket_sum"].sum() / 4, metrics["loss"], rtol=1e-5)


def lora_program(sizes=ALONE, **fields) -> TrainProgram:
    update = UpdateConfig(trainable=(lora.PATTERN,))
    return program(update, sizes, model=dataclasses.replace(MODEL, lora=LORA), **fields)


def test_adapters_begin_as_no_change_and_merge_into_the_same_model():
    adapting = lora_program(frozen_dtype=jnp.bfloat16)
    plain = random_params(adapting.abstract_plain)
    with jax.set_mesh(adapting.mesh):
        params = adapting.adapted(plain)
    types = {leaf.dtype for leaf in jax.tree.leaves(lora.adapters_of(params))}
    assert types == {jnp.dtype(jnp.float32)}
    assert {leaf.dtype for leaf in jax.tree.leaves(plain)} == {jnp.dtype(jnp.bfloat16)}
    plain_graph = nnx.split(nnx.eval_shape(lambda: DiT(MODEL, rngs=nnx.Rngs(0))))[0]
    batch, layout = jax.tree.map(jnp.asarray, random_batch(adapting)), adapting.objective.layout

    @functools.partial(jax.jit, static_argnums=0)
    def predict(graph, params):
        model = nnx.merge(graph, jax.tree.map(lambda x: x.astype(jnp.float32), params))
        return model(batch["mean"], batch["text"], jnp.full((4, layout.num_scenes), 500), layout=layout)

    expected = predict(plain_graph, plain)
    np.testing.assert_array_equal(predict(adapting.graph, params), expected)
    params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    trained = nnx.merge_state(params, random_params(lora.adapters_of(adapting.abstract_params)))
    adapted = predict(adapting.graph, trained)
    assert np.abs(adapted - expected).max() > 1e-2
    np.testing.assert_allclose(predict(plain_graph, lora.merge(trained, LORA)), adapted, atol=2e-5)


@pytest.mark.slow
def test_adapters_train_alone_and_on_every_mesh():
    (state, (metrics, _)), (sharded, _) = run(lora_program()), run(lora_program((1, 2, 1, 2)))
    assert_close(sharded.params, state.params, atol=2e-5)
    assert metrics["grad_norm"] > 0
    names = {sharding.name_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(state.opt_state[1][0].mu)}
    targets = [f"attn.{name}" for name in ("query", "key", "value", "out")] + ["mlp.up", "mlp.down"]
    assert names == {f"blocks.{target}.lora_{side}" for target in targets for side in "ab"}


def test_rank_and_alpha():
    with pytest.raises(UserError, match=r"lora.alpha=0.0 must be above 0"):
        lora.LoRAConfig(2, 0.0)
