"""The host side of the sampler: keeps the slots full, runs the calculator, harvests completions.

Of many processes each has its own pools of prompts and slots, its own queue, and sees its own
tokens only. Since parameters may be spread over all of them, they step together: before every chunk
they agree, in three numbers, on how many prefills to run, whether any still has work, and whether
any was asked to end. One that has run out of problems goes on with idle slots until the last is
done.

A slot takes the next completion of any prompt of its pool. When each prompt had slots of its own,
which idled until the last of its completions ended, 86.5 % of the slot-steps of GSM8K's lengths
were useful; now 96.7 are (`benchmarks.slots`). What is left is the end of the queue, where a step
computes all slots until the longest completion ends. Programs of fewer slots would be quicker, but
give other last bits (XLA:CPU does in float32 with less than 64 rows), and a run that is cut and
goes on comes to them at another time. Tried and lost: to start those prompts' completions first, at
the end of the queue, whose completions were the longest. Of lengths like GSM8K's, 16 problems in
272 slots, 90 % of slot-steps were useful so for 70; of a model's own, which may go on to the limit
in any problem, 77 for 79.
"""

import functools
import itertools
import math
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gsm_verifier import processes, sharding
from gsm_verifier.model import transformer
from gsm_verifier.model.attention import NOWHERE, BranchCache, most_slots
from gsm_verifier.model.config import ModelConfig
from gsm_verifier.model.transformer import Params, Transformer
from gsm_verifier.records import Completion
from gsm_verifier.sample import decode
from gsm_verifier.sample.decode import FORCED, Orders, Sampling
from gsm_verifier.text import calculator
from gsm_verifier.text.tokenizer import Tokenizer

GRAMMAR = 6  # columns of `Tokenizer.grammar`
PROMPT_BUCKET = 32  # prompts are padded to a multiple of it, to compile few shapes


@dataclass(frozen=True)
class Request:
    """Completions wanted of one problem: its prompt's ids and the numbers of the samples."""

    problem: str
    prompt: list[int]
    samples: range


@dataclass
class _Prompt:
    """A prompt, in flight or queued: whose it is and which samples are still to be started.

    Several may be of one problem, each with some of its samples.
    """

    request: Request
    waiting: range


def problem_key(problem: str) -> int:
    """The identity of a problem in the keys of its draws: stable on every machine."""
    return zlib.crc32(problem.encode())


def mesh_of(config: ModelConfig, mesh: jax.sharding.Mesh, where: str) -> jax.sharding.Mesh:
    """The mesh to sample on for a run on `mesh`, by the config's word `mesh.sampling`.

    On `fsdp` a step gathers all weights, to multiply them with one position of each slot.
    """
    if where == "same":
        return mesh
    return sharding.without_fsdp(mesh, config.kv_heads, config.mlp_width, config.vocab_size)


def pool_sizes(mesh: jax.sharding.Mesh, prompts: int, slots: int) -> tuple[int, int]:
    """(P, C) of each pool, for prompts of all pools, and slots of each in the mean."""
    P = math.ceil(prompts / sharding.row_devices(mesh))
    return P, P * slots


def programs(config: ModelConfig, mesh: jax.sharding.Mesh, sampling: Sampling) -> tuple[Any, Any]:
    """(`decode.prefill`, `decode.advance`) of a model with unstacked layers, compiled."""
    model = Transformer(config)
    prefill = jax.jit(functools.partial(decode.prefill, model), donate_argnums=1)
    advance = jax.jit(
        functools.partial(decode.advance, model, sampling=sampling),
        donate_argnums=1,
        out_shardings=(None, decode.trace_shardings(mesh)),
    )
    return prefill, advance


