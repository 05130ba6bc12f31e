"""Completions sampled elsewhere, by vLLM or any other program: one JSON object a line.

    {"problem": "train-00012", "completion": "He sold 48/2=<<48/2=24>>24 ...\\n#### 24"}
    {"question": "Natalia sold ...", "completion": "...", "finished": false, "logprob": -31.25}

A problem is named by its id, which for GSM8K is the number of its line from 0, or by its question.
"finished" is false where the limit of tokens cut the text. "logprob" is the log-probability of the
whole completion at temperature 1: given on every line or on none. Samples of a problem are numbered
in the order of their lines, which needn't be side by side.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from gsm_verifier.records import Completion, Problem
from gsm_verifier.text.tokenizer import Tokenizer

_EXAMPLE = '{"problem": "test-00000", "completion": "... #### 42"}'
_TEXTS = ("problem", "question", "completion")


class _Line(NamedTuple):
    number: int
    offset: int


class Imported:
    """An index of a file: where the completions of each problem are.

    The file is read twice, once to check and index all of it, and then problem by problem: at no
    time is more of it in memory than is asked for.

    Attributes:
      counts: problem's id -> number of its completions, at least 1.
    """

    def __init__(self, path: str | Path, problems: Iterable[Problem]):
        """
        Args:
          problems: all that the file may speak of.

        Raises:
          ValueError: no such file, or a line that is no completion of one of the problems; names
            file, line and the mend.
        """
        self._path = Path(path)
        if not self._path.is_file():
            raise ValueError(f"{path}: no such file of completions: write lines like {_EXAMPLE}")
        ids: dict[str, list[str]] = {}  # problems of a question: it may occur twice
        known = set()
        for problem in problems:
            ids.setdefault(problem.question, []).append(problem.id)
            known.add(problem.id)
        self._lines: dict[str, list[_Line]] = {}
        kinds = set()
        for line, content in self._scan():
            row = self._parse(line, content)
            kinds.add("logprob" in row)
            if len(kinds) > 1:
                raise self._error(line, 'give "logprob" on every line or on none')
            found = [row["problem"]] if "problem" in row else ids.get(row["question"], [])
            if len(found) > 1:
                raise self._error(
                    line, f'"question" is that of {" and ".join(found)}: name one by "problem"'
                )
            if not found or found[0] not in known:
                raise self._error(
                    line,
                    f"{found[0] if found else 'the question'} is none of this run's problems: "
                    "delete the line, or raise config.data.train_size or test_size",
                )
            self._lines.setdefault(found[0], []).append(line)
        self.counts = {problem: len(lines) for problem, lines in self._lines.items()}

    def completions(
        self, problem: Problem, tokenizer: Tokenizer, longest: int
    ) -> Iterator[Completion]:
        """The completions of a problem, tokenised anew; what a calculator forced isn't known.

        Args:
          longest: most tokens of question and completion together.

        Raises:
          ValueError: a completion that is longer, or has no token; names file and line.
        """
        asked = len(tokenizer.question(problem.question))
        with open(self._path, "rb") as file:
            for sample, line in enumerate(self._lines.get(problem.id, [])):
                file.seek(line.offset)
                row = self._parse(line, file.readline())
                text, finished = row["completion"], row.get("finished", True)
                tokens = tokenizer.solution(text) if finished else tokenizer.encode(text)
                if not tokens or asked + len(tokens) > longest:
                    raise self._error(
                        line,
                        f"{len(tokens)} tokens after a question of {asked}, where at least one and "
                        f"together {longest} fit: delete the line, or raise row_tokens",
                    )
                yield Completion(
                    problem=problem.id,
                    sample=sample,
                    text=text,
                    tokens=tokens,
                    forced=[False] * len(tokens),
                    logprob=float(row["logprob"]) if "logprob" in row else None,
                    finished=finished,
                )

    def _scan(self) -> Iterator[tuple[_Line, bytes]]:
        """Lines end in \\n alone: texts contain U+2028."""
        offset = 0
        with open(self._path, "rb") as file:
            for number, content in enumerate(file, 1):
                yield _Line(number, offset), content
                offset += len(content)

    def _error(self, line: _Line, reason: str) -> ValueError:
        return ValueError(f"{self._path}, line {line.number}: {reason}")

    def _parse(self, line: _Line, content: bytes) -> dict[str, Any]:
        try:
            row = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise self._error(line, f"not JSON ({error}): write {_EXAMPLE}") from error
        if not isinstance(row, dict) or "completion" not in row:
            raise self._error(line, f'no key "completion": write {_EXAMPLE}')
        if ("problem" in row) == ("question" in row):
            raise self._error(line, f'give one of "problem" and "question", as in {_EXAMPLE}')
        for key in _TEXTS:
            if not isinstance(row.get(key, ""), str):
                raise self._error(line, f'"{key}" is no string: quote it')
        try:
            row["completion"].encode()
        except UnicodeEncodeError as error:
            raise self._error(line, "half a surrogate pair: write the whole pair") from error
        if not isinstance(row.get("finished", True), bool):
            raise self._error(line, '"finished" is true or false, and true where left out')
        logprob = row.get("logprob", 0.0)
        if type(logprob) not in (int, float) or not -1e9 < logprob <= 0:
            raise self._error(line, f'"logprob" is {logprob!r}, no log-probability: a number to 0')
        return row
