"""What is in C++ on CPU beside what JAX makes of it: a layer's attention, draws, products, loss.

    python -m benchmarks.cpu_kernels

Prints one JSON line: of a step of the sampler, of whole rows without and with their gradient, of
the draws of all slots, and in bfloat16 on a processor with tiles (AMX) of a feed-forward layer's
first product, of gate and in and what comes of them, and of the language model's loss, without and
with their gradients, the median milliseconds a call of each way, by the clock and of the
processors. The caches of several layers take turns, as in a model: none stays in the cache of the
processor.
"""

import argparse
import functools
import itertools
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gsm_verifier.config import default
from gsm_verifier.data.packing import FIELDS
from gsm_verifier.model import cpu_kernels, transformer
from gsm_verifier.model.attention import BranchCache, Branches, Look, by_rows
from gsm_verifier.plan import model_of
from gsm_verifier.sample import decode
from gsm_verifier.sample.engine import sampling_of
from gsm_verifier.train.batch import Batch
from gsm_verifier.train.losses import Objective, cross_entropy_sum

K, G, H = 3, 3, 64
P, C, S, W, J = 8, 160, 96, 60, 4  # of the sampler
OLDEST = 120  # ages are spread evenly from 0 to it
LAYERS = 4
B, T, PROBLEM = 2, 1024, 190  # of whole rows: packed problems of so many positions
TEXT = 49152  # ids of text
D, F = K * G * H, 2 * 1536  # of products: gate and in
FORMULA = "BTD,DF->BTF"

Calls = dict[str, Callable[[], Any]]


def called(way: Callable[..., jax.Array], gradient: bool, *arrays: jax.Array) -> Any:
    """A call of a way, compiled, without or with its gradient by all arrays."""

    def both(*arrays: jax.Array) -> Any:
        found, back = jax.vjp(way, *arrays)
        return found, back(found)

    return functools.partial(jax.jit(both if gradient else way), *arrays)


