"""Runs the stages in order: skips what is done, resumes what was cut, refuses a changed config."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from gsm_verifier import processes, provenance, records, storage
from gsm_verifier.config import default, leaves, validate
from gsm_verifier.stages import STAGES, Run, keys_read, refuse_unknown

METHODS = {
    "greedy": "finetuning baseline, T=0",
    "random": "one sample",
    "majority": "majority vote",
    "logprob": "likeliest sample",
    "length": "shortest sample",
    "integer_only": "integer answers only",
    "verifier": "verifier, best of N",
    "verifier_vote": "verifier, top k vote",
    "verifier_weighted": "verifier-weighted vote",
    "coverage": "coverage (any sample right)",
}

NAMED = 5  # keys that changed, of all


def run_stages(config: ConfigDict, folder: Path, names: Sequence[str]) -> None:
    """Run the named stages of a work directory, in their order.

    Of many processes all call this. They look at what is there before the first one changes it; a
    stage begins when all have finished the one before.

    Raises:
      ValueError: an unknown stage or a nonsensical config; a config that differs from the one that
        made what is in the folder; a stage before the named ones that hasn't run; processes that
        were told different things.
    """
    processes.agree(lambda: _told(config, names), folder)
    refuse_unknown(names)
    validate(config)
    for stage in STAGES:
        _refuse_change(config, folder, stage)
    first = next(i for i, name in enumerate(STAGES) if name in names)
    for name in list(STAGES)[:first]:
        if not _marker(folder, name, "done").exists():
            raise ValueError(f"stage {name} of {folder} hasn't run: run it first")
    done = {name for name in STAGES if _marker(folder, name, "done").exists()}
    processes.wait_for_all("looked around")
    if processes.first():
        whole = json.dumps(config.to_dict(), indent=1).encode()
        records.write_atomically(folder / "config.json", whole)
    run = Run(config, folder)
    for name in STAGES:
        if name in names and name not in done:
            _run_stage(run, name)
        elif name in names:
            _say(f"{name}: done before, skipped")
    if (folder / "results.json").exists():
        _say(closing_table(json.loads((folder / "results.json").read_bytes())))
    if (folder / "report.html").exists():
        _say(f"report: {folder / 'report.html'}")


def _told(config: ConfigDict, names: Sequence[str]) -> dict[str, Any]:
    """What must be the same for all processes, by the names it was given by."""
    told = {f"--config.{key}": value for key, value in leaves(config).items()}
    told |= {"--stages": names, **provenance.versions()}
    commit = provenance.commit()
    return told if commit == provenance.UNKNOWN else told | {"commit": commit}


def _run_stage(run: Run, name: str) -> None:
    stage = STAGES[name]
    _say(f"{name}: {stage.does}")
    started = _marker(run.folder, name, "started")
    resumed = started.exists()
    if processes.first():
        _write_marker(run, name, "started")
    # The first process alone looks: of a thousand, all would list a shared file system.
    before = storage.below(run.folder) if processes.first() else set()
    began = time.perf_counter()
    try:
        if processes.first() or not stage.alone:
            stage.run(run)
    except (ValueError, FileNotFoundError):
        # What made nothing, or makes it all anew, may be begun again with a mended config.
        if processes.first():
            made = resumed or storage.below(run.folder) - before
            if stage.alone or not made:
                started.unlink()
        raise
    processes.wait_for_all(f"{name} is done")
    seconds = time.perf_counter() - began
    if processes.first():
        computed = run.computed(name)
        _write_marker(run, name, "done", seconds=seconds, resumed=resumed, computed=computed)
        started.unlink()
    _say(f"{name}: {seconds:.1f} s")


def _say(text: str) -> None:
    if processes.first():
        print(text, flush=True)


def _marker(folder: Path, stage: str, state: str) -> Path:
    return folder / f"{stage}.{state}"


def _write_marker(run: Run, stage: str, state: str, **more: Any) -> None:
    marker = {
        "keys": keys_read(stage, run.config),
        "commit": provenance.commit(),
        "versions": provenance.versions(),
        **more,
    }
    path = _marker(run.folder, stage, state)
    records.write_atomically(path, json.dumps(marker, indent=1).encode())


def _refuse_change(config: ConfigDict, folder: Path, stage: str) -> None:
    """What a stage has made, or begun, must have been made with the same values."""
    for state in ("done", "started"):
        path = _marker(folder, stage, state)
        if not path.exists():
            continue
        try:
            made = dict(json.loads(path.read_bytes())["keys"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged: delete it to run its stage again") from error
        wanted = json.loads(json.dumps(keys_read(stage, config)))
        # A key that didn't exist yet had the effect of its default.
        made = {k: v for k, v in leaves(default()).items() if k in wanted} | made
        changed = [k for k in {**made, **wanted} if made.get(k) != wanted.get(k)]
        if changed:
            differences = "; ".join(
                f"{k} was {made.get(k)!r} and is now {wanted.get(k)!r}" for k in changed[:NAMED]
            )
            if len(changed) > NAMED:
                differences += f"; and {len(changed) - NAMED} keys more"
            raise ValueError(
                f"{folder} was made with another config: {differences}. Use another --workdir, or "
                f"delete in it what stage {stage} and those after it made: "
                f"{' '.join(_made_from(folder, stage))}"
            )


def _made_from(folder: Path, stage: str) -> list[str]:
    """What a stage and those after it have left in a work directory."""
    stages = list(STAGES)
    later = stages[stages.index(stage) :]
    markers = [_marker(Path(), name, state).name for name in later for state in ("started", "done")]
    files = [name for each in later for name in STAGES[each].writes.split()]
    return [name for name in markers + files if (folder / name).exists()]


def closing_table(results: dict[str, Any]) -> str:
    """Method, accuracy and 95 % interval at N = 1, 10, 100 and the largest N; k of the vote."""
    largest = results["splits"]["test"]["samples"]
    columns = sorted({n for n in (1, 10, 100, largest) if n <= largest})
    lines = [
        f"accuracy on {results['splits']['test']['problems']} test problems, % [95 % interval]",
        f"{'method':<28}" + "".join(f"{f'N = {n}':>20}" for n in columns),
    ]
    for name, rows in results["accuracy"].items():
        at = {row["n"]: row for row in rows}
        cells = "".join(f"{_cell(at.get(n)):>20}" for n in columns)
        lines.append(f"{METHODS[name]:<28}{cells}")
        ks = [f"{at[n]['k']} at N = {n}" for n in columns if "k" in at.get(n, {})]
        if ks:
            lines.append(f"  with k = {', '.join(ks)}")
    return "\n".join(lines)


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    return f"{100 * row['value']:.1f} [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"
