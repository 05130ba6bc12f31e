"""Records on disk: what is written is read, and what is not whole is refused by name."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gsm_verifier import records
from gsm_verifier.records import Completion, Label, Score

settings.register_profile("untimed", deadline=None)  # machines are shared
settings.load_profile("untimed")

texts = st.text(st.characters(exclude_categories=["Cs"]))
keys = {"problem": texts, "sample": st.integers(0, 2**31 - 1)}
ids = st.lists(st.integers(0, 2**31 - 1), max_size=6)
ROWS = {
    Completion: st.builds(
        Completion,
        **keys,
        text=texts,
        tokens=ids,
        forced=st.lists(st.booleans(), max_size=6),
        logprob=st.floats(allow_nan=False),
        finished=st.booleans(),
    ),
    Label: st.builds(
        Label,
        **keys,
        answer=st.none() | texts,
        correct=st.booleans(),
        numeric=st.booleans(),
    ),
    Score: st.builds(
        Score,
        **keys,
        values=st.lists(st.floats(allow_nan=False, width=32), max_size=6),
        score=st.floats(allow_nan=False),
    ),
}
COMPLETIONS = [
    Completion(f"train-{i:05d}", m, f"{i} and {m} <<1+{m}=", [i, m, 300 + m], [False, True, m > 1],
               -0.25 * m, m % 2 == 0)
    for i in range(20)
    for m in range(5)
]  # fmt: skip


@pytest.mark.parametrize("kind", ROWS, ids=lambda kind: kind.__name__)
@settings(max_examples=40)
@given(data=st.data())
def test_read_gives_what_was_written(kind: type, data: st.DataObject, tmp_path_factory) -> None:
    rows = data.draw(st.lists(ROWS[kind], max_size=5))
    path = tmp_path_factory.mktemp("records") / "samples" / "test" / "0.parquet"
    records.write(path, kind, rows)
    assert records.read(path, kind) == rows
    names = ["problem", "sample"]
    narrow = records.read(path, kind, names)
    assert narrow == [{name: getattr(row, name) for name in names} for row in rows]
    assert [file.name for file in path.parent.iterdir()] == ["0.parquet"]


def test_columns_are_written_as_rows_are(tmp_path) -> None:
    rows = [Score("a", m, [m / 4] * m, m / 2) for m in range(4)]
    records.write(tmp_path / "rows", Score, rows)
    columns = {
        "problem": ["a"] * 4,
        "sample": np.arange(4, dtype=np.int32),
        "values": records.list_column([np.array(r.values, np.float32) for r in rows], np.float32),
        "score": [r.score for r in rows],
    }
    records.write_columns(tmp_path / "columns", Score, columns)
    assert (tmp_path / "rows").read_bytes() == (tmp_path / "columns").read_bytes()


@given(st.lists(ids), st.integers(0, 9), st.integers(0, 9))
def test_lists_are_taken_apart(rows: list[list[int]], start: int, length: int) -> None:
    """Of any part of a column in any number of pieces."""
    pieces = [pa.array(rows, pa.list_(pa.int32())), pa.array(rows[:2], pa.list_(pa.int32()))]
    column, expected = pa.chunked_array(pieces).slice(start, length), [*rows, *rows[:2]]
    expected = expected[start : start + length]
    assert [row.tolist() for row in records.lists(column)] == expected
    assert records.list_column(records.lists(column), np.int32).to_pylist() == expected
    if all(expected):
        assert records.last_of_lists(column).tolist() == [row[-1] for row in expected]


def test_writing_is_deterministic(tmp_path) -> None:
    for name in "ab":
        records.write(tmp_path / name, Completion, COMPLETIONS)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_an_answer_of_none_is_not_the_text_none(tmp_path) -> None:
    answers = enumerate([None, "None", ""])
    rows = [Label("a", sample, answer, False, False) for sample, answer in answers]
    records.write(tmp_path / "x.parquet", Label, rows)
    assert [row.answer for row in records.read(tmp_path / "x.parquet", Label)] == [None, "None", ""]


def test_every_damaged_byte_is_found_or_harmless(tmp_path) -> None:
    """One byte turned over anywhere: refused by name, or the rows are right all the same."""
    path = tmp_path / "00000-of-00001.parquet"
    written = COMPLETIONS[:40]  # a number of rows of which one flipped bit makes 32
    records.write(path, Completion, written)
    whole = path.read_bytes()
    messages = []
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")  # under no checksum
    places = [*range(0, footer, footer // 300), *range(footer, len(whole))]
    for place in places:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        try:
            rows = records.read(path, Completion)
        except ValueError as error:
            messages.append(str(error))
        else:
            assert rows == written, place
    assert len(messages) > 0.6 * len(places)
    for message in messages:
        assert str(path) in message
        assert "delete it and run its stage again" in message


@pytest.mark.parametrize("share", [0, 0.3, 0.99])
def test_a_cut_file_is_refused(share: float, tmp_path) -> None:
    path = tmp_path / "x.parquet"
    records.write(path, Completion, COMPLETIONS)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=r"can't read .*x\.parquet as Completion records"):
        records.read(path, Completion)


def test_foreign_columns_and_types_are_refused(tmp_path) -> None:
    path = tmp_path / "x.parquet"
    records.write(path, Label, [Label("a", 0, "1", True, True)])
    with pytest.raises(
        ValueError, match=r"x\.parquet as Score records: its columns are \['problem"
    ):
        records.read(path, Score)
    with pytest.raises(ValueError, match=r"x\.parquet as Label records"):
        records.read(path, Label, ["problem", "score"])
    table = pq.read_table(path)
    pq.write_table(table.set_column(1, "sample", pa.array([0.5])), path)
    with pytest.raises(ValueError, match=r"x\.parquet as Label records"):
        records.read(path, Label)
    with pytest.raises(ValueError, match=r"gone\.parquet"):
        records.read(tmp_path / "gone.parquet", Label)


def test_a_row_of_wrong_values_is_not_written(tmp_path) -> None:
    path = tmp_path / "x.parquet"
    with pytest.raises((pa.ArrowException, ValueError, TypeError)):
        records.write(path, Label, [Label("a", "zero", None, True, True)])
    assert list(tmp_path.iterdir()) == []


def test_shards_are_found_in_order_and_a_missing_one_is_named(tmp_path) -> None:
    with pytest.raises(ValueError, match="holds no records: run the stage that writes them"):
        records.shards(tmp_path / "samples")
    paths = [records.shard_path(tmp_path, index, 12) for index in range(12)]
    for index, path in reversed(list(enumerate(paths))):
        records.write(path, Label, [Label("p", index, None, False, False)])
    assert records.shards(tmp_path) == paths
    assert [row.sample for row in records.read_all(tmp_path, Label)] == list(range(12))
    paths[5].unlink()
    with pytest.raises(ValueError, match="should hold 12 shards, it holds 11"):
        records.shards(tmp_path)
    paths[5].touch()
    records.shard_path(tmp_path, 0, 3).touch()  # of a run with other shards
    with pytest.raises(ValueError, match="should hold"):
        records.shards(tmp_path)


@pytest.mark.parametrize("group", [1, 7, 10, 1000])
def test_row_groups_are_whole_problems(group: int, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(records, "GROUP", group)
    path = tmp_path / "samples/test/00000-of-00001.parquet"
    records.write(path, Completion, COMPLETIONS)
    places = records.places(tmp_path, "test")
    problems = -(-group // 5)  # of five rows
    assert [rows.stop for _, rows in places[:-1]] == [*range(5 * problems, 100, 5 * problems)]
    found = [
        records.read_table(path, Completion, ["tokens", "sample"], rows).to_pylist()
        for _, rows in places
    ]
    assert [row for part in found for row in part] == records.read(
        path, Completion, ["tokens", "sample"]
    )


def test_ever_new_numbers_are_kept_in_their_own_size(tmp_path) -> None:
    values = np.random.default_rng(0).random((2000, 24), np.float32)
    rows = [Score(f"p{i // 500}", i % 500, v.tolist(), float(v[-1])) for i, v in enumerate(values)]
    records.write(tmp_path / "x", Score, rows)
    assert (tmp_path / "x").stat().st_size < 1.1 * 2000 * (24 * 4 + 8)


@pytest.mark.parametrize("labelled", [10, 1000])
def test_places_need_no_equal_row_groups(labelled: int, tmp_path, monkeypatch) -> None:
    """Samples may be older than the labels beside them."""
    judged = [Label(row.problem, row.sample, None, False, False) for row in COMPLETIONS]
    name = "00000-of-00001.parquet"
    monkeypatch.setattr(records, "GROUP", 15)
    records.write(tmp_path / "samples/test" / name, Completion, COMPLETIONS)
    monkeypatch.setattr(records, "GROUP", labelled)
    records.write(tmp_path / "labels/test" / name, Label, judged)
    columns = {Completion: ["tokens"], Label: ["correct"]}
    whole = [table.to_pylist() for table in records.tables(tmp_path, "test", columns)]
    assert len(whole) == 20
    places = records.places(tmp_path, "test")
    assert len(places) == 7
    parts = records.tables(tmp_path, "test", columns, reversed(places))
    assert [table.to_pylist() for table in parts] == [
        part for i in range(18, -1, -3) for part in whole[i : i + 3]
    ]


def test_a_killed_write_leaves_the_old_file_and_no_shard(tmp_path) -> None:
    """Killed between writing and renaming: what is left has a name no reader looks for."""
    path = records.shard_path(tmp_path, 0, 1)
    program = (
        "import os, pathlib, signal, sys\n"
        "from gsm_verifier import records\n"
        "os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)\n"
        "records.write(pathlib.Path(sys.argv[1]), records.Label, [])\n"
    )
    command = [sys.executable, "-c", program, str(path)]
    assert subprocess.run(command, timeout=60).returncode == -signal.SIGKILL
    left = [file.name for file in tmp_path.iterdir()]
    assert len(left) == 1
    assert left[0] != path.name
    with pytest.raises(ValueError, match="holds no records"):
        records.shards(tmp_path)
    records.write(path, Label, [Label("a", 0, None, False, False)])
    assert subprocess.run(command, timeout=60).returncode == -signal.SIGKILL
    assert records.shards(tmp_path) == [path]
    assert records.read_all(tmp_path, Label) == [Label("a", 0, None, False, False)]


def test_write_atomically_replaces_and_cleans_up(tmp_path, monkeypatch) -> None:
    path: Path = tmp_path / "deep" / "results.json"
    for value in (1, 2):
        records.write_atomically(path, json.dumps(value).encode())
        assert json.loads(path.read_text()) == value
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(path.read_text()))
    records.write_atomically(path, b"3")
    assert synced == ["2"]  # on disk before it gets the name
    assert path.read_text() == "3"
    assert [file.name for file in path.parent.iterdir()] == ["results.json"]
