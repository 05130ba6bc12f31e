"""The device side of the sampler: every slot takes one token a step, under one jit.

Each of U pools has P prompts in flight and C slots; a slot grows one completion, of any of its
pool's prompts. A prompt's keys and values are computed and stored once for all slots that have it;
those of a completion lie in pages, which the host deals out to the slots of a pool as they grow. A
slot that needs a page and has none waits. The device sees token ids and small integer tables only;
when an annotation's `=` has come (see `Tokenizer.grammar`), it stops and asks the host.

The key of the token at position t of completion m of problem p is
`fold_in(fold_in(fold_in(seed, p), m), t)`: which slot grows a completion, beside what, when and
after which restart can't change it (bit for bit with the same shapes on the same mesh).
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gsm_verifier import sharding
from gsm_verifier.model import cpu_kernels, transformer
from gsm_verifier.model.attention import (
    CACHE,
    HIDDEN,
    NOWHERE,
    BranchCache,
    Branches,
    Packed,
    by_kernel,
    kept,
    page_at,
    rows_of,
)
from gsm_verifier.model.config import ModelConfig
from gsm_verifier.model.transformer import Params, Transformer
from gsm_verifier.text import tokenizer as tk

# What a slot is doing.
IDLE, RUNNING, ASKING, FINISHED = range(4)

FORCED = 40  # most tokens the calculator can force at one time
BLOCK = 64  # of the vocabulary at most, in the two-level inverse CDF


class Pages(NamedTuple):
    """How the keys and values of completions are kept.

    Attributes:
      U: pools, one for each device of rows. Z: pages of a pool. J: the most that a completion
        needs. W: positions of each.
    """

    U: int
    Z: int
    J: int
    W: int


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
      temperature: 0 takes the likeliest token. top_k: 0 for all. top_p: 1 for all.
      max_tokens: longest completion, the end-of-text token included.
      end: the token that ends a completion.
      seed: of all draws.
      chunk: most steps between two looks of the host.
      patience: slots waiting, for an answer of the calculator or another completion, that make the
        device return early. With 320 slots and a patience of 1 that was after 490 steps 429 times,
        with 10 after 515 steps 279 times. On CPU it was as fast.
      kept_share: how much is kept for the completions in flight, of what all of them would need if
        they were as long as they may get. Less makes some wait while the others are long.
      page: most positions of a page.
    """

    temperature: float
    top_k: int
    top_p: float
    max_tokens: int
    end: int
    seed: int
    chunk: int
    patience: int
    kept_share: float = 1.0
    page: int = 64

    def pages(self, mesh: jax.sharding.Mesh, slots: int) -> Pages:
        """On a mesh, for so many slots of a pool; enough for one of them to come to its end."""
        J = math.ceil(self.max_tokens / self.page)
        Z = max(J, math.ceil(self.kept_share * slots * J))
        return Pages(sharding.row_devices(mesh), Z, J, math.ceil(self.max_tokens / J))


class Slots(NamedTuple):
    """The whole state of the sampler on the device."""

    caches: list[BranchCache]  # one a layer
    prompt_length_UP: jax.Array
    last_token_UP: jax.Array  # of the prompt: the first input of each of its branches
    prompt_UC: jax.Array  # which of its pool's prompts a slot has
    status_UC: jax.Array
    token_UC: jax.Array  # the next input
    age_UC: jax.Array  # inputs of the branch already in its cache
    table_UCJ: jax.Array  # its pages in order, or NOWHERE
    annotation_UC: jax.Array  # state of the annotation grammar
    problem_UC: jax.Array  # uint32 identity, for the keys
    sample_UC: jax.Array
    queue_UCQ: jax.Array  # tokens the calculator forces
    queued_UC: jax.Array  # how many of them are left; they stand at the end of the queue


# What the host may order a slot to do before the next step.
KEEP, START, STOP, ANSWER = range(4)  # nothing, begin a completion, become idle, ask no more

NUMBERS = 6  # of an order, before its queue and its pages


class Orders(NamedTuple):
    """What the host wants before the next step, of every slot: the parts of int32 rows, one a slot.

    Rows are one array: to send it takes 0.1 ms a chunk, where ten arrays took 0.7.
    """

    what_UC: Any  # KEEP, START, STOP or ANSWER
    prompt_UC: Any  # START: of its pool's prompts the one to complete ...
    problem_UC: Any  # ... the problem's identity, as bits of a uint32 ...
    sample_UC: Any  # ... and which of its completions to begin
    token_UC: Any  # ANSWER: an asking slot goes on with this as its last token ...
    queued_UC: Any  # ... and so many forced after it ...
    queue_UCQ: Any  # ... which stand at the end of this
    table_UCJ: Any  # always: the slot's pages, or NOWHERE

    @classmethod
    def of(cls, rows_UCX: Any) -> "Orders":
        """The parts of rows; on the host views of them, to be written to."""
        numbers = (rows_UCX[..., x] for x in range(NUMBERS))
        end = NUMBERS + FORCED
        return cls(*numbers, rows_UCX[..., NUMBERS:end], rows_UCX[..., end:])

    @staticmethod
    def rows(U: int, C: int, J: int) -> np.ndarray:
        """Rows that order nothing, and give no slot a page."""
        rows_UCX = np.zeros((U, C, NUMBERS + FORCED + J), np.int32)
        rows_UCX[..., NUMBERS + FORCED :] = NOWHERE
        return rows_UCX


