"""One training step, for every stage: pretraining, SFT and their ablations differ by values, never by code."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from mask2dit_jax.axes import Array, Floats, Ints
from mask2dit_jax.diffusion import conditioning
from mask2dit_jax.diffusion.schedule import NoiseSchedule
from mask2dit_jax.errors import UserError
from mask2dit_jax.layout import SceneLayout
from mask2dit_jax.models.backbone import Transformer
from mask2dit_jax.parallel.mesh import BATCH
from mask2dit_jax.parallel.sharding import P, constrain
from mask2dit_jax.training import trainable

NUM_BUCKETS = 10  # of timesteps, for the loss by timestep
Batch = dict[str, Array]  # mean, logvar: (b f h w c) of the VAE's posterior, unscaled; text: (b s t x)


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is learnt.

    Attributes:
        scaling_factor: of the VAE; the transformer sees latents times this.
        condition_probability: p, the share of scene-extension samples (0 in pretraining, 0.5 in SFT).
        condition: how known scenes are shown, "clean" or "noised" (at t = 0).
    """

    schedule: NoiseSchedule
    layout: SceneLayout
    scaling_factor: float
    condition_probability: float = 0.0
    condition: str = "clean"

    def __post_init__(self):
        conditioning.check_condition(self.condition)


@dataclasses.dataclass(frozen=True)
class UpdateConfig:
    """How a batch becomes new parameters, the optimiser apart.

    Attributes:
        accumulate_steps: the batch goes through the model in so many parts, for a so many times smaller memory of
            activations. What is random is drawn for the whole batch first, so the step stays the same step.
        ema_decay: of the moving average of the parameters; 0 keeps none. In the first steps the average follows
            faster, with a decay of (1 + step) / (10 + step), or it would long be full of its beginning.
        trainable: regular expressions over parameter paths (see `trainable.split`); all if there are none.
    """

    accumulate_steps: int = 1
    ema_decay: float = 0.0
    trainable: tuple[str, ...] = ()

    def __post_init__(self):
        if not 0 <= self.ema_decay < 1:
            raise UserError(f"ema_decay={self.ema_decay} must be at least 0 and less than 1; 0 keeps no average")


class TrainState(NamedTuple):
    """All that changes from step to step; keys are folded from `step`, so nothing else needs saving.

    Attributes:
        params: all of them, those that do not train as well.
        opt_state, ema: of those that train; ema in fp32, None if there is none.
        skipped, skipped_in_a_row: updates left out because loss or gradient were not finite.
    """

    step: Array
    params: nnx.State
    opt_state: Any
    ema: nnx.State | None
    skipped: Array
    skipped_in_a_row: Array


def init_state(
    params: nnx.State, optimizer: optax.GradientTransformation, update: UpdateConfig = UpdateConfig()
) -> TrainState:
    trained, _ = trainable.split(params, update.trainable)
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, params, optimizer.init(trained), init_ema(params, update), zero, zero)


def init_ema(params: nnx.State, update: UpdateConfig) -> nnx.State | None:
    if not update.ema_decay:
        return None
    # A copy even where the type is the same: what is donated must not be in two places of a state.
    return jax.tree.map(lambda x: jnp.array(x, jnp.float32), trainable.split(params, update.trainable)[0])


def evaluated_params(state: TrainState, update: UpdateConfig) -> nnx.State:
    """What is looked at while training: the average, where there is one."""
    if state.ema is None:
        return state.params
    return trainable.join(state.ema, trainable.split(state.params, update.trainable)[1])


def denoising_loss(
    model: Transformer,
    objective: Objective,
    latents: Floats["b f h w c"],
    text: Floats["b s t x"],
    noise: Floats["b f h w c"],
    timesteps: Ints[" b"],
    is_known: Array,
) -> tuple[Floats[""], dict[str, Array]]:
    """Squared error of the predicted v over the scenes to denoise (Eq. 2 and 3), in fp32.

    Args:
        latents: clean, scaled.
        timesteps: of each sample, 0..999.
        is_known: (b, s), the conditional scenes.

    Returns:
        The loss, and {"loss_per_sample": (b), "prediction", "noisy", "target": (b f h w c)}.
    """
    layout, schedule = objective.layout, objective.schedule
    per_scene = conditioning.scene_timesteps(timesteps, is_known)
    noisy = conditioning.noisy_latents(
        schedule, latents, noise, per_scene, is_known, layout=layout, condition=objective.condition
    )
    prediction = model(noisy, text, per_scene, layout=layout)
    target = schedule.velocity(latents, noise, per_scene[:, layout.frame_scenes])
    error = jnp.square(prediction.astype(jnp.float32) - target.astype(jnp.float32))
    loss, per_sample = conditioning.scene_losses(error, is_known, layout=layout)
    return loss, {"loss_per_sample": per_sample, "prediction": prediction, "noisy": noisy, "target": target}


