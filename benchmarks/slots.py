"""How many of the sampler's slot-steps write a token, of completions as long as GSM8K's solutions.

    python -m benchmarks.slots --data <folder> --kept 1.0 0.3 0.27 0.25 0.22

The sampler's own host keeps the slots full and deals out their pages. What the device writes is
made up, so no model is needed: a problem's completions are as long as its solution, in tokens of
which the mean solution has 96, times a random factor each; they ask the calculator as often as the
solution does. One JSON line for every share that is kept: of the slot-steps those that wrote a
token, in all and until no problem was left to begin; the number of steps; and how many positions
are kept for a slot.
"""

import argparse
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import contest
from gsm_verifier import sharding
from gsm_verifier.config import default
from gsm_verifier.data import problems
from gsm_verifier.model import transformer
from gsm_verifier.plan import SOLUTION, model_of
from gsm_verifier.records import Problem
from gsm_verifier.sample import decode
from gsm_verifier.sample.engine import Engine, Request, problem_key, sampling_of
from gsm_verifier.text.tokenizer import Tokenizer

END, TEXT = 0, 1  # tokens


class Device:
    """Stands for `decode.prefill` and `decode.advance`: writes what is known beforehand."""

    def __init__(self, drawn: list[Problem], options: Any, completions: int, spread: float):
        rng = np.random.default_rng(0)
        mean = np.mean([len(p.solution) for p in drawn])
        self._length: dict[tuple[int, int], int] = {}
        self._asks: dict[tuple[int, int], set[int]] = {}
        for problem in drawn:
            factors = rng.lognormal(-(spread**2) / 2, spread, completions)
            lengths = len(problem.solution) * SOLUTION / mean * factors
            for m, length in enumerate(lengths.round().clip(2, options.max_tokens)):
                key = problem_key(problem.id), m
                self._length[key] = int(length)
                asked = rng.integers(1, int(length), problem.solution.count("<<"))
                self._asks[key] = set(asked.tolist())
        self._chunk, self._patience = options.chunk, options.patience
        self.begun = len(drawn)  # problems that weren't until now: see `useful`
        self.useful: list[tuple[int, int, int]] = []  # steps, tokens, problems not begun

    def prefill(self, params: Any, slots: Any, tokens: Any, length: Any, row: Any) -> Any:
        self.begun -= int((np.asarray(row) < slots.prompt_length_UP.shape[1]).sum())
        return slots

    def advance(
        self, params: Any, slots: decode.Slots, rows_UCX: jax.Array, grammar: Any
    ) -> tuple[decode.Slots, decode.Trace]:
        obeyed = jax.tree.map(np.array, decode.obey(slots._replace(caches=[]), rows_UCX))
        W = slots.caches[0].own_k_UZKWH.shape[3]
        status, age = obeyed.status_UC, obeyed.age_UC
        room = W * (obeyed.table_UCJ != decode.NOWHERE).sum(-1)
        active_XUC = np.zeros((self._chunk, *status.shape), bool)
        token_XUC = np.full(active_XUC.shape, TEXT)
        steps = 0
        while steps < self._chunk:
            active = (status == decode.RUNNING) & (age < room)
            waiting = np.isin(status, (decode.ASKING, decode.FINISHED)).sum()
            if not active.any() or waiting >= self._patience:
                break
            age += active
            for u, c in np.argwhere(active):
                key = int(obeyed.problem_UC[u, c]), int(obeyed.sample_UC[u, c])
                if age[u, c] == self._length[key]:
                    status[u, c], token_XUC[steps, u, c] = decode.FINISHED, END
                elif age[u, c] in self._asks[key]:
                    status[u, c] = decode.ASKING
            active_XUC[steps] = active
            steps += 1
        self.useful.append((steps, int(active_XUC.sum()), self.begun))
        logprob = np.zeros(active_XUC.shape, np.float32)
        written = (active_XUC, token_XUC, np.zeros_like(active_XUC), logprob, status)
        trace = decode.Trace(*map(jnp.asarray, (np.int32(steps), *written)))
        return obeyed._replace(caches=slots.caches), trace


def measure(kept: float, args: argparse.Namespace) -> dict[str, Any]:
    """All completions of the problems, with a share kept."""
    words = default()
    options = words.sample
    options.kept_share, options.max_tokens = kept, args.tokens
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    words.model.update(layers=1, width=8, heads=1, kv_heads=1, head_size=8, mlp_width=8)
    words.model.attention = args.attention
    config = model_of(words, "cpu")
    drawn = problems.subset(problems.load(args.data, "train"), args.problems, seed=0)
    sampling = sampling_of(options, END, 0, args.prompts * args.slots)
    engine = Engine(
        config,
        transformer.init(config, jax.random.key(0), mesh),
        mesh,
        Tokenizer.train(["a"], 300),
        sampling,
        prompts=args.prompts,
        slots=args.slots,
        calculator=False,
    )
    device = Device(drawn, sampling, args.completions, args.spread)
    engine._prefill, engine._advance = device.prefill, device.advance
    engine._compile = lambda *shapes: None
    requests = [Request(p.id, [TEXT], range(args.completions)) for p in drawn]
    found = sum(1 for _ in engine.run(requests))
    if found != args.problems * args.completions:
        raise AssertionError(f"{found} completions of {args.problems} x {args.completions}")
    slots = args.prompts * args.slots
    pages = sampling.pages(mesh, slots)  # of the one pool
    steps, tokens, left = np.array(device.useful).T
    full = left > 0
    return {
        "kept_share": kept,
        "positions_a_slot": round(pages.Z * pages.W / slots, 1),
        "steps": int(steps.sum()),
        "useful": round(tokens.sum() / steps.sum() / slots, 3),
        "useful_before_the_tail": (
            round(tokens[full].sum() / steps[full].sum() / slots, 3) if full.any() else None
        ),
    }


def main() -> None:
    """Measure every share."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument(
        "--data",
        required=True,
        type=contest.holding("train.jsonl"),
        help="a folder with GSM8K's train.jsonl",
    )
    parser.add_argument("--kept", type=float, nargs="+", default=[1.0], help="sample.kept_share")
    parser.add_argument("--problems", type=int, default=150)
    parser.add_argument("--completions", type=int, default=100, help="of each problem")
    parser.add_argument("--tokens", type=int, default=400, help="the most of a completion")
    parser.add_argument("--prompts", type=int, default=16, help="in flight")
    parser.add_argument("--slots", type=int, default=16, help="of each prompt, in the mean")
    parser.add_argument(
        "--attention",
        default="auto",
        choices=["auto", "jax"],
        help="in JAX, as on a TPU, a prompt may have twice its mean of slots, in C++ all",
    )
    parser.add_argument("--spread", type=float, default=0.25, help="of the factors' logarithms")
    args = parser.parse_args()
    counts = (args.problems, args.completions, args.tokens, args.prompts, args.slots)
    if min(counts) < 1 or not all(0 < kept <= 1 for kept in args.kept):
        parser.error("use counts of at least 1, and shares of more than 0 and at most 1")
    for kept in args.kept:
        print(json.dumps(measure(kept, args)), flush=True)


if __name__ == "__main__":
    main()
