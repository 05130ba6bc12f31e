"""Who sees whom: the two kinds of context a layer can attend in.

`Packed` is a whole sequence seeing itself (training, scoring, and the prompt of the sampler).
`Branches` is one new token for each slot of the sampler, which sees its prompt, stored once for all
slots that have it, and its own branch. Slots lie in pools, one for each device of rows: what a slot
sees is in its own.

A branch lies in pages, of which the slots of a device share fewer than all would need if all were
as long as they may get: most completions are much shorter, and a step must read all that is kept,
except by the kernel on CPU. What a query makes of its prompt and of each of its pages is united in
float32: that is the softmax over all of it.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gsm_verifier import sharding
from gsm_verifier.model import cpu_kernels
from gsm_verifier.model.config import ModelConfig
from gsm_verifier.model.cpu_kernels import NEW, PAGES, PROMPTS, SLOTS

QUERY_BLOCKS = 8  # of a row: most of what causality saves, for a graph that still compiles quickly
LEAST_BLOCK = 32
HIDDEN = -1e30  # a finite "never": a row that sees nothing must not become NaN
NOWHERE = 2**30  # no page, or no seat
CROWD = 2  # most slots that have one prompt in JAX, for each that a prompt has in the mean
SHARED, OWN = "BKSH", "BTKSH"  # keys and values of all queries of a row, or of each query's own
CACHE = (PROMPTS, PROMPTS, PAGES, PAGES)  # of a layer in the sampler


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

    def near(self, visible_BTS: jax.Array, positions: Any) -> jax.Array:
        """`visible` less what is out of the window, of keys at `positions`, [B, T or 1, S]."""
        if self.window is None:
            return visible_BTS
        distance_BTS = self.position_BT[:, :, None] - positions
        reach = jnp.where(self.window == 0, jnp.iinfo(jnp.int32).max, self.window)
        return visible_BTS & (distance_BTS < reach)


class Part(NamedTuple):
    """What queries make of a part of what they see; all float32.

    Attributes:
      top_BTKG: the greatest logit. total_BTKG: the sum of the weights, exp(logit - top).
      out_BTKGH: the sum of the values by their weights.
    """

    top_BTKG: jax.Array
    total_BTKG: jax.Array
    out_BTKGH: jax.Array


def part(
    q_BTKGH: jax.Array,
    letters: str,
    k: jax.Array,
    v: jax.Array,
    visible: jax.Array,
    scale: float = 0.0,
    cap: float = 0.0,
) -> Part:
    """A part of attention.

    The logits are laid out [B, K, T, G, S]: T and G together are the rows of one matrix product,
    which on CPU takes two thirds of the time of [B, K, G, T, S]. Weights are normalised after the
    product with the values, on H instead of S numbers.

    Args:
      letters: of keys and values, SHARED by the queries of a row or each query's OWN.
      visible: bool, broadcastable to [B, K, T, G, S]. Who sees nothing gets a top of `HIDDEN`.
    """
    q = q_BTKGH * (scale or q_BTKGH.shape[-1] ** -0.5)
    logits = _einsum(f"BTKGH,{letters}->BKTGS", q, k)
    if cap:
        logits = cap * jnp.tanh(logits / cap)
    logits = jnp.where(visible, logits, HIDDEN)
    top = jax.lax.stop_gradient(logits.max(-1, keepdims=True))  # cancels out; against overflow
    weights = jnp.exp(logits - top)
    out_BTKGH = _einsum(f"BKTGS,{letters}->BTKGH", weights.astype(v.dtype), v)
    return Part(top[..., 0].swapaxes(1, 2), weights.sum(-1).swapaxes(1, 2), out_BTKGH)


def union(parts: Sequence[Part]) -> Part:
    """Parts as one, added up in their order."""
    top_BTKG = functools.reduce(jnp.maximum, (each.top_BTKG for each in parts))
    shares = [jnp.exp(each.top_BTKG - top_BTKG) for each in parts]
    both = list(zip(shares, parts, strict=True))
    return Part(
        top_BTKG,
        functools.reduce(jnp.add, (share * each.total_BTKG for share, each in both)),
        functools.reduce(jnp.add, (share[..., None] * each.out_BTKGH for share, each in both)),
    )


def softmax(whole: Part) -> jax.Array:
    """The result of attention, [B, T, K, G, H], of all that is seen."""
    return whole.out_BTKGH / whole.total_BTKG[..., None]


def by_kernel(attention: str, cap: float, mesh: jax.sharding.Mesh | None = None) -> bool:
    """Does the C++ kernel compute this, on a mesh or the enclosing one? It has no soft cap."""
    on_cpu = sharding.platform(mesh) == "cpu"
    return attention == "auto" and on_cpu and not cap and cpu_kernels.available()


def sees(end_BS: jax.Array, first: int) -> jax.Array:
    """Which of S positions those from the `first` on see, [B, T, S]: themselves, and those before
    them whose end is after them."""
    s = jnp.arange(end_BS.shape[1])
    t = s[first:, None]
    return (s == t) | (s < t) & (t < end_BS[:, None])


def by_rows(
    q_BTKGH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    end_BT: jax.Array,
    position_BT: Any = None,
    window: Any = None,
    scale: float = 0.0,
    cap: float = 0.0,
) -> jax.Array:
    """Attention of whole sequences in blocks of queries: keys after a block are never computed.

    On CPU rows go one after another, so that a block's logits stay in the cache: [B, T, S] of
    them through memory took four times as long forward and more than twice backward. The backward
    pass computes them anew.

    Args:
      end_BT, position_BT, window: as `Packed` and `Look` have them.
    """
    T = q_BTKGH.shape[1]
    k_BKSH, v_BKSH = k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2)
    block = max(LEAST_BLOCK, -(-T // QUERY_BLOCKS))

    @jax.checkpoint
    def rows(q_BTKGH: Any, k_BKSH: Any, v_BKSH: Any, end_BT: Any, position_BT: Any) -> jax.Array:
        blocks = []
        for start in range(0, T, block):
            end = min(start + block, T)
            visible_BTS = sees(end_BT[:, :end], start)
            if window is not None:
                look = Look(position_BT[:, start:end], window)
                visible_BTS = look.near(visible_BTS, position_BT[:, None, :end])
            look_at = (
                SHARED,
                k_BKSH[:, :, :end],
                v_BKSH[:, :, :end],
                visible_BTS[:, None, :, None],
            )
            blocks.append(softmax(part(q_BTKGH[:, start:end], *look_at, scale, cap)))
        return jnp.concatenate(blocks, 1).astype(q_BTKGH.dtype)

    if sharding.platform() != "cpu":
        return rows(q_BTKGH, k_BKSH, v_BKSH, end_BT, position_BT)
    # In float32, as `_einsum` wants them: to write a row into a bfloat16 result, XLA:CPU converts
    # all of the result, which took an eighth of a training step of SmolLM2-135M.
    wide = [x.astype(jnp.float32) for x in (q_BTKGH, k_BKSH, v_BKSH)]

    def one(row: Any) -> jax.Array:
        return rows(*jax.tree.map(lambda x: x[None], row))[0]

    return jax.lax.map(one, (*wide, end_BT, position_BT)).astype(q_BTKGH.dtype)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Packed:
    """Whole sequences.

    Attributes:
      end_BT: int32, where those end that see a position: it is seen by itself and by those after it
        that are before its end, 0 for padding. That says all there is to say of trees that lie
        depth first (`gsm_verifier.data.packing`), in T numbers, where a mask has T x T: of a row
        of 3,328 positions 11 MB, which every head of every layer had to read on CPU.
      keep: a layer also returns its keys and values, [B, K, T, H] each.
    """

    end_BT: jax.Array
    keep: bool = field(default=False, metadata=dict(static=True))

    @classmethod
    def causal(cls, B: int, T: int, keep: bool = False) -> "Packed":
        """Rows of one sequence each: a position sees itself and what is before it."""
        return cls(jnp.full((B, T), T, jnp.int32), keep)

    def __call__(
        self,
        q_BTKGH: jax.Array,
        k_BTKH: jax.Array,
        v_BTKH: jax.Array,
        cache: None,
        look: Look = Look(),  # noqa: B008 - it is immutable
    ) -> tuple[jax.Array, Any]:
        rows = (q_BTKGH, k_BTKH, v_BTKH, self.end_BT)
        if by_kernel(look.attention, look.cap):
            scale = look.scale or q_BTKGH.shape[-1] ** -0.5
            window = jnp.asarray(0 if look.window is None else look.window, jnp.int32)
            position_BT = self.end_BT if look.window is None else look.position_BT
            out = cpu_kernels.whole_attention(*rows, position_BT, window, scale)
        else:
            attention = functools.partial(by_rows, scale=look.scale, cap=look.cap)
            letters = ["BTKGH", "BTKH", "BTKH", "BT"]
            if look.window is not None:
                rows = (*rows, look.position_BT, jnp.asarray(look.window))
                letters += ["BT", ""]
            out = sharding.local(attention, letters, "BTKGH", *rows)
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
    """One layer's keys and values in the sampler: of U pools, each with P prompts and Z pages."""

    prompt_k_UPKSH: jax.Array
    prompt_v_UPKSH: jax.Array
    own_k_UZKWH: jax.Array
    own_v_UZKWH: jax.Array


