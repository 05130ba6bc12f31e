r"""Completions per second: 100 of each question, all of one length, or with --real as they come.

    python -m benchmarks.sampling --model <folder> --data <folder>
    python -m benchmarks.sampling --model <folder> --data <folder> --real --questions 16 \
        --tokens 300

The equal work has no end-of-text and no calculator: every contender writes as many tokens, and may
batch the questions as it likes. With --real a completion stops when it stops, and ours takes part
with the calculator and without it; a model finetuned on GSM8K has something to calculate.
"""

import statistics
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks import contest, roofline, samplers
from benchmarks.contest import Contender, Result

UNAIDED = "ours_without_calculator"
CHECKED = 16  # completions, of all questions, whose probabilities are looked at
IMPROBABLE = 6.0  # standard deviations

Completions = list[list[list[int]]]  # of each question, the tokens of each completion


def ours(args: Namespace, calculator: bool = False) -> Callable[[], dict[str, Any]]:
    """The sampler of this project."""
    from gsm_verifier.sample.engine import Engine, Request, sampling_of

    model = contest.load(args)
    words = dict(temperature=samplers.TEMPERATURE, top_k=0, top_p=1.0, max_tokens=args.tokens)
    end = model.tokenizer.end if args.real else -1
    engine = Engine(
        model.config,
        model.params,
        model.mesh,
        model.tokenizer,
        sampling_of(model.options.sample, end, 0, args.rows[0], **words),
        prompts=args.in_flight,
        slots=args.slots,
        calculator=calculator,
    )
    requests = [
        Request(p.id, model.tokenizer.question(p.question), range(args.completions))
        for p in contest.questions(args)
    ]

    def sample() -> dict[str, Any]:
        found = {r.problem: {} for r in requests}
        for completion in engine.run(requests):
            found[completion.problem][completion.sample] = completion.tokens
        # By number: those that ended first are short, and no fair sample of what was drawn.
        completions = [[each[m] for m in sorted(each)] for each in found.values()]
        return {"completions": completions, "useful": round(engine.useful, 3)}

    return sample


def calculating(args: Namespace) -> Callable[[], dict[str, Any]]:
    """The same with the calculator."""
    return ours(args, calculator=True)


