"""The whole paper by the command line: what a run leaves, and that nothing can spoil it."""

import functools
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bucket
import pytest
from ml_collections import ConfigDict

from gsm_verifier import compare, metrics, pipeline, records, sharding, stages
from gsm_verifier.data import problems
from gsm_verifier.data.packing import PackedRows
from gsm_verifier.records import Completion, Label, Score
from gsm_verifier.text import answers
from gsm_verifier.text.tokenizer import Tokenizer
from gsm_verifier.train.batch import verifier_trees

REPOSITORY = Path(__file__).resolve().parents[1]
GSM8K = Path(os.environ.get("GSM8K_DIR", REPOSITORY.parent / "shared/data/gsm8k"))
STAGES = ["prepare", "pretrain", "finetune", "sample", "label", "verify", "score", "rank", "report"]
NAMES = "greedy random majority logprob length integer_only verifier verifier_vote"
NAMES = {*NAMES.split(), "verifier_weighted", "coverage"}
# Of configs/quickstart.py:tiny: problems and completions of each in the folders of samples/.
SAMPLED = {"train": (8, 4), "heldout": (6, 2), "test": (8, 10), "greedy": (8, 1)}
TIMEOUT = 580


@pytest.fixture(scope="session")
def environment(tmp_path_factory) -> dict[str, str]:
    """Programs compiled by one run are there for the next."""
    compiled = os.environ.get("JAX_COMPILATION_CACHE_DIR") or tmp_path_factory.mktemp("compiled")
    return os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(compiled),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def command(folder: Path | str, *flags: str, file: str = "configs/quickstart.py:tiny") -> list[str]:
    config = [f"--config={file}", "--config.mesh.cpu_devices=1"]
    return [sys.executable, "-m", "gsm_verifier.main", *config, f"--workdir={folder}", *flags]


def run_main(
    folder: Path | str, environment: dict[str, str], *flags: str, **file: str
) -> SimpleNamespace:
    done = subprocess.run(
        command(folder, *flags, **file),
        env=environment,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    return SimpleNamespace(code=done.returncode, out=done.stdout, err=done.stderr)


@pytest.fixture(scope="session")
def finished(tmp_path_factory, environment) -> SimpleNamespace:
    """One finished run; tests that spoil it take a `copy`."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    done = run_main(folder, environment)
    assert done.code == 0, done.err
    return SimpleNamespace(folder=folder, out=done.out, err=done.err)


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished.folder, tmp_path / "copy"))


def config_of(folder: Path) -> ConfigDict:
    """The config a run was made with."""
    return ConfigDict(json.loads((folder / "config.json").read_bytes()))


def results_of(folder: Path) -> dict[str, Any]:
    """The results without what differs between two runs of the same."""
    results = json.loads((folder / "results.json").read_bytes())
    return {
        k: v
        for k, v in results.items()
        if k not in ("timing", "resumed", "computed", "commit", "versions")
    }


def shards_of(folder: Path, *roots: str) -> dict[str, bytes]:
    """The bytes of the record shards below some folders of a run."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for root in roots or ("samples", "labels", "scores")
        for path in sorted((folder / root).rglob("*.parquet"))
    }


def same_run(folder: Path, other: Path) -> None:
    """The same samples, labels and values bit for bit, and the same results."""
    ours, theirs = shards_of(folder), shards_of(other)
    assert list(ours) == list(theirs)
    assert [name for name in ours if ours[name] != theirs[name]] == []
    assert results_of(folder) == results_of(other)


# What a run leaves


def test_a_run_leaves_the_files_it_promises(finished) -> None:
    files = "config.json problems tokenizer.json model.json pretrained generator verifier samples "
    files += "labels scores results.json report.html metrics"
    for name in [*files.split(), *(f"{stage}.done" for stage in STAGES)]:
        assert (finished.folder / name).exists(), name
    left = [path.name for path in finished.folder.rglob("*")]
    assert not [name for name in left if name.endswith((".started", ".tmp"))]
    config = json.loads((finished.folder / "config.json").read_bytes())
    assert config["model"]["layers"] == 2
    for stage in STAGES:
        marker = json.loads((finished.folder / f"{stage}.done").read_bytes())
        assert marker["seconds"] >= 0
    html = (finished.folder / "report.html").read_text(encoding="utf-8")
    assert html.lstrip().lower().startswith("<!doctype html>")


