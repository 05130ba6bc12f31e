"""Many processes make what one makes, on every mesh, and none is left behind."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from gsm_verifier import metrics, records, sharding
from gsm_verifier.records import Completion, Label, Score

REPOSITORY = Path(__file__).resolve().parents[1]
DEVICES = 4  # of all processes together
DATA, FSDP, MIXED = (4, 1, 1), (1, 4, 1), (1, 2, 2)  # data, fsdp, tensor
# Heads for every device, and some shards for every process.
SIZES = ["--config.model.heads=8", "--config.model.kv_heads=4", "--config.model.head_size=8"]
SIZES += ["--config.sample.train_problems=16"]
SECONDS = 580


@pytest.fixture(scope="session")
def environment(tmp_path_factory) -> dict[str, str]:
    """Programs compiled by one run are there for the next; proxies don't know of localhost."""
    compiled = os.environ.get("JAX_COMPILATION_CACHE_DIR") or tmp_path_factory.mktemp("compiled")
    return {k: v for k, v in os.environ.items() if "proxy" not in k.lower()} | {
        "JAX_COMPILATION_CACHE_DIR": str(compiled),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        # A busy machine may keep one device's thread from a collective for longer than 40 s.
        "XLA_FLAGS": "--xla_cpu_collective_call_terminate_timeout_seconds=500",
    }


@dataclass
class Together:
    """Processes of one run, each with a log of its own."""

    processes: list[subprocess.Popen[bytes]]
    logs: list[Path]

    def told(self) -> str:
        return "\n".join(path.read_text()[-4000:] for path in self.logs)

    def codes(self, seconds: float = SECONDS) -> list[int]:
        """Exit codes, once all have ended."""
        deadline = time.monotonic() + seconds
        try:
            return [p.wait(timeout=deadline - time.monotonic()) for p in self.processes]
        finally:
            for process in self.processes:
                process.kill()

    def wait(self, moment: Callable[[], bool] | None) -> None:
        """Until a moment, None: the end; or until one has ended, and with it all."""
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline and all(p.poll() is None for p in self.processes):
            if moment and moment():
                return
            time.sleep(0.01)
        self.codes(deadline - time.monotonic())

    def missed(self) -> bool:
        """Were its processes further apart than the 30 s that gloo waits for one?"""
        return any("Gloo context initialization failed" in log.read_text() for log in self.logs)


def start(
    command: list[str], count: int, folder: Path, environment: dict[str, str], *last: str
) -> Together:
    """Start `count` processes of a command, which meet if there are several.

    Args:
      last: flags of the last process alone.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)
    run = Together([], [folder / f"{index}-of-{count}.log" for index in range(count)])
    for index, log in enumerate(run.logs):
        meet = [f"--coordinator=127.0.0.1:{port}", f"--processes={count}", f"--process={index}"]
        with open(log, "wb") as out:
            run.processes.append(
                subprocess.Popen(
                    [*command, *(meet if count > 1 else []), *(last if index == count - 1 else [])],
                    env=environment,
                    cwd=REPOSITORY,
                    stdout=out,
                    stderr=out,
                )
            )
    return run


def main(
    folder: Path,
    count: int,
    environment: dict[str, str],
    *flags: str,
    mesh: tuple[int, int, int] = DATA,
    moment: Callable[[], bool] | None = None,
    last: tuple[str, ...] = (),
) -> Together:
    """A run that has ended, or come to a moment; one whose processes missed each other goes on."""
    command = [sys.executable, "-m", "gsm_verifier.main", "--config=configs/quickstart.py:tiny"]
    command += [f"--config.mesh.cpu_devices={DEVICES // count}", f"--workdir={folder}", *SIZES]
    command += [f"--config.mesh.{a}={n}" for a, n in zip(sharding.AXES, mesh, strict=True)]
    for _ in range(3):
        run = start([*command, *flags], count, folder.parent / "logs", environment, *last)
        run.wait(moment)
        if not run.missed():
            break
    return run


@pytest.fixture(scope="session")
def alone(tmp_path_factory, environment) -> Path:
    """The run of one process with one device."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    run = main(folder, 1, environment, "--config.mesh.cpu_devices=1", mesh=(1, 1, 1))
    assert run.codes() == [0], run.told()
    return folder


