"""AdamW as the paper trained with (FACTS: lr 1e-5, eps 1e-10, decay 3e-2, clipping at 0.05, 100 warm-up steps)."""

import dataclasses

import optax


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Attributes:
    warmup_steps: the learning rate rises linearly from 0 over so many steps, then stays.
    clip_norm: the global norm that gradients are scaled down to.
    """

    learning_rate: float = 1e-5
    warmup_steps: int = 100
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-10
    weight_decay: float = 3e-2
    clip_norm: float = 0.05


def learning_rate(config: OptimizerConfig) -> optax.Schedule:
    return optax.linear_schedule(
        0.0 if config.warmup_steps else config.learning_rate, config.learning_rate, max(config.warmup_steps, 1)
    )


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate(config), b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay
        ),
    )