def test_results_follow_their_schema(finished) -> None:
    results = json.loads((finished.folder / "results.json").read_bytes())
    assert results["schema"] == 1
    assert results["commit"]
    assert {"python", "jax", "numpy"} <= set(results["versions"])
    assert results["seed"] == 0
    assert results["splits"]["test"]["problems"] == 8
    assert set(results["accuracy"]) == NAMES
    for name, rows in results["accuracy"].items():
        assert [row["n"] for row in rows] == ([1] if name == "greedy" else [1, 2, 5, 10])
        for row in rows:
            assert 0 <= row["low"] <= row["value"] <= row["high"] <= 1
    assert {(row["a"], row["b"]) for row in results["paired"]} >= {("verifier", "greedy")}
    for row in results["paired"]:
        assert row["low"] <= row["difference"] <= row["high"]
        assert 0 <= row["p"] <= 1
        assert row["n"] in (1, 2, 5, 10)
    assert {"auroc", "brier", "ece"} <= set(results["verifier"])
    earlier = STAGES[: STAGES.index("rank")]
    assert set(results["timing"]) >= set(earlier)
    assert all(seconds >= 0 for seconds in results["timing"].values())
    assert results["resumed"] == []
    assert set(results["computed"]) == set(earlier) - {"prepare", "label"}
    assert all("cpu" in told and "float32" in told for told in results["computed"].values())


def test_records_are_aligned_and_complete(finished) -> None:
    folder = finished.folder
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    for split, (count, samples) in SAMPLED.items():
        origin = "test" if split == "greedy" else split
        gold = problems.load(folder / "problems", origin)[:count]
        completions = records.read_all(folder / "samples" / split, Completion)
        keys = [(p.id, m) for p in gold for m in range(samples)]
        assert [(c.problem, c.sample) for c in completions] == keys
        solutions = {p.id: p.solution for p in gold}
        labels = records.read_all(folder / "labels" / split, Label)
        for completion, label in zip(completions, labels, strict=True):
            assert (label.problem, label.sample) == (completion.problem, completion.sample)
            assert label.answer == answers.extract(completion.text)
            assert label.correct == answers.is_correct(completion.text, solutions[label.problem])
            assert len(completion.forced) == len(completion.tokens) <= 48
            assert completion.text == tokenizer.decode(completion.tokens)
            assert completion.finished == (completion.tokens[-1] == tokenizer.end)
        names = [path.name for path in records.shards(folder / "samples" / split)]
        assert names == [path.name for path in records.shards(folder / "labels" / split)]
        assert len(names) == -(-count // 3)
    completions = records.read_all(folder / "samples/test", Completion)
    scores = records.read_all(folder / "scores/test", Score)
    for completion, score in zip(completions, scores, strict=True):
        assert (score.problem, score.sample) == (completion.problem, completion.sample)
        assert len(score.values) == len(completion.tokens)
        assert score.score == min(score.values)  # what the quickstart aggregates by
    assert len({score.score for score in scores}) > 40


def test_the_problems_of_the_splits_are_apart(finished) -> None:
    splits = [problems.load(finished.folder / "problems", s) for s in ("train", "heldout", "test")]
    questions = [p.question for split in splits for p in split]
    assert [len(split) for split in splits] == [24, 6, 8]
    assert len(set(questions)) == len(questions)


def test_the_run_ends_with_a_table_and_the_reports_path(finished) -> None:
    assert [line.split(":")[0] for line in finished.out.splitlines() if line[-2:] == " s"] == STAGES
    table = finished.out[finished.out.index("accuracy on 8 test problems") :]
    assert "N = 1 " in table
    assert "N = 10" in table
    assert len(table.splitlines()) == 2 + len(NAMES) + 2
    vote = results_of(finished.folder)["accuracy"]["verifier_vote"]
    k = {row["n"]: row["k"] for row in vote}
    assert f"\n  with k = {k[1]} at N = 1, {k[10]} at N = 10\n" in table
    assert table.splitlines()[-1] == f"report: {finished.folder / 'report.html'}"


def test_what_waits_for_a_program_says_so_until_something_is_done(finished) -> None:
    lines = re.split(r"[\r\n]", finished.err)
    bars = ["pretrain", "finetune", "baseline", "verify", "score test"]
    for bar in [*bars, *(f"sample {folder}" for folder in SAMPLED)]:
        told = [line for line in lines if line.startswith(f"{bar}: ")]
        assert "compiling" in told[1]  # the first line is drawn before it
        assert "compiling" not in told[-1]
        assert [line for line in told if "compiling" in line and " 0/" not in line] == []


# Running again


def state_of(folder: Path) -> dict[str, tuple[float, int]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime, path.stat().st_size)
        for path in folder.rglob("*")
        if path.is_file() and path.name != "config.json"
    }


def test_a_finished_run_is_left_alone(finished, environment) -> None:
    before = state_of(finished.folder)
    done = run_main(finished.folder, environment)
    assert done.code == 0, done.err
    for stage in STAGES:
        assert f"{stage}: done before, skipped" in done.out
    assert state_of(finished.folder) == before
    assert "report: " in done.out.splitlines()[-1]


