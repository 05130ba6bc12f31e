"""Word problems: read, write, hold out, subsample.

On disk a problem is one line of JSON as in GSM8K: `{"question": "...", "answer": "..."}`, the
answer being the gold solution. Lines end in `\\n` alone: the texts contain U+2028, at which
`str.splitlines` would break them.
"""

import hashlib
import json
import os
from collections.abc import Sequence

from gsm_verifier import storage
from gsm_verifier.records import Problem
from gsm_verifier.text import answers

_EXAMPLE = '{"question": "...", "answer": "... #### 42"}'


def load(
    path_or_name: str | os.PathLike[str],
    split: str,
    data_dir: str | os.PathLike[str] | None = None,
) -> list[Problem]:
    """Reads the problems of one split, in the order of the file.

    A problem's id is that of its line, if it has one, else `{split}-{index:05d}`.

    Args:
      path_or_name: a folder with `<split>.jsonl`; a .jsonl file; or "gsm8k", the data of the paper
        (section 2), through `gsm_verifier.data.gsm8k` (a folder of that name is "./gsm8k").
      split: such as "train" or "test".
      data_dir: for "gsm8k" only: where TFDS keeps its datasets; None means TFDS's default.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a line is not a problem; the message names file, line, key and what to do. Further
        keys are ignored, and a question may occur twice.
    """
    if path_or_name == "gsm8k":
        from gsm_verifier.data import gsm8k  # imports TFDS, which no other source needs

        return gsm8k.load(split, data_dir)
    path = storage.path(path_or_name)
    if path.is_dir():
        path = path / f"{split}.jsonl"
    if not path.is_file():
        beside = ", ".join(sorted(p.name for p in path.parent.glob("*.jsonl"))) or "no .jsonl file"
        raise FileNotFoundError(
            f"{path} does not exist (its folder holds {beside}): give a folder with {split}.jsonl, "
            'or the name "gsm8k"'
        )
    lines = path.read_bytes().removesuffix(b"\n").split(b"\n")
    if lines == [b""]:
        raise ValueError(f"{path} is empty: write one problem a line, as {_EXAMPLE}")
    return [
        _parse(line, f"{path}, line {index + 1}", f"{split}-{index:05d}")
        for index, line in enumerate(lines)
    ]


def save(problems: Sequence[Problem], path: str | os.PathLike[str]) -> None:
    """Writes problems as GSM8K's JSON lines with a key "id" in front, all or nothing."""
    rows = [{"id": p.id, "question": p.question, "answer": p.solution} for p in problems]
    lines = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    storage.write_atomically(storage.path(path), lines)


def held_out(problems: Sequence[Problem], fraction: float) -> tuple[list[Problem], list[Problem]]:
    """Splits into (train, held out), about `fraction` of the problems being held out.

    Each problem's side follows from its id alone, so it is the same in every subset of the data,
    and a greater fraction only adds to the problems held out.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"held_out: fraction is {fraction}, must be at least 0 and less than 1")
    sides: tuple[list[Problem], list[Problem]] = ([], [])
    for problem in problems:
        sides[_hash(problem.id) < fraction * 2**256].append(problem)
    return sides


def subset(problems: Sequence[Problem], size: int, seed: int) -> list[Problem]:
    """Returns `size` problems in random order: the training-set sizes of figures 2 and 5.

    The subsets of one seed are nested, a smaller one being the beginning of a larger one.
    """
    if not 1 <= size <= len(problems):
        raise ValueError(
            f"subset: size is {size}, must be at least 1 and at most {len(problems)}, the number "
            "of problems available"
        )
    return sorted(problems, key=lambda problem: _hash(f"{seed}:{problem.id}"))[:size]


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest())


def _parse(line: bytes, where: str, number: str) -> Problem:
    """The problem of one line, `number` being its id if it has none of its own."""
    if not line.strip():
        raise ValueError(f"{where}: the line is blank; delete it")
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: byte {error.start + 1} is not UTF-8; save the file as UTF-8"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({error}); write {_EXAMPLE}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where}: not a JSON object but {type(row).__name__}; write {_EXAMPLE}")
    row = {"id": number} | row
    for key in ("id", "question", "answer"):
        if key not in row:
            raise ValueError(f'{where}: key "{key}" is missing; write {_EXAMPLE}')
        if not isinstance(row[key], str):
            raise ValueError(
                f'{where}: key "{key}" is not a string but {type(row[key]).__name__}; quote it'
            )
        if not row[key].strip():
            raise ValueError(f'{where}: key "{key}" is empty; fill it in or delete the line')
        if any("\ud800" <= character <= "\udfff" for character in row[key]):
            raise ValueError(
                f'{where}: key "{key}" has half a surrogate pair (\\ud800 to \\udfff), which is no '
                "character; write the whole pair"
            )
    if not answers.extract(row["answer"]):
        raise ValueError(f'{where}: key "answer" has no final answer; end it with a line "#### 42"')
    return Problem(row["id"], row["question"], row["answer"])
