"""A verifier's values after every token of 100 completions of a question, 128 tokens each.

    python -m benchmarks.scoring --model <folder> --data <folder>

Completions are pieces of GSM8K's solutions. So that the contenders' values can be compared, the
verifier's head is a row of the embedding that all of them have, the end-of-text token's. Nobody
computes the logits of the vocabulary, and every contender computes the question once.
"""

import sys
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import contest, roofline
from benchmarks.contest import Contender, Result

DIFFERENT = 0.2  # of two contenders' values, in standard deviations of the values


def items(args: Namespace, tokenizer: Any) -> list[tuple[list[int], list[list[int]]]]:
    """Every question's ids with its completions."""
    found = contest.completed(args, tokenizer, args.completions)
    return [(tokenizer.question(problem.question), each) for problem, each in found]


def ours(args: Namespace) -> Callable[[], np.ndarray]:
    """The scorer of this project."""
    from gsm_verifier.score import Scorer, prepared

    model = contest.load(args)
    work = items(args, model.tokenizer)
    scorer = Scorer(
        *prepared(model.config, contest.headed(model), model.mesh),
        model.mesh,
        squash="none",
        row_tokens=args.row_tokens,
        rows=args.batch_rows,
    )
    return lambda: np.array(list(scorer(work)))


def transformers(args: Namespace) -> Callable[[], np.ndarray]:
    """The model without its head, on copies of the question's cache."""
    import copy

    import torch

    from gsm_verifier.model import hf

    torch.set_grad_enabled(False)
    model = contest.torch_model(args).eval()
    row_D = model.get_output_embeddings().weight[hf.read_tokenizer(args.model).end].float()
    work = items(args, hf.read_tokenizer(args.model))

    def values(question: list[int], completions: list[list[int]]) -> np.ndarray:
        shared = model.base_model(torch.tensor([question]), use_cache=True).past_key_values
        found = []
        for start in range(0, len(completions), args.chunk):
            chunk = torch.tensor(completions[start : start + args.chunk])
            cache = copy.deepcopy(shared)
            cache.batch_repeat_interleave(len(chunk))
            hidden = model.base_model(chunk, past_key_values=cache).last_hidden_state
            found.append((hidden.float() @ row_D).numpy())
        return np.concatenate(found)

    return lambda: np.array([values(*item) for item in work])


def difference(result: Result, other: Result) -> float:
    """How far two contenders' values are apart, in standard deviations of the values."""
    a, b = result.outputs[-1], other.outputs[-1]
    if a.shape != b.shape or not np.isfinite(a).all():
        sys.exit(f"values of shape {a.shape} beside {b.shape}, or not finite")
    return float(np.sqrt(np.square(a - b).mean()) / b.std())


def main() -> None:
    """The command."""
    parser = contest.arguments(__doc__, questions=1)
    parser.add_argument(
        "--row-tokens",
        type=int,
        default=3328,
        help="of a packed row in ours: 25 completions",
    )
    parser.add_argument("--batch-rows", type=int, default=1, help="that ours computes at one time")
    parser.add_argument("--chunk", type=int, default=25, help="completions at one time in peers")
    args = parser.parse_args()
    args.rows = [args.row_tokens * args.batch_rows]
    contenders = {
        contest.OURS: Contender(ours),
        "transformers": Contender(transformers, needs=("torch", "transformers")),
        contest.ROOFLINE: roofline.CONTENDER,
    }
    results = contest.compete(contenders, args)
    limits = results.pop(contest.ROOFLINE)
    first = next(iter(results.values()))
    tokens = first.outputs[-1].size
    speeds = {}
    for name, result in results.items():
        apart = difference(result, first)
        if not apart <= DIFFERENT:  # nor not a number
            sys.exit(f"{name}: its values are {apart:.3f} standard deviations from the others'")
        speeds[name] = contest.speed(result, [tokens] * args.rounds, difference=round(apart, 5))

    from gsm_verifier.model import hf

    work = items(args, hf.read_tokenizer(args.model))
    computed = tokens + sum(len(question) for question, _ in work)
    ceiling = roofline.ceiling(args, limits, tokens=tokens, rows=computed, head=False)
    contest.line(args, **contest.standing(speeds, ceiling))


if __name__ == "__main__":
    main()
