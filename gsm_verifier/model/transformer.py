"""The one transformer, shared by generator and verifier: a pure function of its parameters.

    hidden_BTD, caches = model.apply(params, tokens_BT, position_BT, context)
    logits = model.apply(params, hidden, method="logits")      # the language model
    value = model.apply(params, hidden, method="value")        # the verifier (section 4.2)

The verifier's head is one gain and one bias on the logit of one reserved vocabulary token; the
language model never predicts that token, so a generator is a verifier whose head nobody trained.
"""

import functools
import re
from collections.abc import Callable, Sequence
from string import ascii_lowercase
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from gsm_verifier import sharding
from gsm_verifier.model import cpu_kernels
from gsm_verifier.model.attention import HIDDEN, Look, Packed, by_kernel
from gsm_verifier.model.config import ModelConfig
from gsm_verifier.sharding import constrain, tree_shardings

Params = Any  # a linen variable collection {"params": {...}} of plain arrays
Context = Callable[..., tuple[jax.Array, Any]]

_GELU = functools.partial(jax.nn.gelu, approximate=True)
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": _GELU,
    "gelu_exact": functools.partial(jax.nn.gelu, approximate=False),
    "swiglu": jax.nn.silu,
    "geglu": _GELU,
}


def _normal(letters: str, scale: float) -> Callable[..., Any]:
    return nn.with_logical_partitioning(nn.initializers.normal(scale), tuple(letters))


def _constant(letters: str, value: float) -> Callable[..., Any]:
    return nn.with_logical_partitioning(nn.initializers.constant(value), tuple(letters))


def lies_transposed(x: jax.Array) -> bool:
    """Must x be transposed in memory for x.T @ g, the gradient of a matrix it is multiplied with?

    From bfloat16 XLA:CPU runs that at the speed of float32, a fifth of what it makes of a left side
    that lies so. By the table alone SmolLM2-135M lost 5 % of a training step to it.
    """
    return sharding.platform() == "cpu" and x.dtype == jnp.bfloat16


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _product(formula: str, narrow: bool, kernel: bool, x: jax.Array, w: jax.Array) -> jax.Array:
    """x @ w in x's dtype, accumulated in float32; so are the two products of its gradient.

    JAX's own gradient multiplies a float32 cotangent with x and w as they are, which XLA:CPU does
    in float32, several times slower.

    Args:
      narrow: the result may be rounded to x's dtype. Accelerators do that at once, before a bias is
        added and before devices add up their parts of it, which so send half as much: with bfloat16
        one rounding more than on one device. So does the kernel. XLA:CPU leaves it to the caller,
        which is faster.
      kernel: may it be computed in C++, where that is faster?
    """
    w = w.astype(x.dtype)
    if kernel and cpu_kernels.multiplies(formula, x, w):
        return cpu_kernels.product(formula, x, w, x.dtype if narrow else jnp.float32)
    narrow = narrow and sharding.platform() != "cpu"
    dtype = x.dtype if narrow else jnp.float32
    # einsum contracts letters in the order of the alphabet. Where that isn't theirs in x, XLA:CPU
    # transposes x and w: they get names in the order of x.
    letters = dict.fromkeys(filter(str.isalpha, formula))
    formula = formula.translate(str.maketrans(dict(zip(letters, ascii_lowercase, strict=False))))
    return jnp.einsum(formula, x, w, preferred_element_type=dtype)


def _product_forward(
    formula: str, narrow: bool, kernel: bool, x: Any, w: Any
) -> tuple[jax.Array, Any]:
    return _product(formula, narrow, kernel, x, w), (x, w)