def results_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_bytes())


def assert_same_losses(folder: Path, other: Path, *names: str) -> None:
    """To rounding: sums over devices are added up in another order where they are another's."""
    for name in names:
        ours, theirs = (metrics.read(f / "metrics" / f"{name}.jsonl") for f in (folder, other))
        assert [row["step"] for row in ours] == [row["step"] for row in theirs]
        for a, b in zip(ours, theirs, strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


def assert_same_completions(folder: Path, other: Path, split: str) -> None:
    """Likelihoods agree to rounding."""
    ours, theirs = (records.read_all(f / "samples" / split, Completion) for f in (folder, other))
    for a, b in zip(ours, theirs, strict=True):
        assert (a.problem, a.sample, a.tokens) == (b.problem, b.sample, b.tokens)
        assert (a.text, a.forced, a.finished) == (b.text, b.forced, b.finished)
        assert a.logprob == pytest.approx(b.logprob, rel=1e-5)


def assert_same_results(folder: Path, other: Path) -> None:
    """The same completions, labels and results; values agree to rounding."""
    for split in ("train", "heldout", "test", "greedy"):
        assert_same_completions(folder, other, split)
        if split != "heldout":
            ours, theirs = (records.read_all(f / "labels" / split, Label) for f in (folder, other))
            assert ours == theirs
    ours, theirs = (records.read_all(f / "scores/test", Score) for f in (folder, other))
    for a, b in zip(ours, theirs, strict=True):
        assert (a.problem, a.sample) == (b.problem, b.sample)
        assert a.values == pytest.approx(b.values, abs=1e-5)
    ours, theirs = map(results_of, (folder, other))
    assert set(ours) == set(theirs)
    for key in set(ours) - MADE_BY:
        assert_close(ours[key], theirs[key])


MADE_BY = {"config", "timing", "resumed", "computed"}  # how results were made


def assert_close(ours: Any, theirs: Any) -> None:
    """Values of JSON, numbers to rounding."""
    if isinstance(ours, dict):
        assert list(ours) == list(theirs)
        ours, theirs = list(ours.values()), list(theirs.values())
    if isinstance(ours, list):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert_close(a, b)
    else:
        assert ours == (pytest.approx(theirs, abs=1e-4) if isinstance(theirs, float) else theirs)


def assert_clean(folder: Path) -> None:
    left = [path.name for path in folder.rglob("*") if path.name.endswith((".tmp", ".started"))]
    assert not left


MADE = {
    "prepare": ["problems", "tokenizer.json", "tokenizer_config.json", "model.json"],
    "pretrain": ["pretrained"],
    "finetune": ["generator", "baseline"],
    "sample": ["samples/train", "samples/heldout"],
    "label": ["labels/train", "labels/heldout"],
    "verify": ["verifier"],
}


def copy_made(source: Path, folder: Path, *stages: str) -> None:
    """Begin a run with what stages of another one have made."""
    folder.mkdir()
    for name in [name for stage in stages for name in [*MADE[stage], f"{stage}.done"]]:
        copy = shutil.copytree if (source / name).is_dir() else shutil.copy
        copy(source / name, folder / name)


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "copied"), [(DATA, []), (FSDP, ["prepare", "finetune"])], ids=str)
def test_two_processes_make_what_one_makes(
    mesh: tuple[int, int, int], copied: list[str], alone: Path, tmp_path: Path, environment
) -> None:
    """All of it; then on another mesh of the same generator, and a verifier anew.

    (A difference in the last bit of a generator's weights may turn a draw, though it is rare.)
    """
    folder = tmp_path / "run"
    copy_made(alone, folder, *copied)
    run = main(folder, 2, environment, mesh=mesh)
    assert run.codes() == [0, 0], run.told()
    assert_same_results(folder, alone)
    assert_same_losses(folder, alone, "pretrained", "verifier")
    if not copied:
        assert_same_losses(folder, alone, "generator", "baseline")
    assert_clean(folder)
    assert "report: " in run.logs[0].read_text()
    assert "report: " not in run.logs[1].read_text()  # the first speaks for all