@pytest.mark.parametrize(
    ("key", "old", "new"),
    [
        ("seed", "0", 1),
        ("data.train_size", "24", 25),
        ("model.layers", "2", 3),
        ("sample.temperature", "0.7", 0.9),
        ("verify.level", "'token'", "solution"),
        ("report.problems", "40", 3),
    ],
)
def test_a_changed_config_is_refused_with_old_and_new(
    key: str, old: str, new: Any, finished
) -> None:
    """Whichever stage reads the key, and whichever stages are asked for."""
    before = state_of(finished.folder), (finished.folder / "config.json").read_bytes()
    config = config_of(finished.folder)
    config.update_from_flattened_dict({key: new})
    for names in (STAGES, ["report"]):
        with pytest.raises(ValueError, match="was made with another config") as error:
            pipeline.run_stages(config, finished.folder, names)
        message = str(error.value)
        assert message.startswith(
            f"{finished.folder} was made with another config: {key} was {old}"
        )
        assert f"{key} was {old} and is now {new!r}. Use another --workdir" in message
        assert "\n" not in message
    assert (state_of(finished.folder), (finished.folder / "config.json").read_bytes()) == before


def test_of_many_changes_some_are_named_and_the_rest_counted(finished) -> None:
    config = config_of(finished.folder)
    keys = ("temperature", "top_k", "max_tokens", "completions", "prompts", "slots", "chunk_steps")
    for key in keys:
        config.sample[key] += 1
    with pytest.raises(ValueError, match=r"; and \d+ keys more\. Use another --workdir"):
        pipeline.run_stages(config, finished.folder, STAGES)


@pytest.mark.parametrize(
    ("key", "value", "before"), [("seed", 1, None), ("verify.level", "solution", "label.done")]
)
def test_a_changed_config_tells_what_to_delete(
    key: str, value: Any, before: str | None, copy: Path
) -> None:
    """What is left is what was there when the stage before ended."""
    config = config_of(copy)
    config.update_from_flattened_dict({key: value})
    with pytest.raises(ValueError, match="was made with another config") as error:
        pipeline.run_stages(config, copy, STAGES)
    ended = state_of(copy)[before][0] if before else 0
    wanted = {name for name, (written, _) in state_of(copy).items() if written <= ended}
    for name in str(error.value).rsplit(": ", 1)[1].split():
        path = copy / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    left = {name for name in state_of(copy) if not name.startswith("metrics/tensorboard")}
    assert left == {name for name in wanted if not name.startswith("metrics/tensorboard")}
    pipeline.run_stages(config, copy, ["prepare"])


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such file of documents"), ("", "too little text"), ("one\n", "too little text")],
)
@pytest.mark.parametrize("pretrained", ["", "quickstart"])
def test_documents_are_asked_for_before_any_training(
    content: str | None, message: str, pretrained: str, tmp_path: Path
) -> None:
    source, folder = tmp_path / "documents.txt", tmp_path / "run"
    if content is not None:
        source.write_text(content)
    config = tiny(
        pretrain__documents=str(source), model__pretrained=pretrained, mesh__cpu_devices=8
    )
    with pytest.raises(ValueError, match=message) as error:
        pipeline.run_stages(config, folder, ["prepare"])
    assert str(error.value).startswith("config.pretrain.documents")
    source.write_text("one\ntwo\n")
    pipeline.run_stages(config, folder, ["prepare"])  # the same work directory


def tiny(**keys: Any) -> ConfigDict:
    """configs/quickstart.py:tiny with other values for some keys; `__` is a dot."""
    config = runpy.run_path(str(REPOSITORY / "configs/quickstart.py"))["get_config"]("tiny")
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in keys.items()})
    return config


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("sample__max_tokens", 500, "config.sample.max_tokens is 500, together more than"),
        ("score__row_tokens", 60, "config.score.row_tokens, 60"),
        ("finetune__row_tokens", 40, "config.finetune.row_tokens is 40"),
        ("sample__top_k", 5000, "config.sample.top_k=5000: the tokenizer has"),
        ("verify__run", "nowhere", "config.verify.run=nowhere is no finished run"),
        ("mesh__data", 7, "7"),
        ("model__pretrained", "nowhere", "config.model.pretrained: nowhere: no such folder"),
        ("text__tokenizer", "nowhere", "config.text.tokenizer: no tokenizer at nowhere"),
        ("score__imported", "nowhere", "config.score.imported: nowhere: no such file"),
    ],
)
def test_what_must_fail_later_fails_at_once_and_can_be_mended(
    key: str, value: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        pipeline.run_stages(tiny(**{key: value}), tmp_path, ["prepare"])
    pipeline.run_stages(tiny(), tmp_path, ["prepare"])  # the same work directory
    assert (tmp_path / "prepare.done").exists()


def test_a_folder_from_before_a_key_goes_on_with_its_default(tmp_path: Path) -> None:
    pipeline.run_stages(tiny(), tmp_path, ["prepare"])
    marker = tmp_path / "prepare.done"
    told = json.loads(marker.read_bytes())
    del told["keys"]["model.attention"]
    marker.write_text(json.dumps(told))
    pipeline.run_stages(tiny(), tmp_path, ["prepare"])
    with pytest.raises(ValueError, match=r"model\.attention was 'auto' and is now 'jax'"):
        pipeline.run_stages(tiny(model__attention="jax"), tmp_path, ["prepare"])


def test_what_is_left_to_the_devices_is_decided_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharding, "fast_dtype", {"cpu": "bfloat16"}.get)
    pipeline.run_stages(tiny(model__dtype="auto"), tmp_path, ["prepare"])
    monkeypatch.undo()
    config = tiny(model__dtype="auto")
    assert stages.Run(config, tmp_path).model.dtype == "bfloat16"
    assert stages.Run(config, tmp_path).wanted_model(300, "tpu").dtype == "bfloat16"


