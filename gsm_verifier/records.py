"""What stages hand to each other, and its only format on disk: row-aligned parquet shards.

A work directory keeps, for every split, `samples/<split>/<shard>.parquet`, and beside it `labels/`
and `scores/` with the same rows in the same order, keyed by (problem, sample). A shard is written
under a temporary name, synced and renamed: a shard that exists is whole. Resuming is skipping
the shards that exist. Its row groups are whole problems, so that a few can be read without the
others.
"""

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gsm_verifier.storage import write_atomically


@dataclass(frozen=True)
class Problem:
    """A word problem and its gold solution.

    Attributes:
      id: unique within a run, e.g. "train-00012"; stable for a given source.
      question: the text shown to the model.
      solution: worked steps with `<<48/2=24>>` annotations, the last line being `#### N`.
    """

    id: str
    question: str
    solution: str


@dataclass(frozen=True)
class Completion:
    """One sampled solution.

    Attributes:
      problem: id of its problem. sample: its number, from 0.
      text: what was written. tokens: its ids, the end-of-text token included if it came.
      forced: was the token forced by the calculator?
      logprob: sum of the log-probabilities, at temperature 1, of the tokens that weren't forced;
        None of a completion sampled elsewhere that came without.
      finished: ended by itself, not by the limit of tokens.
    """

    problem: str
    sample: int
    text: str
    tokens: list[int]
    forced: list[bool]
    logprob: float | None
    finished: bool


@dataclass(frozen=True)
class Label:
    """Is a completion's final answer the gold one?

    Attributes:
      answer: None where there is none. correct: the official score, which compares strings.
      numeric: equal as numbers, `$18.00` and `18` alike.
    """

    problem: str
    sample: int
    answer: str | None
    correct: bool
    numeric: bool


@dataclass(frozen=True)
class Score:
    """The verifier's value after every token of a completion, and the score made of them."""

    problem: str
    sample: int
    values: list[float]
    score: float


_KEY = [("problem", pa.string()), ("sample", pa.int32())]
SCHEMAS: dict[type, pa.Schema] = {
    Completion: pa.schema(
        [
            *_KEY,
            ("text", pa.string()),
            ("tokens", pa.list_(pa.int32())),
            ("forced", pa.list_(pa.bool_())),
            ("logprob", pa.float64()),
            ("finished", pa.bool_()),
        ]
    ),
    Label: pa.schema(
        [*_KEY, ("answer", pa.string()), ("correct", pa.bool_()), ("numeric", pa.bool_())]
    ),
    Score: pa.schema([*_KEY, ("values", pa.list_(pa.float32())), ("score", pa.float64())]),
}

Record = TypeVar("Record", Completion, Label, Score)

# Columns whose entries repeat. A dictionary of ever new numbers would be as long as the column.
REPEATED = ["problem", "text", "tokens.list.element", "answer"]
GROUP = 500  # rows of a row group at least: with few, its headers weigh on the file


def write(path: Path, kind: type[Record], rows: Sequence[Record]) -> None:
    """Write one shard."""
    _write_table(path, pa.Table.from_pylist([vars(row) for row in rows], schema=SCHEMAS[kind]))


def write_columns(path: Path, kind: type[Any], columns: Mapping[str, Any]) -> None:
    """Write one shard of whole columns: no object is made for a row."""
    _write_table(path, pa.table(dict(columns), schema=SCHEMAS[kind]))


def _write_table(path: Path, table: pa.Table) -> None:
    sink = pa.BufferOutputStream()
    how = dict(compression="zstd", write_page_checksum=True, use_dictionary=REPEATED)
    with pq.ParquetWriter(sink, table.schema, **how) as writer:
        start = end = 0
        for part in problem_tables(table):
            end += part.num_rows
            if end - start >= GROUP or end == table.num_rows:
                writer.write_table(table.slice(start, end - start))
                start = end
    write_atomically(path, sink.getvalue().to_pybytes())


@contextlib.contextmanager
def _open(path: Path) -> Iterator[pq.ParquetFile]:
    """A shard to read parts of, wherever it is."""
    with path.open("rb") as source, pq.ParquetFile(source, page_checksum_verification=True) as file:
        yield file


def _group_ends(file: pq.ParquetFile) -> list[int]:
    """Where the row groups of a shard end; the first number, 0, is where they begin."""
    sizes = (file.metadata.row_group(i).num_rows for i in range(file.num_row_groups))
    return list(itertools.accumulate(sizes, initial=0))


def read_table(
    path: Path,
    kind: type[Any],
    columns: Sequence[str] | None = None,
    rows: range | None = None,
) -> pa.Table:
    """One shard as a table, with all or some of its columns and rows.

    Raises:
      ValueError: a missing, damaged or foreign file; names it and the mend.
    """
    try:
        with _open(path) as file:
            whole = range(file.metadata.num_rows)
            rows = whole if rows is None else rows
            ends = _group_ends(file)
            groups = [
                group
                for group, (start, end) in enumerate(itertools.pairwise(ends))
                if start < rows.stop and rows.start < end
            ]
            table = file.read_row_groups(groups, columns)
        table = table.slice(rows.start - ends[groups[0]] if groups else 0, len(rows))
        if columns is None and not table.schema.equals(SCHEMAS[kind]):
            raise ValueError(f"its columns are {table.schema.names}, not {SCHEMAS[kind].names}")
        # No checksum covers the footer, whose number of rows stands there twice.
        if table.num_rows != len(rows) or ends[-1] != len(whole):
            raise ValueError("its numbers of rows disagree")
        return table if columns is None else table.select(columns)
    except (OSError, KeyError, ValueError, pa.ArrowException) as error:
        raise ValueError(
            f"can't read {path} as {kind.__name__} records: {error}; delete it and run its stage "
            "again"
        ) from error


