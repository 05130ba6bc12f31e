"""What the stages without a model do to so many completions: rows a second, memory, files.

    python -m benchmarks.records --problems 1000 --completions 400

Makes a run folder of synthetic problems and completions in the project's own shards, and runs
the project's own code on it, every stage in a process of its own:

    samples   writes the completions: random tokens, and texts that end in a right answer, a wrong
              one or none
    score     reads them, and writes a value after every token; drawn, where a verifier would read
    label     right or wrong, by the final answer
    trees     what `verify` does before its first step on every host, and 100 rows that it would
              read (only if asked for)
    rank      labels them again, as it does in a run, joins labels and scores, chooses by every rule
    report    the page

The folder counts as the test problems, and as the training problems too: label and trees work on
these. Texts repeat more than real ones, so that their bytes are too few; tokens are random, so that
theirs are too many.
"""

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks import contest

NO_ANSWER = 0.03  # share of completions without a final answer
READ_ROWS = 100  # of the verifier's training data, about three batches
WRONG = 200  # wrong answers a problem's completions choose from, the first ones most often


def run_of(args: Namespace) -> Any:
    """The run, of the project's default config but for the size of its shards."""
    from gsm_verifier.config import default
    from gsm_verifier.stages import Run

    config = default()
    config.records.shard_problems = args.shard_problems
    config.sample.completions = config.sample.test_completions = args.completions
    return Run(config, args.folder)


def prepare(args: Namespace) -> None:
    """Problems and a tokenizer."""
    from gsm_verifier.data import problems, synthetic
    from gsm_verifier.model import hf
    from gsm_verifier.stages import PACKAGED

    found = synthetic.generate("test", args.problems, seed=0, difficulty=1)
    for split in ("train", "test"):
        problems.save(found, args.folder / "problems" / f"{split}.jsonl")
    hf.read_tokenizer(PACKAGED / "quickstart").save(args.folder / "tokenizer.json")


