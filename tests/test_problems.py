"""Problems on disk, their splits and subsets, and GSM8K through TFDS."""

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gsm_verifier.data import problems
from gsm_verifier.records import Problem

settings.register_profile("untimed", deadline=None)  # machines are shared
settings.load_profile("untimed")

GSM8K = Path(os.environ.get("GSM8K_DIR", Path(__file__).resolve().parents[2] / "shared/data/gsm8k"))
needs_gsm8k = pytest.mark.skipif(
    not (GSM8K / "train.jsonl").is_file() or not (GSM8K / "test.jsonl").is_file(),
    reason=f"GSM8K is not in {GSM8K}; set GSM8K_DIR",
)
REPOSITORY = Path(__file__).resolve().parents[1]
SMALL = [Problem(f"train-{i:05d}", f"What is {i}+1?", f"#### {i + 1}") for i in range(1000)]

texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)


@given(st.lists(st.tuples(texts, texts), min_size=1))
def test_load_reads_what_save_wrote(tmp_path_factory, pairs):
    written = [
        Problem(f"train-{index:05d}", question, solution + "\n#### 1")
        for index, (question, solution) in enumerate(pairs)
    ]
    path = tmp_path_factory.mktemp("saved") / "deep" / "train.jsonl"
    problems.save(written, path)
    assert problems.load(path, "train") == written
    assert problems.load(path.parent, "train") == written
    assert [file.name for file in path.parent.iterdir()] == ["train.jsonl"]


def test_only_newlines_separate_lines(tmp_path):
    separators = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e\r"
    row = {"question": f"a{separators}b", "answer": "#### 1", "source": "further keys are ignored"}
    line = json.dumps(row, ensure_ascii=False).encode()
    (tmp_path / "test.jsonl").write_bytes(line + b"\r\n" + line)
    loaded = problems.load(tmp_path, "test")
    assert [problem.id for problem in loaded] == ["test-00000", "test-00001"]
    assert loaded[0].question == row["question"]


def test_a_failed_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "train.jsonl"
    problems.save(SMALL[:2], path)
    with pytest.raises(AttributeError):
        problems.save([SMALL[0], None], path)
    assert problems.load(path, "train") == SMALL[:2]
    assert [file.name for file in tmp_path.iterdir()] == ["train.jsonl"]


GOOD = b'{"question": "q", "answer": "#### 1"}'


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        (b"", ["line 2", "blank", "delete"]),
        (b"{", ["line 2", "not JSON"]),
        (b"[" * 100_000, ["line 2", "not JSON"]),
        (b"9" * 10_000, ["line 2", "not JSON"]),
        (b"\xef\xbb\xbf" + GOOD, ["line 2", "not JSON", "BOM"]),
        (b'["q", "#### 1"]', ["line 2", "list", '{"question"']),
        (b'{"question": "q\xff", "answer": "#### 1"}', ["line 2", "byte 16", "UTF-8"]),
        (b'{"question": "q"}', ["line 2", '"answer"', "missing"]),
        (b'{"answer": "#### 1"}', ["line 2", '"question"', "missing"]),
        (b'{"question": 3, "answer": "#### 1"}', ["line 2", '"question"', "int"]),
        (b'{"question": "q", "answer": null}', ["line 2", '"answer"', "NoneType"]),
        (b'{"question": " ", "answer": "#### 1"}', ["line 2", '"question"', "empty"]),
        (b'{"question": "q", "answer": "1"}', ["line 2", '"answer"', "final answer", "####"]),
        (b'{"question": "q", "answer": "#### ,"}', ["line 2", '"answer"', "final answer"]),
        (b'{"question": "\\ud800", "answer": "#### 1"}', ["line 2", '"question"', "surrogate"]),
    ],
    ids=lambda value: repr(value)[:32],
)
def test_errors_name_file_line_key_and_mend(tmp_path, line, parts):
    path = tmp_path / "train.jsonl"
    path.write_bytes(GOOD + b"\n" + line + b"\n" + GOOD + b"\n")
    with pytest.raises(ValueError, match="line 2") as caught:
        problems.load(path, "train")
    for part in [str(path), *parts]:
        assert part in str(caught.value)


def test_missing_and_empty_files(tmp_path):
    (tmp_path / "train.jsonl").write_bytes(b"")
    with pytest.raises(ValueError, match="is empty"):
        problems.load(tmp_path, "train")
    with pytest.raises(FileNotFoundError, match=r"holds train\.jsonl.*test\.jsonl"):
        problems.load(tmp_path, "test")
    with pytest.raises(FileNotFoundError, match='the name "gsm8k"'):
        problems.load(tmp_path / "absent", "test")


@given(st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True))
def test_held_out_is_a_split_that_grows_and_ignores_the_rest(a, b):
    few, many = sorted((a, b))
    train, held_out = problems.held_out(SMALL, few)
    assert sorted(train + held_out, key=lambda problem: problem.id) == SMALL
    assert set(held_out) <= set(problems.held_out(SMALL, many)[1])
    assert problems.held_out(SMALL[::7], few)[1] == [p for p in SMALL[::7] if p in set(held_out)]


