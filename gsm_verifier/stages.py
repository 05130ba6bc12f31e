"""The paper, as functions in order. Start here.

    prepare   the problems, a tokenizer, the model's sizes         problems/ *.json
    pretrain  a language model that knows the words                pretrained/
    finetune  the generator, and the finetuning baseline           generator/ baseline/
    sample    completions of the training problems                 samples/train samples/heldout
    label     correct or not, by the final answer                  labels/train labels/heldout
    verify    train the verifier on them                           verifier/
    score     test time: sample the test problems, value them      samples/test scores/test
    rank      choose by every rule, with intervals and tests       results.json
    report    one page to read                                     report.html

Each stage reads the records of the stages before it, calls one room of the package, and writes its
own. Only `prepare` copies the test problems, and only score, rank and report use them.

Of many processes, all run every stage, but for those that the first one runs alone. A record shard
belongs to one process of a stage (`_own`), which alone writes it; the work directory is common.
"""

import contextlib
import functools
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from ml_collections import ConfigDict

from gsm_verifier import (
    checkpoint,
    metrics,
    processes,
    provenance,
    rank,
    records,
    sharding,
    storage,
)
from gsm_verifier.config import leaves
from gsm_verifier.data import documents, synthetic
from gsm_verifier.data import problems as problems_io
from gsm_verifier.data.imported import Imported
from gsm_verifier.data.packing import Forest, Tree
from gsm_verifier.model import attention, hf, transformer
from gsm_verifier.model import config as model_config
from gsm_verifier.model.config import ModelConfig
from gsm_verifier.model.transformer import Params
from gsm_verifier.records import Completion, Label, Problem, Record, Score
from gsm_verifier.report import page
from gsm_verifier.sample.engine import Engine, Request, mesh_of, sampling_of
from gsm_verifier.score import Scorer, aggregate, prepared
from gsm_verifier.text import answers
from gsm_verifier.text.tokenizer import Tokenizer
from gsm_verifier.train import loop
from gsm_verifier.train.batch import document_trees, finetuning_trees, verifier_trees
from gsm_verifier.train.losses import Objective

TRAINED_ON_PROBLEMS = ("finetune", "baseline", "verify")
SYNTHETIC_SIZES = {"train": 2000, "test": 300}  # where the config leaves them at 0
PACKAGED = Path(__file__).parent / "pretrained"  # models that come with the package