@pytest.mark.slow
def test_two_processes_that_split_every_product_agree_with_one(
    alone: Path, tmp_path: Path, environment
) -> None:
    """Sums are added up in another order, which now and then turns a draw (1 of 164 was seen).

    In sampling both processes hold every slot, and one of them speaks; then they share the values.
    """
    folder = tmp_path / "run"
    copy_made(alone, folder, "prepare", "finetune", "sample", "label", "verify")
    run = main(folder, 2, environment, "--config.mesh.sampling=tensor", mesh=MIXED)
    assert run.codes() == [0, 0], run.told()
    assert_same_losses(folder, alone, "pretrained")
    ours, theirs = (records.read_all(f / "samples/test", Completion) for f in (folder, alone))
    same = [a.tokens == b.tokens for a, b in zip(ours, theirs, strict=True)]
    assert sum(same) >= 0.9 * len(same)
    values = [records.read_all(f / "scores/test", Score) for f in (folder, alone)]
    for a, b, alike in zip(*values, same, strict=True):
        assert (a.problem, a.sample) == (b.problem, b.sample)
        assert not alike or a.values == pytest.approx(b.values, abs=1e-5)
    assert_clean(folder)


def stop(
    folder: Path, count: int, environment: dict[str, str], *flags: str, mesh: tuple[int, int, int]
) -> None:
    """Pretrain some steps, and ask the last process alone to end: all save the same step."""

    def steps() -> int:
        return len(metrics.read(folder / "metrics/pretrained.jsonl"))

    before = steps()
    run = main(folder, count, environment, *flags, mesh=mesh, moment=lambda: steps() > before)
    run.processes[-1].terminate()
    assert run.codes() == [128 + signal.SIGTERM] * count, run.told()
    told = [re.findall(r"stopped and saved at step (\d+);", log.read_text()) for log in run.logs]
    assert told == [[str(steps())]] * count
    assert (folder / "pretrained/training" / told[0][0]).is_dir()
    assert not (folder / "pretrain.done").exists()


@pytest.mark.slow
def test_a_run_stopped_by_one_sigterm_goes_on_in_any_processes_and_mesh(
    alone: Path, tmp_path: Path, environment
) -> None:
    folder = tmp_path / "run"
    stages = "--stages=prepare,pretrain"
    stop(folder, 2, environment, stages, mesh=DATA)
    stop(folder, 1, environment, stages, mesh=MIXED)
    run = main(folder, 2, environment, stages, mesh=FSDP)
    assert run.codes() == [0, 0], run.told()
    assert_same_losses(folder, alone, "pretrained")
    assert_clean(folder)