def test_a_folder_without_problems_is_told_with_its_key(tmp_path: Path) -> None:
    config = tiny(data__source="gsm8k", data__path=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"^config\.data\.path: .*nowhere does not exist"):
        pipeline.run_stages(config, tmp_path / "run", ["prepare"])


def test_one_file_is_not_both_train_and_test(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"question": "1 + 1?", "answer": "#### 2"}')
    config = tiny(data__source="gsm8k", data__path=str(tmp_path / "train.jsonl"))
    with pytest.raises(ValueError, match=r"^config\.data\.path: .*train\.jsonl is one file"):
        pipeline.run_stages(config, tmp_path / "run", ["prepare"])


@pytest.mark.parametrize("split", ["train", "test"])
def test_more_problems_than_there_are_is_told_with_its_key(split: str, tmp_path: Path) -> None:
    for name in ("train", "test"):
        rows = [{"question": f"{n} + 1?", "answer": f"#### {n + 1}"} for n in range(9)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sizes = {"data__train_size": 3, "data__test_size": 3, f"data__{split}_size": 30}
    config = tiny(data__source="gsm8k", data__path=str(tmp_path), **sizes)
    with pytest.raises(ValueError, match=rf"^config\.data\.{split}_size: .*size is 30"):
        pipeline.run_stages(config, tmp_path / "run", ["prepare"])


def test_another_model_to_start_from_after_prepare_is_refused(tmp_path: Path) -> None:
    """Its tokenizer is another."""
    pipeline.run_stages(tiny(), tmp_path, ["prepare"])
    with pytest.raises(ValueError, match=r"model\.pretrained was '' and is now 'quickstart'"):
        pipeline.run_stages(tiny(model__pretrained="quickstart"), tmp_path, ["pretrain"])


def test_there_may_be_no_held_out_problems(tmp_path: Path) -> None:
    epochs = {"pretrain__epochs": 0.0, "finetune__epochs": 1.0, "baseline__epochs": 0.0}
    stages = STAGES[: STAGES.index("verify") + 1]
    pipeline.run_stages(tiny(data__heldout_fraction=0.0, **epochs), tmp_path, stages)
    assert not (tmp_path / "samples/heldout").exists()
    assert (tmp_path / "verify.done").exists()


def test_the_command_line_tells_of_a_changed_config_in_one_line(finished, environment) -> None:
    done = run_main(finished.folder, environment, "--config.sample.temperature=0.9")
    assert done.code == 1
    assert "sample.temperature was 0.7 and is now 0.9" in done.err
    assert len(done.err.strip().splitlines()) == 1


def test_another_mesh_is_no_other_config(copy: Path, environment) -> None:
    done = run_main(copy, environment, "--config.mesh.cpu_devices=2")
    assert done.code == 0, done.err


def test_sampling_on_a_mesh_of_its_own(tmp_path: Path) -> None:
    """It makes what it makes where all stages are on that mesh."""
    heads = dict(model__heads=4, model__kv_heads=2, finetune__epochs=0.0, baseline__epochs=0.0)

    def sampled(**words: Any) -> dict[str, bytes]:
        shutil.rmtree(tmp_path / "samples", ignore_errors=True)
        (tmp_path / "sample.done").unlink(missing_ok=True)
        config = tiny(**heads, **{f"mesh__{key}": word for key, word in words.items()})
        pipeline.run_stages(config, tmp_path, ["prepare", "pretrain", "finetune", "sample"])
        computed = json.loads((tmp_path / "sample.done").read_bytes())["computed"]
        assert "(data 4 x tensor 2)" in computed  # and not the run's mesh
        return shards_of(tmp_path, "samples")

    assert sampled(fsdp=4, sampling="tensor") == sampled(data=4, tensor=2)


def test_a_mesh_that_does_not_divide_the_model_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^config\.mesh: .*dimension .* can't be split"):
        pipeline.run_stages(tiny(mesh__tensor=8), tmp_path, ["prepare"])


def test_a_mesh_that_does_not_divide_the_verifier_is_refused_at_once(
    finished, tmp_path: Path
) -> None:
    """Another run's model, while this run's own is divided."""
    words = dict(
        model__heads=8, model__kv_heads=8, mesh__tensor=8, verify__run=str(finished.folder)
    )
    with pytest.raises(ValueError, match=r"^config\.mesh: .*dimension .* can't be split"):
        pipeline.run_stages(tiny(**words), tmp_path, ["prepare"])


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"seconds": 1}', '{"keys": 3}'])
def test_a_damaged_marker_is_named(content: str, copy: Path) -> None:
    (copy / "label.done").write_text(content)
    with pytest.raises(ValueError, match=r"label\.done is damaged: delete it") as error:
        pipeline.run_stages(config_of(copy), copy, STAGES)
    assert str(copy / "label.done") in str(error.value)
    assert "\n" not in str(error.value)


