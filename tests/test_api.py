"""A run, made by the command, loaded again in three lines; and its exported folders."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gsm_verifier import api, export, records
from gsm_verifier.data import problems
from gsm_verifier.model import hf
from gsm_verifier.records import Completion, Problem, Score

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work directory of the tiny quickstart."""
    folder = tmp_path_factory.mktemp("run")
    command = [sys.executable, "-m", "gsm_verifier.main", f"--workdir={folder}"]
    command += ["--config=configs/quickstart.py:tiny"]
    command += ["--stages=prepare,pretrain,finetune,sample,label,verify,score"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="session")
def generator(run: Path) -> api.Generator:
    return api.load(run / "generator")


@pytest.fixture(scope="session")
def verifier(run: Path) -> api.Verifier:
    return api.load(run / "verifier")


@pytest.fixture(scope="session")
def problem(run: Path) -> Problem:
    return problems.load(run / "problems", "test")[0]


def test_stages_load_as_what_they_are(run: Path) -> None:
    assert isinstance(api.load(run / "verifier"), api.Verifier)
    for path in (run, run / "generator", run / "baseline", run / "pretrained"):
        assert isinstance(api.load(path), api.Generator)


def test_logits_are_causal_and_of_the_text_only(generator: api.Generator) -> None:
    ids = generator.tokenizer.encode("Ann has 12 apples.\n")
    logits = generator.logits(ids)
    assert logits.shape == (len(ids), generator.config.text_size)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(generator.logits(ids[:3]), logits[:3], atol=1e-5)


@pytest.mark.parametrize("ids", [[], [0] * 769, [-1], [10_000]])
def test_what_are_no_token_ids_is_refused(ids: list[int], generator: api.Generator) -> None:
    with pytest.raises(ValueError, match="token id"):
        generator.logits(ids)


def test_samples_are_many_numbered_and_of_the_seed(
    generator: api.Generator, problem: Problem
) -> None:
    found = generator.sample(problem.question, 11, max_tokens=20)
    assert [c.sample for c in found] == list(range(11))
    assert all(c.text == generator.tokenizer.decode(c.tokens) for c in found)
    assert len({c.text for c in found}) > 1
    assert found == generator.sample(problem.question, 11, max_tokens=20)
    other = generator.sample(problem.question, 11, max_tokens=20, seed=1)
    assert [c.text for c in found] != [c.text for c in other]
    assert generator.sample(problem.question, 0) == []


@pytest.mark.parametrize(
    "word", [dict(temperature=-1.0), dict(top_p=0.0), dict(max_tokens=0), dict(kept_share=0.0)]
)
def test_what_the_command_refuses_is_refused(word: dict, generator: api.Generator) -> None:
    with pytest.raises(ValueError, match=rf"config\.sample\.{next(iter(word))}="):
        generator.sample("1 + 1?", **word)


def test_one_text_is_not_several(verifier: api.Verifier) -> None:
    with pytest.raises(ValueError, match="give a list"):
        verifier.score("1 + 1?", "#### 2")


def test_greedy_samples_are_the_run_s(run: Path, problem: Problem) -> None:
    recorded = {c.problem: c for c in records.read_all(run / "samples/greedy", Completion)}
    [greedy] = api.load(run / "baseline").sample(problem.question, temperature=0.0)
    assert greedy.tokens == recorded[problem.id].tokens
    assert greedy.text == recorded[problem.id].text


def test_values_are_the_run_s(run: Path, verifier: api.Verifier, problem: Problem) -> None:
    scores = [s for s in records.read_all(run / "scores/test", Score) if s.problem == problem.id]
    samples = [
        c for c in records.read_all(run / "samples/test", Completion) if c.problem == problem.id
    ]
    assert len(samples) == len(scores) == 10
    found = verifier.values(problem.question, samples)
    for (ids, values), sample, recorded in zip(found, samples, scores, strict=True):
        assert ids == sample.tokens
        np.testing.assert_allclose(values, recorded.values, atol=1e-5)
    np.testing.assert_allclose(
        verifier.score(problem.question, samples), [s.score for s in scores], atol=1e-5
    )


def test_texts_are_scored_as_whole_solutions(verifier: api.Verifier, problem: Problem) -> None:
    [(ids, values)] = verifier.values(problem.question, [problem.solution])
    assert ids[-1] == verifier.tokenizer.end
    assert verifier.tokenizer.decode(ids) == problem.solution
    [score] = verifier.score(problem.question, [problem.solution])
    assert verifier.options.score.aggregate == "min"
    assert score == pytest.approx(min(values))
    assert verifier.score(problem.question, []) == []
    with pytest.raises(ValueError, match="from 1 to 768"):
        verifier.score(problem.question, ["1 + " * 500])


