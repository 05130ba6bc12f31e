"""Training metrics as they come: JSONL for programs, TensorBoard for people."""

import json
from pathlib import Path
from typing import Any


class Metrics:
    """The metrics of one stage: `<folder>/<stage>.jsonl`, a row a step, and TensorBoard events."""

    def __init__(self, folder: Path, stage: str, enabled: bool = True):
        self.path = folder / f"{stage}.jsonl"
        self._enabled = enabled
        if enabled:
            from tensorboardX import SummaryWriter  # which imports torch wherever there is one

            folder.mkdir(parents=True, exist_ok=True)
            self._board = SummaryWriter(str(folder / "tensorboard" / stage))
            self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()

    def rewind(self, step: int) -> None:
        """Forget the rows after `step`: the run goes on from there."""
        if not self._enabled:
            return
        rows = [row for row in read(self.path) if row["step"] <= step]
        self._file.close()
        self._file = open(self.path, "w", encoding="utf-8")  # noqa: SIM115 - closed by close()
        for row in rows:
            self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def write(self, step: int, row: dict[str, Any]) -> None:
        if not self._enabled:
            return
        self._file.write(json.dumps({"step": step} | row) + "\n")
        self._file.flush()
        for name, value in row.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        if self._enabled:
            self._file.close()
            self._board.close()


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; none if there is no file. A torn last line is left out."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows
