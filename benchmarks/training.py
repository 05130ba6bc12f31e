"""Training: finetuning beside what else trains the model, and trees beside one branch a row.

    python -m benchmarks.training --model <folder> --data <folder>

Finetuning is whole optimiser steps (AdamW, clipped) on as many positions of GSM8K's training
problems: ours packs whole problems into rows, the peers get the texts one after the other, without
any padding. Tokens per second are of tokens that aren't padding.

Verifier training takes 100 completions of 128 tokens of each of --questions questions, once with
the question shared by as many as fit a row, once with every completion behind a question of its
own. Their gradients are compared in float32. Its tokens are the completions' alone.
"""

import itertools
import sys
from argparse import Namespace
from collections.abc import Callable
from typing import Any

from benchmarks import contest, roofline
from benchmarks.contest import Contender

RATE = 1e-5
COMPARED = 8  # completions whose gradients are compared ...
DIFFERENT = 1e-4  # ... and how far they may be apart, as a share of their size
TREES, ROWS = "ours_trees", "ours_branch_a_row"


def stepping(
    args: Namespace, make_trees: Callable[[Any], list[Any]], steps: int | None
) -> Callable[[], dict[str, float]]:
    """Rounds of so many optimiser steps of this project's loop; None: as many as make an epoch."""
    import jax
    import jax.numpy as jnp

    from gsm_verifier.data.packing import PackedRows
    from gsm_verifier.model.transformer import Transformer
    from gsm_verifier.train import loop
    from gsm_verifier.train.losses import Objective

    model = contest.load(args, "float32")
    options = model.options.finetune
    options.update(row_tokens=args.row_tokens, microbatch_rows=args.batch_rows)
    options.update(batch_tokens=args.batch_tokens, learning_rate=RATE, clip_norm=1.0)
    rows = PackedRows(make_trees(model), args.row_tokens, 1, seed=0)
    cut = loop.plan(len(rows), options, model.mesh.size)
    tx = loop.make_optimizer(options, cut.steps)
    where = loop.state_shardings(model.config, tx, model.mesh)[1]
    step = loop.jit_step(Transformer(model.config), Objective(), tx, 0, where)
    moments = jax.jit(tx.init, out_shardings=where.opt_state)(model.params)
    state = loop.TrainState(
        contest.headed(model), moments, jnp.zeros((), jnp.int32, device=where.step)
    )
    every = range(cut.rows * cut.accumulate)
    batches = (fields for _ in itertools.count() for fields in rows.batches(cut.batch, mine=every))

    def train() -> dict[str, float]:
        nonlocal state
        tokens, loss = 0, 0.0
        with jax.set_mesh(model.mesh):
            for fields in itertools.islice(batches, steps or cut.steps):
                state, metrics = step(state, loop.device_batch(model.mesh, fields, cut.accumulate))
                tokens, loss = tokens + int(metrics["tokens"]), float(metrics["loss"])
        return {"tokens": tokens, "loss": loss}

    del model.params["params"]  # the first step donates them
    return train


def ours(args: Namespace) -> Callable[[], dict[str, float]]:
    """Finetuning by this project."""
    from gsm_verifier.train.batch import finetuning_trees

    def trees(model: Any) -> list[Any]:
        found = contest.training(args)
        questions = [model.tokenizer.question(p.question) for p in found]
        solutions = [model.tokenizer.solution(p.solution) for p in found]
        return finetuning_trees(questions, solutions, question_loss=True)

    return stepping(args, trees, args.steps)


def judged(args: Namespace, model: Any, completions: int, branches: int) -> list[Any]:
    """Trees of the questions' completions, so many of which share one, every other one correct."""
    from gsm_verifier.train.batch import verifier_trees

    tokenizer = model.tokenizer
    return [
        tree
        for problem, found in contest.completed(args, tokenizer, completions)
        for tree in verifier_trees(
            tokenizer.question(problem.question),
            tokenizer.solution(problem.solution),
            found,
            [j % 2 == 0 for j in range(completions)],
            level="token",
            objective="verifier_only",  # the gold branch would favour trees even more
            mix="weighted",
            branches=branches,
            capacity=args.row_tokens,
        )
    ]


def ours_trees(args: Namespace) -> Callable[[], dict[str, float]]:
    """Verifier training with the question shared."""
    n = args.completions
    return stepping(args, lambda model: judged(args, model, n, branches=n), None)


def ours_branch_a_row(args: Namespace) -> Callable[[], dict[str, float]]:
    """Verifier training with a question for every completion."""
    return stepping(args, lambda model: judged(args, model, args.completions, branches=1), None)