@dataclass(frozen=True)
class Run:
    """A work directory, its config, and what every stage needs of them."""

    config: ConfigDict
    folder: Path

    @cached_property
    def mesh(self) -> jax.sharding.Mesh:
        mesh = self.config.mesh
        return sharding.make_mesh(mesh.data, mesh.fsdp, mesh.tensor)

    @cached_property
    def sampling_mesh(self) -> jax.sharding.Mesh:
        return mesh_of(self.model, self.mesh, self.config.mesh.sampling)

    @cached_property
    def share(self) -> sharding.Share:
        return sharding.share(self.mesh)

    @cached_property
    def start(self) -> Path | None:
        """The Hugging Face folder of the model to start from; None: start from scratch."""
        name = self.config.model.pretrained
        packaged = PACKAGED / name
        with _asked_by("model.pretrained"):
            return (packaged if packaged.is_dir() else hf.resolve(name)) if name else None

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.folder / "tokenizer.json")

    @cached_property
    def model(self) -> ModelConfig:
        """As prepare wrote it down: what the run started from may be gone since."""
        return model_config.read(self.folder / "model.json")

    def wanted_model(self, tokens: int, platform: str) -> ModelConfig:
        """The model its config asks for on a platform; one from scratch has so many tokens."""
        keys = ConfigDict(self.config.model)
        if keys.dtype == "auto":
            keys.dtype = sharding.fast_dtype(platform)
        if not self.start:
            return model_config.from_keys(keys, tokens)
        words = {key: keys[key] for key in ("dtype", "attention", "remat")}
        return hf.read_config(self.start).with_(**words)

    def computed(self, stage: str) -> str:
        """What a stage computes on and how, which decides its speed and the last digits.

        Empty for one that runs no model. What samples and then values says both meshes.
        """
        imports = stage == "sample" and self.config.sample.imported
        meshes = dict.fromkeys(getattr(self, name) for name in STAGES[stage].on)
        if imports or not meshes:
            return ""
        model = self.model_of("verifier") if stage == "verify" else self.model
        by_kernel = attention.by_kernel(model.attention, model.attention_cap, self.mesh)

        def axes(mesh: jax.sharding.Mesh) -> str:
            return " x ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1)

        split = ", then ".join(filter(None, map(axes, meshes)))
        return (
            f"{self.mesh.size} devices, {self.mesh.devices.flat[0].device_kind}"
            f"{f' ({split})' if split else ''}, of {jax.process_count()} processes, "
            f"{model.dtype}, attention in {'C++' if by_kernel else 'JAX'}"
        )

    def problems(self, split: str) -> list[Problem]:
        """The problems of a split; there may be no held-out ones."""
        folder = self.folder / "problems"
        if split == "heldout" and not (folder / "heldout.jsonl").read_bytes():
            return []
        return problems_io.load(folder, split)

    def question(self, problem: Problem) -> list[int]:
        return self.tokenizer.question(problem.question)

    def solution(self, problem: Problem) -> list[int]:
        return self.tokenizer.solution(problem.solution)

    @cached_property
    def judge(self) -> "Run":
        """The run whose model the verifier is made of: this one, or one of another size."""
        if not self.config.verify.run:
            return self
        folder = storage.path(self.config.verify.run)
        try:
            keys = json.loads((folder / "config.json").read_bytes())
            same = (folder / "tokenizer.json").read_bytes()
        except (OSError, ValueError) as error:
            raise ValueError(f"config.verify.run={folder} is no finished run: {error}") from error
        judge = Run(ConfigDict(keys | {"mesh": self.config.mesh.to_dict()}), folder)
        own = (self.folder / "tokenizer.json").read_bytes()
        if same != own or judge.tokenizer.end != self.tokenizer.end:
            raise ValueError(f"config.verify.run={folder} has another tokenizer than {self.folder}")
        return judge

    def model_of(self, name: str) -> ModelConfig:
        """The model in folder `name`: the verifier may be another run's."""
        return self.judge.model if name == "verifier" else self.model

    def params(self, name: str, mesh: jax.sharding.Mesh | None = None) -> Params:
        """The parameters a training stage left in folder `name`, on the run's mesh or another.

        Raises:
          ValueError: there are none, or they are damaged or of another model.
        """
        if name == "baseline" and not self.config.baseline.epochs:
            raise ValueError(
                f"{self.folder} has no baseline: its config.baseline.epochs is 0, so its generator "
                "answers greedily"
            )
        if not (self.folder / name).is_dir():  # which a store would make
            raise ValueError(f"{self.folder / name} isn't there: run the stage that makes it")
        model = self.model_of(name)
        like = checkpoint.abstract(
            transformer.shapes(model), transformer.shardings(model, mesh or self.mesh)
        )
        store = checkpoint.Checkpoints(self.folder / name)
        try:
            return store.restore(like)[0]
        finally:
            store.close()


@contextlib.contextmanager
def _asked_by(key: str) -> Iterator[None]:
    """What is refused within is told with the key of the config that asked for it."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"config.{key}: {error}") from error


def synthetic_sizes(data: ConfigDict) -> dict[str, int]:
    """Generated problems of every split, by `config.data`."""
    train = data.train_size or SYNTHETIC_SIZES["train"]
    heldout = round(train * data.heldout_fraction)
    return {"train": train, "heldout": heldout, "test": data.test_size or SYNTHETIC_SIZES["test"]}


def _chosen(problems: list[Problem], key: str, data: ConfigDict) -> list[Problem]:
    with _asked_by(f"data.{key}"):
        return problems_io.subset(problems, data[key] or len(problems), data.seed)


def prepare(run: Run) -> None:
    """Problems of the three splits, the tokenizer, and the model's sizes (section 2)."""
    data = run.config.data
    if data.source == "synthetic":
        splits = {
            split: synthetic.generate(split, size, data.seed, data.difficulty, data.trials)
            for split, size in synthetic_sizes(data).items()
        }
    else:
        with _asked_by("data.path"):
            if data.path and storage.path(data.path).is_file():
                raise ValueError(
                    f"{data.path} is one file, whose problems would be trained on and be the test: "
                    "give a folder with train.jsonl and test.jsonl"
                )
            train, test = (problems_io.load(data.path or "gsm8k", s) for s in ("train", "test"))
        train, heldout = problems_io.held_out(train, data.heldout_fraction)
        splits = {
            "train": _chosen(train, "train_size", data),
            "heldout": heldout,
            "test": _chosen(test, "test_size", data),
        }
    for split, found in splits.items():
        problems_io.save(found, run.folder / "problems" / f"{split}.jsonl")
    tokenizer = _tokenizer(run, splits["train"])
    tokenizer.save(run.folder / "tokenizer.json")
    model = run.wanted_model(tokenizer.size, sharding.platform(run.mesh))
    model_config.write(run.folder / "model.json", model)
    _refuse_what_fails_later(run, splits)