def test_held_out_is_stable_and_of_the_size_asked_for():
    train, held_out = problems.held_out(SMALL, 0.1)
    assert abs(len(held_out) - 100) <= 3 * (1000 * 0.1 * 0.9) ** 0.5
    digest = hashlib.sha256("".join(p.id for p in held_out).encode()).hexdigest()
    assert (len(train), len(held_out), digest[:16]) == (909, 91, "49c277caf038d25b")
    assert problems.held_out(SMALL, 0)[1] == []
    for fraction in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="fraction"):
            problems.held_out(SMALL, fraction)


@given(st.integers(1, 1000), st.integers(1, 1000), st.integers(0, 2**32))
def test_subsets_are_nested(a, b, seed):
    small, large = sorted((a, b))
    chosen = problems.subset(SMALL, large, seed)
    assert len(set(chosen)) == large
    assert problems.subset(SMALL, small, seed) == chosen[:small]
    assert problems.subset(SMALL[::-1], large, seed) == chosen


def test_subset_seeds_and_sizes():
    first, second = (set(problems.subset(SMALL, 500, seed)) for seed in (0, 1))
    assert 200 < len(first & second) < 300  # 250 expected of independent choices
    for size in (0, -1, 1001):
        with pytest.raises(ValueError, match=f"size is {size}.*1000"):
            problems.subset(SMALL, size, seed=0)


def run(code, **environment):
    """Runs `code` in a fresh interpreter; returns the finished process."""
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        env=os.environ | {"GSM8K_DIR": ""} | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_neither_tensorflow_nor_jax_is_imported():
    code = (
        "import sys; from gsm_verifier.data import gsm8k, problems; "
        "print([m for m in ('tensorflow', 'torch', 'jax') if m in sys.modules])"
    )
    assert run(code).stdout == "[]\n"
    code = (
        "import sys; from gsm_verifier.data import problems; print('tensorflow_datasets' in "
        "sys.modules)"
    )
    assert run(code).stdout == "False\n"


def test_gsm8k_without_files_and_network_fails_at_once(tmp_path):
    # 192.0.2.1 is reserved for documentation: as a proxy it answers nobody.
    proxy = {"https_proxy": "http://192.0.2.1:9", "HTTPS_PROXY": "http://192.0.2.1:9"}
    code = (
        "import time; from gsm_verifier.data import problems, gsm8k\n"
        "start = time.perf_counter()\n"
        f"try: problems.load('gsm8k', 'test', {str(tmp_path)!r})\n"
        "except FileNotFoundError as error: print(error)\n"
        "print(time.perf_counter() - start)"
    )
    output = run(code, **proxy).stdout
    assert "give --config.data.path=<folder>" in output
    assert str(tmp_path / "downloads" / "manual") in output
    assert "https://raw.githubusercontent.com/openai/grade-school-math/" in output
    assert float(output.splitlines()[-1]) < 2


def test_gsm8k_refuses_other_files_and_splits(tmp_path):
    from gsm_verifier.data import gsm8k

    problems.save(SMALL, tmp_path / "test.jsonl")
    with pytest.raises(ValueError, match="sha256") as caught:
        gsm8k.load("test", tmp_path / "tfds", manual_dir=tmp_path)
    actual = hashlib.sha256((tmp_path / "test.jsonl").read_bytes()).hexdigest()
    expected = "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14"
    for part in (str(tmp_path / "test.jsonl"), actual, expected):
        assert part in str(caught.value)
    with pytest.raises(ValueError, match='no split "dev"; choose one of train, test'):
        gsm8k.load("dev", tmp_path / "tfds")


@needs_gsm8k
def test_gsm8k_through_tfds_is_the_files_even_if_built_twice_at_once(tmp_path):
    code = (
        "import sys; from gsm_verifier.data import problems\n"
        "for split in ('train', 'test'):\n"
        f"    rows = problems.load('gsm8k', split, {str(tmp_path)!r})\n"
        f"    assert rows == problems.load({str(GSM8K)!r}, split)\n"
        "assert 'tensorflow' not in sys.modules\n"
        "print(len(rows))"
    )
    environment = os.environ | {"GSM8K_DIR": str(GSM8K)}
    builders = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=REPOSITORY,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for builder in builders:
        output, errors = builder.communicate(timeout=60)
        assert output.endswith("1319\n"), errors
    assert not list(tmp_path.rglob("incomplete*"))

    # Prepared once, it needs neither the files nor the network, nor the second it took.
    from gsm_verifier.data import gsm8k

    start = time.perf_counter()
    assert len(gsm8k.load("train", tmp_path, manual_dir=tmp_path / "absent")) == 7473
    assert time.perf_counter() - start < 5


@needs_gsm8k
@pytest.mark.parametrize(("split", "count"), [("train", 7473), ("test", 1319)])
def test_saving_gsm8k_keeps_its_rows_and_ids(tmp_path, split, count):
    loaded = problems.load(GSM8K, split)
    assert len(loaded) == count
    assert loaded[-1].id == f"{split}-{count - 1:05d}"
    problems.save(loaded[::-1], tmp_path / "copy.jsonl")
    assert problems.load(tmp_path / "copy.jsonl", split) == loaded[::-1]