class Engine:
    """Samples completions of many problems, as many at a time as there are slots.

    Between runs it holds its parameters and the caches of the last one.

    Attributes:
      useful: share of the slot-steps run so far that wrote a token.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        mesh: jax.sharding.Mesh,
        tokenizer: Tokenizer,
        sampling: Sampling,
        *,
        prompts: int,
        slots: int,
        calculator: bool,
    ):
        """
        Args:
          config: the model; its layers stacked.
          params: its parameters on the mesh.
          prompts: in flight, of all pools. slots: completions of each at one time, in the mean.
          calculator: force the results of annotations.
        """
        self._P, self._C = pool_sizes(mesh, prompts, slots)
        self._pools = len(sharding.share(mesh).blocks)  # this process's own
        self._mesh, self._tokenizer, self._sampling = mesh, tokenizer, sampling
        # Matrices are cast once here, not at every step.
        self._config, self._params = transformer.unstack(config, params, cast="all")
        table = tokenizer.grammar() if calculator else np.zeros((tokenizer.size, GRAMMAR), np.int8)
        padded = np.zeros((config.vocab_size, table.shape[1]), np.int32)
        padded[: len(table)] = table
        self._grammar = jnp.asarray(padded, device=sharding.named(mesh, ()))
        self._prefill, self._advance = programs(self._config, mesh, sampling)
        self._kept: tuple[int, list[BranchCache] | None] = (0, None)  # a run's S, and its caches
        self._steps = self._used = 0

    def _compile(self, slots: decode.Slots, prompts: Any, rows_UCX: jax.Array) -> None:
        """Compile both programs before there are slots, or the two peaks of memory would add up.

        The calls find what was compiled: JAX keeps it.
        """
        self._prefill.lower(self._params, slots, *prompts).compile()
        self._advance.lower(self._params, slots, rows_UCX, self._grammar).compile()

    @property
    def useful(self) -> float:
        return self._used / max(self._steps * self._pools * self._C, 1)

    def run(
        self,
        requests: Iterable[Request],
        longest: int = 0,
        termination: processes.Termination | None = None,
    ) -> Iterator[Completion]:
        """Completions in the order in which they finish; every process runs requests of its own.

        Args:
          longest: at least so long a prompt is allowed for. With the longest of all problems, what
            is sampled of a part of them is bit for bit the same.
          termination: looked at before every chunk of steps.

        Raises:
          ValueError: a prompt that leaves no room for max_tokens in the model's max_length.
          Stopped: a process was asked to end; all do, before the same chunk.
        """
        queue = sorted(requests, key=lambda r: -len(r.samples))
        (longest,) = processes.largest(max([longest, *(len(r.prompt) for r in queue)]))
        if not longest:
            return  # no process has any
        room = self._config.max_length - longest
        if room < self._sampling.max_tokens:
            mend = f"lower max_tokens to {room}" if room > 0 else "the prompt alone fills it"
            raise ValueError(
                f"a prompt of {longest} tokens and max_tokens={self._sampling.max_tokens} exceed "
                f"the model's max_length={self._config.max_length}: {mend}"
            )
        with jax.set_mesh(self._mesh):
            run = _Run(self, queue, math.ceil(longest / PROMPT_BUCKET) * PROMPT_BUCKET)
            yield from run.loop(termination or processes.Termination())


class _Run:
    """One call of `Engine.run`: the host's picture of the slots."""

    def __init__(self, engine: Engine, queue: list[Request], S: int):
        self._e, self._S = engine, S
        self._queue = [_Prompt(request, request.samples) for request in queue[::-1]]
        U, P, C, W = engine._pools, engine._P, engine._C, engine._sampling.max_tokens
        self._pages = engine._sampling.pages(engine._mesh, C)
        self._most = most_slots(engine._config, engine._mesh, P, C)
        self._prompts: list[list[_Prompt | None]] = [[None] * P for _ in range(U)]
        self._in_use = np.zeros((U, P), np.int64)  # slots that have it
        self._free_pages = [list(range(self._pages.Z)) for _ in range(U)]
        # Of the slots.
        self._prompt = np.zeros((U, C), np.int64)  # which of its pool's
        self._sample = np.full((U, C), -1, np.int64)  # -1: idle
        self._started = np.zeros((U, C), np.int64)  # counts up
        self._starts = 0
        self._table = np.full((U, C, self._pages.J), NOWHERE, np.int32)  # its pages, in order
        self._tokens = np.zeros((U, C, W), np.int32)
        self._forced = np.zeros((U, C, W), bool)
        self._logprob = np.zeros((U, C, W), np.float64)
        self._length = np.zeros((U, C), np.int64)
        self._slots: Any = None  # until there is work for them

    def _begin(self) -> None:
        """Make the slots, of the last run's caches if they fit: memory that is freed may not be had
        again in one piece."""
        e = self._e
        (kept_S, caches), e._kept = e._kept, (0, None)
        if kept_S != self._S:
            caches = None  # freed before others are made
        shapes = decode.slot_shapes(e._config, e._mesh, e._P, e._C, self._S, self._pages)
        rows, _ = self._no_orders()
        e._compile(shapes, self._batch([None] * e._pools), self._global(rows))
        self._slots = decode.idle_slots(shapes, caches)

    def loop(self, termination: processes.Termination) -> Iterator[Completion]:
        rows, orders = self._no_orders()
        while True:
            prefills, unfinished, stop = processes.largest(
                self._prefills(), self._unfinished(), termination.noted
            )
            if stop:
                raise processes.Stopped(processes.SHARDS_KEPT)
            if not unfinished:
                if self._slots:
                    self._e._kept = (self._S, self._slots.caches)
                return
            if not self._slots:
                self._begin()
            for _ in range(prefills):
                self._admit()
            self._start(orders)
            self._deal()
            orders.table_UCJ[:] = self._table
            self._slots, trace = self._e._advance(
                self._e._params, self._slots, self._global(rows), self._e._grammar
            )
            status = self._read(trace)
            rows, orders = self._no_orders()
            for u, c in np.argwhere(status == decode.ASKING):
                self._answer(orders, u, c)
            for u, c in np.argwhere((status == decode.FINISHED) & (self._sample >= 0)):
                yield self._harvest(u, c)
                orders.what_UC[u, c] = decode.STOP

    def _no_orders(self) -> tuple[np.ndarray, Orders]:
        """Rows that order nothing yet, and their parts to write to.

        New ones for every chunk: a CPU's device may read the host's memory in its place.
        """
        rows = Orders.rows(*self._table.shape)
        return rows, Orders.of(rows)

    def _global(self, rows_UCX: np.ndarray) -> jax.Array:
        return sharding.to_global(self._e._mesh, ("U", "C", None), rows_UCX)

    def _waiting(self) -> np.ndarray:
        """How many samples of each prompt are to be started, [U, P]."""
        return np.array([[len(it.waiting) if it else 0 for it in pool] for pool in self._prompts])

    def _free(self) -> np.ndarray:
        """Which prompts are done with, [U, P]."""
        return (self._waiting() == 0) & (self._in_use == 0)

    def _spare(self) -> np.ndarray:
        """How many idle slots each pool has for which nothing waits, [U]."""
        taken_U = np.minimum(self._waiting(), self._most - self._in_use).sum(1)
        return np.maximum((self._sample < 0).sum(1) - taken_U, 0)

    def _unfinished(self) -> bool:
        return bool(self._queue) or bool(self._waiting().any() or self._in_use.any())

    def _prefills(self) -> int:
        """Prefills this process wants now; while others run, none for less than a batch's worth."""
        self._split()
        free = self._free().sum(1)
        batch = min(free.sum(), len(self._queue))
        some_run = self._in_use.any()
        if batch < min(len(free), len(self._queue)) and some_run:
            return 0
        each = next(n for n in itertools.count() if np.minimum(free, n).sum() >= batch)
        # Prompts that more than one of a batch's pools have to spare can wait for the next.
        return min(each, max(1, batch // len(free))) if some_run else each

    def _split(self) -> None:
        """At the end of the queue let slots that are to spare take half of what waits."""
        wanted_U = np.minimum(self._free().sum(1), np.ceil(self._spare() / self._most))
        for _ in range(int(wanted_U.sum()) - len(self._queue)):
            some = [it for pool in self._prompts for it in pool if it]
            most = max(some, key=lambda it: len(it.waiting), default=None)
            if most is None or len(most.waiting) < max(2, self._e._C // self._e._P):
                return
            half = len(most.waiting) // 2
            self._queue.append(_Prompt(most.request, most.waiting[-half:]))
            most.waiting = most.waiting[:-half]

    def _admit(self) -> None:
        """Give each pool that has room for it a new prompt, those with most slots to spare first.

        One only, or pools would wait for each other: with 4 where this is 1, 9 of 100 slot-steps
        were lost so. One prompt's positions are rows enough for a product.
        """
        prompts: list[tuple[int, list[int]] | None] = [None] * len(self._prompts)
        free_UP = self._free()
        for u in np.argsort(-self._spare(), kind="stable"):
            if free_UP[u].any() and self._queue:
                p = int(free_UP[u].argmax())
                self._prompts[u][p] = it = self._queue.pop()
                prompts[u] = p, it.request.prompt
        self._slots = self._e._prefill(self._e._params, self._slots, *self._batch(prompts))

    def _batch(self, prompts: list[tuple[int, list[int]] | None]) -> list[jax.Array]:
        """What `decode.prefill` takes: for every pool (which of its prompts, the new one's ids)."""
        tokens = np.zeros((len(prompts), self._S), np.int32)
        length = np.ones(len(prompts), np.int32)
        where = np.full(len(prompts), self._e._P, np.int32)
        for u, new in enumerate(prompts):
            if new:
                where[u], ids = new
                tokens[u, : len(ids)] = ids
                length[u] = len(ids)
        put = functools.partial(sharding.to_global, self._e._mesh)
        return [put("BT", tokens), put("B", length), put("B", where)]

    def _start(self, orders: Orders) -> None:
        """Start waiting samples in idle slots, of the prompts that have the fewest."""
        for u, waiting_P in enumerate(self._waiting()):
            for c in np.flatnonzero(self._sample[u] < 0):
                ready_P = (waiting_P > 0) & (self._in_use[u] < self._most)
                if not ready_P.any():
                    break
                p = int(np.where(ready_P, self._in_use[u], self._most).argmin())
                it = self._prompts[u][p]
                sample, it.waiting = it.waiting[0], it.waiting[1:]
                waiting_P[p] -= 1
                self._in_use[u, p] += 1
                self._starts += 1
                self._prompt[u, c], self._sample[u, c] = p, sample
                self._started[u, c], self._length[u, c] = self._starts, 0
                orders.what_UC[u, c] = decode.START
                orders.prompt_UC[u, c] = p
                orders.problem_UC[u, c] = np.uint32(problem_key(it.request.problem)).view(np.int32)
                orders.sample_UC[u, c] = sample

    def _deal(self) -> None:
        """Give slots the pages that the next chunk can fill, the oldest first.

        What the oldest of a pool may still need stays free for it: it can always go on, and leaves
        its pages to the next.
        """
        chunk, J, W = self._e._sampling.chunk, self._pages.J, self._pages.W
        held_UC = (self._table != NOWHERE).sum(-1)
        wanted_UC = np.minimum(J, -(-(self._length + chunk) // W))
        for u, free in enumerate(self._free_pages):
            busy = np.flatnonzero(self._sample[u] >= 0)
            busy = busy[np.argsort(self._started[u, busy])]
            for c in busy[held_UC[u, busy] < wanted_UC[u, busy]]:
                reserved = 0 if c == busy[0] else J - held_UC[u, busy[0]]
                held = held_UC[u, c]
                more = max(0, min(wanted_UC[u, c] - held, len(free) - reserved))
                self._table[u, c, held : held + more] = [free.pop() for _ in range(more)]
                held_UC[u, c] += more

    def _read(self, trace: decode.Trace) -> np.ndarray:
        """Append what the slots wrote; the slots' status."""
        steps = int(trace.steps)
        active, token, forced, logprob = (
            sharding.to_host(x)[:steps]
            for x in (trace.active_XUC, trace.token_XUC, trace.forced_XUC, trace.logprob_XUC)
        )
        for x in range(steps):
            u, c = np.nonzero(active[x])
            at = self._length[u, c]
            self._tokens[u, c, at] = token[x, u, c]
            self._forced[u, c, at] = forced[x, u, c]
            self._logprob[u, c, at] = logprob[x, u, c]
            self._length[u, c] += 1
        self._e._steps += steps
        self._e._used += int(active.sum())
        return sharding.to_host(trace.status_UC)

    def _answer(self, orders: Orders, u: int, c: int) -> None:
        """Evaluate the annotation a slot has just opened; refused, its sampling goes on."""
        length = self._length[u, c]
        tokens = self._tokens[u, c, :length].tolist()
        orders.what_UC[u, c] = decode.ANSWER
        orders.token_UC[u, c] = tokens[-1]
        ids = self._forced_ids(tokens)
        if not ids:
            return
        # The token that held the `=` may hold more (`=-`): it is written again, up to the `=`.
        orders.token_UC[u, c] = ids[0]
        if ids[0] != tokens[-1]:
            self._tokens[u, c, length - 1] = ids[0]
            self._forced[u, c, length - 1] = True
        orders.queue_UCQ[u, c, FORCED - len(ids) + 1 :] = ids[1:]
        orders.queued_UC[u, c] = len(ids) - 1

    def _forced_ids(self, tokens: list[int]) -> list[int]:
        """Ids that replace the last token and follow it; none if the calculator refuses."""
        tokenizer = self._e._tokenizer
        text = tokenizer.decode(tokens)
        expression = calculator.open_expression(text)
        if expression is None:
            return []
        before = tokenizer.decode(tokens[:-1])
        result = calculator.evaluate(expression, context=before)
        opened = text.rfind("<<")
        upto = text.index("=", opened) + 1
        if result is None or not text.startswith(before) or upto <= len(before):
            return []
        ids = tokenizer.continuation(text[len(before) : upto] + result + ">>")
        return ids if len(ids) <= FORCED else []

    def _harvest(self, u: int, c: int) -> Completion:
        request, length = self._prompts[u][self._prompt[u, c]].request, self._length[u, c]
        tokens = self._tokens[u, c, :length].tolist()
        forced = self._forced[u, c, :length]
        completion = Completion(
            problem=request.problem,
            sample=int(self._sample[u, c]),
            text=self._e._tokenizer.decode(tokens),
            tokens=tokens,
            forced=forced.tolist(),
            # What the calculator forced wasn't the model's choice.
            logprob=float(self._logprob[u, c, :length][~forced].sum()),
            finished=tokens[-1] == self._e._sampling.end,
        )
        self._sample[u, c] = -1
        self._in_use[u, self._prompt[u, c]] -= 1
        pages_J = self._table[u, c]
        self._free_pages[u] += pages_J[pages_J != NOWHERE].tolist()
        self._table[u, c] = NOWHERE
        return completion


def sampling_of(options: Any, end: int, seed: int, slots: int, **changes: Any) -> Sampling:
    """The `Sampling` of a stage's `config.sample`, with changes (greedy: `temperature=0.0`)."""
    words = {
        "temperature": options.temperature,
        "top_k": options.top_k,
        "top_p": options.top_p,
        "max_tokens": options.max_tokens,
        "chunk": options.chunk_steps,
        "kept_share": options.kept_share,
    }
    return Sampling(**(words | changes), end=end, seed=seed, patience=max(1, slots // 32))
