"""Training metrics as they come: JSONL for programs, TensorBoard for people."""

import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gsm_verifier import storage


class Metrics:
    """The metrics of one stage: `<folder>/<stage>.jsonl`, a row a step, and TensorBoard events.

    In a bucket, where nothing can be appended to a file, rows are there after `flush` and `close`.
    """

    def __init__(self, folder: Path, stage: str, enabled: bool = True):
        self.path = folder / f"{stage}.jsonl"
        self._enabled = enabled
        if enabled:
            from tensorboardX import SummaryWriter  # which imports torch wherever there is one

            self._board = SummaryWriter(str(folder / "tensorboard" / stage))
            self._begin(read(self.path))

    def _begin(self, rows: Iterable[dict[str, Any]]) -> None:
        """Make these rows all there is, and what is written come after them."""
        text = "".join(json.dumps(row) + "\n" for row in rows)
        storage.write_atomically(self.path, text.encode())
        if storage.in_bucket(self.path):
            self._file: io.TextIOBase = io.StringIO()
            self._file.write(text)
        else:
            self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()

    def rewind(self, step: int) -> None:
        """Forget the rows after `step`: the run goes on from there."""
        if not self._enabled:
            return
        self._file.close()
        self._begin(row for row in read(self.path) if row["step"] <= step)

    def write(self, step: int, row: dict[str, Any]) -> None:
        if not self._enabled:
            return
        self._file.write(json.dumps({"step": step} | row) + "\n")
        self._file.flush()
        for name, value in row.items():
            self._board.add_scalar(name, value, step)

    def flush(self) -> None:
        """Let the file have all rows: before a checkpoint, from which a run goes on."""
        if self._enabled and isinstance(self._file, io.StringIO):
            storage.write_atomically(self.path, self._file.getvalue().encode())

    def close(self) -> None:
        if self._enabled:
            self.flush()
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