class Trace(NamedTuple):
    """What the slots wrote since the last look, by step; `steps` of the rows are filled."""

    steps: jax.Array
    active_XUC: jax.Array
    token_XUC: jax.Array
    forced_XUC: jax.Array
    logprob_XUC: jax.Array
    status_UC: jax.Array


def trace_shardings(mesh: jax.sharding.Mesh) -> Trace:
    """Where a Trace lives: every process reads the rows of its own slots."""
    log = sharding.named(mesh, (None, "U", "C"))
    return Trace(sharding.named(mesh, ()), log, log, log, log, sharding.named(mesh, "UC"))


def slot_shapes(
    config: ModelConfig, mesh: jax.sharding.Mesh, P: int, C: int, S: int, pages: Pages
) -> Slots:
    """Shapes and shardings of pools of P prompts of at most S tokens, C slots, and pages each."""

    def array(letters: str, dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.named(mesh, letters))

    U, K, H, dtype = pages.U, config.kv_heads, config.head_size, kept(config, mesh)

    prompts, own = (U, P, K, S, H), (U, pages.Z, K, pages.W, H)
    shapes = zip(CACHE, (prompts, prompts, own, own), strict=True)
    cache = BranchCache(*(array(letters, dtype, *shape) for letters, shape in shapes))

    def slots(dtype: Any, *more: int) -> jax.ShapeDtypeStruct:
        return array("UC" + "S" * len(more), dtype, U, C, *more)

    return Slots(
        caches=[cache] * config.layers,
        prompt_length_UP=array("UP", jnp.int32, U, P),
        last_token_UP=array("UP", jnp.int32, U, P),
        prompt_UC=slots(jnp.int32),
        status_UC=slots(jnp.int32),
        token_UC=slots(jnp.int32),
        age_UC=slots(jnp.int32),
        table_UCJ=slots(jnp.int32, pages.J),
        annotation_UC=slots(jnp.int32),
        problem_UC=slots(jnp.uint32),
        sample_UC=slots(jnp.int32),
        queue_UCQ=slots(jnp.int32, FORCED),
        queued_UC=slots(jnp.int32),
    )