def test_rank_and_report_can_be_made_again(finished, copy: Path, environment) -> None:
    for name in ("rank.done", "report.done", "results.json", "report.html"):
        (copy / name).unlink()
    done = run_main(copy, environment, "--stages=rank,report")
    assert done.code == 0, done.err
    assert "sample" not in done.out.split("accuracy on")[0]
    assert (copy / "report.html").exists()
    same_run(copy, finished.folder)


def hashes_of(folder: Path) -> dict[str, int]:
    """Content hashes of the arrays of a checkpoint."""
    return json.loads((folder / "0/_CHECKPOINT_METADATA").read_bytes())["custom_metadata"]["hashes"]


@pytest.mark.slow
def test_a_stage_whose_marker_was_lost_makes_the_same_again(
    finished, copy: Path, environment
) -> None:
    """As a run killed when its model was saved and its marker was not."""
    (copy / "finetune.done").unlink()
    done = run_main(copy, environment, "--stages=finetune")
    assert done.code == 0, done.err
    assert (copy / "finetune.done").exists()
    for name in ("generator", "baseline"):
        assert hashes_of(copy / name) == hashes_of(finished.folder / name)
    assert hashes_of(copy / "generator") != hashes_of(copy / "baseline")


def test_a_lost_sample_shard_is_made_again_bit_for_bit(finished, copy: Path, environment) -> None:
    """Without the samples beside which it was made first."""
    lost = [records.shard_path(copy / "samples/train", 1, 3)]
    lost += [records.shard_path(copy / "samples/heldout", 0, 2)]
    for path in lost:
        path.unlink()
    (copy / "sample.done").rename(copy / "sample.started")  # as if it had been killed
    kept = records.shard_path(copy / "samples/train", 0, 3)
    before = kept.stat().st_mtime_ns
    done = run_main(copy, environment, "--stages=sample")
    assert done.code == 0, done.err
    assert kept.stat().st_mtime_ns == before
    (copy / "rank.done").unlink()
    assert run_main(copy, environment, "--stages=rank").code == 0
    results = json.loads((copy / "results.json").read_bytes())
    assert results["resumed"] == ["sample"]  # whose seconds aren't all it took
    same_run(copy, finished.folder)


@pytest.mark.parametrize("group", [1, 1000])
def test_trees_are_made_of_all_completions_in_order(
    group: int, finished, tmp_path: Path, monkeypatch
) -> None:
    """The verifier's rows, read a few problems at a time, are those of all trees in memory."""
    run = stages.Run(config_of(finished.folder), finished.folder)
    run.config.verify.branches = 3
    gold, eager = {p.id: p for p in run.problems("train")}, []
    for problem, rows in records.by_problem(run.folder, "train", Completion, Label):
        eager += verifier_trees(
            run.question(gold[problem]),
            run.solution(gold[problem]),
            [completion.tokens for completion, _ in rows],
            [label.correct for _, label in rows],
            **{key: run.config.verify[key] for key in ("level", "objective", "mix", "branches")},
            capacity=run.config.verify.row_tokens,
        )
    assert len(eager) == 8 * 2
    monkeypatch.setattr(records, "GROUP", group)
    for kind in (Completion, Label):
        for path in records.shards(run.folder / records.FOLDERS[kind] / "train"):
            copied = tmp_path / path.relative_to(run.folder)
            records.write(copied, kind, records.read(path, kind))
    shutil.copytree(run.folder / "problems", tmp_path / "problems")
    shutil.copy(run.folder / "tokenizer.json", tmp_path)
    lazy = stages._verifier_trees(stages.Run(run.config, tmp_path), "train")
    assert len(records.places(tmp_path, "train")) == (8 if group == 1 else 3)
    got, expected = (PackedRows(trees, 512, 2, 0) for trees in (lazy, eager))
    assert len(got) == len(expected) > 3
    for index in range(len(expected)):
        for name, values in expected[index].items():
            assert (got[index][name] == values).all()


