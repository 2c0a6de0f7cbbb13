"""A validation loss that is comparable from step to step: timesteps, noise and batch stay fixed throughout a run."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mask2dit_jax.diffusion import conditioning
from mask2dit_jax.training.step import Batch, Objective, denoising_loss, draw_latents

NUM_TIMESTEPS = 5
_STREAM = 2**31 - 1  # folded into the key; no training step has this number


def timesteps(objective: Objective) -> np.ndarray:
    """Return the middles of NUM_TIMESTEPS equal ranges: 100, 300, .. 900 of 1000."""
    total = objective.schedule.config.num_train_timesteps
    return (np.arange(NUM_TIMESTEPS) * 2 + 1) * total // (2 * NUM_TIMESTEPS)


def kinds(objective: Objective) -> dict[str, float]:
    """Return the kinds of samples that the run trains on, with the condition probability that draws only that kind."""
    p = objective.condition_probability
    return {name: only for name, only in (("fixed", 0.0), ("extension", 1.0)) if abs(p - only) < 1}


def scalars(losses: dict[str, np.ndarray], objective: Objective) -> dict[str, float]:
    """Return the losses that `validate` computed and their mean, by the names that TensorBoard shows."""
    found = {
        f"validation/{kind}_t{timestep:03d}": float(loss)
        for kind, per_timestep in losses.items()
        for timestep, loss in zip(timesteps(objective), per_timestep, strict=True)
    }
    return found | {"validation/loss": float(np.mean(list(losses.values())))}


def make_validation(graph: nnx.GraphDef, objective: Objective, seed: int):
    """Make `validate(params, batch) -> {kind: losses}`, to be jitted.

    Args:
        graph: of the model.
        objective: what the run trains.
        seed: of the noise and of the draws from the posterior.

    Returns:
        The function; it computes the loss of the batch at each of `timesteps`.
    """

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
