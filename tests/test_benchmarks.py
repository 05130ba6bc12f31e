"""The benchmarks run from end to end on a tiny model; how fast is nobody's business here."""

import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from conftest import make_config
from jax.sharding import Mesh

from benchmarks import sampling, training
from benchmarks.contest import Result
from benchmarks.samplers import TEMPERATURE
from gsm_verifier.data import problems, synthetic
from gsm_verifier.model import cpu_kernels, hf, transformer
from gsm_verifier.text.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
PEER = "transformers"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, mesh: Mesh) -> list[str]:
    """The options that name a tiny model and some problems."""
    folder = tmp_path_factory.mktemp("benchmarks")
    for split, size in (("test", 2), ("train", 60)):
        found = synthetic.generate(split, size, seed=0, difficulty=1)
        problems.save(found, folder / "data" / f"{split}.jsonl")
    tokenizer = Tokenizer.train([f"{p.question}\n{p.solution}" for p in found], 320)  # of train
    config = make_config("llama", text_size=tokenizer.size, max_length=1024)
    hf.save(folder / "model", config, transformer.init(config, jax.random.key(0), mesh), tokenizer)
    return ["--model", str(folder / "model"), "--data", str(folder / "data")]


def told(program: str, *options: str) -> dict[str, Any]:
    """The one line a benchmark prints."""
    rounds = ["--rounds", "1"] if program != "records" else []
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{program}", *rounds, *options],
        cwd=ROOT,
        env=os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    [line] = done.stdout.splitlines()
    found = json.loads(line)
    assert found["benchmark"] == program
    assert not any(str(value).startswith("/") for value in found["arguments"].values())
    return found


def assert_stands(found: dict[str, Any]) -> None:
    """Every contender has its speed and memory; ours stands to the roofline and to a peer."""
    for one in found["contenders"].values():
        speed = one["tokens_per_s"]
        assert 0 < speed["low"] <= speed["median"] <= speed["high"]
        assert one["memory_mib"] > 10
    assert found["ratio_to_roofline"] > 0
    assert found["roofline"]["tokens_per_s"] > 0
    assert (found["ratio_to_best_peer"] is None) == (found["best_peer"] is None)


SMALL = ["--questions", "2", "--completions", "3", "--tokens", "8", "--dtype", "float32"]


def test_roofline(folders: list[str]) -> None:
    found = told("roofline", *folders, "--rows", "4")
    assert found["gb_per_s"] > 0
    assert all(rate > 0 for rate in found["gflops"].values())
    assert {shape.split("x")[0] for shape in found["gflops"]} == {"4"}


def test_sampling(folders: list[str]) -> None:
    found = told("sampling", *folders, *SMALL)
    assert_stands(found)
    for one in found["contenders"].values():
        assert one["mean_tokens"] == 8
        assert one["distinct"] == 1
        assert abs(one["improbability"]) < 4


def test_sampling_that_stops_when_it_stops(folders: list[str]) -> None:
    ours = ["ours", "ours_without_calculator"]
    found = told("sampling", *folders, *SMALL, "--real", "--in-flight", "1", "--contenders", *ours)
    assert_stands(found)
    assert list(found["contenders"]) == ours
    assert found["calculator_cost"] < 1
    assert all(0 < one["useful"] <= 1 for one in found["contenders"].values())


WORDS = 4  # that the made-up model below knows, the first nine times in ten


def judged(name: str, folders: list[str], completions: list[list[list[int]]]) -> dict[str, Any]:
    """What `benchmarks.sampling` says of completions by a model that mostly draws one word."""
    _, model, _, data = folders
    args = Namespace(
        model=model, data=data, real=False, questions=2, completions=50, tokens=8, rounds=1
    )
    logits_V = np.log([0.9, 0.1 / 3, 0.1 / 3, 0.1 / 3]) * TEMPERATURE
    result = Result([1.0], [1.0], [{"completions": completions}], first=1.0, memory=1.0)
    return sampling.judged(name, args, result, lambda ids: np.tile(logits_V, (len(ids), 1)))