def test_a_damaged_shard_is_named(copy: Path, environment) -> None:
    path = records.shard_path(copy / "samples/test", 2, 3)
    path.write_bytes(path.read_bytes()[:-100])
    (copy / "rank.done").unlink()
    done = run_main(copy, environment, "--stages=rank")
    assert done.code == 1
    assert f"can't read {path} as Completion records" in done.err.strip().splitlines()[-1]
    path.unlink()
    done = run_main(copy, environment, "--stages=rank")
    assert done.code == 1
    assert "should hold 3 shards, it holds 2" in done.err.strip().splitlines()[-1]


@pytest.mark.slow
@pytest.mark.skipif(not GSM8K.is_dir(), reason="no GSM8K here: name its folder in GSM8K_DIR")
def test_gsm8k_goes_through_every_stage(tmp_path: Path, environment) -> None:
    sizes = ["--config.data.train_size=60", "--config.data.test_size=10"]
    sizes += ["--config.sample.prompts=8", f"--config.data.path={GSM8K}"]
    done = run_main(tmp_path, environment, *sizes, file="configs/gsm8k.py:tiny")
    assert done.code == 0, done.err
    assert results_of(tmp_path)["splits"] == {"test": {"problems": 10, "samples": 4}}
    assert done.out.splitlines()[-1].startswith("report: ")


@pytest.mark.slow
def test_zeroshot_ranks_the_answers_of_the_pretrained_model(tmp_path: Path, environment) -> None:
    done = run_main(tmp_path, environment, file="configs/paper/zeroshot.py:quickstart-tiny")
    assert done.code == 0, done.err
    generator = hashes_of(tmp_path / "generator")
    assert generator == hashes_of(tmp_path / "pretrained")
    assert not (tmp_path / "baseline").exists()
    accuracy = results_of(tmp_path)["accuracy"]
    assert set(accuracy) == NAMES
    scores = records.read_all(tmp_path / "scores/test", Score)
    assert {score.score for score in scores} == {0.5}


# Sampled elsewhere


def sampled_elsewhere(
    run: Path, split: str, path: Path, **keys: Callable[[Completion], Any]
) -> str:
    """A run's own samples of a split, and of those held out, as a file from elsewhere."""
    splits = [split, "heldout"] if split == "train" else [split]
    found = [c for s in splits for c in records.read_all(run / "samples" / s, Completion)]
    found.sort(key=lambda c: c.sample)  # those of a problem aren't side by side
    with open(path, "w", encoding="utf-8") as file:
        for c in found:
            row = {"problem": c.problem, "completion": c.text, "finished": c.finished}
            row |= {key: value(c) for key, value in keys.items()}
            file.write(json.dumps(row) + "\n")
    return str(path)


def test_completions_from_elsewhere_are_labelled_scored_ranked_and_reported(
    finished, copy: Path, environment, tmp_path: Path
) -> None:
    for stage in STAGES[STAGES.index("sample") :]:
        (copy / f"{stage}.done").unlink()
    for name in ("samples", "labels", "scores", "verifier"):
        shutil.rmtree(copy / name)
    train = sampled_elsewhere(finished.folder, "train", tmp_path / "train.jsonl")
    test = sampled_elsewhere(finished.folder, "test", tmp_path / "test.jsonl")
    flags = [f"--config.sample.imported={train}", f"--config.score.imported={test}"]
    done = run_main(copy, environment, *flags)
    assert done.code == 0, done.err
    assert list(shards_of(copy)) == list(shards_of(finished.folder))
    for split in ("train", "heldout", "test"):
        ours, theirs = (
            records.read_all(run / "samples" / split, Completion) for run in (copy, finished.folder)
        )
        for a, b in zip(ours, theirs, strict=True):
            assert (a.problem, a.sample, a.text) == (b.problem, b.sample, b.text)
            assert (a.finished, a.logprob) == (b.finished, None)
    same = ["labels/train", "labels/heldout", "labels/test", "samples/greedy"]
    assert shards_of(copy, *same) == shards_of(finished.folder, *same)
    ours, theirs = results_of(copy)["accuracy"], results_of(finished.folder)["accuracy"]
    assert set(ours) == NAMES - {"logprob"}
    for name in ("greedy", "random", "majority", "integer_only", "coverage"):
        assert ours[name] == theirs[name]


def test_log_probabilities_from_elsewhere_are_ranked_by(
    finished, copy: Path, environment, tmp_path: Path
) -> None:
    for stage in ("score", "rank", "report"):
        (copy / f"{stage}.done").unlink()
    for name in ("samples/test", "scores", "labels/test"):
        shutil.rmtree(copy / name)
    test = sampled_elsewhere(
        finished.folder, "test", tmp_path / "test.jsonl", logprob=lambda c: c.logprob
    )
    done = run_main(copy, environment, f"--config.score.imported={test}")
    assert done.code == 0, done.err
    ours, theirs = results_of(copy)["accuracy"], results_of(finished.folder)["accuracy"]
    assert ours["logprob"] == theirs["logprob"]


