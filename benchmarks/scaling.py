"""What a device does, and a compiler needs, as devices are added along the data axis.

    python -m benchmarks.scaling --devices 1 2 4 8 16 32 64 128 256

Compiles a config's programs (a finetuning step, a prefill and a chunk of sampling, a batch of
values) for so many forced CPU devices, each with as much work as one alone has; nothing runs. A
device's memory and FLOPs must stay what they are, and what it sends is the gradients' sum alone,
whose ring of n devices sends 2 (n - 1) / n of the parameters. Every number of devices is compiled
in a process of its own; one JSON line a number.
"""

import argparse
import json
import multiprocessing
import time
from typing import Any


def compiled(path: str, count: int, fsdp: int) -> dict[str, Any]:
    """The programs for `count` devices, of which `fsdp` share their parameters."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", count)
    jax.config.update("jax_enable_compilation_cache", False)
    import runpy

    from gsm_verifier import plan, sharding

    file, _, size = path.partition(":")
    config = runpy.run_path(file)["get_config"](size)
    mesh = sharding.make_mesh(count // fsdp, fsdp, 1)
    config.finetune.batch_tokens *= count
    for rows in (config.finetune, config.score):
        key = "rows" if "rows" in rows else "microbatch_rows"
        rows[key] *= count
    config.sample.prompts *= count
    programs = plan.Programs(config, mesh)
    found = {}
    prefill, sample = programs.sample()
    for name, program in (
        ("finetune", programs.train("finetune")),
        ("prefill", prefill),
        ("sample", sample),
        ("score", programs.score()),
    ):
        began = time.perf_counter()
        cost = plan.compile_(program)
        assert cost.work is not None  # forced devices have no limit
        found[name] = {
            "compile_s": round(time.perf_counter() - began, 1),
            "memory_mib": round(cost.memory / 2**20, 2),
            "gflop": round(cost.work.flops / 1e9, 4),
            "sent_mib": {k: round(v / 2**20, 3) for k, v in cost.work.sent.items() if v},
        }
    return found


def main() -> None:
    """One line for each number of devices."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--config", default="configs/quickstart.py")
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--fsdp", type=int, default=1, help="of them share their parameters")
    options = parser.parse_args()
    for count in options.devices:
        with multiprocessing.get_context("spawn").Pool(1) as alone:
            found = alone.apply(compiled, (options.config, count, min(options.fsdp, count)))
        print(json.dumps({"devices": count, "programs": found}), flush=True)


if __name__ == "__main__":
    main()
