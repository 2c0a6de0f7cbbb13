"""AdamW as the paper trained with (FACTS: lr 1e-5, eps 1e-10, decay 3e-2, clipping at 0.05, 100 warm-up steps)."""

import dataclasses

import optax

from mask2dit_jax.errors import UserError

SCHEDULES = ("constant", "cosine")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Attributes:
    warmup_steps: the learning rate rises linearly from 0 over so many steps.
    schedule: what follows: "constant" (the paper), or "cosine", down to 0 at decay_steps.
    decay_steps: of "cosine". It is not the run's num_steps, so that a run that is made longer stays the same run.
    clip_norm: the global norm that gradients are scaled down to.
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
        if self.schedule not in SCHEDULES:
            raise UserError(
                f"optimizer.schedule {self.schedule!r} does not exist; choose one of {', '.join(SCHEDULES)}"
            )
        if self.schedule == "cosine" and self.decay_steps <= self.warmup_steps:
            raise UserError(
                f"optimizer.decay_steps={self.decay_steps} must be more than optimizer.warmup_steps={self.warmup_steps}"
            )


def learning_rate(config: OptimizerConfig) -> optax.Schedule:
    peak, warmup = config.learning_rate, config.warmup_steps
    rise = optax.linear_schedule(0.0 if warmup else peak, peak, max(warmup, 1))
    if config.schedule == "constant":
        return rise
    fall = optax.cosine_decay_schedule(peak, config.decay_steps - warmup)
    return optax.join_schedules([rise, fall], [warmup])


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate(config), b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay
        ),
    )
