"""What is in C++ on CPU beside what JAX makes of it: a layer's attention, draws and products.

    python -m benchmarks.cpu_kernels

Prints one JSON line: of a step of the sampler, of whole rows without and with their gradient, of
the draws of all slots, and in bfloat16 on a processor with tiles (AMX) of a feed-forward layer's
first product without and with its gradient, the median milliseconds a call of each way, by the
clock and of the processors. The caches of several layers take turns, as in a model: none stays in
the cache of the processor.
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
from gsm_verifier.model import cpu_kernels, transformer
from gsm_verifier.model.attention import BranchCache, Branches, Look, by_rows
from gsm_verifier.plan import model_of
from gsm_verifier.sample import decode
from gsm_verifier.sample.engine import sampling_of

K, G, H = 3, 3, 64
P, C, S, W, J = 8, 160, 96, 60, 4  # of the sampler
OLDEST = 120  # ages are spread evenly from 0 to it
LAYERS = 4
B, T, PROBLEM = 2, 1024, 190  # of whole rows: packed problems of so many positions
TEXT = 49152  # ids of text
D, F = K * G * H, 2 * 1536  # of products: gate and in

Calls = dict[str, Callable[[], Any]]


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

        def both(*qkv: jax.Array) -> Any:
            found, back = jax.vjp(out, *qkv)
            return back(found)

        return functools.partial(jax.jit(both if gradient else out), q, k, v)

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


def products(normal: Callable[..., jax.Array], gradient: bool) -> Calls:
    """Of whole rows with weights."""
    x_BTD, w_DF = normal(B, T, D), normal(D, F)

    def calls(kernel: bool) -> Callable[[], Any]:
        def out(x: jax.Array, w: jax.Array) -> jax.Array:
            return transformer._product("BTD,DF->BTF", True, kernel, x, w).astype(x.dtype)

        def both(x: jax.Array, w: jax.Array) -> Any:
            found, back = jax.vjp(out, x, w)
            return found, back(found)

        return functools.partial(jax.jit(both if gradient else out), x_BTD, w_DF)

    return {"kernel": calls(True), "jax": calls(False)}


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
        works["products"] = products(normal, gradient=False)
        works["products_with_gradient"] = products(normal, gradient=True)
    told = {name: measure(ways, options.rounds, options.calls) for name, ways in works.items()}
    print(json.dumps({"dtype": options.dtype} | told))


if __name__ == "__main__":
    main()
