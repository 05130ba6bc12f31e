"""What counts as correct: the official scorer, and the numeric reading beside it."""

import json
import os
import re
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gsm_verifier.text.answers import (
    ending,
    extract,
    is_correct,
    is_integer,
    is_numerically_correct,
)

settings.register_profile("untimed", deadline=None)  # machines are shared
settings.load_profile("untimed")

GSM8K = Path(os.environ.get("GSM8K_DIR", Path(__file__).resolve().parents[2] / "shared/data/gsm8k"))
needs_gsm8k = pytest.mark.skipif(
    not (GSM8K / "train.jsonl").is_file() or not (GSM8K / "test.jsonl").is_file(),
    reason=f"GSM8K is not in {GSM8K}; set GSM8K_DIR",
)
GOLD = "48/2 = <<48/2=24>>24\n#### 18"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("#### 18", "18"),
        ("#### 1,234,567", "1234567"),
        ("#### -5", "-5"),
        ("#### 18.0 dollars", "18.0"),
        ("#### 18.", "18."),
        ("#### 18\n#### 19", "18"),
        ("#### $1\n#### 19", "19"),
        ("##### 7", "7"),
        ("#### $18", None),
        ("####18", None),
        ("####  18", None),
        ("#### \u221218", None),
        ("#### \u0661", None),
        ("18", None),
        ("", None),
    ],
)
def test_extract(text, answer):
    assert extract(text) == answer


@pytest.mark.parametrize(
    ("text", "official", "numeric"),
    [
        ("#### 18", True, True),
        ("#### 1,8", True, True),
        ("#### 18 eggs", True, True),
        ("#### 18.", False, True),
        ("#### 18.0", False, True),
        ("#### $18", False, True),
        ("#### $ 18.00 a day", False, True),
        ("####18", False, True),
        ("#### 018", False, True),
        ("#### -18", False, False),
        ("#### \u221218", False, False),
        ("#### 18.5", False, False),
        ("#### 180", False, False),
        ("#### --18", False, False),
        ("#### eighteen", False, False),
        ("18", False, False),
        ("", False, False),
        ("#### " + "1" * 100_000, False, False),
        ("####" + " " * 100_000 + "18", False, False),
        ("#### - " * 20_000, False, False),
        ("#" * 100_000, False, False),
        ("\ud800 #### 18", True, True),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_correct(text, official, numeric):
    start = time.process_time()
    assert is_correct(text, GOLD) is official
    assert is_numerically_correct(text, GOLD) is numeric
    assert time.process_time() - start < 0.05


def test_negative_gold():
    assert is_numerically_correct("#### -$5.00", "#### -5")
    assert is_numerically_correct("#### $-5", "#### -5")
    assert is_numerically_correct("#### \u22125", "#### -5")


def test_nothing_is_correct_against_a_missing_gold_answer():
    assert not is_correct("no answer", "no answer")
    assert not is_numerically_correct("no answer", "no answer")


def official_score(completion, gold):
    """The scorer of the paper's release, restated independently of the module under test."""

    def answer(text):
        match = re.compile(r"#### (\-?[0-9\.\,]+)").search(text)
        return match.group(1).strip().replace(",", "") if match else "[invalid]"

    return answer(gold) != "[invalid]" and answer(completion) == answer(gold)


near_answers = st.lists(st.sampled_from([*"0123456789-$,.\n #", "#### "]), max_size=20).map("".join)


@given(near_answers | st.text(), st.integers(-999, 9999).map(lambda n: f"so\n#### {n:,}"))
def test_official_implies_numeric(text, gold):
    for completion in (text, f"#### {text}", gold + text):
        assert is_correct(completion, gold) == official_score(completion, gold)
        if is_correct(completion, gold):
            assert is_numerically_correct(completion, gold)


@given(near_answers | st.text(st.sampled_from("# 18.$-")), st.integers(-9, 99))
def test_the_ending_decides(text, gold):
    gold = f"#### {gold}"
    assert text.endswith(ending(text))
    assert extract(ending(text)) == extract(text)
    for judge in (is_correct, is_numerically_correct):
        assert judge(ending(text), gold) == judge(text, gold)


@given(st.integers(-(10**9), 10**9), st.integers(-(10**9), 10**9))
def test_numbers_decide(a, b):
    gold = f"#### {b:,}"
    for text in (f"#### {a}", f"#### {a:,}", f"#### {a}.00", f"#### ${a:,}"):
        assert is_numerically_correct(text, gold) == (a == b)


def test_is_integer():
    assert is_integer("18")
    assert is_integer("-18")
    for answer in (None, "", "-", "18.0", "18.", "1.5", "\u0661", "18\n"):
        assert not is_integer(answer)


@needs_gsm8k
@pytest.mark.parametrize(("split", "negative"), [("train", 3), ("test", 2)])
def test_gsm8k(split, negative):
    lines = (GSM8K / f"{split}.jsonl").read_bytes().split(b"\n")[:-1]
    golds = [json.loads(line)["answer"] for line in lines]
    assert all(is_correct(gold, gold) and is_integer(extract(gold)) for gold in golds)
    assert sum(extract(gold).startswith("-") for gold in golds) == negative
