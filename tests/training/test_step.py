"""The training step learns, treats its two kinds of samples apart, and differs between stages by values only."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mask2dit_jax.diffusion.schedule import NoiseSchedule, ScheduleConfig
from mask2dit_jax.models.dit import DiT, DiTConfig
from mask2dit_jax.training.optimizer import OptimizerConfig, learning_rate, make_optimizer
from mask2dit_jax.training.step import Objective, denoising_loss, init_state, make_train_step

CONFIG = DiTConfig(2, 16, 1, 4, time_embed_dim=16, text_embed_dim=8, text_tokens=5, sample_height=4, sample_width=6)
LAYOUT = CONFIG.layout((1, 1, 2), 4, 6)
SCHEDULE = NoiseSchedule(ScheduleConfig.cogvideox_5b())
OPTIMIZER = make_optimizer(OptimizerConfig(learning_rate=1e-2, warmup_steps=0, clip_norm=1.0))


def batch(size=4):
    """Plain grey videos, which are easy to learn."""
    mean = jnp.ones((size, 4, 4, 6, 4))
    text = jax.random.normal(jax.random.key(3), (size, 3, 5, 8))
    return {"mean": mean, "logvar": jnp.full_like(mean, -20.0), "text": text}


def new_model():
    return nnx.split(DiT(CONFIG, rngs=nnx.Rngs(0)))


@functools.cache
def train_step(probability, seed):
    objective = Objective(SCHEDULE, LAYOUT, 1.0, condition_probability=probability)
    step = make_train_step(new_model()[0], OPTIMIZER, objective, seed)
    return jax.jit(step)


def run(probability, num_steps, seed=0):
    state, history = init_state(new_model()[1], OPTIMIZER), []
    for _ in range(num_steps):
        state, metrics = train_step(probability, seed)(state, batch())
        history.append(jax.device_get(metrics))
    return state, history


@pytest.mark.parametrize("probability", [0.0, 0.5])
def test_learns_a_fixed_batch(probability):
    _, history = run(probability, 60)
    losses = [metrics["loss"] for metrics in history]
    assert np.mean(losses[-10:]) < 0.3 * np.mean(losses[:5])


@pytest.mark.parametrize(("probability", "kinds"), [(0.0, (4, 0)), (1.0, (0, 4))])
def test_metrics_tell_the_kinds_of_samples_apart(probability, kinds):
    _, (metrics,) = run(probability, 1)
    assert (metrics["num_fixed"], metrics["num_extension"]) == kinds
    assert [metrics["loss_fixed_sum"] > 0, metrics["loss_extension_sum"] > 0] == [number > 0 for number in kinds]
    total = metrics["loss_fixed_sum"] + metrics["loss_extension_sum"]
    assert total / 4 == pytest.approx(metrics["loss"], rel=1e-5)
    assert metrics["grad_norm"] > 0


def test_a_sample_is_decided_for_on_its_own():
    """A batch can hold both kinds, and over many steps each has the requested share."""
    _, history = run(0.5, 40)
    assert all(metrics["num_fixed"] + metrics["num_extension"] == 4 for metrics in history)
    assert any(0 < metrics["num_fixed"] < 4 for metrics in history)
    assert 0.35 < np.mean([metrics["num_fixed"] for metrics in history]) / 4 < 0.65


def test_runs_repeat_and_seeds_matter():
    first, again, other = (run(0.5, 3, seed=seed)[0] for seed in (0, 0, 1))
    assert int(first.step) == 3
    leaves = [jax.tree.leaves(state.params) for state in (first, again, other)]
    assert all(np.array_equal(a, b) for a, b in zip(leaves[0], leaves[1], strict=True))
    assert any(not np.array_equal(a, b) for a, b in zip(leaves[0], leaves[2], strict=True))


def test_every_step_draws_anew():
    state = init_state(new_model()[1], OPTIMIZER)
    losses = [train_step(0.5, 0)(state._replace(step=jnp.int32(step)), batch())[1]["loss"] for step in (0, 1, 1)]
    assert losses[0] != losses[1] == losses[2]


def random_params(params):
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(9), len(leaves))
    return tree.unflatten([0.2 * jax.random.normal(key, x.shape) for key, x in zip(keys, leaves, strict=True)])


def test_a_condition_is_seen_clean_and_is_not_learnt():
    """The content of known scenes matters to the loss; the noise drawn for them and their own error do not."""
    graph, params = new_model()
    model = nnx.merge(graph, random_params(params))
    objective = Objective(SCHEDULE, LAYOUT, 1.0)
    text = batch(1)["text"]
    x, noise = jax.random.normal(jax.random.key(4), (2, 1, 4, 4, 6, 4))
    known = jnp.array([[True, True, False]])
    loss = jax.jit(functools.partial(denoising_loss, model, objective))

    def value(x, noise):
        return float(loss(x, text, noise, jnp.array([600]), known)[0])

    base = value(x, noise)
    assert value(x, noise.at[:, :2].multiply(-1.0)) == base
    assert abs(value(x.at[:, :2].multiply(-1.0), noise) - base) > 1e-4


def test_learning_rate_warms_up_and_stays():
    rate = learning_rate(OptimizerConfig(learning_rate=1e-5, warmup_steps=100))
    np.testing.assert_allclose([rate(0), rate(50), rate(100), rate(5000)], [0, 5e-6, 1e-5, 1e-5], rtol=1e-5)


def test_cosine_schedule_ends_at_zero():
    rate = learning_rate(OptimizerConfig(learning_rate=2.0, warmup_steps=10, schedule="cosine", decay_steps=110))
    np.testing.assert_allclose([rate(0), rate(5), rate(10), rate(60), rate(110)], [0, 1, 2, 1, 0], atol=1e-6)


def test_gradients_are_clipped_to_the_global_norm():
    tx = make_optimizer(OptimizerConfig(clip_norm=0.05, warmup_steps=0, eps=1.0, learning_rate=1.0, weight_decay=0.0))
    params = {"w": jnp.zeros(4)}
    updates, _ = tx.update({"w": jnp.full(4, 100.0)}, tx.init(params), params)
    # With eps = 1 Adam's first update is g / (|g| + 1): small only because g was scaled to 0.025.
    np.testing.assert_allclose(updates["w"], -0.025 / 1.025, rtol=1e-4)


def test_a_clip_norm_of_0_never_clips_and_a_run_may_resume_with_it():
    config = OptimizerConfig(clip_norm=0.0, warmup_steps=0, eps=1.0, learning_rate=1.0, weight_decay=0.0)
    params, tx = {"w": jnp.zeros(4)}, make_optimizer(config)
    updates, _ = tx.update({"w": jnp.full(4, 100.0)}, tx.init(params), params)
    np.testing.assert_allclose(updates["w"], -100 / 101, rtol=1e-4)
    clipping = make_optimizer(dataclasses.replace(config, clip_norm=0.05))
    assert jax.tree.structure(tx.init(params)) == jax.tree.structure(clipping.init(params))
