"""The one loss: cross-entropy of the language model plus the verifier's error (section 4.2)."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gsm_verifier.model import cpu_kernels, transformer
from gsm_verifier.model.attention import Packed, by_kernel
from gsm_verifier.model.config import ModelConfig
from gsm_verifier.model.transformer import Params, Transformer
from gsm_verifier.sharding import constrain, parts
from gsm_verifier.train.batch import Batch


class Objective(NamedTuple):
    """What the verifier's head is trained for.

    Attributes:
      loss: "mse" | "bce" between the value and the 0/1 label.
      squash: "none", the value is the head's output (the paper's reading), or "sigmoid".
      chunk: positions of each row whose logits exist at one time. In tiles (AMX) those of none do,
        and their gradients by logits of 1,024 in all.
    """

    loss: str = "mse"
    squash: str = "none"
    chunk: int = 128


def squashed(raw: jax.Array, squash: str) -> jax.Array:
    """The verifier's value, from the head's output."""
    return jax.nn.sigmoid(raw) if squash == "sigmoid" else raw


class _Head(NamedTuple):
    """What a language model's loss is computed by, besides its table.

    Attributes:
      letters: of the table, "VD" or transposed "DV".
      in_tiles: is the loss computed in C++, and are logits never written?
    """

    config: ModelConfig
    letters: str
    in_tiles: bool

    @property
    def formula(self) -> str:
        """Of the logits."""
        return f"BD,{self.letters}->BV"

    def loss(
        self,
        table: jax.Array,
        hidden_BCD: jax.Array,
        targets_BC: jax.Array,
        weight_BC: jax.Array,
        gradient: bool,
    ) -> tuple[jax.Array, Any]:
        """The sum of the weighted cross-entropy, and its gradient by `transformer.dots`."""

        def entropy(dots_BCV: jax.Array) -> jax.Array:
            logits_BCV = transformer.logits_of(self.config, dots_BCV)
            picked_BC = jnp.take_along_axis(logits_BCV, targets_BC[..., None], -1)[..., 0]
            loss_BC = jax.nn.logsumexp(logits_BCV, -1) - picked_BC
            return (loss_BC * weight_BC).sum()

        if self.in_tiles:
            arrays = (hidden_BCD, targets_BC, weight_BC)
            hidden, *of_row = (x.reshape(-1, *x.shape[2:]) for x in arrays)
            loss_B, d_dots = cpu_kernels.cross_entropy(
                self.formula, hidden, table, *of_row, self.config.text_size, gradient
            )
            return loss_B.sum(), d_dots
        dots_BCV = transformer.dots(table, hidden_BCD, self.letters)
        if not gradient:
            return entropy(dots_BCV), None
        loss, d_dots_BCV = jax.value_and_grad(entropy)(dots_BCV)
        return loss, d_dots_BCV.astype(hidden_BCD.dtype)

    def gradients(self, table: jax.Array, hidden_BCD: jax.Array, *of_row: jax.Array) -> Any:
        """The same sum, and its gradients by the table, in float32, and by hidden states."""
        loss, d_dots = self.loss(table, hidden_BCD, *of_row, gradient=True)
        hidden = hidden_BCD.reshape(-1, hidden_BCD.shape[-1])
        d_dots_BV = d_dots.reshape(len(hidden), -1)
        d_hidden, d_table = transformer.product_gradients(
            self.formula, self.in_tiles, hidden, table, d_dots_BV
        )
        return loss, d_table, d_hidden.reshape(hidden_BCD.shape).astype(hidden.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _total(head: _Head, table: jax.Array, pieces: Any) -> jax.Array:
    """The sum of the head's loss over the first axis of the arrays in `pieces`.

    The last array is the weights; a piece that has none isn't computed.

    Its gradient by the table and by the first array is computed with it: the logits, which are a
    piece's at a time, would otherwise have to be computed again in the backward pass, a quarter of
    the products with the table. By the other arrays it has none.
    """
    table = table.astype(pieces[0].dtype)

    def add(total: jax.Array, piece: Any) -> tuple[jax.Array, None]:
        weighs, *piece = piece

        def loss() -> jax.Array:
            return head.loss(table, *piece, gradient=False)[0]

        return total + jax.lax.cond(weighs, loss, lambda: 0.0), None

    return jax.lax.scan(add, jnp.zeros(()), (_weigh(pieces), *pieces))[0]


def _weigh(pieces: Any) -> jax.Array:
    """Which pieces have a weight, in any of their rows."""
    return (pieces[-1] != 0).any(range(1, pieces[-1].ndim))


def _total_forward(head: _Head, table: jax.Array, pieces: Any) -> tuple[jax.Array, Any]:
    """Each device adds up the gradients of its own rows, so that they are summed over devices once,
    not with every piece."""
    B, n = pieces[0].shape[1], parts("B")
    n = n if B % n == 0 else 1
    narrow = table.astype(pieces[0].dtype)  # in a condition XLA would with every piece

    def by_device(x: jax.Array) -> jax.Array:
        return constrain(x.reshape(n, B // n, *x.shape[1:]), ("B", *[None] * x.ndim))

    def add(carry: Any, piece: Any) -> tuple[Any, jax.Array]:
        weighs, *piece = piece

        def added() -> tuple[Any, jax.Array]:
            if n == 1:  # what is in C++ has no other way
                each = jax.tree.map(lambda x: x[None], head.gradients(narrow, *piece))
            else:
                each = jax.vmap(head.gradients, (None, 0, 0, 0))(narrow, *map(by_device, piece))
            *sums, d_hidden = each
            return jax.tree.map(jnp.add, carry, tuple(sums)), d_hidden.reshape(piece[0].shape)

        return jax.lax.cond(weighs, added, lambda: (carry, jnp.zeros_like(piece[0])))

    own = ("B", *(letter if letter == "V" else None for letter in head.letters))
    zero = constrain(jnp.zeros((n, *table.shape)), own)
    (total, d_table), d_hidden = jax.lax.scan(add, (jnp.zeros(n), zero), (_weigh(pieces), *pieces))
    d_table = constrain(d_table.sum(0).astype(table.dtype), head.letters)
    return total.sum(), (d_table, d_hidden)


def _total_backward(head: _Head, kept: Any, g: jax.Array) -> tuple[Any, ...]:
    d_table, d_hidden = ((g * x).astype(x.dtype) for x in kept)
    return d_table, (d_hidden, None, None)


_total.defvjp(_total_forward, _total_backward)


def cross_entropy_sum(
    config: ModelConfig, params: Params, hidden_BTD: jax.Array, batch: Batch, chunk: int
) -> jax.Array:
    """Weighted cross-entropy summed over the batch, of `chunk` positions of each row at a time.

    Those without a weight, which are most where a verifier is trained, come last in their rows, and
    no logits are computed where nothing else is left. In tiles all rows are one, and of it as many
    positions at a time as these want at least: of fewer the table would be packed too often.
    """
    # Else each chunk's gradient by the logits would be transposed for that by the table.
    letters = "DV" if transformer.lies_transposed(hidden_BTD) else "VD"
    table = jnp.einsum(f"VD->{letters}", params["params"][transformer.table(config)])
    rows_BD = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
    kernel = by_kernel(config.attention, config.logit_cap)
    in_tiles = kernel and cpu_kernels.multiplies(f"BD,{letters}->BV", rows_BD, table)
    head = _Head(config, letters, in_tiles)

    arrays = (hidden_BTD, batch.targets_BT, batch.lm_weight_BT)
    if in_tiles:
        chunk = cpu_kernels.LEAST
        arrays = tuple(_one_row(x, chunk) for x in arrays)
    B, T = arrays[-1].shape
    chunk = next(c for c in range(min(chunk, T), 0, -1) if T % c == 0)

    def pieces(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(B, T // chunk, chunk, *x.shape[2:]), 1, 0)

    order_BT = jnp.argsort(arrays[-1] == 0, axis=1, stable=True)

    def ordered(x: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x, order_BT.reshape(B, T, *[1] * (x.ndim - 2)), 1)

    return _total(head, table, tuple(pieces(ordered(x)) for x in arrays))


def _one_row(x: jax.Array, multiple: int) -> jax.Array:
    """[B, T, ...] as one row, filled up with zeros to a multiple of so many positions."""
    size = x.shape[0] * x.shape[1]
    row = x.reshape(1, size, *x.shape[2:])
    return jnp.pad(row, [(0, 0), (0, -size % multiple), *[(0, 0)] * (x.ndim - 2)])


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
