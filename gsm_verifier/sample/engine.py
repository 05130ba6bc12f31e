"""The host side of the sampler: keeps the slots full, runs the calculator, harvests completions.

Of many processes each has its own rows of prompts in flight, its own queue, and sees its own
tokens only. Since parameters may be spread over all of them, they step together: before every chunk
they agree, in three numbers, on how many prefills to run, whether any still has work, and whether
any was asked to end. One that has run out of problems goes on with idle slots until the last is
done.
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
from gsm_verifier.model.attention import BranchCache
from gsm_verifier.model.config import ModelConfig
from gsm_verifier.model.transformer import Params, Transformer
from gsm_verifier.records import Completion
from gsm_verifier.sample import decode
from gsm_verifier.sample.decode import FORCED, Sampling
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
class _Row:
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
          prompts: P, prompts in flight. slots: C, completions of each at one time.
          calculator: force the results of annotations.
        """
        devices = sharding.row_devices(mesh)
        self._P, self._C = math.ceil(prompts / devices) * devices, slots
        self._share = sharding.share(mesh)
        self._here = self._share.rows(self._P)  # this process's own
        self._mesh, self._tokenizer, self._sampling = mesh, tokenizer, sampling
        # Matrices are cast once here, not at every step.
        self._config, self._params = transformer.unstack(config, params, cast=True)
        table = tokenizer.grammar() if calculator else np.zeros((tokenizer.size, GRAMMAR), np.int8)
        padded = np.zeros((config.vocab_size, table.shape[1]), np.int32)
        padded[: len(table)] = table
        self._grammar = jnp.asarray(padded, device=sharding.named(mesh, ()))
        self._prefill, self._advance = programs(self._config, mesh, sampling)
        self._kept: tuple[int, list[BranchCache] | None] = (0, None)  # a run's S, and its caches
        self._steps = self._used = 0

    def _compile(self, slots: decode.Slots, prompts: Any, orders: decode.Orders) -> None:
        """Compile both programs before there are slots, or the two peaks of memory would add up.

        The calls find what was compiled: JAX keeps it.
        """
        self._prefill.lower(self._params, slots, *prompts).compile()
        self._advance.lower(self._params, slots, orders, self._grammar).compile()

    @property
    def useful(self) -> float:
        return self._used / max(self._steps * len(self._here) * self._C, 1)

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
        if longest + self._sampling.max_tokens > self._config.max_length:
            raise ValueError(
                f"a prompt of {longest} tokens and max_tokens={self._sampling.max_tokens} exceed "
                f"the model's max_length={self._config.max_length}: lower max_tokens"
            )
        with jax.set_mesh(self._mesh):
            run = _Run(self, queue, math.ceil(longest / PROMPT_BUCKET) * PROMPT_BUCKET)
            yield from run.loop(termination or processes.Termination())