def product_gradients(
    formula: str, kernel: bool, x: jax.Array, w: jax.Array, g: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The gradients of a product by x, as accelerators round it, and by w, in float32.

    Args:
      g: by the product, in x's dtype. kernel: as in `_product`.
    """
    of_x, of_w, of_y = re.split(",|->", formula)
    dx = _product(f"{of_y},{of_w}->{of_x}", True, kernel, g, w)
    in_cpp = kernel and cpu_kernels.multiplies(f"{of_x},{of_y}->{of_w}", x, g)
    if lies_transposed(x) and not in_cpp:
        # The barrier keeps XLA from undoing it, if the rows have two axes at least.
        x, g, of_x, of_y = x[None], g[None], "Z" + of_x, "Z" + of_y
        rows = "".join(letter for letter in of_x if letter not in of_w)
        lying = "".join(letter for letter in of_x if letter in of_w) + rows
        x, of_x = jax.lax.optimization_barrier(jnp.einsum(f"{of_x}->{lying}", x)), lying
    return dx, _product(f"{of_x},{of_y}->{of_w}", False, kernel, x, g)


def _product_backward(formula: str, narrow: bool, kernel: bool, kept: Any, g: Any) -> Any:
    x, w = kept
    dx, dw = product_gradients(formula, kernel, x, w, g.astype(x.dtype))
    return dx.astype(x.dtype), dw.astype(w.dtype)


_product.defvjp(_product_forward, _product_backward)


def _project(
    config: ModelConfig, formula: str, x: jax.Array, w: jax.Array, bias: jax.Array | None
) -> jax.Array:
    """x @ w accumulated in float32 on each device (on CPU the faster way too), in x's dtype."""
    y = _product(formula, True, by_kernel(config.attention, cap=0), x, w)
    return (y if bias is None else y + bias).astype(x.dtype)


def stretch(config: ModelConfig) -> Any:
    """What the wavelengths of the rotary embedding are multiplied by, to reach further."""
    c = config
    if not c.rope_llama3:
        return c.rope_linear
    # Waves much shorter than the original length stay, much longer ones are stretched by factor.
    factor, low, high, length = c.rope_llama3
    half = int(c.head_size * c.rope_fraction) // 2
    turns = length / (2 * np.pi * c.rope_theta ** (np.arange(half) / half))
    stay = np.clip((turns - low) / (high - low), 0, 1)
    return 1 / (stay + (1 - stay) / factor)


class Turn(NamedTuple):
    """How far the rotary embedding turns each position; H is half of what rotates of a head."""

    cos_BTH: jax.Array
    sin_BTH: jax.Array


def turn(position_BT: jax.Array, theta: float, half: int, stretch: Any = 1.0) -> Turn:
    """The turn by frequencies that fall from 1 by powers of theta, all divided by `stretch`."""
    frequency_H = jnp.asarray(theta ** (-np.arange(half) / half) / stretch, jnp.float32)

    def at(position: jax.Array) -> Turn:
        angle = position[..., None].astype(jnp.float32) * frequency_H
        return Turn(jnp.cos(angle), jnp.sin(angle))

    if sharding.platform() != "cpu":
        return at(position_BT)
    # In a loop, or XLA:CPU computes them for every head of every layer anew; of two halves, as it
    # takes one of a single turn apart. An odd T gets a position more.
    B, T = position_BT.shape
    halves = jnp.pad(position_BT, ((0, 0), (0, T % 2))).reshape(B, 2, -1).swapaxes(0, 1)
    both = jax.lax.map(at, halves)
    return Turn(*(x.swapaxes(0, 1).reshape(B, -1, half)[:, :T] for x in both))


def rotate(x_BTNH: jax.Array, turn: Turn) -> jax.Array:
    """Rotary position embedding, halves convention (Llama's in Hugging Face checkpoints)."""
    cos, sin = (x[..., None, :] for x in turn)
    half = cos.shape[-1]
    a, b, rest = jnp.split(x_BTNH, (half, 2 * half), -1)
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    both = [(a * cos - b * sin).astype(x_BTNH.dtype), (b * cos + a * sin).astype(x_BTNH.dtype)]
    if sharding.platform() == "cpu":  # of a concatenation it would choose for each number
        turned = jnp.stack(both, -2).reshape(*x_BTNH.shape[:-1], 2 * half)
    else:
        turned = jnp.concatenate(both, -1)
    return jnp.concatenate([turned, rest], -1) if rest.shape[-1] else turned


class Norm(nn.Module):
    """Normalisation over the last axis, `size` long; `letter` is its name."""

    config: ModelConfig
    letter: str
    size: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        y = x.astype(jnp.float32)
        if c.norm == "layer":
            y -= y.mean(-1, keepdims=True)
        y *= jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + c.norm_eps)
        offset = 1.0 if c.norm == "rms_offset" else 0.0
        y *= offset + self.param(
            f"scale_{self.letter}", _constant(self.letter, 1.0 - offset), (self.size,)
        )
        if c.biases:
            y += self.param(f"bias_{self.letter}", _constant(self.letter, 0.0), (self.size,))
        return y.astype(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention: projections, positions, and the context that says who sees whom."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        position_BT: jax.Array,
        turns: Sequence[Turn],
        context: Context,
        cache: Any,
        window: Any,
    ) -> tuple[jax.Array, Any]:
        c = self.config

        def heads(name: str, letter: str, count: int) -> jax.Array:
            w = self.param(
                f"w{name}_D{letter}H",
                _normal(f"D{letter}H", c.init_scale),
                (c.width, count, c.head_size),
            )
            bias = (
                self.param(f"b{name}_{letter}H", _constant(f"{letter}H", 0.0), (count, c.head_size))
                if c.biases or c.qkv_biases
                else None
            )
            return constrain(
                _project(c, f"BTD,D{letter}H->BT{letter}H", x_BTD, w, bias), f"BT{letter}H"
            )

        q_BTNH = heads("q", "N", c.heads)
        k_BTKH = heads("k", "K", c.kv_heads)
        v_BTKH = heads("v", "K", c.kv_heads)
        if c.qk_norm:
            q_BTNH = Norm(c, "H", c.head_size, name="q_norm")(q_BTNH)
            k_BTKH = Norm(c, "H", c.head_size, name="k_norm")(k_BTKH)
        if turns:
            own = turns[0]
            if len(turns) == 2:
                own = jax.tree.map(functools.partial(jnp.where, window == 0), *turns)
            q_BTNH, k_BTKH = rotate(q_BTNH, own), rotate(k_BTKH, own)
        B, T = position_BT.shape
        q_BTKGH = q_BTNH.reshape(B, T, c.kv_heads, c.heads // c.kv_heads, c.head_size)
        look = Look(position_BT, window, c.query_scale, c.attention_cap, c.attention)
        out_BTKGH, cache = context(q_BTKGH, k_BTKH, v_BTKH, cache, look)
        out_BTNH = constrain(out_BTKGH.reshape(q_BTNH.shape), "BTNH")
        wo_NHD = self.param(
            "wo_NHD",
            _normal("NHD", c.init_scale * (2 * c.layers) ** -0.5),
            (c.heads, c.head_size, c.width),
        )
        bo_D = self.param("bo_D", _constant("D", 0.0), (c.width,)) if c.biases else None
        return constrain(_project(c, "BTNH,NHD->BTD", out_BTNH, wo_NHD, bo_D), "BTD"), cache


def _unrolled(config: ModelConfig) -> bool:
    """Do the layers follow each other in the program, or is there a loop over them?"""
    # XLA:CPU keeps what a loop's iterations leave for the backward pass in one array of all layers,
    # and rewrites all of it in every iteration where it is bfloat16: 30 layers of SmolLM2-135M
    # train at 1.8 times the speed when the loop is unrolled.
    return not config.scan_layers or sharding.platform() == "cpu"


def _activated(name: str, first: jax.Array, *second: jax.Array) -> jax.Array:
    """The activation of the first, times the second where there is one.

    In float32: XLA:CPU takes twice the time to round each step.
    """
    h_BTF = ACTIVATIONS[name](first.astype(jnp.float32))
    for x in second:
        h_BTF *= x
    return h_BTF.astype(first.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gated(name: str, formula: str, x: jax.Array, w_gate: jax.Array, w_in: jax.Array) -> jax.Array:
    """`_activated` of x's products with the two, in C++."""
    return _gated_in_cpp(name, formula, x, w_gate, w_in, keep=False)[0]


def _gated_in_cpp(
    name: str, formula: str, x: jax.Array, *ws: jax.Array, keep: bool
) -> tuple[jax.Array, ...]:
    narrow = (w.astype(x.dtype) for w in ws)
    return cpu_kernels.gated(formula, x, *narrow, gelu=name == "geglu", keep=keep)


def _gated_forward(name: str, formula: str, x: Any, *ws: Any) -> tuple[jax.Array, Any]:
    h, *wide = _gated_in_cpp(name, formula, x, *ws, keep=True)
    return h, (x, ws, wide)


def _gated_backward(name: str, formula: str, kept: Any, g: jax.Array) -> Any:
    x, ws, wide = kept
    _, back = jax.vjp(functools.partial(_activated, name), *wide)
    each = [
        _product_backward(formula, True, True, (x, w), d) for w, d in zip(ws, back(g), strict=True)
    ]
    dxs, dws = zip(*each, strict=True)
    return sum(dxs), *dws


_gated.defvjp(_gated_forward, _gated_backward)


class Mlp(nn.Module):
    """The feed-forward sublayer, gated or not."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        c = self.config

        def widening(name: str) -> tuple[jax.Array, jax.Array | None]:
            w = self.param(f"w_{name}_DF", _normal("DF", c.init_scale), (c.width, c.mlp_width))
            return w, (
                self.param(f"b_{name}_F", _constant("F", 0.0), (c.mlp_width,)) if c.biases else None
            )

        formula = "BTD,DF->BTF"
        widenings = [widening(name) for name in (("gate", "in") if c.gated else ("in",))]
        w_DF, _ = widenings[0]
        kernel = c.gated and not c.biases and by_kernel(c.attention, cap=0)
        if kernel and cpu_kernels.multiplies(formula, x_BTD, w_DF):
            h_BTF = _gated(c.mlp, formula, x_BTD, *(w for w, _ in widenings))
        else:
            wide = (constrain(_project(c, formula, x_BTD, *own), "BTF") for own in widenings)
            # For the gradient only what it is computed from is kept, in the narrow dtype.
            activated = functools.partial(_activated, c.mlp)
            h_BTF = jax.checkpoint(activated, prevent_cse=_unrolled(c))(*wide)
        w_FD = self.param(
            "w_out_FD", _normal("FD", c.init_scale * (2 * c.layers) ** -0.5), (c.mlp_width, c.width)
        )
        b_D = self.param("b_out_D", _constant("D", 0.0), (c.width,)) if c.biases else None
        return constrain(_project(c, "BTF,FD->BTD", h_BTF, w_FD, b_D), "BTD")


def drop(y_BTD: jax.Array, rate: float, key_B: jax.Array | None, sublayer: int) -> jax.Array:
    """Residual dropout (section 4.3), on what a sublayer adds to the residual stream.

    A row's mask is of its own key: it doesn't depend on the rows beside it, nor on how many devices
    share them.
    """
    if not rate:
        return y_BTD
    if key_B is None:
        raise ValueError("dropout needs the rows' keys")

    def mask(key: jax.Array) -> jax.Array:
        return jax.random.bernoulli(jax.random.fold_in(key, sublayer), 1 - rate, y_BTD.shape[1:])

    return jnp.where(jax.vmap(mask)(key_B), y_BTD / (1 - rate), 0)


class Block(nn.Module):
    """One layer: attention and feed-forward, each added to the residual stream."""

    config: ModelConfig
    dropout: float

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        cache: Any,
        position_BT: jax.Array,
        turns: Sequence[Turn],
        context: Context,
        window: Any = None,
        key_B: jax.Array | None = None,
    ) -> tuple[jax.Array, Any]:
        c = self.config

        def norm(name: str, x_BTD: jax.Array) -> jax.Array:
            return Norm(c, "D", c.width, name=name)(x_BTD)

        def added(name: str, y_BTD: jax.Array) -> jax.Array:
            y_BTD = norm(f"{name}_post_norm", y_BTD) if c.post_norms else y_BTD
            return drop(y_BTD, self.dropout, key_B, ("attention", "mlp").index(name))

        attended_BTD, cache = Attention(c, name="attention")(
            norm("attention_norm", x_BTD), position_BT, turns, context, cache, window
        )
        after_BTD = x_BTD + added("attention", attended_BTD)
        read_BTD = x_BTD if c.residual == "parallel" else after_BTD
        return after_BTD + added("mlp", Mlp(c, name="mlp")(norm("mlp_norm", read_BTD))), cache


def table(config: ModelConfig) -> str:
    """Name of the parameter that says of every vocabulary entry what its logit is, [V, D]."""
    return "embed_VD" if config.tied else "unembed_VD"


def _capped(config: ModelConfig, logits: jax.Array) -> jax.Array:
    cap = config.logit_cap
    return cap * jnp.tanh(logits / cap) if cap else logits


def looked_up(table_VD: jax.Array, tokens_BT: jax.Array, dtype: Any) -> jax.Array:
    """The tokens' rows of a table, [B, T, D], in a dtype."""
    if sharding.platform() == "cpu":
        # XLA:CPU converts rows of bfloat16 to float32 and back. If it could tell that the table is
        # always the same, it would convert all of it before a loop, at each chunk of the sampler.
        table_VD, tokens_BT = jax.lax.optimization_barrier((table_VD, tokens_BT))
    return constrain(table_VD.astype(dtype), ("V", None))[tokens_BT]


def dots(table: jax.Array, hidden: jax.Array, letters: str = "VD") -> jax.Array:
    """What logits are before there is a cap and whatever isn't text is hidden, float32 [..., V].

    All rows are one matrix: of a [B, T, D] XLA:CPU makes a product with the table transposed first,
    which takes a quarter of the product's time by 256 rows.

    Args:
      letters: "VD", the table as it lies, or "DV", transposed: so its gradient is x.T @ g, like
        those of all other weights, where the table's own is g.T @ x, of a [B, V] to transpose.
    """
    rows_BD = hidden.reshape(-1, hidden.shape[-1])
    found_BV = _product(f"BD,{letters}->BV", False, False, rows_BD, table)
    return found_BV.reshape(*hidden.shape[:-1], -1)


def logits_of(config: ModelConfig, dots: jax.Array) -> jax.Array:
    """The logits that `dots` become."""
    return text_only(config, _capped(config, dots))


def text_only(config: ModelConfig, logits: jax.Array) -> jax.Array:
    """Logits [..., V] without those of ids that aren't text."""
    return jnp.where(jnp.arange(config.vocab_size) < config.text_size, logits, HIDDEN)


class Transformer(nn.Module):
    """A decoder-only transformer with pre-normalisation; its config says the rest.

    Attributes:
      config: its shape and family.
      dropout: residual dropout rate; above 0, apply needs `key_B`.
    """

    config: ModelConfig
    dropout: float = 0.0

    def setup(self) -> None:
        c = self.config
        self.embed_VD = self.param("embed_VD", _normal("VD", c.init_scale), (c.vocab_size, c.width))
        if c.positions == "learned":
            self.position_TD = self.param(
                "position_TD", _normal("TD", c.init_scale), (c.max_length, c.width)
            )
        unrolled = _unrolled(c)
        block = nn.remat(Block, prevent_cse=unrolled) if c.remat else Block
        if c.scan_layers:
            self.layers = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast, 0, 0),
                length=c.layers,
                unroll=c.layers if unrolled else 1,
                metadata_params={nn.PARTITION_NAME: "L"},
            )(c, self.dropout)
        else:
            self.layers = [block(c, self.dropout) for _ in range(c.layers)]
        self.final_norm = Norm(c, "D", c.width)
        if not c.tied:
            self.unembed_VD = self.param(
                "unembed_VD", _normal("VD", c.init_scale), (c.vocab_size, c.width)
            )
        self.value_gain = self.param("value_gain", _constant("", 1.0), ())
        self.value_bias = self.param("value_bias", _constant("", 0.0), ())

    def __call__(
        self,
        tokens_BT: jax.Array,
        position_BT: jax.Array,
        context: Context,
        caches: Any = None,
        key_B: jax.Array | None = None,
    ) -> tuple[jax.Array, Any]:
        """Hidden states after the final norm, [B, T, D], and the layers' caches.

        Args:
          caches: what is returned for them is alike; stacked over layers with `scan_layers`, else a
            list.
          key_B: of every row's dropout.
        """
        c = self.config
        # Looked up in a table sharded over D, XLA would rematerialise the whole table per device.
        x_BTD = looked_up(self.embed_VD, tokens_BT, c.dtype)
        if c.scaled_embedding:
            x_BTD *= jnp.asarray(c.width**0.5, c.dtype)  # rounded to it, as Gemma was trained
        if c.positions == "learned":
            x_BTD += self.position_TD.astype(c.dtype)[position_BT]
        x_BTD = constrain(x_BTD, "BTD")
        shared = position_BT, self._turns(position_BT), context
        keys_LB = None
        if key_B is not None:
            of_row = jax.vmap(jax.random.fold_in, (0, None))
            keys_LB = jax.vmap(of_row, (None, 0))(key_B, jnp.arange(c.layers))
        if c.scan_layers:
            windows_L = jnp.array(c.windows, jnp.int32) if c.windows else None
            x_BTD, caches = self.layers(x_BTD, caches, *shared, windows_L, keys_LB)
        else:
            out = []
            nothing = [None] * c.layers
            given = (caches or nothing, c.windows or nothing, nothing if key_B is None else keys_LB)
            for layer, cache, window, layer_key_B in zip(self.layers, *given, strict=True):
                x_BTD, cache = layer(x_BTD, cache, *shared, window, layer_key_B)
                out.append(cache)
            caches = out
        return self.final_norm(x_BTD), caches

    def _turns(self, position_BT: jax.Array) -> list[Turn]:
        """Of all layers, or where those with a window have another base, of these second."""
        c = self.config
        if c.positions != "rope":
            return []
        half = int(c.head_size * c.rope_fraction) // 2
        turns = [turn(position_BT, c.rope_theta, half, stretch(c))]
        if c.windows and c.window_theta:
            turns.append(turn(position_BT, c.window_theta, half))
        return turns

    def _table(self) -> jax.Array:
        return getattr(self, table(self.config))

    def logits(self, hidden: jax.Array, all_ids: bool = False) -> jax.Array:
        """Logits of the language model, float32 [..., V].

        Args:
          all_ids: those of ids that aren't text too; else these are never likely.
        """
        found = dots(self._table(), hidden)
        return _capped(self.config, found) if all_ids else logits_of(self.config, found)

    def value(self, hidden: jax.Array) -> jax.Array:
        """The verifier's raw value, float32 [...]: gain * logit of the reserved token + bias."""
        row_D = self._table()[self.config.reserved_token]
        logit = _capped(self.config, hidden.astype(jnp.float32) @ row_D)
        return self.value_gain * logit + self.value_bias