def transformers(args: Namespace, compiled: bool = False) -> Callable[[], dict[str, float]]:
    """Transformers and torch's AdamW; weights are float32 here as in ours."""
    import torch

    from gsm_verifier.model import hf

    tokenizer, length = hf.read_tokenizer(args.model), args.peer_length
    texts = (
        tokenizer.question(p.question) + tokenizer.solution(p.solution)
        for p in contest.training(args)
    )
    sequences = args.batch_tokens // length
    pieces = contest.pieces(texts, length, sequences * args.steps * (args.rounds + 1))
    batches = iter(torch.tensor(pieces).view(-1, sequences, length))
    model = contest.torch_model(args, "float32").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0, fused=True)

    def loss_of(ids: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=args.dtype == "bfloat16"):
            return model(input_ids=ids, labels=ids, use_cache=False).loss

    loss_of = torch.compile(loss_of) if compiled else loss_of

    def train() -> dict[str, float]:
        for ids in itertools.islice(batches, args.steps):
            optimizer.zero_grad(set_to_none=True)
            loss = loss_of(ids)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        return {"tokens": args.steps * sequences * length, "loss": loss.item()}

    return train


def transformers_compiled(args: Namespace) -> Callable[[], dict[str, float]]:
    """The same through torch.compile."""
    return transformers(args, compiled=True)


def gradient_difference(args: Namespace) -> float:
    """|a - b| / |b| of the gradients of a few completions as trees and with a branch a row."""
    import jax

    from gsm_verifier.data.packing import PackedRows
    from gsm_verifier.model.transformer import Transformer
    from gsm_verifier.train import loop, losses

    model = contest.load(args, "float32")
    params = contest.headed(model)
    net = Transformer(model.config.with_(dtype="float32"))

    def gradient(branches: int) -> Any:
        trees = judged(args, model, min(COMPARED, args.completions), branches)
        rows = PackedRows(trees, args.row_tokens, 1, seed=0)
        together = -(-len(rows) // model.mesh.size) * model.mesh.size
        batch_ABT = loop.device_batch(model.mesh, next(rows.batches(together)), 1)
        batch = jax.tree.map(lambda x: x[0], batch_ABT)

        def loss(params: Any) -> jax.Array:
            sums = losses.loss_sums(net, params, batch, losses.Objective())
            return losses.mean_losses(sums, batch)["value"]

        return jax.jit(jax.grad(loss))(params)

    with jax.set_mesh(model.mesh):
        a, b = gradient(args.completions), gradient(1)
    return agreeing(a, b)


def agreeing(a: Any, b: Any) -> float:
    """|a - b| / |b| of two gradients; the command ends if that is more than rounding."""
    import optax

    apart = float(optax.tree.norm(optax.tree.sub(a, b)) / optax.tree.norm(b))
    if not apart <= DIFFERENT:  # nor not a number
        sys.exit(f"{TREES}: its gradient differs from {ROWS}'s by {apart:.2g} of its size")
    return apart


def main() -> None:
    """The command."""
    parser = contest.arguments(__doc__, questions=1)
    parser.add_argument("--steps", type=int, default=1, help="of finetuning in a round")
    parser.add_argument("--batch-tokens", type=int, default=4096, help="positions of a step")
    parser.add_argument("--row-tokens", type=int, default=1024, help="of a packed row in ours")
    parser.add_argument("--batch-rows", type=int, default=2, help="that ours computes at one time")
    parser.add_argument("--peer-length", type=int, default=256, help="of a sequence in peers")
    args = parser.parse_args()
    args.rows = [args.row_tokens * args.batch_rows]
    torch = ("torch", "transformers")
    contenders = {
        contest.OURS: Contender(ours),
        "transformers": Contender(transformers, needs=torch),
        "transformers_compiled": Contender(transformers_compiled, needs=torch),
        TREES: Contender(ours_trees),
        ROWS: Contender(ours_branch_a_row),
        contest.ROOFLINE: roofline.CONTENDER,
    }
    results = contest.compete(contenders, args)
    limits = results.pop(contest.ROOFLINE)
    completions = args.questions * args.completions * args.tokens
    speeds = {
        name: contest.speed(
            result,
            [completions if name in (TREES, ROWS) else each["tokens"] for each in result.outputs],
            losses=[round(each["loss"], 4) for each in result.outputs],
        )
        for name, result in results.items()
    }

    from gsm_verifier.model import hf

    # Adam reads and writes the weights and two moments, and reads the gradient, all in float32.
    weights = roofline.weights(roofline.products(hf.read_config(args.model), True))
    ceiling = roofline.ceiling(
        args,
        limits,
        tokens=args.batch_tokens,
        rows=args.batch_tokens,
        passes=3,
        more_bytes=7 * 4 * weights,
    )
    told = contest.standing(speeds, ceiling)
    if {TREES, ROWS} <= set(speeds):
        told["trees_time_ratio"] = contest.ratio(speeds, ROWS, TREES)
        told["gradient_difference"] = gradient_difference(args)
    contest.line(args, **told)


if __name__ == "__main__":
    main()