def _refuse_what_fails_later(run: Run, splits: dict[str, list[Problem]]) -> None:
    """What can be known to be wrong is told before any training.

    Raises:
      ValueError: lengths that don't fit, more top_k than tokens, a mesh the devices don't make,
        documents, another run or imported completions that won't do; names the key.
    """
    config = run.config
    limits = {f"config.{s}.row_tokens": config[s].row_tokens for s in TRAINED_ON_PROBLEMS}
    limits["the model's max_length"] = run.model.max_length
    limits["the verifier's max_length"] = run.judge.model.max_length
    limit = min(limits, key=limits.__getitem__)
    trained_on = splits["train"] + splits["heldout"]
    longest = max(len(run.question(p)) + len(run.solution(p)) for p in trained_on)
    if longest > limits[limit]:
        raise ValueError(
            f"the longest training problem has {longest} tokens, {limit} is {limits[limit]}: make "
            "them fit"
        )
    limits["config.score.row_tokens"] = config.score.row_tokens
    limit = min(limits, key=limits.__getitem__)
    longest = max(len(run.question(p)) for found in splits.values() for p in found)
    if longest + config.sample.max_tokens > limits[limit]:
        raise ValueError(
            f"the longest question has {longest} tokens and config.sample.max_tokens is "
            f"{config.sample.max_tokens}, together more than {limit}, {limits[limit]}: make them "
            "fit"
        )
    if config.sample.top_k > run.tokenizer.size:
        raise ValueError(
            f"config.sample.top_k={config.sample.top_k}: the tokenizer has {run.tokenizer.size} ids"
        )
    with _asked_by("mesh"):
        for model in (run.model, run.model_of("verifier")):
            transformer.shardings(model, run.mesh)
        for mesh in (run.mesh, run.sampling_mesh):
            sharding.share(mesh)
    if config.pretrain.epochs and len(list(itertools.islice(_document_trees(run), 2))) < 2:
        raise ValueError(
            "config.pretrain.documents, or where it is empty config.pretrain.generated, gives too "
            "little text: two documents, or one longer than config.pretrain.row_tokens, are the "
            "least"
        )
    for stage in IMPORTS:
        with _asked_by(f"{stage}.imported"):
            _imported(run, stage)


def _tokenizer(run: Run, train: Sequence[Problem]) -> Tokenizer:
    if run.start:
        with _asked_by("model.pretrained"):
            return hf.read_tokenizer(run.start)
    if run.config.text.tokenizer:
        with _asked_by("text.tokenizer"):
            return Tokenizer.load(run.config.text.tokenizer)
    more = list(itertools.islice(_documents(run), 5000)) if run.config.pretrain.epochs else []
    texts = [f"{p.question}\n{p.solution}" for p in train] + more
    return Tokenizer.train(texts, run.config.text.vocab_size, run.config.text.numbers)


def _documents(run: Run) -> Iterator[str]:
    """The texts of pretraining, one in memory at a time."""
    options, data = run.config.pretrain, run.config.data
    if options.documents:
        with _asked_by("pretrain.documents"):
            yield from documents.read(options.documents)
    else:
        yield from synthetic.documents(options.generated, data.seed, data.difficulty, data.trials)


def _document_trees(run: Run) -> Iterator[Tree]:
    longest = min(run.config.pretrain.row_tokens, run.model.max_length)
    return document_trees(run.tokenizer.documents(_documents(run)), longest)


