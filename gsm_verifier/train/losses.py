"""The one loss: cross-entropy of the language model plus the verifier's error (section 4.2)."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gsm_verifier.model import transformer
from gsm_verifier.model.attention import Packed
from gsm_verifier.model.config import ModelConfig
from gsm_verifier.model.transformer import Params, Transformer
from gsm_verifier.sharding import constrain, parts
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _total(
    loss: Callable[..., jax.Array], letters: str, table: jax.Array, pieces: Any
) -> jax.Array:
    """The sum of loss(table, *piece) over the first axis of the arrays in `pieces`.

    The last array is the weights; a piece that has none isn't computed.

    Its gradient by the table and by the first array is computed with it: the logits, which are a
    piece's at a time, would otherwise have to be computed again in the backward pass, a quarter of
    the products with the table. By the other arrays it has none.
    """

    def add(total: jax.Array, piece: Any) -> tuple[jax.Array, None]:
        weighs, *piece = piece
        return total + jax.lax.cond(weighs, lambda: loss(table, *piece), lambda: 0.0), None

    return jax.lax.scan(add, jnp.zeros(()), (_weigh(pieces), *pieces))[0]


def _weigh(pieces: Any) -> jax.Array:
    """Which pieces have a weight, in any of their rows."""
    return (pieces[-1] != 0).any(range(1, pieces[-1].ndim))


def _total_forward(loss: Any, letters: str, table: jax.Array, pieces: Any) -> tuple[jax.Array, Any]:
    """Each device adds up the gradients of its own rows, so that they are summed over devices once,
    not with every piece."""
    B, n = pieces[0].shape[1], parts("B")
    n = n if B % n == 0 else 1

    def by_device(x: jax.Array) -> jax.Array:
        return constrain(x.reshape(n, B // n, *x.shape[1:]), ("B", *[None] * x.ndim))

    def add(carry: Any, piece: Any) -> tuple[Any, jax.Array]:
        weighs, *piece = piece

        def added() -> tuple[Any, jax.Array]:
            each = jax.vmap(jax.value_and_grad(loss, (0, 1)), (None, 0, 0, 0))
            value, (d_table, d_hidden) = each(table, *map(by_device, piece))
            return jax.tree.map(jnp.add, carry, (value, d_table)), d_hidden.reshape(piece[0].shape)

        return jax.lax.cond(weighs, added, lambda: (carry, jnp.zeros_like(piece[0])))

    own = ("B", *(letter if letter == "V" else None for letter in letters))
    zero = constrain(jnp.zeros((n, *table.shape), table.dtype), own)
    (total, d_table), d_hidden = jax.lax.scan(add, (jnp.zeros(n), zero), (_weigh(pieces), *pieces))
    return total.sum(), (constrain(d_table.sum(0), letters), d_hidden)


def _total_backward(loss: Any, letters: str, kept: Any, g: jax.Array) -> tuple[Any, ...]:
    d_table, d_hidden = ((g * x).astype(x.dtype) for x in kept)
    return d_table, (d_hidden, None, None)


_total.defvjp(_total_forward, _total_backward)


def cross_entropy_sum(
    config: ModelConfig, params: Params, hidden_BTD: jax.Array, batch: Batch, chunk: int
) -> jax.Array:
    """Weighted cross-entropy summed over the batch, of `chunk` positions of each row at a time.

    Those without a weight, which are most where a verifier is trained, come last in their rows, and
    no logits are computed where nothing else is left.
    """
    T = hidden_BTD.shape[1]
    # Else each chunk's gradient by the logits would be transposed for that by the table.
    letters = "DV" if transformer.lies_transposed(hidden_BTD) else "VD"
    chunk = next(c for c in range(min(chunk, T), 0, -1) if T % c == 0)

    def loss(table: Any, hidden_BCD: Any, targets_BC: Any, weight_BC: Any) -> jax.Array:
        logits_BCV = transformer.logits(config, table, hidden_BCD, letters=letters)
        picked_BC = jnp.take_along_axis(logits_BCV, targets_BC[..., None], -1)[..., 0]
        loss_BC = jax.nn.logsumexp(logits_BCV, -1) - picked_BC
        return (loss_BC * weight_BC).sum()

    def pieces(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(x.shape[0], T // chunk, chunk, *x.shape[2:]), 1, 0)

    order_BT = jnp.argsort(batch.lm_weight_BT == 0, axis=1, stable=True)
    ordered_BTD = jnp.take_along_axis(hidden_BTD, order_BT[..., None], 1)
    others = (batch.targets_BT, batch.lm_weight_BT)
    arrays = (ordered_BTD, *(jnp.take_along_axis(x, order_BT, 1) for x in others))
    table_VD = params["params"][transformer.table(config)]
    table = jnp.einsum(f"VD->{letters}", table_VD)
    return _total(loss, letters, table, tuple(map(pieces, arrays)))


def loss_sums(
    model: Transformer, params: Params, batch: Batch, objective: Objective, key_B: Any = None
) -> dict[str, jax.Array]:
    """Weighted sums over the batch: {"lm", "value"}; divide by the sums of the weights.

    Args:
      key_B: of every row's residual dropout; needed when `model.dropout` is above 0.
    """
    hidden_BTD, _ = model.apply(
        params,
        batch.tokens_BT,
        batch.position_BT,
        Packed(batch.end_BT),
        key_B=key_B,
    )
    raw_BT = model.apply(params, hidden_BTD, method="value")
    if objective.loss == "bce":
        error_BT = jax.nn.softplus(raw_BT) - batch.label_BT * raw_BT
    else:
        # The mean over correct solutions, of which label is the share, and wrong ones.
        spread_BT = batch.label_BT * (1 - batch.label_BT)
        error_BT = jnp.square(squashed(raw_BT, objective.squash) - batch.label_BT) + spread_BT
    return {
        "lm": cross_entropy_sum(model.config, params, hidden_BTD, batch, objective.chunk),
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
