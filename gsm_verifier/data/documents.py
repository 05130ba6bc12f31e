"""Documents to pretrain on: a text, JSON lines or parquet file, or a dataset of TFDS."""

import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

KEY = "text"  # of a JSON line, a parquet column and a TFDS feature
TFDS = "tfds:"


def read(source: str) -> Iterator[str]:
    """The documents of a source, in its order, one in memory at a time.

    Args:
      source: path of a .txt (one document a line), .jsonl (key "text") or .parquet (column "text")
        file; or "tfds:<name>", the split "train" of a dataset that is already prepared there.

    Raises:
      ValueError: no such source, or what isn't a document; names file, line and the mend.
    """
    if source.startswith(TFDS):
        return _tfds(source.removeprefix(TFDS))
    path = Path(source)
    readers = {".txt": _lines, ".jsonl": _json_lines, ".parquet": _parquet}
    if path.suffix not in readers:
        raise ValueError(f"{source}: documents are .txt, .jsonl or .parquet files, or tfds:<name>")
    if not path.is_file():
        raise ValueError(f"{source}: no such file of documents")
    return readers[path.suffix](path)


def _numbered(path: Path) -> Iterator[tuple[int, str]]:
    """The lines that aren't blank; they end in \\n alone, as texts contain U+2028."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode()
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}, line {number}: not UTF-8: save it as that") from error
            if text.strip():
                yield number, text.rstrip("\r\n")


def _lines(path: Path) -> Iterator[str]:
    return (text for _, text in _numbered(path))


def _json_lines(path: Path) -> Iterator[str]:
    for number, line in _numbered(path):
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f'{where}: not JSON ({error}): write {{"{KEY}": "..."}}') from error
        if not isinstance(row, dict) or KEY not in row:
            raise ValueError(f'{where}: no key "{KEY}": write {{"{KEY}": "..."}}')
        if not isinstance(row[KEY], str):
            raise ValueError(f'{where}: "{KEY}" is no string: quote it')
        yield row[KEY]


def _parquet(path: Path) -> Iterator[str]:
    try:
        table = pq.ParquetFile(path)
        kind = table.schema_arrow.field(KEY).type
        if kind not in (pa.string(), pa.large_string()):
            raise KeyError(f"it is one of {kind}")
        for batch in table.iter_batches(columns=[KEY]):
            yield from (text for text in batch.column(KEY).to_pylist() if text)
    except (pa.ArrowException, KeyError, OSError) as error:
        raise ValueError(f'{path}: no parquet file with texts in "{KEY}": {error}') from error


def _tfds(name: str) -> Iterator[str]:
    import tensorflow_datasets as tfds  # takes a second to import

    try:
        rows = tfds.data_source(name, split="train", download=False)
    except Exception as error:  # of many kinds
        raise ValueError(
            f"{TFDS}{name} can't be read ({error}): prepare it first, in the file format "
            "array_record: tfds build --file_format=array_record"
        ) from error
    for row in rows:
        text = row.get(KEY) if isinstance(row, dict) else None
        if not isinstance(text, bytes | str):
            raise ValueError(f'{TFDS}{name} has no text in feature "{KEY}": use a dataset that has')
        yield text.decode("utf-8", "replace") if isinstance(text, bytes) else text