def _boxed_init(config: ModelConfig) -> Callable[[jax.Array], Params]:
    def init(key: jax.Array) -> Params:
        model = Transformer(config)
        one = jnp.zeros((1, 1), jnp.int32)
        return model.init(key, one, one, Packed.causal(1, 1))

    return init


def shapes(config: ModelConfig) -> Params:
    """Shapes and dtypes of the parameters; nothing is allocated."""
    return nn.unbox(jax.eval_shape(_boxed_init(config), jax.random.key(0)))


def shardings(config: ModelConfig, mesh: Mesh) -> Params:
    """Where every parameter lives on the mesh.

    Raises:
      ValueError: a parameter's dimension that the mesh doesn't divide.
    """
    return tree_shardings(mesh, jax.eval_shape(_boxed_init(config), jax.random.key(0)))


def init(config: ModelConfig, key: jax.Array, mesh: Mesh) -> Params:
    """Fresh float32 parameters, made on the devices they live on."""
    boxed_init = _boxed_init(config)
    with jax.set_mesh(mesh):
        return jax.jit(
            lambda key: nn.unbox(boxed_init(key)), out_shardings=shardings(config, mesh)
        )(key)


def neutral_head(config: ModelConfig, params: Params, value: float) -> Params:
    """The parameters with a verifier head that says `value` whatever it reads.

    The reserved token's row of the unembedding is zero, so its logit is; through the gain of 1 the
    row learns from the first step on, where a gain of 0 would keep the gradient from it.
    """
    tree, name = params["params"], table(config)
    return {
        "params": tree
        | {
            name: tree[name].at[config.reserved_token].set(0.0),
            "value_gain": jnp.ones_like(tree["value_gain"]),
            "value_bias": jnp.full_like(tree["value_bias"], value),
        }
    }


