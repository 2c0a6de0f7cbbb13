"""One training step for every stage: pretraining, SFT and their ablations differ in values, never in code."""

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

NUM_BUCKETS = 10  # ranges of timesteps that losses are reported for
Batch = dict[str, Array]  # mean, logvar: (b f h w c) of the VAE's posterior, unscaled; text: (b s t x)


@dataclasses.dataclass(frozen=True)
class Objective:
    """What a run learns.

    Attributes:
        schedule: how latents are noised, and the v that the model predicts.
        layout: scenes of a sample.
        scaling_factor: of the VAE; the transformer sees latents times this.
        condition_probability: p, the share of scene-extension samples (0 in pretraining, 0.5 in SFT).
        condition: how known scenes are shown, "clean" or "noised" at t = 0.
    """

    schedule: NoiseSchedule
    layout: SceneLayout
    scaling_factor: float
    condition_probability: float = 0.0
    condition: str = "clean"

    def __post_init__(self):
        """Raise UserError for an unknown `condition`."""
        conditioning.check_condition(self.condition)


@dataclasses.dataclass(frozen=True)
class UpdateConfig:
    """How a batch updates the parameters, apart from the optimiser.

    Attributes:
        accumulate_steps: number of parts in which a batch goes through the model, to divide the memory of activations
            by that number. Random numbers are drawn for the whole batch first, so the step computes the same update.
        ema_decay: decay of the moving average of the parameters; 0 keeps no average. Early steps use the smaller decay
            (1 + step) / (10 + step), so that the average soon forgets the initial parameters.
        trainable: regular expressions over the paths of the parameters that train (`trainable.split`); () trains all.
    """

    accumulate_steps: int = 1
    ema_decay: float = 0.0
    trainable: tuple[str, ...] = ()

    def __post_init__(self):
        """Raise UserError for a decay outside [0, 1)."""
        if not 0 <= self.ema_decay < 1:
            raise UserError(f"ema_decay={self.ema_decay} must be at least 0 and less than 1; 0 keeps no average")


class TrainState(NamedTuple):
    """Everything that changes from step to step. Random keys are derived from `step`, so no key is saved.

    Attributes:
        step: number of steps done.
        params: all parameters, frozen ones included.
        opt_state: the optimiser's state, for the trained parameters.
        ema: moving average of the trained parameters in fp32, or None.
        skipped: number of updates skipped so far because loss or gradient were not finite.
        skipped_in_a_row: number of updates skipped since the last one that was made.
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
    """Return the state of step 0."""
    trained, _ = trainable.split(params, update.trainable)
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, params, optimizer.init(trained), init_ema(params, update), zero, zero)


def init_ema(params: nnx.State, update: UpdateConfig) -> nnx.State | None:
    """Return the initial moving average, a copy of the trained parameters in fp32; None if the run keeps none."""
    if not update.ema_decay:
        return None
    # A copy even where the dtype is the same, because a donated array must not appear twice in a state.
    return jax.tree.map(lambda x: jnp.array(x, jnp.float32), trainable.split(params, update.trainable)[0])


def evaluated_params(state: TrainState, update: UpdateConfig) -> nnx.State:
    """Return the parameters to validate and sample with: the moving average if there is one."""
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
    """Compute the squared error of the predicted v over the scenes to denoise (Eq. 2 and 3 of the paper), in fp32.

    Args:
        model: predicts v.
        objective: schedule, layout and how known scenes are shown.
        latents: clean, scaled latents.
        text: embeddings of each scene's prompt.
        noise: standard normal noise.
        timesteps: timestep of each sample, 0..999.
        is_known: (b, s), true for the scenes that condition the others.

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
    """Make `train_step(state, batch) -> (state, metrics)`, to be jitted with the state donated.

    An update that is not finite is skipped: parameters, optimiser state and average stay as they are, and the step
    number still rises.

    The metrics are device arrays, so that a step never waits for the host: loss, grad_norm (before clipping),
    param_norm (after the update), is_updated, skipped, skipped_in_a_row. Sums are divided when they are read:
    loss_fixed_sum and loss_extension_sum by num_fixed and num_extension samples, loss_bucket_sum by num_bucket (10
    ranges of timesteps).

    Args:
        graph: of the model.
        optimizer: makes updates from gradients.
        objective: what the run learns.
        seed: of everything random.
        update: accumulation, moving average, and which parameters train.
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
    """Return (loss, loss of each sample, gradients) of a batch that goes through the model in equal parts."""
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
    if num_parts == 1:
        (loss, per_sample), grads = value_and_grad(trained, inputs)
        return loss, per_sample, grads

    def add(total, part):
        (loss, per_sample), grads = value_and_grad(trained, part)
        return jax.tree.map(lambda t, g: t + g.astype(t.dtype) / num_parts, total, grads), (loss, per_sample)

    def cut(x):
        # Neighbours go into different parts, so that each device holds its share of every part already.
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
    """Sum the samples' losses and count the samples, by kind and by timestep; skips losses that are not finite."""
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
    """Draw everything random in a step: latents from the posterior, noise, timesteps, and which scenes are known."""
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
    """Draw latents from the VAE's posterior and scale them, as the transformer sees them."""
    mean, std = batch["mean"], jnp.exp(0.5 * batch["logvar"])
    return (mean + std * jax.random.normal(key, mean.shape)) * objective.scaling_factor
