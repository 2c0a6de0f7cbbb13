"""A loss that can be compared from step to step: timesteps, noise and batch stay the same all through a run."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mask2dit_jax.diffusion import conditioning
from mask2dit_jax.training.step import Batch, Objective, denoising_loss, draw_latents

NUM_TIMESTEPS = 5
_STREAM = 2**31 - 1  # of keys: no training step has this number


def timesteps(objective: Objective) -> np.ndarray:
    """The middles of so many equal ranges: 100, 300, .. 900 of 1000."""
    total = objective.schedule.config.num_train_timesteps
    return (np.arange(NUM_TIMESTEPS) * 2 + 1) * total // (2 * NUM_TIMESTEPS)


def kinds(objective: Objective) -> dict[str, float]:
    """The kinds of samples that the run trains on, and the probability with which each draws only its own."""
    p = objective.condition_probability
    return {name: only for name, only in (("fixed", 0.0), ("extension", 1.0)) if abs(p - only) < 1}


def scalars(losses: dict[str, np.ndarray], objective: Objective) -> dict[str, float]:
    """What `validate` found, by name, and its mean."""
    found = {
        f"validation/{kind}_t{timestep:03d}": float(loss)
        for kind, per_timestep in losses.items()
        for timestep, loss in zip(timesteps(objective), per_timestep, strict=True)
    }
    return found | {"validation/loss": float(np.mean(list(losses.values())))}


def make_validation(graph: nnx.GraphDef, objective: Objective, seed: int):
    """`validate(params, batch) -> {kind: losses}`, to be jitted: the loss of the batch at each of `timesteps`."""

    def validate(params: nnx.State, batch: Batch):
        model = nnx.merge(graph, params)
        latents_key, noise_key, known_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), _STREAM), 3)
        latents = draw_latents(latents_key, batch, objective)
        noise = jax.random.normal(noise_key, latents.shape)
        size, num_scenes = len(latents), objective.layout.num_scenes

        def losses(probability):
            is_known = conditioning.draw_is_known(known_key, size, num_scenes, probability)

            def loss_at(timestep):
                inputs = latents, batch["text"], noise, jnp.full(size, timestep), is_known
                return denoising_loss(model, objective, *inputs)[0]

            return jax.lax.map(loss_at, jnp.asarray(timesteps(objective), jnp.int32))

        return {name: losses(probability) for name, probability in kinds(objective).items()}

    return validate