def step(normal: Callable[..., jax.Array], rng: np.random.Generator) -> Calls:
    """A step of all slots of the sampler."""
    prompts, own = (1, P, K, S, H), (1, C * J, K, W, H)
    shapes = (prompts, prompts, own, own)
    length_UP, age_UC = rng.integers(S // 2, S + 1, (1, P)), rng.integers(0, OLDEST + 1, (1, C))
    prompt_UC = np.arange(C)[None] % P
    table_UCJ = rng.permutation(C * J).reshape(1, C, J)
    slots = Branches(*map(jnp.int32, (length_UP, prompt_UC, age_UC, table_UCJ)))
    new = (normal(1, C, K, G, H), normal(1, C, K, H), normal(1, C, K, H))

    def calls(way: Callable[..., Any]) -> Callable[[], Any]:
        jitted = jax.jit(functools.partial(way, look=Look()), donate_argnames="cache")
        caches = [BranchCache(*(normal(*shape) for shape in shapes)) for _ in range(LAYERS)]
        turns = itertools.cycle(range(LAYERS))

        def call() -> Any:
            at = next(turns)
            out, caches[at] = jitted(*new, cache=caches[at])
            return out

        return call

    return {"kernel": calls(slots._kernel), "jax": calls(slots._pages)}


def rows(normal: Callable[..., jax.Array], gradient: bool) -> Calls:
    """Whole rows of packed problems."""
    q, k, v = normal(B, T, K, G, H), normal(B, T, K, H), normal(B, T, K, H)
    ends = np.minimum(np.arange(T) // PROBLEM * PROBLEM + PROBLEM, T)
    end_BT = jnp.broadcast_to(ends.astype(np.int32), (B, T))

    def calls(way: Callable[..., jax.Array]) -> Callable[[], Any]:
        def out(*qkv: jax.Array) -> jax.Array:
            return way(*qkv, end_BT, scale=H**-0.5)

        return called(out, gradient, q, k, v)

    def kernel(*arrays: jax.Array, scale: float) -> jax.Array:
        return cpu_kernels.whole_attention(*arrays, end_BT, jnp.int32(0), scale)  # no window

    return {"kernel": calls(kernel), "jax": calls(by_rows)}


def draws(normal: Callable[..., jax.Array]) -> Calls:
    """A token for each slot."""
    model = model_of(default(), "cpu").with_(text_size=TEXT)
    sampling = sampling_of(default().sample, 0, 0, C)
    logits_UCV = normal(1, C, model.vocab_size).astype(jnp.float32)
    problem, sample = np.indices((1, C), np.uint32)

    def calls(attention: str) -> Callable[[], Any]:
        config = model.with_(attention=attention)
        drawn = jax.jit(lambda x: decode.draw(x, config, sampling, problem, sample, sample))
        return functools.partial(drawn, logits_UCV)

    return {"kernel": calls("auto"), "jax": calls("jax")}


def _product(kernel: bool) -> Callable[..., jax.Array]:
    return lambda x, w: transformer._product(FORMULA, True, kernel, x, w).astype(x.dtype)


def products(normal: Callable[..., jax.Array], gradient: bool) -> Calls:
    """Of whole rows with weights."""
    return {
        "kernel": called(_product(True), gradient, normal(B, T, D), normal(D, F)),
        "jax": called(_product(False), gradient, normal(B, T, D), normal(D, F)),
    }


def gates(normal: Callable[..., jax.Array], gradient: bool) -> Calls:
    """Of whole rows with gate and in, activated."""

    def apart(x: jax.Array, *ws: jax.Array) -> jax.Array:
        return transformer._activated("swiglu", *(_product(False)(x, w) for w in ws))

    at_once = functools.partial(transformer._gated, "swiglu", FORMULA)
    arrays = (normal(B, T, D), normal(D, F // 2), normal(D, F // 2))
    return {"kernel": called(at_once, gradient, *arrays), "jax": called(apart, gradient, *arrays)}


def loss(normal: Callable[..., jax.Array], gradient: bool) -> Calls:
    """The language model's, of whole rows."""
    model = model_of(default(), "cpu").with_(width=D, text_size=TEXT, dtype="bfloat16")
    batch = Batch.of({name: np.ones((B, T), dtype) for name, dtype in FIELDS.items()})
    hidden_BTD = normal(B, T, D)
    table_VD = normal(model.vocab_size, D).astype(jnp.float32) / D**0.5

    def calls(attention: str) -> Callable[[], Any]:
        config = model.with_(attention=attention)

        def summed(table: jax.Array, hidden: jax.Array) -> jax.Array:
            params = {"params": {transformer.table(config): table}}
            return cross_entropy_sum(config, params, hidden, batch, Objective().chunk)

        return called(summed, gradient, table_VD, hidden_BTD)

    return {"kernel": calls("auto"), "jax": calls("jax")}


def measure(ways: Calls, rounds: int, calls: int) -> dict[str, dict[str, float]]:
    """The ways in turns."""
    clock: dict[str, list[float]] = {name: [] for name in ways}
    processors: dict[str, list[float]] = {name: [] for name in ways}
    for call in ways.values():
        jax.block_until_ready(call())  # compiles
    for _ in range(rounds):
        for name, call in ways.items():
            began, used = time.perf_counter(), time.process_time()
            for _ in range(calls):
                jax.block_until_ready(call())
            clock[name].append(1e3 * (time.perf_counter() - began) / calls)
            processors[name].append(1e3 * (time.process_time() - used) / calls)
    return {
        name: {
            "ms": round(statistics.median(clock[name]), 2),
            "cpu_ms": round(statistics.median(processors[name]), 2),
        }
        for name in ways
    }


def main() -> None:
    """Measure all."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", type=int, default=40, help="of each, a round")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    options = parser.parse_args()
    if not cpu_kernels.available():
        raise SystemExit("the kernel can't be compiled: install a C++ compiler or set CXX to one")
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), options.dtype)

    works = {
        "sampler_step": step(normal, rng),
        "rows": rows(normal, gradient=False),
        "rows_with_gradient": rows(normal, gradient=True),
        "draws": draws(normal),
    }
    if options.dtype == "bfloat16" and cpu_kernels.has_tiles():
        for name, work in (("products", products), ("gates", gates), ("loss", loss)):
            works[name] = work(normal, gradient=False)
            works[f"{name}_with_gradient"] = work(normal, gradient=True)
    told = {name: measure(ways, options.rounds, options.calls) for name, ways in works.items()}
    print(json.dumps({"dtype": options.dtype} | told))


if __name__ == "__main__":
    main()