def seats(P: int, T: int) -> int:
    """E: in JAX each of a pool's P prompts is looked over by so many queries, if only by T in all.

    6B on four chips of v5p moves 9.74 GB a step with a `CROWD` of 1, 10.05 with 2, 10.67 with 4.
    """
    return min(T, CROWD * -(-T // P))


def most_slots(config: ModelConfig, mesh: jax.sharding.Mesh, prompts: int, slots: int) -> int:
    """How many of a pool's slots may have the same prompt: all, if the kernel looks over it."""
    kernel = by_kernel(config.attention, config.attention_cap, mesh)
    return slots if kernel else seats(prompts, slots)


def page_at(table_UTJ: jax.Array, age_UT: jax.Array, W: int) -> jax.Array:
    """The page of W positions that holds what is at an age: [U, T], or NOWHERE."""
    page_UT1 = jnp.take_along_axis(
        table_UTJ, age_UT[..., None] // W, -1, mode="fill", fill_value=NOWHERE
    )
    return page_UT1[..., 0]


@functools.partial(jax.vmap, in_axes=(0, 0, None))
def rows_of(x_UX: jax.Array, index: jax.Array, otherwise: Any) -> jax.Array:
    """Of each pool's rows those of an index, or `otherwise` where that is past the end."""
    return x_UX.at[index].get(mode="fill", fill_value=otherwise)


@functools.partial(jax.vmap, in_axes=(0, None))
def _inverse(place_UX: jax.Array, places: int) -> jax.Array:
    """Who is at each place: the index of one that says so, or their number where nobody does."""
    count = place_UX.size
    return jnp.full(places, count).at[place_UX.ravel()].set(jnp.arange(count), mode="drop")


@functools.partial(jax.vmap, in_axes=(0, None, None))
def _seats(prompt_UT: jax.Array, P: int, E: int) -> jax.Array:
    """A seat for each slot at its prompt, p * E + e; NOWHERE for one that has none, or no room."""
    sits_TP = prompt_UT[:, None] == jnp.arange(P)
    e_T = ((jnp.cumsum(sits_TP, 0) - 1) * sits_TP).sum(1)
    return jnp.where(sits_TP.any(1) & (e_T < E), prompt_UT * E + e_T, NOWHERE)


@jax.vmap
def _write(pages_UZKWH: Any, page_UT: Any, at_UT: Any, new_UTKH: Any) -> jax.Array:
    """The pages with each slot's new key or value at its place."""
    new_UTKH = new_UTKH.astype(pages_UZKWH.dtype)
    return pages_UZKWH.at[page_UT, :, at_UT].set(new_UTKH, mode="drop")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Branches:
    """One step of every slot. A slot writes at its own age, so that neither the other slots nor the
    moment it started can change its numbers. Rows B are pools here, and their positions T slots.

    Attributes:
      prompt_UT: int32, which of its pool's prompts a slot has. Of more than `most_slots` with the
        same, some would look over their pages only.
      table_UTJ: int32, a slot's pages in its pool, in order, or NOWHERE. A slot without one for its
        age is left out: it writes nothing, and what it gets says nothing.
    """

    prompt_length_UP: jax.Array
    prompt_UT: jax.Array
    age_UT: jax.Array
    table_UTJ: jax.Array

    def _slots(self) -> tuple[jax.Array, ...]:
        return self.prompt_length_UP, self.prompt_UT, self.age_UT, self.table_UTJ

    def __call__(
        self,
        q_UTKGH: jax.Array,
        k_UTKH: jax.Array,
        v_UTKH: jax.Array,
        cache: BranchCache,
        look: Look = Look(),  # noqa: B008 - it is immutable
    ) -> tuple[jax.Array, BranchCache]:
        step = self._kernel if by_kernel(look.attention, look.cap) else self._pages
        return step(q_UTKGH, k_UTKH, v_UTKH, cache, look)

    def _kernel(
        self,
        q_UTKGH: jax.Array,
        k_UTKH: jax.Array,
        v_UTKH: jax.Array,
        cache: BranchCache,
        look: Look,
    ) -> tuple[jax.Array, BranchCache]:
        """Attention that reads only what a slot sees, of each device's slots and heads."""
        window = jnp.asarray(0 if look.window is None else look.window, jnp.int32)
        q, k, v = (x.astype(cache.own_k_UZKWH.dtype) for x in (q_UTKGH, k_UTKH, v_UTKH))
        scale = look.scale or q.shape[-1] ** -0.5
        step = cpu_kernels.decode_attention
        out, own_k, own_v = step(q, k, v, *cache, *self._slots(), window, scale)
        cache = cache._replace(own_k_UZKWH=own_k, own_v_UZKWH=own_v)
        return out.astype(q_UTKGH.dtype), cache

    def _pages(
        self,
        q_UTKGH: jax.Array,
        k_UTKH: jax.Array,
        v_UTKH: jax.Array,
        cache: BranchCache,
        look: Look,
    ) -> tuple[jax.Array, BranchCache]:
        """The same anywhere: all that is kept is multiplied, and what isn't seen is hidden."""
        windows = () if look.window is None else (jnp.asarray(look.window),)

        def step(q: Any, k: Any, v: Any, *rest: Any) -> Any:
            caches, slots, window = rest[:4], rest[4:8], rest[8:]
            seen = look._replace(window=(*window, None)[0])
            return Branches(*slots)._look_over_pages(q, k, v, BranchCache(*caches), seen)

        letters = (*NEW, *CACHE, *SLOTS, *[""] * len(windows))
        arrays = (q_UTKGH, k_UTKH, v_UTKH, *cache, *self._slots(), *windows)
        return sharding.local(step, letters, (NEW[0], BranchCache(*CACHE)), *arrays)

    def _look_over_pages(
        self,
        q_UTKGH: jax.Array,
        k_UTKH: jax.Array,
        v_UTKH: jax.Array,
        cache: BranchCache,
        look: Look,
    ) -> tuple[jax.Array, BranchCache]:
        words = (look.scale, look.cap)
        U, P, _, S, _ = cache.prompt_k_UPKSH.shape
        Z, W = cache.own_k_UZKWH.shape[1], cache.own_k_UZKWH.shape[3]
        T, J = self.table_UTJ.shape[1:]
        length_UT = rows_of(self.prompt_length_UP, self.prompt_UT, 0)
        position_UT = length_UT + self.age_UT

        page_UT = page_at(self.table_UTJ, self.age_UT, W)

        # Every prompt is looked over by the queries of the slots that have it.
        E = seats(P, T)
        seat_UT = _seats(jnp.where(page_UT == NOWHERE, NOWHERE, self.prompt_UT), P, E)
        slot_UX = _inverse(seat_UT, P * E)

        def seated(x_UT: jax.Array) -> jax.Array:
            return rows_of(x_UT, slot_UX, 0).reshape(U * P, E, *x_UT.shape[2:])

        prompt_S = jnp.arange(S)
        theirs = look._replace(position_BT=seated(position_UT))
        length_B = self.prompt_length_UP.reshape(U * P)
        in_prompt = theirs.near(prompt_S < length_B[:, None, None], prompt_S)
        kv = (x.reshape(U * P, *x.shape[2:]) for x in (cache.prompt_k_UPKSH, cache.prompt_v_UPKSH))
        prompts = part(seated(q_UTKGH), SHARED, *kv, in_prompt[:, None, :, None], *words)

        # And every page by the query of the slot whose it is.
        place = (page_UT, self.age_UT % W)
        cache = cache._replace(
            own_k_UZKWH=_write(cache.own_k_UZKWH, *place, k_UTKH),
            own_v_UZKWH=_write(cache.own_v_UZKWH, *place, v_UTKH),
        )
        owner_UZ = _inverse(self.table_UTJ, Z)
        slot_UZ = owner_UZ // J
        age_UZ, length_UZ = rows_of(self.age_UT, slot_UZ, -1), rows_of(length_UT, slot_UZ, 0)
        at_UZW = (owner_UZ % J * W)[..., None] + jnp.arange(W)
        theirs = look._replace(position_BT=length_UZ + age_UZ)
        in_page = theirs.near(at_UZW <= age_UZ[..., None], length_UZ[..., None] + at_UZW)
        kv = (cache.own_k_UZKWH, cache.own_v_UZKWH)
        pages = part(rows_of(q_UTKGH, slot_UZ, 0), OWN, *kv, in_page[:, None, :, None], *words)

        def mine(parts: Part, where_UT: jax.Array) -> Part:
            """What each slot gets of a part that is its own. One array for all pages would have J
            of them a slot, most of them nowhere."""

            def take(x: jax.Array, shape: tuple[int, ...], nothing: float) -> jax.Array:
                return rows_of(x.reshape(U, -1, *shape), where_UT, nothing)

            K, G, H = q_UTKGH.shape[2:]
            shapes = Part((K, G), (K, G), (K, G, H))
            # Who sees nothing gets 0, of a total that isn't.
            return Part(*map(take, parts, shapes, Part(HIDDEN, 1.0, 0.0)))

        seen = [mine(prompts, seat_UT), *(mine(pages, self.table_UTJ[..., j]) for j in range(J))]
        return softmax(union(seen)).astype(q_UTKGH.dtype), cache
