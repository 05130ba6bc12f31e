"""Adam with the paper's schedule (table 1): linear decay to zero."""

import optax


def schedule(learning_rate: float, steps: int, warmup: int) -> optax.Schedule:
    """Linear warm-up over `warmup` steps, then linear decay that ends at 0 after `steps`."""
    decay = optax.linear_schedule(learning_rate, 0.0, max(steps - warmup, 1))
    if not warmup:
        return decay
    return optax.join_schedules(
        [optax.linear_schedule(learning_rate / warmup, learning_rate, warmup), decay], [warmup]
    )


def make(
    learning_rate: float,
    steps: int,
    *,
    warmup: int,
    beta1: float,
    beta2: float,
    epsilon: float,
    weight_decay: float,
    clip: float,
) -> optax.GradientTransformation:
    """Adam(W); `clip` bounds the gradient's global norm, 0 leaves it alone."""
    return optax.chain(
        optax.clip_by_global_norm(clip) if clip else optax.identity(),
        optax.scale_by_adam(beta1, beta2, epsilon),
        optax.add_decayed_weights(weight_decay) if weight_decay else optax.identity(),
        optax.scale_by_learning_rate(schedule(learning_rate, steps, warmup)),
    )