def test_a_file_from_elsewhere_is_checked_before_any_training(finished, tmp_path: Path) -> None:
    def refusal(stage: str, path: str, **changes: Any) -> str:
        config = config_of(finished.folder)
        config[stage].imported = path
        config.sample.update(changes)
        with pytest.raises(ValueError, match=re.escape(path)) as error:
            pipeline.run_stages(config, tmp_path / "run", ["prepare"])
        shutil.rmtree(tmp_path / "run")
        return str(error.value)

    train = sampled_elsewhere(finished.folder, "train", tmp_path / "train.jsonl")
    test = sampled_elsewhere(finished.folder, "test", tmp_path / "test.jsonl")
    message = refusal("sample", train, completions=5)
    assert "4 completions of problem" in message
    assert "config.sample.completions is 5" in message
    assert "config.sample.heldout_completions is 3" in refusal(
        "sample", train, heldout_completions=3
    )
    lines = Path(test).read_text().splitlines(keepends=True)
    assert "is none of this run's problems" in refusal("sample", test)
    missing = json.loads(lines[0])["problem"]
    Path(test).write_text("".join(line for line in lines if missing not in line))
    assert f"0 completions of problem {missing}" in refusal("score", test)
    Path(test).write_text("")
    assert "no completion of a problem to train on" in refusal("sample", test)


# Killed and begun again


def kill_when(
    folder: Path | str,
    environment: dict[str, str],
    moment: Callable[[], bool],
    log: Path | None = None,
) -> None:
    """Start a run and SIGKILL it as soon as `moment` is true."""
    log = log or Path(folder).parent / "killed.log"
    with open(log, "wb") as out:
        process = subprocess.Popen(
            command(folder), env=environment, cwd=REPOSITORY, stdout=out, stderr=out
        )
        try:
            deadline = time.monotonic() + TIMEOUT
            while not moment():
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline
                time.sleep(0.002)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait(timeout=60)


MOMENTS = {
    "in pretraining": ("pretrain", "pretrained/training/5"),
    "after the generator's checkpoint": ("finetune", "generator/0"),
    "in the baseline": ("finetune", "baseline/training"),
    "between two shards of samples": ("sample", "samples/train/*.parquet"),
    "in verifier training": ("verify", "verifier/training"),
    "between two shards at test time": ("score", "samples/test/*.parquet"),
    "between two shards of values": ("score", "scores/test/*.parquet"),
}


@pytest.mark.slow
def test_what_was_begun_with_a_temperature_is_not_finished_with_another(
    finished, tmp_path: Path, environment
) -> None:
    folder = tmp_path / "killed"
    stage, pattern = MOMENTS["between two shards of samples"]
    kill_when(folder, environment, lambda: any(folder.glob(pattern)))
    assert (folder / f"{stage}.started").exists()
    assert not (folder / f"{stage}.done").exists()
    done = run_main(folder, environment, "--config.sample.temperature=0.9")
    assert done.code == 1
    assert "sample.temperature was 0.7 and is now 0.9" in done.err
    done = run_main(folder, environment)
    assert done.code == 0, done.err
    same_run(folder, finished.folder)


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_as_the_whole_one(
    finished, tmp_path: Path, environment
) -> None:
    folder = tmp_path / "killed"
    for stage, pattern in MOMENTS.values():
        kill_when(folder, environment, lambda pattern=pattern: any(folder.glob(pattern)))
        assert not (folder / f"{stage}.done").exists()
    done = run_main(folder, environment)
    assert done.code == 0, done.err
    same_run(folder, finished.folder)


@pytest.mark.slow
def test_two_runs_are_equal_and_two_seeds_differ(finished, tmp_path: Path, environment) -> None:
    done = run_main(tmp_path / "again", environment)
    assert done.code == 0, done.err
    same_run(tmp_path / "again", finished.folder)
    done = run_main(tmp_path / "other", environment, "--config.seed=1")
    assert done.code == 0, done.err
    ours, theirs = (shards_of(f, "samples") for f in (tmp_path / "other", finished.folder))
    assert list(ours) == list(theirs)
    assert not [name for name in ours if ours[name] == theirs[name]]
    assert results_of(tmp_path / "other")["seed"] == 1


# In a bucket


needs_gcsfs = pytest.mark.skipif(not find_spec("gcsfs"), reason="gcsfs isn't installed")


def losses(folder: Path) -> dict[str, list[Any]]:
    return {
        path.stem: [(row["step"], row["loss"]) for row in metrics.read(path)]
        for path in sorted((folder / "metrics").glob("*.jsonl"))
    }


COUNTED = """
import jax, sys
from absl import app
from gsm_verifier import main

compiled = []
jax.monitoring.register_event_listener(lambda event, **_: compiled.append(event))
try:
    app.run(main.main)
finally:
    for name in ("compile_requests_use_cache", "cache_hits"):
        print(name, compiled.count(f"/jax/compilation_cache/{name}"))
"""