def idle_slots(shapes: Slots, caches: list[BranchCache] | None = None) -> Slots:
    """Idle slots of the shapes that `slot_shapes` gives.

    Args:
      caches: of such slots that are done with, to be used again: what they hold is never seen.
    """

    def zeros(x: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.zeros(x.shape, x.dtype, device=x.sharding)

    caches = caches or jax.tree.map(zeros, shapes.caches)
    return jax.tree.map(zeros, shapes._replace(caches=[]))._replace(caches=caches)


def prefill(
    model: Transformer,
    params: Params,
    slots: Slots,
    tokens_BT: jax.Array,
    length_B: jax.Array,
    row_B: jax.Array,
) -> Slots:
    """Compute the prompts' keys and values and put them in their places in the pools.

    Args:
      tokens_BT: prompts padded to the S of the caches; one for each pool.
      length_B: their lengths; the last token isn't computed here: every branch starts with it.
      row_B: which of its pool's prompts a new one replaces; none if there aren't so many. Were it a
        row of any pool, all devices would send all their keys and values to all.
    """
    B, T = tokens_BT.shape
    position_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
    _, kept = model.apply(params, tokens_BT, position_BT, Packed.causal(B, T, keep=True))

    @jax.vmap
    def write(rows: jax.Array, new: jax.Array, row: jax.Array) -> jax.Array:
        return rows.at[row].set(new.astype(rows.dtype), mode="drop")

    def put(rows: jax.Array, new: jax.Array) -> jax.Array:
        letters = "KSH"[: rows.ndim - 2]
        names = [f"UP{letters}", f"U{letters}", "U"]
        return sharding.local(write, names, f"UP{letters}", rows, new, row_B)

    return slots._replace(
        caches=[
            cache._replace(
                prompt_k_UPKSH=put(cache.prompt_k_UPKSH, k_BKSH),
                prompt_v_UPKSH=put(cache.prompt_v_UPKSH, v_BKSH),
            )
            for cache, (k_BKSH, v_BKSH) in zip(slots.caches, kept, strict=True)
        ],
        prompt_length_UP=put(slots.prompt_length_UP, length_B - 1),
        last_token_UP=put(
            slots.last_token_UP, jnp.take_along_axis(tokens_BT, length_B[:, None] - 1, 1)[:, 0]
        ),
    )


def obey(slots: Slots, rows_UCX: jax.Array) -> Slots:
    """The slots after the host's orders, given as their rows."""
    orders = Orders.of(rows_UCX)
    start, stop, answer = (orders.what_UC == what for what in (START, STOP, ANSWER))
    first_UC = rows_of(slots.last_token_UP, orders.prompt_UC, 0)  # inputs of branches

    problem_UC = jax.lax.bitcast_convert_type(orders.problem_UC, jnp.uint32)

    def select(at_start: Any, at_answer: Any, otherwise: jax.Array) -> jax.Array:
        return jnp.where(start, at_start, jnp.where(answer, at_answer, otherwise))

    return slots._replace(
        prompt_UC=jnp.where(start, orders.prompt_UC, slots.prompt_UC),
        status_UC=jnp.where(start | answer, RUNNING, jnp.where(stop, IDLE, slots.status_UC)),
        token_UC=select(first_UC, orders.token_UC, slots.token_UC),
        age_UC=jnp.where(start, 0, slots.age_UC),
        table_UCJ=orders.table_UCJ,
        annotation_UC=jnp.where(start | answer, tk.TEXT, slots.annotation_UC),
        problem_UC=jnp.where(start, problem_UC, slots.problem_UC),
        sample_UC=jnp.where(start, orders.sample_UC, slots.sample_UC),
        queue_UCQ=jnp.where(answer[..., None], orders.queue_UCQ, slots.queue_UCQ),
        queued_UC=select(0, orders.queued_UC, slots.queued_UC),
    )


def restrict(logits: jax.Array, top_k: int, top_p: float) -> jax.Array:
    """Logits [..., V] with all but the top k, and all but the nucleus of mass top_p, hidden."""
    if top_k:
        least = jax.lax.top_k(logits, top_k)[0][..., -1:]
        logits = jnp.where(logits < least, HIDDEN, logits)
    if top_p < 1:
        ordered = -jnp.sort(-logits, -1)
        probs = jax.nn.softmax(ordered, -1)
        inside = jnp.cumsum(probs, -1) - probs < top_p  # the mass before a token
        least = jnp.where(inside, ordered, jnp.inf).min(-1, keepdims=True)
        logits = jnp.where(logits < least, HIDDEN, logits)
    return logits


def inverse_cdf(weight_V: jax.Array, uniform: jax.Array) -> jax.Array:
    """The index drawn from unnormalised weights [..., V] by one uniform number [...] each.

    One number a row where Gumbel noise needs V, and two levels, blocks and then a block's members,
    so that only sums and a short cumulative sum run over the vocabulary. A block lies within one
    device's part of V: otherwise all weights would be sent to all devices.
    """
    V = weight_V.shape[-1]
    part = V // sharding.parts("V")
    size = max(n for n in range(1, BLOCK + 1) if part % n == 0)
    blocks = weight_V.reshape(*weight_V.shape[:-1], V // size, size)

    def pick(weight: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
        total = jnp.cumsum(weight, -1)
        before = total - weight
        hit = (before <= target[..., None]) & (weight > 0)
        index = weight.shape[-1] - 1 - jnp.argmax(hit[..., ::-1], -1)  # the last that begins before
        return index, target - jnp.take_along_axis(before, index[..., None], -1)[..., 0]

    mass = blocks.sum(-1)
    block, rest = pick(mass, uniform * mass.sum(-1))
    member, _ = pick(jnp.take_along_axis(blocks, block[..., None, None], -2)[..., 0, :], rest)
    return block * size + member


def draw(
    logits_UCV: jax.Array,
    config: ModelConfig,
    sampling: Sampling,
    problem: jax.Array,
    sample: jax.Array,
    at: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The next token of every slot, and the log of its logits' sum of exponentials, each [U, C].

    Args:
      logits_UCV: of all ids; those that aren't text are left out here.
    """
    T, key = sampling.temperature, jax.random.key(sampling.seed)

    def uniform(problem: jax.Array, sample: jax.Array, at: jax.Array) -> jax.Array:
        token_key = jax.random.fold_in(key, problem)
        token_key = jax.random.fold_in(jax.random.fold_in(token_key, sample), at)
        return jax.random.uniform(token_key)

    uniform_UC = jax.vmap(jax.vmap(uniform))(problem, sample, at)
    of_all = not sampling.top_k and sampling.top_p == 1
    if of_all and sharding.parts("V") == 1 and by_kernel(config.attention, cap=0):
        return cpu_kernels.draw(logits_UCV, uniform_UC, T, config.text_size)
    logits_UCV = transformer.text_only(config, logits_UCV)
    top_UC = logits_UCV.max(-1)
    logits_UCV -= top_UC[..., None]
    log_total_UC = top_UC + jnp.log(jnp.exp(logits_UCV).sum(-1))
    if T == 0:
        return jnp.argmax(logits_UCV, -1), log_total_UC
    weight_UCV = jnp.exp(restrict(logits_UCV / T, sampling.top_k, sampling.top_p))
    return inverse_cdf(weight_UCV, uniform_UC), log_total_UC


def active_slots(slots: Slots) -> jax.Array:
    """Which take a step: those that run and have a page for it, [U, C]."""
    W = slots.caches[0].own_k_UZKWH.shape[3]
    page_UC = page_at(slots.table_UCJ, slots.age_UC, W)
    return (slots.status_UC == RUNNING) & (page_UC != NOWHERE)


def one_step(
    model: Transformer, params: Params, slots: Slots, sampling: Sampling, grammar_VX: jax.Array
) -> tuple[Slots, dict[str, jax.Array]]:
    """One token for every active slot."""
    active = active_slots(slots)
    table_UCJ = jnp.where(active[..., None], slots.table_UCJ, NOWHERE)  # others are left out
    position_UC = rows_of(slots.prompt_length_UP, slots.prompt_UC, 0) + slots.age_UC
    hidden, caches = model.apply(
        params,
        slots.token_UC,
        position_UC,
        Branches(slots.prompt_length_UP, slots.prompt_UC, slots.age_UC, table_UCJ),
        slots.caches,
    )
    logits_UCV = model.apply(params, hidden, method="logits", all_ids=True)
    who = slots.problem_UC, slots.sample_UC, slots.age_UC
    drawn, log_total = draw(logits_UCV, model.config, sampling, *who)
    forced = slots.queued_UC > 0
    head = jnp.clip(FORCED - slots.queued_UC, 0, FORCED - 1)
    queued = jnp.take_along_axis(slots.queue_UCQ, head[..., None], -1)[..., 0]
    token = jnp.where(forced, queued, drawn)
    # Of the model itself: at temperature 1, over the whole vocabulary.
    picked = jnp.take_along_axis(logits_UCV, token[..., None], -1)[..., 0]
    logprob = picked - log_total
    age = slots.age_UC + active
    annotation = grammar_VX[token, slots.annotation_UC]
    annotation = jnp.where(forced, tk.TEXT, annotation)
    status = jnp.select(
        [
            ~active,
            (token == sampling.end) | (age >= sampling.max_tokens),
            annotation == tk.ASK,
        ],
        [slots.status_UC, jnp.full_like(age, FINISHED), jnp.full_like(age, ASKING)],
        RUNNING,
    )
    slots = slots._replace(
        caches=caches,
        status_UC=status,
        token_UC=jnp.where(active, token, slots.token_UC),
        age_UC=age,
        annotation_UC=jnp.where(active, annotation, slots.annotation_UC),
        queued_UC=jnp.maximum(slots.queued_UC - active, 0),
    )
    return slots, {"active": active, "token": token, "forced": forced, "logprob": logprob}


def advance(
    model: Transformer,
    params: Params,
    slots: Slots,
    rows_UCX: jax.Array,
    grammar_VX: jax.Array,
    sampling: Sampling,
) -> tuple[Slots, Trace]:
    """Obey the orders, then step until enough slots wait for the host or the chunk is full."""
    slots = obey(slots, rows_UCX)
    params = transformer.with_whole_tables(params)  # once, not at every step
    shape = (sampling.chunk, *slots.status_UC.shape)
    log = {
        "active": jnp.zeros(shape, bool),
        "token": jnp.zeros(shape, jnp.int32),
        "forced": jnp.zeros(shape, bool),
        "logprob": jnp.zeros(shape, jnp.float32),
    }

    def goes_on(carry: tuple[jax.Array, Slots, dict[str, jax.Array]]) -> jax.Array:
        steps, slots, _ = carry
        status = slots.status_UC
        return (
            (steps < sampling.chunk)
            & active_slots(slots).any()
            & (((status == ASKING) | (status == FINISHED)).sum() < sampling.patience)
        )

    def body(carry: tuple[jax.Array, Slots, dict[str, jax.Array]]) -> Any:
        steps, slots, log = carry
        slots, row = one_step(model, params, slots, sampling, grammar_VX)
        log = {
            name: jax.lax.dynamic_update_index_in_dim(
                log[name], row[name].astype(x.dtype), steps, 0
            )
            for name, x in log.items()
        }
        return steps + 1, slots, log

    steps, slots, log = jax.lax.while_loop(goes_on, body, (jnp.zeros((), jnp.int32), slots, log))
    trace = Trace(
        steps, log["active"], log["token"], log["forced"], log["logprob"], slots.status_UC
    )
    return slots, trace