def improbability(
    args: Namespace, completions: Completions, logits: Callable[[Sequence[int]], np.ndarray]
) -> float:
    """How many standard deviations the tokens are more (or less) probable than a true sample's.

    Of a token drawn from p, log p(token) has the mean sum p log p: the differences add up to a
    random walk whose variance is known. Another temperature or a cut tail shows at once.
    """
    prompts, _ = samplers.prompts(args)
    walk = variance = 0.0
    for prompt, found in zip(prompts, completions, strict=True):
        for tokens in found[: max(1, CHECKED // len(prompts))]:
            raw_TV = logits([*prompt, *tokens[:-1]])[len(prompt) - 1 :] / samplers.TEMPERATURE
            shifted_TV = raw_TV - raw_TV.max(-1, keepdims=True)
            logp_TV = shifted_TV - np.log(np.exp(shifted_TV).sum(-1, keepdims=True))
            p_TV = np.exp(logp_TV)
            mean_T = (p_TV * logp_TV).sum(-1)
            walk += float((logp_TV[np.arange(len(tokens)), tokens] - mean_T).sum())
            variance += float(((p_TV * logp_TV**2).sum(-1) - mean_T**2).sum())
    return round(walk / max(variance, 1e-9) ** 0.5, 2)


def judged(
    name: str, args: Namespace, result: Result, logits: Callable[[Sequence[int]], np.ndarray]
) -> dict[str, Any]:
    """A contender's figures; output that isn't the work that was asked for ends the command.

    A peer's improbable tokens are only told of: 64 completions that OpenVINO drew from a finetuned
    model in bfloat16 were 7.3 standard deviations away.
    """
    rounds = [[c for found in out["completions"] for c in found] for out in result.outputs]
    last, more = rounds[-1], dict(result.outputs[-1])
    completions = more.pop("completions")
    lengths = [len(tokens) for tokens in last]
    low, high = min(lengths), max(lengths)
    counts = [len(found) for found in completions]
    if counts != [args.completions] * args.questions or high > args.tokens:
        sys.exit(f"{name}: {counts} completions of {low} to {high} tokens")
    if low < args.tokens and not args.real:
        sys.exit(f"{name}: a completion has {low} tokens, not {args.tokens}")
    alike = [len(set(map(tuple, found))) == 1 for found in completions]
    # One that a finetuned model is sure of may be.
    if args.completions > 1 and (all(alike) if args.real else any(alike)):
        sys.exit(f"{name}: the completions of a question are all the same")
    calculated = args.real and name == contest.OURS  # not all of its tokens are drawn
    sigmas = None if calculated else improbability(args, completions, logits)
    if sigmas is not None and not abs(sigmas) <= IMPROBABLE:  # nor not a number
        told = f"{name}: its tokens are {sigmas} standard deviations from the model's"
        if name.startswith(contest.OURS):
            sys.exit(told)
        contest.tell(told)
    return contest.speed(
        result,
        [sum(map(len, found)) for found in rounds],
        distinct=round(len(set(map(tuple, last))) / len(last), 3),
        mean_tokens=round(statistics.mean(lengths), 1),
        improbability=sigmas,
        **more,
    )


def cache_bytes(args: Namespace, mean_tokens: float) -> float:
    """What a step reads of keys and values: every slot half a completion, every prompt once."""
    from gsm_verifier.model import hf

    model, prompts = hf.read_config(args.model), samplers.prompts(args)[0]
    position = 2 * model.layers * model.kv_heads * model.head_size * roofline.SIZES[args.dtype]
    questions = args.in_flight * statistics.mean(map(len, prompts))
    return position * (args.rows[0] * mean_tokens / 2 + questions)


def main() -> None:
    """The command."""
    parser = contest.arguments(__doc__)
    parser.add_argument("--real", action="store_true", help="stop at the end of text")
    parser.add_argument("--in-flight", type=int, help="questions at one time in ours; all")
    parser.add_argument(
        "--slots",
        type=int,
        help="completions of each at one time, in the mean; all, with --real a sixth",
    )
    parser.add_argument(
        "--openvino",
        type=contest.holding("openvino_model.xml"),
        help="the model's folder as OpenVINO's; else it's left out",
    )
    parser.add_argument("--gguf", help="the model's file as llama.cpp's; else it's left out")
    args = parser.parse_args()
    args.in_flight = args.in_flight or args.questions
    # Fewer than there are, so that one that ends gives its slot to the next.
    args.slots = args.slots or -(-args.completions // (6 if args.real else 1))
    args.rows = [args.in_flight * args.slots]
    contenders = {contest.OURS: Contender(calculating if args.real else ours)}
    if args.real:
        contenders[UNAIDED] = Contender(ours)
    contenders |= samplers.PEERS | {contest.ROOFLINE: roofline.CONTENDER}
    results = contest.compete(contenders, args)
    limits = results.pop(contest.ROOFLINE)

    from gsm_verifier import api  # now that nobody's memory is being measured

    logits = api.load(args.model).logits
    speeds = {name: judged(name, args, result, logits) for name, result in results.items()}
    mean_tokens = next(iter(speeds.values()))["mean_tokens"]
    ceiling = roofline.ceiling(
        args,
        limits,
        tokens=args.rows[0],
        rows=args.rows[0],
        more_bytes=cache_bytes(args, mean_tokens),
    )
    told = contest.standing(speeds, ceiling)
    if {contest.OURS, UNAIDED} <= set(speeds):
        told["calculator_cost"] = round(1 - contest.ratio(speeds, contest.OURS, UNAIDED), 3)
    contest.line(args, **told)


if __name__ == "__main__":
    main()
