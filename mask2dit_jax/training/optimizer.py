"""AdamW with warm-up and clipping. The learning rate is the paper's; the other defaults are from the authors' code."""

import optax

from mask2dit_jax.config import OptimizerConfig


def learning_rate(config: OptimizerConfig) -> optax.Schedule:
    """Return the learning rate by step: a linear warm-up, then constant, or a cosine down to 0 at `decay_steps`.

    Args:
        config: of the run, with its `decay_steps` (`TrainConfig.scheduled_optimizer`) if it has a cosine.
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    rise = optax.linear_schedule(0.0 if warmup else peak, peak, max(warmup, 1))
    if config.schedule == "constant":
        return rise
    fall = optax.cosine_decay_schedule(peak, config.decay_steps - warmup)
    return optax.join_schedules([rise, fall], [warmup])


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Return clipping by the global norm, unless `clip_norm` is 0, followed by AdamW.

    Both choices have a state of one structure, so that a run may resume with the other.
    """
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        optax.adamw(
            learning_rate(config), b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay
        ),
    )