def make_train_step(
    graph: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    objective: Objective,
    seed: int,
    update: UpdateConfig = UpdateConfig(),
):
    """`train_step(state, batch) -> (state, metrics)`, to be jitted with the state donated.

    An update that would not be finite is left out: parameters, optimiser and average stay, the step counts on.

    The metrics are device arrays, so that a step never waits for the host: loss, grad_norm (before clipping),
    param_norm (after the update), is_updated, skipped, skipped_in_a_row; and sums, to be divided when they are read:
    loss_fixed and loss_extension over num_fixed and num_extension samples, loss_bucket over num_bucket (10 ranges of
    timesteps).
    """

    def train_step(state: TrainState, batch: Batch):
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        inputs = _draw_inputs(key, batch, objective)
        trained, frozen = trainable.split(state.params, update.trainable)

        def loss_fn(trained, inputs):
            loss, aux = denoising_loss(nnx.merge(graph, trainable.join(trained, frozen)), objective, *inputs)
            return loss, aux["loss_per_sample"]

        loss, per_sample, grads = _loss_and_gradients(loss_fn, trained, inputs, update.accumulate_steps)
        grad_norm = optax.tree.norm(grads)
        is_finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        updates, opt_state = optimizer.update(grads, state.opt_state, trained)
        new = optax.apply_updates(trained, updates)
        new = new, opt_state, _averaged(state, new, update.ema_decay)
        old = trained, state.opt_state, state.ema
        trained, opt_state, ema = jax.tree.map(lambda new, old: jnp.where(is_finite, new, old), new, old)
        params = trainable.join(trained, frozen)
        in_a_row = jnp.where(is_finite, 0, state.skipped_in_a_row + 1)
        new_state = TrainState(state.step + 1, params, opt_state, ema, state.skipped + ~is_finite, in_a_row)
        metrics = {
            "loss": loss,
            "grad_norm": grad_norm,
            "param_norm": optax.tree.norm(params),
            "is_updated": is_finite,
            "skipped": new_state.skipped,
            "skipped_in_a_row": in_a_row,
            **_loss_sums(per_sample, inputs, objective),
        }
        return new_state, metrics

    return train_step


def _loss_and_gradients(loss_fn, trained: nnx.State, inputs, num_parts: int):
    """(loss, loss of each sample, gradients) of a batch, part after part: their mean is that of the whole."""
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
    if num_parts == 1:
        (loss, per_sample), grads = value_and_grad(trained, inputs)
        return loss, per_sample, grads

    def add(total, part):
        (loss, per_sample), grads = value_and_grad(trained, part)
        return jax.tree.map(lambda t, g: t + g.astype(t.dtype) / num_parts, total, grads), (loss, per_sample)

    def cut(x):
        # Neighbours go into different parts, so that each device finds its share of every part among its own samples.
        return constrain(x.reshape(-1, num_parts, *x.shape[1:]).swapaxes(0, 1), P(None, BATCH))

    zeros = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), trained)
    total, (loss, per_sample) = jax.lax.scan(add, zeros, jax.tree.map(cut, inputs))
    grads = jax.tree.map(lambda t, x: t.astype(x.dtype), total, trained)
    return loss.mean(), per_sample.swapaxes(0, 1).reshape(-1), grads


def _averaged(state: TrainState, params: nnx.State, decay: float) -> nnx.State | None:
    step = state.step.astype(jnp.float32)
    decay = jnp.minimum(decay, (1 + step) / (10 + step))
    return state.ema and jax.tree.map(lambda e, x: decay * e + (1 - decay) * x.astype(e.dtype), state.ema, params)


def _loss_sums(per_sample: Floats[" b"], inputs, objective: Objective) -> dict[str, Array]:
    """Sums of the samples' losses, and their numbers, by kind and by timestep; what is not finite is left out."""
    *_, timesteps, is_known = inputs
    is_finite, is_extension = jnp.isfinite(per_sample), is_known.any(axis=1)
    bucket = timesteps * NUM_BUCKETS // objective.schedule.config.num_train_timesteps
    kinds = {
        "fixed": ~is_extension & is_finite,
        "extension": is_extension & is_finite,
        "bucket": (bucket == jnp.arange(NUM_BUCKETS)[:, None]) & is_finite,
    }
    loss = jnp.where(is_finite, per_sample, 0)
    sums = {f"loss_{name}_sum": (loss * chosen).sum(axis=-1) for name, chosen in kinds.items()}
    return sums | {f"num_{name}": chosen.sum(axis=-1) for name, chosen in kinds.items()}


def _draw_inputs(key: Array, batch: Batch, objective: Objective):
    """Everything random in a step: latents from the posterior, noise, timesteps, and which samples are extensions."""
    posterior_key, noise_key, time_key, known_key = jax.random.split(key, 4)
    latents = draw_latents(posterior_key, batch, objective)
    noise = jax.random.normal(noise_key, latents.shape)
    num_samples = len(latents)
    timesteps = jax.random.randint(time_key, (num_samples,), 0, objective.schedule.config.num_train_timesteps)
    is_known = conditioning.draw_is_known(
        known_key, num_samples, objective.layout.num_scenes, objective.condition_probability
    )
    return latents, batch["text"], noise, timesteps, is_known


def draw_latents(key: Array, batch: Batch, objective: Objective) -> Floats["b f h w c"]:
    """Latents as the transformer sees them: drawn from the posterior, scaled."""
    mean, std = batch["mean"], jnp.exp(0.5 * batch["logvar"])
    return (mean + std * jax.random.normal(key, mean.shape)) * objective.scaling_factor
