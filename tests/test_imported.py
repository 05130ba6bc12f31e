"""Completions sampled elsewhere: what a file may say, and what is refused by its line."""

import json
from pathlib import Path
from typing import Any

import pytest

from gsm_verifier.data.imported import Imported
from gsm_verifier.records import Completion, Problem
from gsm_verifier.text.tokenizer import Tokenizer

PROBLEMS = [
    Problem("train-00000", "How many?", "#### 1"),
    Problem("train-00001", "How\u2028few?", "#### 2"),
    Problem("train-00002", "Twice?", "#### 3"),
    Problem("train-00003", "Twice?", "#### 4"),
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["How many? Twice? 1+1=<<1+1=2>>2\n#### 2"], 300)


def write(folder: Path, *rows: Any) -> Path:
    """A file of rows; text and bytes are lines as they are."""
    lines = [r if isinstance(r, (str, bytes)) else json.dumps(r, ensure_ascii=False) for r in rows]
    path = folder / "completions.jsonl"
    path.write_bytes(b"".join((r if isinstance(r, bytes) else r.encode()) + b"\n" for r in lines))
    return path


def by_id(problem: str, completion: str, **more: Any) -> dict[str, Any]:
    return {"problem": problem, "completion": completion, **more}


def read(path: Path, problem: Problem, tokenizer: Tokenizer, longest: int = 99) -> list[Completion]:
    return list(Imported(path, PROBLEMS).completions(problem, tokenizer, longest))


def test_samples_are_numbered_by_their_lines_wherever_they_stand(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    path = write(
        tmp_path,
        by_id("train-00001", "first\u2028line #### 2"),
        {"question": "How many?", "completion": "one"},
        {"question": "How\u2028few?", "completion": "second"},
        by_id("train-00000", "two"),
    )
    assert Imported(path, PROBLEMS).counts == {"train-00001": 2, "train-00000": 2}
    for problem, texts in zip(
        PROBLEMS, (["one", "two"], ["first\u2028line #### 2", "second"], []), strict=False
    ):
        found = read(path, problem, tokenizer)
        assert [c.text for c in found] == texts
        assert [(c.problem, c.sample) for c in found] == [
            (problem.id, m) for m in range(len(found))
        ]


def test_a_completion_is_a_whole_solution_unless_it_says_otherwise(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    text = "1+1=<<1+1=2>>2 <|endoftext|>"
    path = write(tmp_path, by_id("train-00000", text), by_id("train-00000", text, finished=False))
    whole, cut = read(path, PROBLEMS[0], tokenizer)
    assert whole.tokens == [*cut.tokens, tokenizer.end]
    assert (whole.finished, cut.finished) == (True, False)
    assert tokenizer.end not in cut.tokens  # text is never a special token
    assert tokenizer.decode(whole.tokens) == whole.text == text
    assert whole.forced == [False] * len(whole.tokens)


def test_the_log_probability_is_kept_or_unknown(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(
        tmp_path,
        by_id("train-00000", "a", logprob=-2.5),
        '{"problem": "train-00000", ' + '"completion": "b", "logprob": -3}',
    )
    assert [c.logprob for c in read(path, PROBLEMS[0], tokenizer)] == [-2.5, -3.0]
    path = write(tmp_path, by_id("train-00000", "a"))
    assert [c.logprob for c in read(path, PROBLEMS[0], tokenizer)] == [None]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        (b'{"completion": "\xff", "problem": "train-00000"}', "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", 'no key "completion"'),
        ({"problem": "train-00000"}, 'no key "completion"'),
        ({"completion": "a"}, 'give one of "problem" and "question"'),
        (by_id("train-00000", "a", question="How many?"), 'give one of "problem" and "question"'),
        (by_id("train-00000", 3), '"completion" is no string: quote it'),
        (by_id(0, "a"), '"problem" is no string: quote it'),
        ('{"problem": "train-00000", "completion": "\\ud800"}', "half a surrogate pair"),
        (by_id("train-00000", "a", finished="no"), '"finished" is true or false'),
        (by_id("train-00000", "a", logprob=0.5), '"logprob" is 0.5, no log-probability'),
        (by_id("train-00000", "a", logprob=float("nan")), '"logprob" is nan, no log-probability'),
        (by_id("train-00000", "a", logprob=True), '"logprob" is True, no log-probability'),
        (by_id("train-00000", "a", logprob=-1.0), 'give "logprob" on every line or on none'),
        (by_id("train-00009", "a"), "train-00009 is none of this run's problems: delete the line"),
        ({"question": "How?", "completion": "a"}, "the question is none of this run's problems"),
        (
            {"question": "Twice?", "completion": "a"},
            '"question" is that of train-00002 and train-00003: name one by "problem"',
        ),
    ],
)
def test_a_line_that_is_none_is_refused_with_file_line_and_mend(
    row: Any, reason: str, tmp_path: Path
) -> None:
    path = write(tmp_path, by_id("train-00000", "a"), row)
    with pytest.raises(ValueError, match="line 2") as error:
        Imported(path, PROBLEMS)
    message = str(error.value)
    assert message.startswith(f"{path}, line 2: {reason}")
    assert "\n" not in message


def test_what_does_not_fit_and_what_is_nothing_is_refused(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    path = write(tmp_path, by_id("train-00000", "#### 12345"))
    asked = len(tokenizer.question("How many?"))
    (found,) = read(path, PROBLEMS[0], tokenizer)
    longest = asked + len(found.tokens)
    assert read(path, PROBLEMS[0], tokenizer, longest) == [found]
    with pytest.raises(ValueError, match=rf"line 1: .* together {longest - 1} fit: delete the"):
        read(path, PROBLEMS[0], tokenizer, longest - 1)
    path = write(tmp_path, by_id("train-00000", "", finished=False))
    with pytest.raises(ValueError, match="line 1: 0 tokens after a question"):
        read(path, PROBLEMS[0], tokenizer)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file of completions: write lines like"):
        Imported(tmp_path / "none.jsonl", PROBLEMS)
