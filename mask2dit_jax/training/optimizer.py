"""AdamW with warm-up and clipping. The learning rate is the paper's; the other defaults are from the authors' code."""

import dataclasses

import optax

from mask2dit_jax.errors import UserError

SCHEDULES = ("constant", "cosine")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The settings of the optimizer.

    Attributes:
        learning_rate: Peak learning rate (paper: 1e-5).
        warmup_steps: Number of steps over which the learning rate rises linearly from 0.
        b1: Decay of the first moment.
        b2: Decay of the second moment.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled weight decay.
        clip_norm: Global norm to which larger gradients are scaled down.
        schedule: Learning rate after the warm-up: "constant" (the authors' code), or "cosine", down to 0 at
            `decay_steps`.
        decay_steps: Last step of "cosine". It is separate from the run's num_steps, so that extending a run does not
            change its schedule.

    Raises:
        UserError: There is no such schedule, or `decay_steps` is not above `warmup_steps`.
    """

    learning_rate: float = 1e-5
    warmup_steps: int = 100
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-10
    weight_decay: float = 3e-2
    clip_norm: float = 0.05
    schedule: str = "constant"
    decay_steps: int = 0

    def __post_init__(self):
        """Check the schedule."""
        if self.schedule not in SCHEDULES:
            raise UserError(
                f"optimizer.schedule {self.schedule!r} does not exist; choose one of {', '.join(SCHEDULES)}"
            )
        if self.schedule == "cosine" and self.decay_steps <= self.warmup_steps:
            raise UserError(
                f"optimizer.decay_steps={self.decay_steps} must be more than optimizer.warmup_steps={self.warmup_steps}"
            )


def learning_rate(config: OptimizerConfig) -> optax.Schedule:
    """Return the learning rate as a function of the step."""
    peak, warmup = config.learning_rate, config.warmup_steps
    rise = optax.linear_schedule(0.0 if warmup else peak, peak, max(warmup, 1))
    if config.schedule == "constant":
        return rise
    fall = optax.cosine_decay_schedule(peak, config.decay_steps - warmup)
    return optax.join_schedules([rise, fall], [warmup])


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Return clipping by the global norm followed by AdamW."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate(config), b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay
        ),
    )