def _fit(
    run: Run,
    name: str,
    *,
    stage: str,
    model: ModelConfig,
    initial: Callable[[], Params],
    trees: Sequence[Tree],
    held_out: Sequence[Tree],
    objective: Objective | None = None,
) -> None:
    """Train a model of the run from its initial parameters and save it; 0 epochs save those.

    One that is saved is left alone: its stage trains another one too, and was cut in that.
    """
    store = checkpoint.Checkpoints(run.folder / name)
    saved = store.latest is not None
    store.close()
    if saved:
        return
    if not run.config[stage].epochs:
        _save(run, name, model, initial())
        return
    log = metrics.Metrics(run.folder / "metrics", name, enabled=processes.first())
    params = loop.fit(
        model=model,
        initial=initial,
        trees=trees,
        held_out=held_out,
        options=run.config[stage],
        objective=objective or Objective(),
        folder=run.folder / name / "training",
        mesh=run.mesh,
        seed=run.config.seed,
        name=stage,
        log=log,
    )
    log.close()
    _save(run, name, model, params)


def _save(run: Run, name: str, model: ModelConfig, params: Params) -> None:
    store = checkpoint.Checkpoints(run.folder / name)
    store.save(0, params, {"model": vars(model)})
    store.close()


def pretrain(run: Run) -> None:
    """The language model finetuning starts from; with dropout, section 4.3's extra pretraining."""

    def initial() -> Params:
        if run.start:
            return hf.load(run.start, run.mesh)[1]
        return transformer.init(run.model, jax.random.key(run.config.seed), run.mesh)

    trees = list(_document_trees(run)) if run.config.pretrain.epochs else []
    aside = max(1, len(trees) // 100)
    _fit(
        run,
        "pretrained",
        stage="pretrain",
        model=run.model,
        initial=initial,
        trees=trees[aside:],
        held_out=trees[:aside],
    )


def finetune(run: Run) -> None:
    """The generator, and the baseline trained longer that answers greedily (section 4.1)."""
    for name, stage in (("generator", "finetune"), ("baseline", "baseline")):
        options = run.config[stage]
        if options.epochs or name == "generator":
            trees, held_out = (
                finetuning_trees(
                    [run.question(p) for p in found],
                    [run.solution(p) for p in found],
                    question_loss,
                )
                for found, question_loss in (
                    (run.problems("train"), options.question_loss),
                    (run.problems("heldout"), False),
                )
            )
            _fit(
                run,
                name,
                stage=stage,
                model=run.model,
                initial=functools.partial(run.params, "pretrained"),
                trees=trees,
                held_out=held_out,
            )


def _own(share: sharding.Share, shards: Sequence[Any]) -> list[Any]:
    """The record shards that are this process's, dealt out like cards."""
    return list(shards[share.index :: share.count])


def _write(share: sharding.Share, path: Path, kind: type[Record], rows: Sequence[Record]) -> None:
    """Write a shard of one's own, of which every process that shares its rows has the content."""
    if share.speaks:
        records.write(path, kind, rows)


def _write_beside(
    run: Run, path: Path, kind: type[Any], shard: pa.Table, columns: dict[str, Any]
) -> None:
    """`_write` of columns whose rows are those of another shard."""
    if run.share.speaks:
        keys = {name: shard[name] for name in ("problem", "sample")}
        records.write_columns(path, kind, keys | columns)


def _parts(
    share: sharding.Share, folder: Path, problems: Sequence[Problem], size: int
) -> dict[Path, Sequence[Problem]]:
    """The record shards of a folder that are this process's, and the `size` problems of each."""
    count = -(-len(problems) // size)
    parts = [problems[i * size : (i + 1) * size] for i in range(count)]
    paths = [records.shard_path(folder, i, count) for i in range(count)]
    return dict(_own(share, list(zip(paths, parts, strict=True))))


def _sample(run: Run, engine: Engine, folder: Path, problems: Sequence[Problem], n: int) -> None:
    """n completions of each problem, in shards; whole shards that exist are kept."""
    share = sharding.share(run.sampling_mesh)
    parts = _parts(share, folder, problems, run.config.records.shard_problems)
    todo = [path for path in parts if not path.exists()]
    shard_of = {p.id: path for path in todo for p in parts[path]}
    found: dict[Path, dict[tuple[str, int], Completion]] = {path: {} for path in todo}
    prompts = {p.id: run.question(p) for p in problems}
    longest = max(map(len, prompts.values()), default=0)
    requests = [Request(problem, prompts[problem], range(n)) for problem in shard_of]
    bar = processes.bar(f"sample {folder.name}", "completion", len(shard_of) * n)
    with bar, processes.Termination() as termination:
        for completion in engine.run(requests, longest, termination):
            path = shard_of[completion.problem]
            found[path][completion.problem, completion.sample] = completion
            bar.set_postfix(useful_slot_steps=f"{engine.useful:.0%}", refresh=False)
            bar.update()
            if len(found[path]) == len(parts[path]) * n:
                rows = found.pop(path)
                ordered = [rows[p.id, m] for p in parts[path] for m in range(n)]
                _write(share, path, Completion, ordered)
    processes.wait_for_all(f"{folder} is complete")


def _engine(run: Run, name: str, completions: int, **changes: Any) -> Engine:
    options = run.config.sample
    slots = options.prompts * options.slots
    each = min(options.slots, completions)  # more would idle
    return Engine(
        run.model,
        run.params(name, run.sampling_mesh),
        run.sampling_mesh,
        run.tokenizer,
        sampling_of(options, run.tokenizer.end, run.config.seed, slots, **changes),
        prompts=slots // each,
        slots=each,
        calculator=options.calculator,
    )


# Stages that may import completions: the splits in their file, and the keys of their numbers.
IMPORTS = {
    "sample": {"train": "completions", "heldout": "heldout_completions"},
    "score": {"test": "test_completions"},
}


def _imported(run: Run, stage: str) -> dict[str, Imported]:
    """The file of completions sampled elsewhere that a stage of `IMPORTS` is given, by split.

    Raises:
      ValueError: what isn't a completion of a problem of its splits, or another number of them than
        the config's; a test problem without any, or no train problem with some.
    """
    path = run.config[stage].imported
    if not path:
        return {}
    problems = {split: run.problems(split) for split in IMPORTS[stage]}
    file = Imported(path, itertools.chain(*problems.values()))
    splits = []
    for split, key in IMPORTS[stage].items():
        there = [p.id for p in problems[split] if split == "test" or p.id in file.counts]
        n = run.config.sample[key]
        wrong = next((p for p in there if file.counts.get(p, 0) != n), None)
        if wrong:
            raise ValueError(
                f"{path}: {file.counts.get(wrong, 0)} completions of problem {wrong}, but "
                f"config.sample.{key} is {n}: make them the same for all problems"
            )
        splits += [split] if there else []
    if splits == ["heldout"] or not splits:
        raise ValueError(f"{path}: no completion of a problem to train on: add some")
    return dict.fromkeys(splits, file)


def _import(run: Run, split: str, file: Imported) -> None:
    """The completions of a file as samples of a split, for the problems it has."""
    row_tokens = run.config["score" if split == "test" else "verify"].row_tokens
    longest = min(row_tokens, run.model_of("verifier").max_length)
    problems = [p for p in run.problems(split) if p.id in file.counts]
    folder, size = run.folder / "samples" / split, run.config.records.shard_problems
    for path, some in _parts(run.share, folder, problems, size).items():
        if not path.exists():
            rows = [c for p in some for c in file.completions(p, run.tokenizer, longest)]
            _write(run.share, path, Completion, rows)
    processes.wait_for_all(f"{split} is imported")


def sample(run: Run) -> None:
    """Completions of the training problems, by the generator or from elsewhere (section 4.2)."""
    options = run.config.sample
    if options.imported:
        for split, file in _imported(run, "sample").items():
            _import(run, split, file)
        return
    engine = _engine(run, "generator", options.completions)
    train = run.problems("train")[: options.train_problems or None]
    _sample(run, engine, run.folder / "samples/train", train, options.completions)
    if options.heldout_completions:
        heldout = run.problems("heldout")
        _sample(run, engine, run.folder / "samples/heldout", heldout, options.heldout_completions)


def label(run: Run) -> None:
    """Correct or not, by the final answer alone (section 4.2)."""
    for split in ("train", "heldout"):
        if (run.folder / "samples" / split).is_dir():
            own = _own(run.share, records.shards(run.folder / "samples" / split))
            _label(run, split, run.problems(split), own)


def _label(run: Run, split: str, problems: Sequence[Problem], paths: Sequence[Path]) -> None:
    gold = {p.id: p.solution for p in problems}
    for path in paths:
        shard = records.read_table(path, Completion, ["problem", "sample", "text"])
        judged = [row for table in records.problem_tables(shard) for row in _judged(table, gold)]
        answer, correct, numeric = zip(*judged, strict=True)
        labels = {"answer": answer, "correct": correct, "numeric": numeric}
        _write_beside(run, run.folder / "labels" / split / path.name, Label, shard, labels)


def _judged(completions: pa.Table, gold: dict[str, str]) -> Iterator[tuple[str | None, bool, bool]]:
    """Answer, is it correct and is it numerically, of every completion of a problem."""
    solution = gold[completions["problem"][0].as_py()]

    @functools.cache
    def judge(ending: str) -> tuple[str | None, bool, bool]:
        return (
            answers.extract(ending),
            answers.is_correct(ending, solution),
            answers.is_numerically_correct(ending, solution),
        )

    return (judge(answers.ending(text)) for text in completions["text"].to_pylist())


def verify(run: Run) -> None:
    """Train the verifier on labelled completions (section 4.2)."""
    options = run.config.verify
    judge = run.judge

    def initial() -> Params:
        value = _raw(options.initial_value, options.squash)
        return transformer.neutral_head(judge.model, judge.params(options.init), value)

    objective = Objective(options.loss, options.squash)
    _fit(
        run,
        "verifier",
        stage="verify",
        model=judge.model,
        initial=initial,
        trees=_verifier_trees(run, "train"),
        held_out=_verifier_trees(run, "heldout"),
        objective=objective,
    )


def _verifier_trees(run: Run, split: str) -> Sequence[Tree]:
    """The labelled completions of a split, of which those are in memory that a batch wants."""
    if not (run.folder / "samples" / split).is_dir():
        return []
    options, columns = run.config.verify, {Completion: ["tokens"], Label: ["correct"]}
    problems, places = {p.id: p for p in run.problems(split)}, records.places(run.folder, split)

    @functools.cache
    def text(problem: str) -> tuple[list[int], list[int]]:
        return run.question(problems[problem]), run.solution(problems[problem])

    def grove(place: int) -> list[Tree]:
        made: list[Tree] = []
        for table in records.tables(run.folder, split, columns, [places[place]]):
            chosen = table.slice(0, options.completions or None)
            made += verifier_trees(
                *text(table["problem"][0].as_py()),
                records.lists(chosen["tokens"]),
                chosen["correct"].to_pylist(),
                level=options.level,
                objective=options.objective,
                mix=options.mix,
                branches=options.branches,
                capacity=options.row_tokens,
            )
        return made

    share = run.share
    own = range(len(places))[share.index :: share.count] if share.speaks else range(0)
    return Forest(len(places), grove, own, processes.gather)


def _raw(value: float, squash: str) -> float:
    """The head's output that reads as `value`."""
    return float(np.log(value / (1 - value))) if squash == "sigmoid" else value


def score(run: Run) -> None:
    """Test time: complete the test problems, greedily too, and value the completions."""
    options = run.config.sample
    test = run.problems("test")
    samples = run.folder / "samples"
    n = options.test_completions
    if run.config.score.imported:
        _import(run, "test", _imported(run, "score")["test"])
    else:
        _sample(run, _engine(run, "generator", n), samples / "test", test, n)
    baseline = "baseline" if run.config.baseline.epochs > 0 else "generator"
    _sample(run, _engine(run, baseline, 1, temperature=0.0), samples / "greedy", test, 1)
    scorer = Scorer(
        *prepared(run.model_of("verifier"), run.params("verifier"), run.mesh),
        run.mesh,
        squash=run.config.verify.squash,
        row_tokens=run.config.score.row_tokens,
        rows=run.config.score.rows,
    )
    _score(run, scorer)


def _score(run: Run, scorer: Callable[..., Iterable[list[np.ndarray]]]) -> None:
    """Value the completions of the test problems, a shard at a time."""
    problems = {p.id: p for p in run.problems("test")}
    scores = run.folder / "scores/test"
    own = _own(run.share, records.shards(run.folder / "samples/test"))
    todo = [path for path in own if not (scores / path.name).exists()]
    (rounds,) = processes.largest(len(todo))  # a process without a shard left goes on with none
    bar = processes.bar("score test", "shard", len(todo))
    with bar, processes.Termination() as termination:
        for path in [*todo, *[None] * (rounds - len(todo))]:
            columns = ["problem", "sample", "tokens"]
            shard = records.read_table(path, Completion, columns) if path else None
            items = [
                (run.question(problems[t["problem"][0].as_py()]), records.lists(t["tokens"]))
                for t in (records.problem_tables(shard) if shard else ())
            ]
            values = [value for found in scorer(items, termination) for value in found]
            if path:
                how = run.config.score.aggregate
                scored = {
                    "values": records.list_column(values, np.float32),
                    "score": [aggregate(value, how) for value in values],
                }
                _write_beside(run, scores / path.name, Score, shard, scored)
                bar.set_postfix_str("", refresh=False)  # no longer compiling
                bar.update()
        if termination.asked():
            raise processes.Stopped(processes.SHARDS_KEPT)


NUMERIC = {"greedy": "greedy", "random": "test"}  # methods scored as numbers too, and their splits


def rank_(run: Run) -> None:
    """Every rule of choosing, at every N, with intervals and paired tests (figures 5 and 7)."""
    test = run.problems("test")
    for split in ("test", "greedy"):
        _label(run, split, test, records.shards(run.folder / "samples" / split))
    candidates = rank.Candidates.gather(_choices(run.folder))
    greedy = {
        row.problem: row.correct for row in records.read_all(run.folder / "labels/greedy", Label)
    }
    options = run.config.rank
    results = rank.evaluate(
        candidates,
        np.array([greedy[p.id] for p in test]),
        seed=run.config.seed,
        subsets=options.subsets,
        vote_k=(lambda n: min(n, options.vote_k)) if options.vote_k else rank.default_vote_k,
    )
    results = (
        _provenance(run)
        | {"splits": {"test": {"problems": len(test), "samples": candidates.answer_PM.shape[1]}}}
        | results
        | {"numeric": {n: _numeric(run.folder, s) for n, s in NUMERIC.items()}}
    )
    records.write_atomically(
        run.folder / "results.json", json.dumps(results, indent=1, allow_nan=False).encode()
    )


def _numeric(folder: Path, split: str) -> float:
    """Share of a split's completions whose answer is right as a number."""
    columns = [t["numeric"] for t in records.tables(folder, split, {Label: ["numeric"]})]
    return sum(pc.sum(c).as_py() for c in columns) / sum(map(len, columns))


def _choices(folder: Path) -> Iterator[rank.Choice]:
    """What the rules of choosing look at, problem by problem."""
    columns = {
        Completion: ["tokens", "logprob"],
        Label: ["answer", "correct"],
        Score: ["values", "score"],
    }
    for table in records.tables(folder, "test", columns):
        unknown = table["logprob"].null_count  # of what was sampled elsewhere
        yield rank.Choice(
            answer=table["answer"].to_pylist(),
            correct=table["correct"].to_numpy(),
            score=table["score"].to_numpy(),
            value=records.last_of_lists(table["values"]),
            logprob=None if unknown else table["logprob"].to_numpy(),
            length=pc.list_value_length(table["tokens"]).to_numpy(),
        )


def _provenance(run: Run) -> dict[str, Any]:
    markers = {
        stage: json.loads((run.folder / f"{stage}.done").read_bytes())
        for stage in STAGES
        if (run.folder / f"{stage}.done").exists()
    }
    return {
        "schema": 1,
        "commit": provenance.commit(),
        "versions": provenance.versions(),
        "seed": run.config.seed,
        "config": run.config.to_dict(),
        # Seconds of the last attempt at each stage; of these stages some work had been done before.
        "timing": {stage: marker["seconds"] for stage, marker in markers.items()},
        "resumed": [stage for stage, marker in markers.items() if marker.get("resumed")],
        "computed": {stage: m["computed"] for stage, m in markers.items() if m.get("computed")},
    }


def report(run: Run) -> None:
    """One page to read, with problems to browse (appendix F)."""
    results = json.loads((run.folder / "results.json").read_bytes())
    logs = {
        name: metrics.read(run.folder / "metrics" / f"{name}.jsonl")
        for name in ("pretrained", "generator", "baseline", "verifier")
    }
    logs = {name: rows for name, rows in logs.items() if rows}
    html = page.render(results, logs, _browsed(run), title=run.folder.name)
    storage.write_atomically(run.folder / "report.html", html.encode())


def _browsed(run: Run) -> list[page.BrowsedProblem]:
    options = run.config.report
    test = {p.id: p for p in run.problems("test")[: options.problems]}
    greedy = {
        problem: _browse(run, *rows[0], None)
        for problem, rows in records.by_problem(run.folder, "greedy", Completion, Label)
    }
    browsed = []
    for problem, rows in records.by_problem(run.folder, "test", Completion, Label, Score):
        if len(browsed) == len(test):
            break
        if problem not in test:
            continue
        rows = sorted(rows, key=lambda row: -row[2].score)
        browsed.append(
            page.BrowsedProblem(
                id=problem,
                question=test[problem].question,
                gold_solution=test[problem].solution,
                gold_answer=answers.extract(test[problem].solution) or "",
                completions=[_browse(run, *row) for row in rows[: options.completions]],
                greedy=greedy.get(problem),
                total=len(rows),
                total_correct=sum(label.correct for _, label, _ in rows),
            )
        )
    return browsed


def _browse(
    run: Run, completion: Completion, label: Label, scored: Score | None
) -> page.BrowsedCompletion:
    return page.BrowsedCompletion(
        tokens=run.tokenizer.pieces(completion.tokens),
        values=scored.values if scored else None,
        forced=completion.forced,
        score=scored.score if scored else None,
        correct=label.correct,
        answer=label.answer,
        logprob=completion.logprob,
        sample=completion.sample,
    )


@dataclass(frozen=True)
class Stage:
    """A stage.

    Attributes:
      reads: the parts of the config it reads beside those of the stages before it.
      writes: what it makes in the work directory.
      on: the meshes of a `Run` that it computes on, in order; none: it runs no model.
      alone: the first process runs it, and the others wait.
    """

    run: Callable[[Run], None]
    reads: tuple[str, ...]
    writes: str
    on: tuple[str, ...] = ()
    alone: bool = False

    @property
    def does(self) -> str:
        """What it does, in the first line of its docstring."""
        return (self.run.__doc__ or "").splitlines()[0]


STAGES: dict[str, Stage] = {
    "prepare": Stage(
        prepare,
        # The tokenizer is the pretrained model's, or learnt from the documents of pretraining too.
        ("seed", "data", "text", "model", "pretrain"),
        "problems tokenizer.json tokenizer_config.json model.json",
        alone=True,
    ),
    "pretrain": Stage(pretrain, (), "pretrained metrics/pretrained.jsonl", on=("mesh",)),
    "finetune": Stage(
        finetune,
        ("finetune", "baseline"),
        "generator baseline metrics/generator.jsonl metrics/baseline.jsonl",
        on=("mesh",),
    ),
    "sample": Stage(
        sample, ("sample", "records"), "samples/train samples/heldout", on=("sampling_mesh",)
    ),
    "label": Stage(label, (), "labels/train labels/heldout"),
    "verify": Stage(verify, ("verify",), "verifier metrics/verifier.jsonl", on=("mesh",)),
    "score": Stage(
        score, ("score",), "samples/test samples/greedy scores", on=("sampling_mesh", "mesh")
    ),
    "rank": Stage(rank_, ("rank",), "labels/test labels/greedy results.json", alone=True),
    "report": Stage(report, ("report",), "report.html", alone=True),
}


def refuse_unknown(names: Sequence[str]) -> None:
    """Raise ValueError for a name that no stage has."""
    unknown = [name for name in names if name not in STAGES]
    if unknown:
        raise ValueError(f"no stage {unknown[0]!r}: use {', '.join(STAGES)}")


def keys_read(stage: str, config: ConfigDict) -> dict[str, Any]:
    """The config values a stage's result depends on, by dotted key."""
    sections: list[str] = []
    for name, each in STAGES.items():
        sections += each.reads
        if name == stage:
            break
    return {k: v for k, v in leaves(config).items() if k.split(".")[0] in sections}