@pytest.mark.slow
def test_a_second_start_compiles_nothing(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    environment |= {"XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONPATH": str(REPOSITORY)}
    counts = []
    for folder in ("first", "second"):
        words = command(tmp_path / folder, "--stages=prepare,pretrain")
        words[1:3] = ["-c", COUNTED]
        done = subprocess.run(
            words, env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=TIMEOUT
        )
        assert done.returncode == 0, done.stderr
        counts.append([int(line.split()[1]) for line in done.stdout.splitlines()[-2:]])
    (asked, hits), again = counts
    assert hits < asked / 2
    assert again == [asked, asked]


@needs_gcsfs
def test_a_run_in_a_bucket_is_the_same_run(finished, tmp_path: Path, environment) -> None:
    with bucket.serve() as server:
        environment = environment | server.environment
        done = run_main("gs://bucket/run", environment)
        assert done.code == 0, done.err
        assert done.out.splitlines()[-1] == "report: gs://bucket/run/report.html"
        server.save(tmp_path)
        before = dict(server.objects)
        done = run_main("gs://bucket/run", environment, "--config.seed=1")
        assert done.code == 1
        assert "gs://bucket/run was made with another config: seed was 0" in done.err
        assert server.objects == before
    folder = tmp_path / "run"
    same_run(folder, finished.folder)
    assert losses(folder) == losses(finished.folder)
    ours, theirs = (
        {str(p.relative_to(f)) for p in [*f.glob("*"), *f.glob("*/*")] if p.is_file()}
        for f in (folder, finished.folder)
    )
    assert ours == theirs
    assert (folder / "pretrained/training/15/_CHECKPOINT_METADATA").is_file()
    assert any((folder / "metrics/tensorboard/verifier").iterdir())


@needs_gcsfs
@pytest.mark.slow
def test_a_run_killed_in_a_bucket_goes_on_and_is_read(
    finished, tmp_path: Path, environment
) -> None:
    with bucket.serve() as server:
        environment = environment | server.environment
        moments = "pretrained/training/5/commit_success.txt samples/train/00000-of-00003.parquet"
        for name in moments.split():
            moment = functools.partial(server.objects.__contains__, f"run/{name}")
            kill_when("gs://bucket/run", environment, moment, tmp_path / "log")
        first = next(line for line in (tmp_path / "log").read_text().splitlines() if "%" in line)
        assert re.search(r"pretrain: .* ([5-9]|1\d)/", first)
        done = run_main("gs://bucket/run", environment)
        assert done.code == 0, done.err
        server.save(tmp_path)
        same_run(tmp_path / "run", finished.folder)
        assert losses(tmp_path / "run") == losses(finished.folder)

        def call(module: str, *words: Any) -> SimpleNamespace:
            return subprocess.run(
                [sys.executable, "-m", f"gsm_verifier.{module}", *map(str, words)],
                env=environment,
                cwd=REPOSITORY,
                capture_output=True,
                text=True,
                timeout=TIMEOUT,
            )

        compared = call("compare", "gs://bucket/run", finished.folder)
        assert "N = 10 | run | whole | mean |" in compared.stdout, compared.stderr
        wrote = call("export", "--run=gs://bucket/run", f"--to={tmp_path / 'hf'}")
        assert (tmp_path / "hf/model.safetensors").is_file(), wrote.stderr
        refused = call("export", "--run=gs://bucket/run", "--to=gs://bucket/hf")
        assert refused.returncode == 1
        assert "write to a folder of this machine" in refused.stderr


def test_runs_are_compared_in_one_table(finished, tmp_path: Path) -> None:
    lines = compare.table([finished.folder, finished.folder]).splitlines()
    assert lines[0] == "| right, % [95 % interval], N = 10 | whole | whole | mean |"
    results = results_of(finished.folder)
    (majority,) = [row for row in results["accuracy"]["majority"] if row["n"] == 10]
    mean = f"{100 * majority['value']:.1f}"
    (line,) = [line for line in lines if line.startswith("| majority vote |")]
    cell = f"{mean} [{100 * majority['low']:.1f}, {100 * majority['high']:.1f}]"
    assert line == f"| majority vote | {cell} | {cell} | {mean} |"
    assert any(line.startswith("| verifier, best of N less finetuning baseline") for line in lines)
    assert compare.table([finished.folder]).splitlines()[0].endswith("| whole |")
    other = tmp_path / "other"
    other.mkdir()
    for key, means in (("seed", True), ("verify", False)):  # of seeds, not of settings
        config = results["config"] | {key: 7}
        (other / "results.json").write_text(json.dumps(results | {"config": config}))
        head = compare.table([finished.folder, other]).splitlines()[0]
        assert head.endswith("| mean |") == means
    copy = tmp_path / "seed-7.json"
    copy.write_text(json.dumps(results))
    assert (
        compare.table([finished.folder, copy]).splitlines()[0].endswith("| whole | seed-7 | mean |")
    )
    with pytest.raises(ValueError, match="holds no results"):
        compare.table([tmp_path])