def test_an_exported_folder_is_the_same_model(
    run: Path, generator: api.Generator, verifier: api.Verifier, problem: Problem, tmp_path: Path
) -> None:
    for name in ("generator", "verifier"):
        export.export(run, name, tmp_path / name, "float32")
    ids = generator.tokenizer.encode(problem.question)
    again = api.load(tmp_path / "generator")
    assert isinstance(again, api.Generator)
    np.testing.assert_allclose(again.logits(ids), generator.logits(ids), atol=1e-5)
    for key in hf.SAMPLING:
        assert again.options.sample[key] == generator.options.sample[key]
    assert again.options.sample.max_tokens == 48
    judge = api.load(tmp_path / "verifier")
    assert isinstance(judge, api.Verifier)
    assert judge.options.score.aggregate == verifier.options.score.aggregate == "min"
    [(_, expected)] = verifier.values(problem.question, [problem.solution])
    [(_, values)] = judge.values(problem.question, [problem.solution])
    np.testing.assert_allclose(values, expected, atol=1e-5)


def test_a_baseline_is_exported_as_greedy_and_never_over_anything(
    run: Path, tmp_path: Path
) -> None:
    export.export(run, "baseline", tmp_path, "float16")  # an empty folder will do
    written = json.loads((tmp_path / hf.GENERATION).read_bytes())
    assert (written["do_sample"], written["max_new_tokens"]) == (False, 48)
    before = (tmp_path / hf.WEIGHTS).stat().st_mtime_ns
    for to in (tmp_path, tmp_path / hf.CONFIG):
        with pytest.raises(ValueError, match="another folder, or delete it"):
            export.export(run, "generator", to, "float32")
    assert (tmp_path / hf.WEIGHTS).stat().st_mtime_ns == before
    (tmp_path / hf.GENERATION).write_text('{"do_sample": true, "temperature": -1}')
    with pytest.raises(ValueError, match=r"generation_config\.json: config\.sample\.temperature"):
        api.load(tmp_path)


def test_a_run_of_before_a_key_existed_has_its_default(
    run: Path, generator: api.Generator, problem: Problem, tmp_path: Path
) -> None:
    old = tmp_path / "run"
    shutil.copytree(run, old)
    keys = json.loads((old / "config.json").read_bytes())
    del keys["sample"]["kept_share"]
    (old / "config.json").write_text(json.dumps(keys))
    [found] = api.load(old / "generator").sample(problem.question, temperature=0.0, max_tokens=8)
    [expected] = generator.sample(problem.question, temperature=0.0, max_tokens=8)
    assert found == expected


@pytest.mark.parametrize(
    ("name", "epochs", "message"),
    [
        ("baseline", 0.0, r"has no baseline: its config\.baseline\.epochs is 0"),
        ("baseline", 3.0, "isn't there: run the stage that makes it"),
        ("verifier", 3.0, "isn't there: run the stage that makes it"),
    ],
)
def test_a_model_that_is_not_there_is_told_and_nothing_made(
    name: str, epochs: float, message: str, run: Path, tmp_path: Path
) -> None:
    for path in run.glob("*.json"):
        shutil.copy(path, tmp_path)
    keys = json.loads((run / "config.json").read_bytes())
    keys["baseline"]["epochs"] = epochs
    (tmp_path / "config.json").write_text(json.dumps(keys))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=message):
        api.load(tmp_path / name)
    with pytest.raises(ValueError, match=message):
        export.export(tmp_path, name, tmp_path / "exported", "float32")
    assert sorted(tmp_path.iterdir()) == before


def test_a_mesh_can_split_the_parameters(generator: api.Generator, run: Path) -> None:
    split = api.load(run / "generator", data=2, fsdp=4, tensor=1)
    np.testing.assert_allclose(split.logits([1, 2, 3]), generator.logits([1, 2, 3]), atol=1e-4)


@pytest.mark.parametrize("name", ["", "samples"])
def test_what_is_no_model_is_refused(name: str, run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="neither a run's"):
        api.load(run / name if name else tmp_path)
    with pytest.raises(ValueError, match="no such folder"):
        api.load(tmp_path / "nothing" / "of" / "it")