def read(path: Path, kind: type[Record], columns: Sequence[str] | None = None) -> list[Any]:
    """The rows of a shard, or dictionaries of some `columns`; refused as by `read_table`."""
    rows = read_table(path, kind, columns).to_pylist()
    return rows if columns is not None else [kind(**row) for row in rows]


def lists(column: pa.ChunkedArray) -> list[np.ndarray]:
    """The rows of a column of lists: views of one array, which hold no object for an entry."""
    array = column.combine_chunks()
    values, ends = array.values.to_numpy(), array.offsets.to_numpy().tolist()
    return [values[start:end] for start, end in itertools.pairwise(ends)]


def last_of_lists(column: pa.ChunkedArray) -> np.ndarray:
    """The last entry of every row of a column of lists, none of which is empty."""
    array = column.combine_chunks()
    return array.values.to_numpy()[array.offsets.to_numpy()[1:] - 1]


def list_column(rows: Sequence[np.ndarray], dtype: Any) -> pa.ListArray:
    """The column of lists that `lists` takes apart."""
    ends = np.cumsum([0, *map(len, rows)], dtype=np.int32)
    return pa.ListArray.from_arrays(ends, np.concatenate([np.empty(0, dtype), *rows]))


def shard_path(folder: Path, index: int, count: int) -> Path:
    """Where shard `index` of `count` is kept: its name tells how many belong together."""
    return folder / f"{index:05d}-of-{count:05d}.parquet"


def shards(folder: Path) -> list[Path]:
    """The shards of a folder in order.

    Raises:
      ValueError: no shard, or not all that their names promise.
    """
    found = sorted(folder.glob("*-of-*.parquet"))
    if not found:
        raise ValueError(f"{folder} holds no records: run the stage that writes them first")
    count = int(found[0].stem.split("-of-")[1])
    if [p.name for p in found] != [shard_path(folder, i, count).name for i in range(count)]:
        raise ValueError(f"{folder} should hold {count} shards, it holds {len(found)}")
    return found


def read_all(folder: Path, kind: type[Record]) -> list[Record]:
    """The rows of all shards of a folder in order; refused as by `shards` and `read`."""
    return [row for path in shards(folder) for row in read(path, kind)]


FOLDERS: dict[type, str] = {Completion: "samples", Label: "labels", Score: "scores"}


def tables(
    run: Path,
    split: str,
    columns: Mapping[type[Any], Sequence[str]],
    places: Iterable[tuple[str, range | None]] | None = None,
) -> Iterator[pa.Table]:
    """The named columns of several kinds side by side: a table for every problem.

    One shard is in memory at a time, without the columns not asked for.

    Args:
      places: names of shards, and which of their rows; None: all.

    Raises:
      ValueError: a kind's shards don't hold the same rows as the first one's.
    """
    keys = ["problem", "sample"]
    first = next(iter(columns))
    if places is None:
        places = [(path.name, None) for path in shards(run / FOLDERS[first] / split)]
    for name, rows in places:
        whole: pa.Table | None = None
        for kind, names in columns.items():
            path = run / FOLDERS[kind] / split / name
            table = read_table(path, kind, [*keys, *names], rows)
            whole = table if whole is None else whole
            if not table.select(keys).equals(whole.select(keys)):
                raise ValueError(
                    f"{name} of {' and '.join(FOLDERS[k] for k in columns)} in {run}, {split},"
                    " hold different rows: delete all but the samples and run their stages again"
                )
            if table is not whole:
                for column in names:
                    whole = whole.append_column(column, table[column])
        yield from problem_tables(whole)


def places(run: Path, split: str) -> list[tuple[str, range]]:
    """The row groups of a split's samples, in order, as `tables` wants them."""
    found = []
    for path in shards(run / FOLDERS[Completion] / split):
        with _open(path) as file:
            ends = _group_ends(file)
        found += [(path.name, range(*rows)) for rows in itertools.pairwise(ends)]
    return found


def problem_tables(shard: pa.Table) -> Iterator[pa.Table]:
    """The part of every problem of a shard."""
    start = 0
    for end in pc.run_end_encode(shard["problem"].combine_chunks()).run_ends.to_pylist():
        yield shard.slice(start, end - start)
        start = end


def by_problem(
    run: Path, split: str, *kinds: type[Any]
) -> Iterator[tuple[str, list[tuple[Any, ...]]]]:
    """(problem's id, its rows of all `kinds` side by side), with one shard in memory at a time.

    Raises:
      ValueError: as `tables`.
    """
    columns = {kind: [field.name for field in fields(kind)[len(_KEY) :]] for kind in kinds}
    for table in tables(run, split, columns):
        rows = table.to_pylist()
        made = [
            [kind(row["problem"], row["sample"], *map(row.get, names)) for row in rows]
            for kind, names in columns.items()
        ]
        yield rows[0]["problem"], list(zip(*made, strict=True))