@pytest.mark.parametrize("name", ["ours", "transformers"])
def test_only_the_work_that_was_asked_for_counts(
    name: str, folders: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    fine = rng.choice(WORDS, (2, 50, 8), p=[0.9, 0.1 / 3, 0.1 / 3, 0.1 / 3]).tolist()
    assert abs(judged(name, folders, fine)["improbability"]) < 4
    short, few, same = (json.loads(json.dumps(fine)) for _ in range(3))
    short[1][3].pop()
    few[0].pop()
    same[1] = [same[1][0]] * 50
    for wrong, why in ((short, "7 tokens, not 8"), (few, "49, 50"), (same, "all the same")):
        with pytest.raises(SystemExit, match=why):
            judged(name, folders, wrong)
    even = rng.choice(WORDS, (2, 50, 8)).tolist()  # as if drawn at another temperature
    if name == "ours":
        with pytest.raises(SystemExit, match="standard deviations from the model's"):
            judged(name, folders, even)
    else:
        assert judged(name, folders, even)["improbability"] < -sampling.IMPROBABLE
        assert "standard deviations" in capsys.readouterr().err


def test_scoring(folders: list[str]) -> None:
    found = told("scoring", *folders, *SMALL, "--row-tokens", "512")
    assert_stands(found)
    assert all(one["difference"] < 1e-4 for one in found["contenders"].values())


def test_training(folders: list[str]) -> None:
    sizes = ["--row-tokens", "512", "--batch-tokens", "1024", "--peer-length", "64"]
    names = ["ours", PEER, "ours_trees", "ours_branch_a_row"]  # compiling takes a minute
    found = told("training", *folders, *SMALL, *sizes, "--contenders", *names)
    assert_stands(found)
    assert found["gradient_difference"] < 1e-4
    assert found["trees_time_ratio"] > 0


@pytest.mark.parametrize("apart", [1e-3, np.nan])
def test_other_gradients_end_the_command(apart: float) -> None:
    gradient = {"w": np.ones(4, np.float32)}
    assert training.agreeing(gradient, gradient) == 0
    with pytest.raises(SystemExit, match="its gradient differs"):
        training.agreeing({"w": gradient["w"] + np.float32(apart)}, gradient)


def test_records(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    parts = ["samples", "score", "label", "trees", "rank", "report"]
    sizes = ["--problems", "5", "--completions", "6", "--shard-problems", "2"]
    found = told("records", *sizes, "--folder", str(folder), "--parts", *parts)
    assert found["rows"] == 30
    assert list(found["parts"]) == parts
    assert all(part["memory_mib"] > 10 for part in found["parts"].values())
    assert {kind: disk["files"] for kind, disk in found["disk"].items()} == {
        "samples": 3,
        "labels": 3,
        "scores": 3,
    }
    assert json.loads((folder / "results.json").read_bytes())["splits"]["test"]["samples"] == 6


@pytest.mark.slow
def test_no_stage_holds_all_completions() -> None:
    """Four times as many, in shards of the same size: as objects they would be 150 MiB more."""
    parts = ["samples", "score", "label", "rank"]
    few, many = (
        told("records", "--problems", problems, "--completions", "500", "--parts", *parts)["parts"]
        for problems in ("100", "400")
    )
    for part in parts:
        assert many[part]["memory_mib"] - few[part]["memory_mib"] < 50, part


def test_scaling() -> None:
    """A device's share doesn't grow along the data axis; only gradients are sent, around a ring."""
    command = [sys.executable, "-m", "benchmarks.scaling", "--config", "configs/quickstart.py:tiny"]
    command += ["--devices", "2", "4"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    two, four = (json.loads(line)["programs"] for line in done.stdout.splitlines())
    for name, program in two.items():
        assert four[name]["gflop"] == program["gflop"]
        assert four[name]["memory_mib"] < 1.1 * program["memory_mib"]
        if name != "finetune":
            assert sum(four[name]["sent_mib"].values()) < 0.001  # a flag
    sent = [found["finetune"]["sent_mib"]["all-reduce"] for found in (two, four)]
    assert sent[1] / sent[0] == pytest.approx((2 * 3 / 4) / (2 * 1 / 2), rel=0.01)


def test_slots(folders: list[str]) -> None:
    """Room for a fifth makes some wait: more steps, of which fewer are useful."""
    sizes = ["--problems", "4", "--completions", "12", "--prompts", "2", "--slots", "6"]
    command = [sys.executable, "-m", "benchmarks.slots", *folders[2:], *sizes, "--tokens", "256"]
    done = subprocess.run(
        [*command, "--kept", "1.0", "0.2"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    full, less = map(json.loads, done.stdout.splitlines())
    assert full["positions_a_slot"] == 256
    assert less["positions_a_slot"] < 60
    assert full["steps"] < less["steps"]
    assert 1 > full["useful"] > less["useful"] > 0
    tokens = [found["useful"] * found["steps"] for found in (full, less)]
    assert tokens[0] == pytest.approx(tokens[1], rel=0.01)


@pytest.mark.skipif(not cpu_kernels.available(), reason="no compiler")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kernels(dtype: str) -> None:
    command = [sys.executable, "-m", "benchmarks.cpu_kernels", "--rounds", "1", "--calls", "1"]
    command += ["--dtype", dtype]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found.pop("dtype") == dtype
    tiles = dtype == "bfloat16" and cpu_kernels.has_tiles()
    assert ("products" in found) == tiles
    for work in found.values():
        assert set(work) == {"kernel", "jax"}
        assert all(one["ms"] > 0 for one in work.values())


def test_a_contender_nobody_knows_is_refused(folders: list[str]) -> None:
    command = [sys.executable, "-m", "benchmarks.scoring", *folders, "--contenders", "abacus"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "abacus" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("program", ["sampling", "scoring", "training", "roofline", "slots"])
def test_a_folder_without_the_files_is_refused(program: str, tmp_path: Path) -> None:
    options = ["--data", str(tmp_path)]
    if program == "roofline":
        options = ["--model", str(tmp_path)]
    command = [sys.executable, "-m", f"benchmarks.{program}", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert f"{options[0]}: there is no {tmp_path}" in done.stderr
    assert "Traceback" not in done.stderr
