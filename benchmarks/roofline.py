"""The machine's limits at a model's real shapes: matrix products per second, memory bandwidth.

    python -m benchmarks.roofline --model <folder> --rows 100 400 4096

A product's rate is the best of what is installed, JAX's and torch's.
"""

import functools
import importlib.util
import statistics
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from typing import Any

from benchmarks import contest
from benchmarks.contest import Contender, Result

SECONDS = 0.2  # that one measurement takes
SIZES = {"float32": 4, "bfloat16": 2}
BANDWIDTH_BYTES = 2**28  # more than any cache holds


def products(config: Any, head: bool) -> Counter[tuple[int, int]]:
    """(inner, outer) of the matrices every token goes through, and how many there are of each.

    What can be one product is counted as one, as nobody has to cut it.
    """
    c = config
    found: Counter[tuple[int, int]] = Counter()
    found[c.width, (c.heads + 2 * c.kv_heads) * c.head_size] += c.layers
    found[c.heads * c.head_size, c.width] += c.layers
    found[c.width, c.mlp_width * (2 if c.gated else 1)] += c.layers
    found[c.mlp_width, c.width] += c.layers
    if head:
        found[c.width, c.vocab_size] += 1
    return found


def weights(matrices: Counter[tuple[int, int]]) -> int:
    """Numbers in all of the `products`."""
    return sum(count * k * n for (k, n), count in matrices.items())


def _calls_per_s(call: Callable[[], Any]) -> float:
    call()
    began, calls = time.perf_counter(), 0
    while (passed := time.perf_counter() - began) < SECONDS:
        call()
        calls += 1
    return calls / passed


def measure(args: Namespace) -> Callable[[], dict[str, Any]]:
    """The contender: GFLOP/s by "rows x inner x outer", and GB/s."""
    import jax
    import jax.numpy as jnp

    from gsm_verifier.model import hf

    shapes = [
        (rows, *shape) for rows in args.rows for shape in products(hf.read_config(args.model), True)
    ]

    @jax.jit
    def product(x: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.matmul(x, w, preferred_element_type=jnp.float32)

    @functools.partial(jax.jit, donate_argnums=0)  # in place: no new memory is asked for
    def add(x: jax.Array) -> jax.Array:
        return x + 1

    def by_jax(m: int, k: int, n: int) -> float:
        x, w = jnp.ones((m, k), args.dtype), jnp.ones((k, n), args.dtype)
        return _calls_per_s(lambda: product(x, w).block_until_ready())

    def by_torch(m: int, k: int, n: int) -> float:
        import torch

        torch.set_num_threads(args.threads)
        dtype = getattr(torch, args.dtype)
        x, w = torch.ones(m, k, dtype=dtype), torch.ones(n, k, dtype=dtype)
        return _calls_per_s(lambda: torch.nn.functional.linear(x, w))

    ways = [by_jax, by_torch] if importlib.util.find_spec("torch") else [by_jax]

    def rates() -> dict[str, Any]:
        big = jnp.ones(BANDWIDTH_BYTES // 4)

        def read_and_write() -> None:
            nonlocal big
            big = add(big).block_until_ready()

        return {
            "gflops": {
                "x".join(map(str, shape)): max(way(*shape) for way in ways)
                * (2e-9 * shape[0] * shape[1] * shape[2])
                for shape in shapes
            },
            "gb_per_s": _calls_per_s(read_and_write) * (2e-9 * BANDWIDTH_BYTES),
        }

    return rates


CONTENDER = Contender(measure)


def medians(result: Result) -> dict[str, Any]:
    """What a contest measured, the medians over its rounds."""
    found = result.outputs
    return {
        "gflops": {
            shape: statistics.median(rates["gflops"][shape] for rates in found)
            for shape in found[0]["gflops"]
        },
        "gb_per_s": statistics.median(rates["gb_per_s"] for rates in found),
    }


def ceiling(
    args: Namespace,
    result: Result,
    *,
    tokens: float,
    rows: float,
    head: bool = True,
    passes: int = 1,
    more_bytes: float = 0.0,
) -> dict[str, Any]:
    """Tokens per second that nobody can exceed here, going by what this run measured.

    Attention and everything that isn't a matrix product count as nothing, so that it's a bound.

    Args:
      tokens: that a step makes. rows: that it computes, in products of `args.rows[0]` rows.
      passes: 1 forwards, 3 with the backward pass.
      more_bytes: that a step moves beside the weights, which it reads once.
    """
    from gsm_verifier.model import hf

    rates = medians(result)
    matrices = products(hf.read_config(args.model), head)
    measured = args.rows[0]
    computing = sum(
        count * passes * 2e-9 * rows * k * n / rates["gflops"][f"{measured}x{k}x{n}"]
        for (k, n), count in matrices.items()
    )
    moving = (SIZES[args.dtype] * weights(matrices) + more_bytes) * 1e-9 / rates["gb_per_s"]
    return {
        "tokens_per_s": round(tokens / max(computing, moving), 1),
        "compute_tokens_per_s": round(tokens / computing, 1),
        "memory_tokens_per_s": round(tokens / moving, 1),
        "gflops": {shape: round(rate) for shape, rate in rates["gflops"].items()},
        "gb_per_s": round(rates["gb_per_s"], 1),
    }


def main() -> None:
    """The command."""
    parser = contest.arguments(__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[100, 400, 4096])
    args = parser.parse_args()
    result = contest.compete({contest.ROOFLINE: CONTENDER}, args)[contest.ROOFLINE]
    contest.line(args, **medians(result))


if __name__ == "__main__":
    main()
