"""The one definition of a correct solution: its final answer is the gold one.

Paper, section 4.2: the reasoning is not judged. `is_correct` is the scorer of the paper's code
release (openai/grade-school-math), and every label and every accuracy rests on it. It compares
strings, so `18.0` and `$18` are not `18`; `is_numerically_correct` forgives that, and is only ever
reported beside it.
"""

import re
from fractions import Fraction

_OFFICIAL = re.compile(r"#### (\-?[0-9\.\,]+)")
_NUMERIC = re.compile(
    # At most so many blanks: adjacent unbounded runs would take cubic time.
    r"#### {0,2}([-\u2212\u2013]?) ?[$\u20ac\u00a3]? ?([-\u2212\u2013]?)"
    r"([0-9][0-9,]*\.?[0-9]*|\.[0-9]+)"
)
_MAX_LENGTH = 64  # characters of a number worth comparing; commas counted, gold has at most 11


def ending(text: str) -> str:
    """Returns `text` from its first `####` on: all that the functions below look at.

    The many completions of a problem have few endings.
    """
    _, mark, rest = text.partition("####")
    return mark + rest


def extract(text: str) -> str | None:
    """Returns the final answer, commas removed, or None: the first `#### ` followed by a number."""
    match = _OFFICIAL.search(text)
    return match[1].replace(",", "") if match else None


def is_correct(text: str, gold_solution: str) -> bool:
    """Returns whether `text` ends in the final answer of `gold_solution`: the official score.

    Without a final answer, in either, nothing is correct.
    """
    answer = extract(text)
    return answer is not None and answer == extract(gold_solution)


def is_numerically_correct(text: str, gold_solution: str) -> bool:
    """Returns whether the final answers are equal as exact numbers, `$18`, `18.` and `18.0` alike.

    Whatever `is_correct` accepts is accepted. A currency sign before the number and anything after
    it are ignored; minus and dash signs count as `-`.
    """
    if is_correct(text, gold_solution):
        return True
    number = _number(text)
    return number is not None and number == _number(gold_solution)


def is_integer(answer: str | None) -> bool:
    """Returns whether an extracted answer is written as an integer, as every gold answer is.

    Dropping all other completions is the baseline a verifier must beat for free.
    """
    return answer is not None and re.fullmatch(r"-?[0-9]+", answer) is not None


def _number(text: str) -> Fraction | None:
    match = _NUMERIC.search(text)
    if not match or len(match[3]) > _MAX_LENGTH or (match[1] and match[2]):
        return None
    magnitude = Fraction(match[3].replace(",", ""))
    return -magnitude if match[1] or match[2] else magnitude
