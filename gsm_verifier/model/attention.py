"""Who sees whom: the two kinds of context a layer can attend in.

`Packed` is a whole sequence seeing itself (training, scoring, and the prompt of the sampler).
`Branches` is one new token for each slot of the sampler, which sees its prompt, stored once for all
slots of the prompt, and its own branch. Both put their keys and values, as segments, under one
softmax: that is exact, and in bfloat16 closer to float32 than merging separate softmaxes.
"""

import functools
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gsm_verifier import sharding
from gsm_verifier.model import cpu_attention
from gsm_verifier.model.config import ModelConfig
from gsm_verifier.model.cpu_attention import OWN, SHARED

QUERY_BLOCKS = 8  # of a row: most of what causality saves, for a graph that still compiles quickly
LEAST_BLOCK = 32
HIDDEN = -1e30  # a finite "never": a row that sees nothing must not become NaN


class Segment(NamedTuple):
    """Keys and values under the softmax, SHARED by the queries of a row or each query's OWN."""

    letters: str
    k: jax.Array
    v: jax.Array
    visible: jax.Array  # bool, broadcastable to [B, K, T, G, S]


def _einsum(formula: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """A batched product accumulated in float32."""
    if sharding.platform() == "cpu":  # XLA:CPU has no batched bfloat16 -> float32 product
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    return jnp.einsum(formula, x, y, preferred_element_type=jnp.float32)


class Look(NamedTuple):
    """How a layer looks at what it may see: the words of its family.

    Attributes:
      position_BT: of the queries. window: how many positions back they see, themselves included;
        0 for all. None, a layer without windows, computes nothing for it.
      scale: of the logits, 0 for 1 / sqrt(H). cap: their soft cap, 0 for none.
      attention: how it is computed, as in ModelConfig.
    """

    position_BT: Any = None
    window: Any = None
    scale: float = 0.0
    cap: float = 0.0
    attention: str = "auto"

    def near(self, visible_BTS: jax.Array, position_BS: jax.Array) -> jax.Array:
        """`visible` less what is out of the window."""
        if self.window is None:
            return visible_BTS
        distance_BTS = self.position_BT[:, :, None] - position_BS[:, None, :]
        reach = jnp.where(self.window == 0, jnp.iinfo(jnp.int32).max, self.window)
        return visible_BTS & (distance_BTS < reach)


def attend(
    q_BTKGH: jax.Array, segments: list[Segment], scale: float = 0.0, cap: float = 0.0
) -> jax.Array:
    """Softmax attention over the union of the segments: [B, T, K, G, H] in q's dtype.

    The logits are laid out [B, K, T, G, S]: T and G together are the rows of one matrix product,
    which on CPU takes two thirds of the time of [B, K, G, T, S]. Weights are normalised after the
    product with the values, on H instead of S numbers.
    """
    q = q_BTKGH * (scale or q_BTKGH.shape[-1] ** -0.5)
    logits = [_einsum(f"BTKGH,{s.letters}->BKTGS", q, s.k) for s in segments]
    if cap:
        logits = [cap * jnp.tanh(part / cap) for part in logits]
    logits = [jnp.where(s.visible, part, HIDDEN) for s, part in zip(segments, logits, strict=True)]
    top = functools.reduce(jnp.maximum, [part.max(-1, keepdims=True) for part in logits])
    top = jax.lax.stop_gradient(top)  # cancels out; only there against overflow
    weights = [jnp.exp(part - top) for part in logits]
    total_BKTG = sum(w.sum(-1) for w in weights)
    out_BTKGH = sum(
        _einsum(f"BKTGS,{s.letters}->BTKGH", w.astype(s.v.dtype), s.v)
        for w, s in zip(weights, segments, strict=True)
    )
    return (out_BTKGH / total_BKTG.swapaxes(1, 2)[..., None]).astype(q_BTKGH.dtype)


def by_kernel(attention: str, cap: float, mesh: jax.sharding.Mesh | None = None) -> bool:
    """Does the C++ kernel compute this, on a mesh or the enclosing one? It has no soft cap."""
    on_cpu = sharding.platform(mesh) == "cpu"
    return attention == "auto" and on_cpu and not cap and cpu_attention.available()


def by_rows(
    q_BTKGH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    visible_BTS: jax.Array,
    scale: float = 0.0,
    cap: float = 0.0,
) -> jax.Array:
    """Attention of whole sequences in blocks of queries: keys after a block are never computed.

    On CPU rows go one after another, so that a block's logits stay in the cache: [B, T, S] of
    them through memory took four times as long forward and more than twice backward. The backward
    pass computes them anew.
    """
    T = q_BTKGH.shape[1]
    k_BKSH, v_BKSH = k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2)
    block = max(LEAST_BLOCK, -(-T // QUERY_BLOCKS))

    @jax.checkpoint
    def rows(q_BTKGH: Any, k_BKSH: Any, v_BKSH: Any, visible_BTS: Any) -> jax.Array:
        blocks = []
        for start in range(0, T, block):
            end = min(start + block, T)
            visible = visible_BTS[:, None, start:end, None, :end]
            seen = Segment(SHARED, k_BKSH[:, :, :end], v_BKSH[:, :, :end], visible)
            blocks.append(attend(q_BTKGH[:, start:end], [seen], scale, cap))
        return jnp.concatenate(blocks, 1)

    if sharding.platform() != "cpu":
        return rows(q_BTKGH, k_BKSH, v_BKSH, visible_BTS)
    # In float32, as `_einsum` wants them: to write a row into a bfloat16 result, XLA:CPU converts
    # all of the result, which took an eighth of a training step of SmolLM2-135M.
    wide = [x.astype(jnp.float32) for x in (q_BTKGH, k_BKSH, v_BKSH)]
    out = jax.lax.map(lambda row: rows(*(x[None] for x in row))[0], (*wide, visible_BTS))
    return out.astype(q_BTKGH.dtype)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Packed:
    """Whole sequences. With `keep`, a layer also returns its keys and values, [B, K, T, H] each."""

    visible_BTS: jax.Array
    keep: bool = field(default=False, metadata=dict(static=True))

    @classmethod
    def causal(cls, B: int, T: int, keep: bool = False) -> "Packed":
        """Rows of one sequence each: a position sees itself and what is before it."""
        return cls(jnp.broadcast_to(jnp.tril(jnp.ones((T, T), bool)), (B, T, T)), keep)

    def __call__(
        self,
        q_BTKGH: jax.Array,
        k_BTKH: jax.Array,
        v_BTKH: jax.Array,
        cache: None,
        look: Look = Look(),  # noqa: B008 - it is immutable
    ) -> tuple[jax.Array, Any]:
        visible_BTS = look.near(self.visible_BTS, look.position_BT)
        if by_kernel(look.attention, look.cap):
            scale = look.scale or q_BTKGH.shape[-1] ** -0.5
            out = cpu_attention.whole_attention(q_BTKGH, k_BTKH, v_BTKH, visible_BTS, scale)
        else:
            attention = functools.partial(by_rows, scale=look.scale, cap=look.cap)
            letters = ("BTKGH", "BTKH", "BTKH", "BTS")
            out = sharding.local(attention, letters, "BTKGH", q_BTKGH, k_BTKH, v_BTKH, visible_BTS)
        return out, (k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2)) if self.keep else None


def kept(config: ModelConfig, mesh: jax.sharding.Mesh) -> str:
    """The dtype the sampler's keys and values are kept in.

    XLA:CPU multiplies them in float32 only (see `_einsum`). Kept in bfloat16, all of them would be
    converted for every token, which takes twice the time of the products; the numbers are the same.
    The kernel converts what it reads.
    """
    kernel = by_kernel(config.attention, config.attention_cap, mesh)
    return "float32" if sharding.platform(mesh) == "cpu" and not kernel else config.dtype


class BranchCache(NamedTuple):
    """One layer's keys and values in the sampler: B prompts of T slots each."""

    prompt_k_BKSH: jax.Array
    prompt_v_BKSH: jax.Array
    own_k_BTKSH: jax.Array
    own_v_BTKSH: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Branches:
    """One step of every slot. A slot writes at its own age, so that neither the other slots nor the
    moment it started can change its numbers."""

    prompt_length_B: jax.Array
    age_BT: jax.Array

    def __call__(
        self,
        q_BTKGH: jax.Array,
        k_BTKH: jax.Array,
        v_BTKH: jax.Array,
        cache: BranchCache,
        look: Look = Look(),  # noqa: B008 - it is immutable
    ) -> tuple[jax.Array, BranchCache]:
        step = self._kernel if by_kernel(look.attention, look.cap) else self._segments
        return step(q_BTKGH, k_BTKH, v_BTKH, cache, look)

    def _kernel(
        self,
        q_BTKGH: jax.Array,
        k_BTKH: jax.Array,
        v_BTKH: jax.Array,
        cache: BranchCache,
        look: Look,
    ) -> tuple[jax.Array, BranchCache]:
        """Attention that reads only what a slot sees, of each device's slots and heads."""
        window = jnp.asarray(0 if look.window is None else look.window, jnp.int32)
        q, k, v = (x.astype(jnp.float32) for x in (q_BTKGH, k_BTKH, v_BTKH))
        q *= look.scale or q.shape[-1] ** -0.5
        arrays = (q, k, v, *cache, self.prompt_length_B, self.age_BT, window)
        out, own_k, own_v = cpu_attention.decode_attention(*arrays)
        cache = cache._replace(own_k_BTKSH=own_k, own_v_BTKSH=own_v)
        return out.astype(q_BTKGH.dtype), cache

    def _segments(
        self,
        q_BTKGH: jax.Array,
        k_BTKH: jax.Array,
        v_BTKH: jax.Array,
        cache: BranchCache,
        look: Look,
    ) -> tuple[jax.Array, BranchCache]:
        """The same anywhere: all that is kept is multiplied, and what isn't seen is hidden."""

        @jax.vmap
        @jax.vmap
        def write(own_KSH: jax.Array, new_KH: jax.Array, age: jax.Array) -> jax.Array:
            new_KSH = new_KH[:, None].astype(own_KSH.dtype)
            return jax.lax.dynamic_update_slice_in_dim(own_KSH, new_KSH, age, 1)

        cache = cache._replace(
            own_k_BTKSH=write(cache.own_k_BTKSH, k_BTKH, self.age_BT),
            own_v_BTKSH=write(cache.own_v_BTKSH, v_BTKH, self.age_BT),
        )
        prompt_S = jnp.arange(cache.prompt_k_BKSH.shape[2])
        own_S = jnp.arange(cache.own_v_BTKSH.shape[3])
        length_B1 = self.prompt_length_B[:, None]
        in_prompt = look.near((prompt_S < length_B1)[:, None], prompt_S[None])
        in_branch = look.near(own_S <= self.age_BT[..., None], length_B1 + own_S)
        prompt = Segment(
            SHARED, cache.prompt_k_BKSH, cache.prompt_v_BKSH, in_prompt[:, None, :, None]
        )
        own = Segment(OWN, cache.own_k_BTKSH, cache.own_v_BTKSH, in_branch[:, None, :, None])
        return attend(q_BTKGH, [prompt, own], look.scale, look.cap), cache
