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

HIDDEN = -1e30  # a finite "never": a row that sees nothing must not become NaN


class Segment(NamedTuple):
    """Keys and values under the softmax; `letters` is BKSH (shared by a row) or BTKSH (own)."""

    letters: str
    k: jax.Array
    v: jax.Array
    visible: jax.Array  # bool, broadcastable to [B, K, T, G, S]


def _einsum(formula: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """A batched product accumulated in float32."""
    if jax.default_backend() == "cpu":  # XLA:CPU has no batched bfloat16 -> float32 product
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    return jnp.einsum(formula, x, y, preferred_element_type=jnp.float32)


def attend(q_BTKGH: jax.Array, segments: list[Segment]) -> jax.Array:
    """Softmax attention over the union of the segments: [B, T, K, G, H] in q's dtype.

    The logits are laid out [B, K, T, G, S]: T and G together are the rows of one matrix product,
    which on CPU takes two thirds of the time of [B, K, G, T, S]. Weights are normalised after the
    product with the values, on H instead of S numbers.
    """
    q = q_BTKGH * q_BTKGH.shape[-1] ** -0.5
    logits = [
        jnp.where(s.visible, _einsum(f"BTKGH,{s.letters}->BKTGS", q, s.k), HIDDEN) for s in segments
    ]
    top = functools.reduce(jnp.maximum, [part.max(-1, keepdims=True) for part in logits])
    top = jax.lax.stop_gradient(top)  # cancels out; only there against overflow
    weights = [jnp.exp(part - top) for part in logits]
    total_BKTG = sum(w.sum(-1) for w in weights)
    out_BTKGH = sum(
        _einsum(f"BKTGS,{s.letters}->BTKGH", w.astype(s.v.dtype), s.v)
        for w, s in zip(weights, segments, strict=True)
    )
    return (out_BTKGH / total_BKTG.swapaxes(1, 2)[..., None]).astype(q_BTKGH.dtype)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Packed:
    """Whole sequences. With `keep`, a layer also returns its keys and values, [B, K, T, H] each."""

    visible_BTS: jax.Array
    keep: bool = field(default=False, metadata=dict(static=True))

    def __call__(
        self, q_BTKGH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, cache: None
    ) -> tuple[jax.Array, Any]:
        k_BKSH, v_BKSH = k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2)
        visible = self.visible_BTS[:, None, :, None]
        out = attend(q_BTKGH, [Segment("BKSH", k_BKSH, v_BKSH, visible)])
        return out, (k_BKSH, v_BKSH) if self.keep else None


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
        self, q_BTKGH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, cache: BranchCache
    ) -> tuple[jax.Array, BranchCache]:
        def write(own_KSH: jax.Array, new_KH: jax.Array, age: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(own_KSH, new_KH[:, None], age, 1)

        write_BT = jax.vmap(jax.vmap(write))
        dtype = cache.own_k_BTKSH.dtype
        cache = cache._replace(
            own_k_BTKSH=write_BT(cache.own_k_BTKSH, k_BTKH.astype(dtype), self.age_BT),
            own_v_BTKSH=write_BT(cache.own_v_BTKSH, v_BTKH.astype(dtype), self.age_BT),
        )
        prompt_S = jnp.arange(cache.prompt_k_BKSH.shape[2])
        own_S = jnp.arange(cache.own_k_BTKSH.shape[3])
        in_prompt = (prompt_S < self.prompt_length_B[:, None])[:, None, None, None]
        in_branch = (own_S <= self.age_BT[..., None])[:, None, :, None]
        out = attend(
            q_BTKGH,
            [
                Segment("BKSH", cache.prompt_k_BKSH, cache.prompt_v_BKSH, in_prompt),
                Segment("BTKSH", cache.own_k_BTKSH, cache.own_v_BTKSH, in_branch),
            ],
        )
        return out, cache
