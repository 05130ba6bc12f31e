"""The sampler's attention on CPU: the C++ kernel beside the one in JAX, for one layer and step.

    python -m benchmarks.cpu_attention

Prints one JSON line: of each the median milliseconds a call, by the clock and of the processors.
The caches of several layers take turns, as in a model: none stays in the cache of the processor.
"""

import argparse
import functools
import json
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from gsm_verifier.model import cpu_attention
from gsm_verifier.model.attention import BranchCache, Branches, Look

P, C, K, G, H, S, W = 8, 20, 3, 3, 64, 96, 240
OLDEST = 120  # ages are spread evenly from 0 to it
LAYERS = 4


def main() -> None:
    """Measure both in turns."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", type=int, default=40, help="of each, a round")
    options = parser.parse_args()
    if not cpu_attention.available():
        raise SystemExit("the kernel can't be compiled: install a C++ compiler or set CXX to one")
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape).astype(np.float32))

    shapes = ((P, K, S, H), (P, K, S, H), (P, C, K, W, H), (P, C, K, W, H))
    caches = [BranchCache(*(normal(*shape) for shape in shapes)) for _ in range(LAYERS)]
    length_P, age_PC = rng.integers(S // 2, S + 1, P), rng.integers(0, OLDEST + 1, (P, C))
    slots = Branches(jnp.int32(length_P), jnp.int32(age_PC))
    step = (normal(P, C, K, G, H), normal(P, C, K, H), normal(P, C, K, H))
    ways = {
        name: jax.jit(functools.partial(way, look=Look()), donate_argnames="cache")
        for name, way in (("kernel", slots._kernel), ("jax", slots._segments))
    }
    clock = {way: [] for way in ways}
    processors = {way: [] for way in ways}
    for way in ways.values():
        _, caches[0] = jax.block_until_ready(way(*step, cache=caches[0]))  # compiles
    for _ in range(options.rounds):
        for name, way in ways.items():
            began, used = time.perf_counter(), time.process_time()
            for call in range(options.calls):
                at = call % LAYERS
                _, caches[at] = jax.block_until_ready(way(*step, cache=caches[at]))
            clock[name].append(1e3 * (time.perf_counter() - began) / options.calls)
            processors[name].append(1e3 * (time.process_time() - used) / options.calls)
    told = {
        name: {"ms": statistics.median(clock[name]), "cpu_ms": statistics.median(processors[name])}
        for name in ways
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main()
