"""One table of several runs' results, in Markdown: seeds side by side, or settings.

    python -m gsm_verifier.compare runs/quickstart runs/quickstart-1 results/quickstart/seed-2.json

A run is named by its folder, or by a copy of its results.json. Accuracies are at the largest N the
runs share; under them, the paired differences. Runs that differ in nothing but their seeds get a
column of means.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import app

from gsm_verifier import storage
from gsm_verifier.pipeline import METHODS


def table(runs: Sequence[Path]) -> str:
    """Accuracy of every method and the verifier's paired differences, a column for every run.

    Raises:
      ValueError: a run without results, or runs that share no number of samples.
    """
    results = [_read(run) for run in runs]
    ns = [{row["n"] for row in found["accuracy"]["random"]} for found in results]
    shared = set.intersection(*ns)
    if not shared:
        raise ValueError("the runs have no number of samples N in common")
    n = max(shared)
    names = [name for name in METHODS if any(name in found["accuracy"] for found in results)]
    mean = len(results) > 1 and all(_setting(r) == _setting(results[0]) for r in results)
    head = [f"right, % [95 % interval], N = {n}", *(run.name.removesuffix(".json") for run in runs)]
    head += ["mean"] * mean
    lines = [_line(*head), _line(*["---"] * len(head))]
    for name in names:
        at = 1 if name == "greedy" else n
        rows = [_at(found["accuracy"].get(name, []), n=at) for found in results]
        lines.append(_row(METHODS[name], rows, "value", "{:.1f}", mean))
    pairs = [(row["a"], row["b"]) for row in results[0]["paired"] if row["n"] == n]
    for a, b in pairs:
        rows = [_at(found["paired"], a=a, b=b, n=n) for found in results]
        name = f"{METHODS[a]} less {METHODS[b]}, paired"
        lines.append(_row(name, rows, "difference", "{:+.1f}", mean))
    return "\n".join(lines)


def _read(run: Path) -> dict[str, Any]:
    file = run if run.suffix == ".json" else run / "results.json"
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{run} holds no results: {error}; finish its run") from error


def _at(rows: Sequence[dict[str, Any]], **keys: Any) -> dict[str, Any] | None:
    return next((row for row in rows if all(row[k] == v for k, v in keys.items())), None)


def _setting(results: dict[str, Any]) -> dict[str, Any]:
    """A run's config without its seeds."""
    config = {key: value for key, value in results["config"].items() if key != "seed"}
    return config | {"data": {k: v for k, v in config["data"].items() if k != "seed"}}


def _row(name: str, rows: Sequence[dict[str, Any] | None], key: str, form: str, mean: bool) -> str:
    def percent(value: float) -> str:
        return form.format(100 * value)

    cells = [
        f"{percent(row[key])} [{percent(row['low'])}, {percent(row['high'])}]" if row else ""
        for row in rows
    ]
    known = [row[key] for row in rows if row]
    return _line(name, *cells, *[percent(sum(known) / len(known))] * mean)


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def main(argv: list[str]) -> None:
    """The command; an expected error is one line."""
    if not argv[1:]:
        raise app.UsageError("name the work directories of runs, or copies of their results.json")
    try:
        print(table([storage.path(name) for name in argv[1:]]))
    except ValueError as error:
        sys.exit(f"gsm_verifier: {error}")


if __name__ == "__main__":
    app.run(main)