def samples(args: Namespace) -> None:
    """Completions of all problems, in shards, and one of each for temperature 0."""
    import numpy as np

    from gsm_verifier import records
    from gsm_verifier.records import Completion

    run = run_of(args)
    found, size, vocabulary = run.problems("test"), args.shard_problems, run.tokenizer.size
    count = -(-len(found) // size)
    for split, n in (("test", args.completions), ("greedy", 1)):
        for index in range(count):
            rng = np.random.default_rng([index, n])
            part = found[index * size : (index + 1) * size]
            path = records.shard_path(args.folder / "samples" / split, index, count)
            columns = completions(part, n, args.tokens, vocabulary, rng)
            records.write_columns(path, Completion, columns)
    train = args.folder / "samples/train"
    if not train.exists():
        train.symlink_to("test")  # the same shards as completions of training problems


def completions(found: list[Any], n: int, tokens: int, vocabulary: int, rng: Any) -> dict[str, Any]:
    """The columns of n completions of each problem."""
    import numpy as np
    import pyarrow as pa

    from gsm_verifier.text import answers

    texts = []
    for problem in found:
        work = problem.solution.partition("####")[0]
        right = int(float(answers.extract(problem.solution) or 0))
        endings = [f"#### {right}", "", *(f"#### {right + d}" for d in range(1, WRONG + 1))]
        # Problems differ in how often they are solved; wrong answers follow Zipf's law.
        solved = rng.beta(0.8, 1.2) * (1 - NO_ANSWER)
        wrong = 1 / np.arange(1, WRONG + 1)
        share = [solved, NO_ANSWER, *(1 - NO_ANSWER - solved) * wrong / wrong.sum()]
        drawn = rng.choice(len(share), n, p=np.array(share) / sum(share))
        texts.append(pa.array([work + ending for ending in endings]).take(pa.array(drawn)))
    rows = len(found) * n
    ends = np.cumsum([0, *rng.integers(tokens // 2, 2 * tokens - tokens // 2 + 1, rows)])
    offsets = ends.astype(np.int32)
    ids = rng.integers(0, vocabulary, ends[-1], dtype=np.int32)
    return {
        "problem": pa.array([p.id for p in found]).take(pa.array(np.arange(rows) // n)),
        "sample": np.arange(rows, dtype=np.int32) % n,
        "text": pa.chunked_array(texts),
        "tokens": pa.ListArray.from_arrays(offsets, ids),
        "forced": pa.ListArray.from_arrays(offsets, rng.random(ends[-1]) < 0.1),
        "logprob": rng.normal(-20, 5, rows),
        "finished": np.ones(rows, bool),
    }


def score(args: Namespace) -> None:
    """The score stage with values that are drawn."""
    import numpy as np

    from gsm_verifier import stages

    rng = np.random.default_rng(0)

    def scorer(items: Iterable[Any], termination: Any) -> Iterator[list[Any]]:
        for _, found in items:
            yield [rng.random(len(ids), np.float32) for ids in found]

    stages._score(run_of(args), scorer)


def trees(args: Namespace) -> None:
    """The verifier's training data packed, and some rows of it."""
    from gsm_verifier import stages
    from gsm_verifier.data.packing import PackedRows

    run = run_of(args)
    options = run.config.verify
    rows = PackedRows(stages._verifier_trees(run, "train"), options.row_tokens, options.epochs, 0)
    for index in range(min(READ_ROWS, len(rows))):
        rows[index]


def stage(name: str) -> Callable[[Namespace], None]:
    """A stage of the project as it is."""

    def work(args: Namespace) -> None:
        from gsm_verifier import stages

        stages.STAGES[name].run(run_of(args))

    return work


PARTS: dict[str, Callable[[Namespace], None]] = {
    "samples": samples,
    "score": score,
    "label": stage("label"),
    "trees": trees,
    "rank": stage("rank"),
    "report": stage("report"),
}


def _work(pipe: Connection, part: str, args: Namespace) -> None:
    os.dup2(2, 1)  # standard output is for the one line
    os.environ["JAX_PLATFORMS"] = "cpu"
    from gsm_verifier import stages  # noqa: F401 - not to be timed

    before = round(contest.peak_mib())
    if part == "samples":
        prepare(args)
    _, seconds, cpu = contest.clocked(lambda: PARTS[part](args))
    rows = args.problems * args.completions
    told = {
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu, 1),
        "rows_per_s": round(rows / seconds),
        "rows_per_cpu_s": round(rows / cpu),
        "memory_mib": round(contest.peak_mib()),
        "imported_mib": before,  # of that, before there was any row
    }
    pipe.send(told)


def played(part: str, args: Namespace) -> dict[str, float]:
    """What a part took, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(theirs, part, args))
    process.start()
    theirs.close()
    try:
        told = ours.recv()
    except EOFError:
        sys.exit(f"failed: {part}")
    process.join()
    contest.tell(f"{part} {json.dumps(told)}")
    return told


def held(folder: Path) -> dict[str, dict[str, int]]:
    """Files and bytes of every kind of record, those of the test problems."""
    found = {
        kind: list((folder / kind / "test").glob("*")) for kind in ("samples", "labels", "scores")
    }
    return {
        kind: {"files": len(files), "bytes": sum(file.stat().st_size for file in files)}
        for kind, files in found.items()
    }


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--problems", type=int, default=500)
    parser.add_argument("--completions", type=int, default=100, help="of each problem (100)")
    parser.add_argument(
        "--tokens", type=int, default=24, help="of each completion, in the mean (24)"
    )
    parser.add_argument("--shard-problems", type=int, default=50, help="as in the config (50)")
    parser.add_argument("--folder", type=Path, help="is kept; default: a temporary one")
    wanted = [part for part in PARTS if part != "trees"]
    parser.add_argument("--parts", nargs="+", default=wanted, choices=PARTS, help="some of them")
    args = parser.parse_args()
    kept = args.folder
    args.folder = kept or Path(tempfile.mkdtemp(prefix="records-"))
    try:
        parts = {part: played(part, args) for part in PARTS if part in args.parts}
        told = {
            "benchmark": "records",
            "arguments": vars(args) | {"folder": args.folder.name},
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "rows": args.problems * args.completions,
            "parts": parts,
            "disk": held(args.folder),
        }
    finally:
        if not kept:
            shutil.rmtree(args.folder)
    print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
