"""The one loss: cross-entropy of the language model plus the verifier's error (section 4.2)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gsm_verifier.model.attention import Packed
from gsm_verifier.model.transformer import Params, Transformer
from gsm_verifier.train.batch import Batch


class Objective(NamedTuple):
    """What the verifier's head is trained for.

    Attributes:
      loss: "mse" | "bce" between the value and the 0/1 label.
      squash: "none", the value is the head's output (the paper's reading), or "sigmoid".
      chunk: positions whose logits exist at one time; the whole [B, T, V] never does.
    """

    loss: str = "mse"
    squash: str = "none"
    chunk: int = 128


def squashed(raw: jax.Array, squash: str) -> jax.Array:
    """The verifier's value, from the head's output."""
    return jax.nn.sigmoid(raw) if squash == "sigmoid" else raw


def cross_entropy_sum(
    model: Transformer, params: Params, hidden_BTD: jax.Array, batch: Batch, chunk: int
) -> jax.Array:
    """Weighted cross-entropy summed over the batch, in chunks recomputed in the backward pass."""
    T = hidden_BTD.shape[1]
    chunk = next(c for c in range(min(chunk, T), 0, -1) if T % c == 0)

    @jax.checkpoint
    def one(total: jax.Array, piece: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        hidden_BCD, targets_BC, weight_BC = piece
        logits_BCV = model.apply(params, hidden_BCD, method="logits")
        picked_BC = jnp.take_along_axis(logits_BCV, targets_BC[..., None], -1)[..., 0]
        loss_BC = jax.nn.logsumexp(logits_BCV, -1) - picked_BC
        return total + (loss_BC * weight_BC).sum(), None

    def pieces(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(x.shape[0], T // chunk, chunk, *x.shape[2:]), 1, 0)

    xs = (pieces(hidden_BTD), pieces(batch.targets_BT), pieces(batch.lm_weight_BT))
    return jax.lax.scan(one, jnp.zeros(()), xs)[0]


def loss_sums(
    model: Transformer, params: Params, batch: Batch, objective: Objective, key: Any = None
) -> dict[str, jax.Array]:
    """Weighted sums over the batch: {"lm", "value"}; divide by the sums of the weights.

    Args:
      key: of the residual dropout; needed when `model.dropout` is above 0.
    """
    hidden_BTD, _ = model.apply(
        params,
        batch.tokens_BT,
        batch.position_BT,
        Packed(batch.visible_BTS()),
        rngs=None if key is None else {"dropout": key},
    )
    raw_BT = model.apply(params, hidden_BTD, method="value")
    if objective.loss == "bce":
        error_BT = jax.nn.softplus(raw_BT) - batch.label_BT * raw_BT
    else:
        error_BT = jnp.square(squashed(raw_BT, objective.squash) - batch.label_BT)
    return {
        "lm": cross_entropy_sum(model, params, hidden_BTD, batch, objective.chunk),
        "value": (error_BT * batch.value_weight_BT).sum(),
    }


def mean_losses(sums: dict[str, jax.Array], batch: Batch) -> dict[str, jax.Array]:
    """Means of the two losses over their weights; a loss that no token carries is 0."""

    def mean(total: jax.Array, weight: jax.Array) -> jax.Array:
        return total / jnp.maximum(weight.sum(), 1e-9)

    return {
        "lm": mean(sums["lm"], batch.lm_weight_BT),
        "value": mean(sums["value"], batch.value_weight_BT),
    }