def with_whole_tables(params: Params) -> Params:
    """The parameters, each row of the vocabulary's tables in one place: for a loop that reads them.

    Where `fsdp` splits the rows, a step would gather them twice, to look tokens up and for logits.
    """
    tree = params["params"]
    tables = {name: tree[name] for name in ("embed_VD", "unembed_VD") if name in tree}
    return {"params": tree | {name: constrain(x, ("V", None)) for name, x in tables.items()}}


def unstack(config: ModelConfig, params: Params, cast: str = "") -> tuple[ModelConfig, Params]:
    """The same model with an array of its own for each layer's weights: what computes fastest.

    Tried and lost on CPU: queries, keys and values as one product, and gate and in. Alone, of 272
    rows, these take a twentieth to an eighth less time; a step of the sampler takes as long.

    Args:
      cast: matrices to the dtype of the computation, "layers" those of the layers, "all" the tables
        too; one after the other, so that where it is bfloat16 there is never a second set of them
        in float32.
    """

    def one(x: jax.Array, casts: bool = bool(cast)) -> jax.Array:
        return x.astype(config.dtype) if casts and x.ndim > 1 else x

    tree = dict(params["params"])
    stacked = tree.pop("layers")
    tree = jax.tree.map(lambda x: one(x, cast == "all"), tree)
    for i in range(config.layers):
        tree[f"layers_{i}"] = jax.tree.map(lambda x, i=i: one(x[i]), stacked)
    return config.with_(scan_layers=False), {"params": tree}