class _Run:
    """One call of `Engine.run`: the host's picture of the slots."""

    def __init__(self, engine: Engine, queue: list[Request], S: int):
        self._e, self._S = engine, S
        self._queue = [_Row(request, request.samples) for request in queue[::-1]]
        P, C, W = len(engine._here), engine._C, engine._sampling.max_tokens
        self._pages = engine._sampling.pages(engine._mesh, engine._P * C)
        self._rows: list[_Row | None] = [None] * P
        self._sample = np.full((P, C), -1, np.int64)  # -1: idle
        self._started = np.zeros((P, C), np.int64)  # counts up
        self._starts = 0
        self._held: list[list[list[int]]] = [[[] for _ in range(C)] for _ in range(P)]  # pages
        self._pools = len(engine._share.blocks)  # one for each device of rows
        self._pool = np.repeat(np.arange(self._pools), P // self._pools)  # of a row
        self._free_pages = [list(range(self._pages.Z)) for _ in range(self._pools)]
        self._tokens = np.zeros((P, C, W), np.int32)
        self._forced = np.zeros((P, C, W), bool)
        self._logprob = np.zeros((P, C, W), np.float64)
        self._length = np.zeros((P, C), np.int64)
        self._slots: Any = None  # until there is work for them

    def _begin(self) -> None:
        """Make the slots, of the last run's caches if they fit: memory that is freed may not be had
        again in one piece."""
        e = self._e
        (kept_S, caches), e._kept = e._kept, (0, None)
        if kept_S != self._S:
            caches = None  # freed before others are made
        shapes = decode.slot_shapes(e._config, e._mesh, e._P, e._C, self._S, self._pages)
        e._compile(shapes, self._batch([]), self._global(self._no_orders()))
        self._slots = decode.idle_slots(shapes, caches)

    def loop(self, termination: processes.Termination) -> Iterator[Completion]:
        orders = self._no_orders()
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
            self._deal(orders)
            self._slots, trace = self._e._advance(
                self._e._params, self._slots, self._global(orders), self._e._grammar
            )
            status = self._read(trace)
            orders = self._no_orders()
            for p, c in np.argwhere(status == decode.ASKING):
                self._answer(orders, p, c)
            for p, c in np.argwhere((status == decode.FINISHED) & (self._sample >= 0)):
                yield self._harvest(p, c)
                orders.stop_PC[p, c] = True

    def _no_orders(self) -> decode.Orders:
        return decode.no_orders(*self._sample.shape, self._pages.J)

    def _global(self, orders: decode.Orders) -> decode.Orders:
        return jax.tree.map(
            lambda x: sharding.to_global(self._e._mesh, "PC" + "S" * (x.ndim - 2), x), orders
        )

    def _free(self) -> list[int]:
        """Rows that are done with their prompts."""
        idle_P = (self._sample < 0).all(1)
        done = [row is None or not row.waiting for row in self._rows]
        return np.flatnonzero(idle_P & done).tolist()

    def _unfinished(self) -> bool:
        waiting = any(row is not None and row.waiting for row in self._rows)
        return bool(self._queue) or waiting or bool((self._sample >= 0).any())

    def _prefills(self) -> int:
        """Prefills this process wants now; while others run, none for less than a batch's worth."""
        self._split()
        free = np.bincount(self._pool[self._free()], minlength=self._pools)
        batch = min(free.sum(), len(self._queue))
        some_run = (self._sample >= 0).any()
        if batch < min(self._pools, len(self._queue)) and some_run:
            return 0
        each = next(n for n in itertools.count() if np.minimum(free, n).sum() >= batch)
        # Rows that more than one of a batch's devices have to spare can wait for the next.
        return min(each, max(1, batch // self._pools)) if some_run else each

    def _split(self) -> None:
        """At the end of the queue let idle rows take half of what waits in others."""
        for _ in range(len(self._free()) - len(self._queue)):
            most = max(filter(None, self._rows), key=lambda row: len(row.waiting), default=None)
            if most is None or len(most.waiting) < max(2, self._e._C):
                return
            half = len(most.waiting) // 2
            self._queue.append(_Row(most.request, most.waiting[-half:]))
            most.waiting = most.waiting[:-half]

    def _admit(self) -> None:
        """Give a new prompt to a row of each device that has one which is done.

        To one only, or rows would wait for each other: with 4 where this is 1, 9 of 100 slot-steps
        were lost so. One prompt's positions are rows enough for a product.
        """
        chosen = {self._pool[p]: p for p in self._free()[::-1]}  # the first of each
        prompts = []
        for b in sorted(chosen)[: len(self._queue)]:
            self._rows[chosen[b]] = row = self._queue.pop()
            prompts.append((chosen[b], row.request.prompt))
        self._slots = self._e._prefill(self._e._params, self._slots, *self._batch(prompts))

    def _batch(self, prompts: list[tuple[int, list[int]]]) -> list[jax.Array]:
        """What `decode.prefill` takes: of every device one (p, prompt) of its own, or none."""
        tokens = np.zeros((self._pools, self._S), np.int32)
        length = np.ones(self._pools, np.int32)
        each = len(self._rows) // self._pools
        where = np.full(self._pools, each, np.int32)
        for p, prompt in prompts:
            b = self._pool[p]
            where[b] = p % each
            tokens[b, : len(prompt)] = prompt
            length[b] = len(prompt)
        put = functools.partial(sharding.to_global, self._e._mesh)
        return [put("BT", tokens), put("B", length), put("B", where)]

    def _start(self, orders: decode.Orders) -> None:
        """Start waiting samples in idle slots."""
        for p, row in enumerate(self._rows):
            if row is None or not row.waiting:
                continue
            for c in np.flatnonzero(self._sample[p] < 0):
                if not row.waiting:
                    break
                sample, row.waiting = row.waiting[0], row.waiting[1:]
                self._sample[p, c] = sample
                self._starts += 1
                self._started[p, c] = self._starts
                self._length[p, c] = 0
                orders.start_PC[p, c] = True
                orders.problem_PC[p, c] = problem_key(row.request.problem)
                orders.sample_PC[p, c] = sample

    def _deal(self, orders: decode.Orders) -> None:
        """Give slots the pages that the next chunk can fill, the oldest first.

        What the oldest of a pool may still need stays free for it: it can always go on, and leaves
        its pages to the next.
        """
        chunk, J, W = self._e._sampling.chunk, self._pages.J, self._pages.W
        oldest: dict[int, int] = {}  # of a pool, what it may still need
        busy = np.argwhere(self._sample >= 0)
        for p, c in busy[np.argsort(self._started[tuple(busy.T)])]:
            pool, held = self._pool[p], self._held[p][c]
            free, reserved = self._free_pages[pool], oldest.get(pool, 0)
            wanted = min(J, math.ceil((self._length[p, c] + chunk) / W))
            while len(held) < wanted and len(free) > reserved:
                held.append(free.pop())
            oldest.setdefault(pool, J - len(held))
            orders.table_PCJ[p, c, : len(held)] = held

    def _read(self, trace: decode.Trace) -> np.ndarray:
        """Append what the slots wrote; the slots' status."""
        steps = int(trace.steps)
        active, token, forced, logprob = (
            sharding.to_host(x)[:steps]
            for x in (trace.active_XPC, trace.token_XPC, trace.forced_XPC, trace.logprob_XPC)
        )
        for x in range(steps):
            p, c = np.nonzero(active[x])
            at = self._length[p, c]
            self._tokens[p, c, at] = token[x, p, c]
            self._forced[p, c, at] = forced[x, p, c]
            self._logprob[p, c, at] = logprob[x, p, c]
            self._length[p, c] += 1
        self._e._steps += steps
        self._e._used += int(active.sum())
        return sharding.to_host(trace.status_PC)

    def _answer(self, orders: decode.Orders, p: int, c: int) -> None:
        """Evaluate the annotation a slot has just opened; refused, its sampling goes on."""
        length = self._length[p, c]
        tokens = self._tokens[p, c, :length]
        orders.answer_PC[p, c] = True
        orders.token_PC[p, c] = tokens[-1]
        ids = self._forced_ids(tokens)
        if not ids:
            return
        # The token that held the `=` may hold more (`=-`): it is written again, up to the `=`.
        orders.token_PC[p, c] = ids[0]
        if ids[0] != tokens[-1]:
            self._tokens[p, c, length - 1] = ids[0]
            self._forced[p, c, length - 1] = True
        orders.queue_PCQ[p, c, FORCED - len(ids) + 1 :] = ids[1:]
        orders.queued_PC[p, c] = len(ids) - 1

    def _forced_ids(self, tokens: np.ndarray) -> list[int]:
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

    def _harvest(self, p: int, c: int) -> Completion:
        row, length = self._rows[p], self._length[p, c]
        tokens = self._tokens[p, c, :length]
        forced = self._forced[p, c, :length]
        completion = Completion(
            problem=row.request.problem,
            sample=int(self._sample[p, c]),
            text=self._e._tokenizer.decode(tokens),
            tokens=tokens.tolist(),
            forced=forced.tolist(),
            # What the calculator forced wasn't the model's choice.
            logprob=float(self._logprob[p, c, :length][~forced].sum()),
            finished=bool(tokens[-1] == self._e._sampling.end),
        )
        self._sample[p, c] = -1
        self._free_pages[self._pool[p]] += self._held[p][c]
        self._held[p][c] = []
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
