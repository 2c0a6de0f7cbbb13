"""One training step, for every stage: pretraining, SFT and their ablations differ by values, never by code."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from mask2dit_jax.axes import Array, Floats, Ints
from mask2dit_jax.diffusion import scenes
from mask2dit_jax.diffusion.schedule import NoiseSchedule
from mask2dit_jax.layout import SceneLayout
from mask2dit_jax.models.dit import DiT

Batch = dict[str, Array]  # mean, logvar: (b f h w c) of the VAE's posterior, unscaled; text: (b s t x)


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is learnt.

    Attributes:
        scaling_factor: of the VAE; the DiT sees latents times this.
        condition_probability: p, the share of scene-extension samples (0 in pretraining, 0.5 in SFT).
        condition: how known scenes are shown, "clean" or "noised" (at t = 0).
    """

    schedule: NoiseSchedule
    layout: SceneLayout
    scaling_factor: float
    condition_probability: float = 0.0
    condition: str = "clean"

    def __post_init__(self):
        scenes.check_condition(self.condition)


class TrainState(NamedTuple):
    """All that changes from step to step; keys are folded from `step`, so nothing else needs saving."""

    step: Array
    params: nnx.State
    opt_state: Any


def init_state(params: nnx.State, optimizer: optax.GradientTransformation) -> TrainState:
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def denoising_loss(
    model: DiT,
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
    per_scene = scenes.scene_timesteps(timesteps, is_known)
    noisy = scenes.noisy_latents(
        schedule, latents, noise, per_scene, is_known, layout=layout, condition=objective.condition
    )
    prediction = model(noisy, text, per_scene, layout=layout)
    target = schedule.velocity(latents, noise, per_scene[:, layout.frame_scenes])
    error = jnp.square(prediction.astype(jnp.float32) - target.astype(jnp.float32))
    loss, per_sample = scenes.scene_losses(error, is_known, layout=layout)
    return loss, {"loss_per_sample": per_sample, "prediction": prediction, "noisy": noisy, "target": target}


def make_train_step(graph: nnx.GraphDef, optimizer: optax.GradientTransformation, objective: Objective, seed: int):
    """`train_step(state, batch) -> (state, metrics)`, to be jitted with the state donated.

    The metrics are device scalars, so that a step never waits for the host: loss, grad_norm (before clipping), and
    loss_fixed, loss_extension with the number of samples of each kind (their sums, to be divided when they are read).
    """

    def train_step(state: TrainState, batch: Batch):
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        inputs = _draw_inputs(key, batch, objective)

        def loss_fn(params):
            loss, aux = denoising_loss(nnx.merge(graph, params), objective, *inputs)
            return loss, aux["loss_per_sample"]

        (loss, per_sample), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        is_extension = inputs[-1].any(axis=1)
        metrics = {
            "loss": loss,
            "grad_norm": optax.tree.norm(grads),
            "loss_fixed_sum": jnp.where(is_extension, 0, per_sample).sum(),
            "loss_extension_sum": jnp.where(is_extension, per_sample, 0).sum(),
            "num_fixed": (~is_extension).sum(),
            "num_extension": is_extension.sum(),
        }
        return TrainState(state.step + 1, params, opt_state), metrics

    return train_step


def _draw_inputs(key: Array, batch: Batch, objective: Objective):
    """Everything random in a step: latents from the posterior, noise, timesteps, and which samples are extensions."""
    posterior_key, noise_key, time_key, known_key = jax.random.split(key, 4)
    mean, std = batch["mean"], jnp.exp(0.5 * batch["logvar"])
    latents = (mean + std * jax.random.normal(posterior_key, mean.shape)) * objective.scaling_factor
    noise = jax.random.normal(noise_key, latents.shape)
    num_samples = len(latents)
    timesteps = jax.random.randint(time_key, (num_samples,), 0, objective.schedule.config.num_train_timesteps)
    is_known = scenes.draw_is_known(
        known_key, num_samples, objective.layout.num_scenes, objective.condition_probability
    )
    return latents, batch["text"], noise, timesteps, is_known