@pytest.mark.slow
def test_a_stopped_or_dead_process_ends_the_other_and_one_ends_the_run(
    alone: Path, tmp_path: Path, environment
) -> None:
    folder = tmp_path / "run"
    copy_made(alone, folder, "prepare", "pretrain", "finetune")
    stages = "--stages=sample,label"

    def shards() -> int:
        return len(list(folder.glob("samples/train/*.parquet")))

    run = main(folder, 2, environment, stages, moment=lambda: shards() > 0)
    run.processes[0].terminate()
    assert run.codes(60) == [128 + signal.SIGTERM] * 2, run.told()
    assert all("whole shards are kept" in log.read_text() for log in run.logs)

    for victim in (1, 0):  # the second is the one at whose address they met
        before = shards()
        run = main(folder, 2, environment, stages, moment=lambda before=before: shards() > before)
        run.processes[victim].kill()
        codes = run.codes(30)
        assert codes[victim] == -signal.SIGKILL, run.told()
        assert codes[1 - victim] not in (0, -signal.SIGKILL), run.told()
        assert re.search("another (task|process has) died", run.logs[1 - victim].read_text())
        assert not (folder / "sample.done").exists()

    run = main(folder, 1, environment, stages, mesh=FSDP)
    assert run.codes() == [0], run.told()
    for split in ("train", "heldout"):
        assert_same_completions(folder, alone, split)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("last", "message"),
    [
        (
            ("--config.sample.temperature=0.5",),
            "process 1 was started with --config.sample.temperature=0.5, process 0 with 0.7",
        ),
        (("--config.mesh.fsdp=2",), "process 1 was started with --config.mesh.fsdp=2"),
        (("--workdir={}",), "process 1 doesn't see what process 0 writes in"),
    ],
    ids=["key", "mesh", "folder"],
)
def test_processes_that_were_told_different_things_are_refused(
    last: tuple[str, ...], message: str, tmp_path: Path, environment
) -> None:
    folder = tmp_path / "run"
    last = tuple(word.format(tmp_path / "other") for word in last)
    run = main(folder, 2, environment, "--stages=prepare", last=last)
    assert run.codes() == [1, 1], run.told()
    assert all(f"gsm_verifier: {message}" in log.read_text() for log in run.logs), run.told()
    assert not (folder / "prepare.started").exists()
    assert not list(folder.glob(".together*"))


TOGETHER = """
import sys
import jax
import numpy as np
from gsm_verifier import processes, sharding

jax.config.update("jax_num_cpu_devices", 2)
told = dict(word.removeprefix("--").split("=") for word in sys.argv[1:])
processes.meet(told["coordinator"], int(told["processes"]), int(told["process"]))
me = jax.process_index()
assert processes.first() == (me == 0)
assert processes.largest(me, 5 - me) == [1, 5]

rows = np.arange(8 * 3).reshape(8, 3)
for sizes, index, count, speaks, own in [
    ((4, 1, 1), me, 2, True, rows[4 * me : 4 * me + 4]),
    ((2, 1, 2), me, 2, True, rows[4 * me : 4 * me + 4]),
    ((1, 2, 2), me, 2, True, rows[4 * me : 4 * me + 4]),
    ((1, 1, 4), 0, 1, me == 0, rows),
]:
    mesh = sharding.make_mesh(*sizes)
    share = sharding.share(mesh)
    assert (share.index, share.count, share.speaks) == (index, count, speaks), (sizes, share)
    np.testing.assert_array_equal(rows[share.rows(8)], own)
    whole = sharding.to_global(mesh, (None, "B"), own.T)
    assert whole.shape == (3, 8)
    np.testing.assert_array_equal(sharding.to_host(whole), own.T)
    assert int(jax.jit(lambda x: x.sum())(whole)) == rows.sum()

order = jax.devices()  # devices of different processes side by side
mesh = jax.sharding.Mesh(np.array([order[i] for i in (0, 2, 1, 3)]).reshape(4, 1, 1), sharding.AXES)
share = sharding.share(mesh)
assert share.rows(8).tolist() == [[0, 1, 4, 5], [2, 3, 6, 7]][me]
whole = sharding.to_global(mesh, "BT", rows[share.rows(8)])
np.testing.assert_array_equal(sharding.to_host(whole), rows[share.rows(8)])
assert (jax.jit(lambda x: x[4])(whole) == rows[4]).all()

try:
    sharding.share(jax.sharding.Mesh(np.array(order[:3]).reshape(3, 1, 1), sharding.AXES))
    raise AssertionError("two rows here and one there")
except ValueError as error:
    assert "unevenly" in str(error)
processes.wait_for_all("the end")
"""


def test_processes_hold_their_own_rows_and_agree(tmp_path: Path, environment) -> None:
    run = start([sys.executable, "-c", TOGETHER], 2, tmp_path, environment)
    assert run.codes(200) == [0, 0], run.told()
