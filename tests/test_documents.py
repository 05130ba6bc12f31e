"""Documents to pretrain on: the same from every format, and refused by file and line."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds

from gsm_verifier.data import documents

TEXTS = ["One and a half: 1½.", 'Two "quoted"\u2028parts', "<|endoftext|> three"]


def write(path: Path, lines: list[Any]) -> str:
    """A text file of lines; what isn't bytes or text becomes JSON."""
    raw = [x if isinstance(x, (bytes, str)) else json.dumps(x) for x in lines]
    path.write_bytes(b"\n".join(x if isinstance(x, bytes) else x.encode() for x in raw))
    return str(path)


def parquet(path: Path, columns: dict[str, list[Any]]) -> str:
    pq.write_table(pa.table(columns), path)
    return str(path)


def test_every_format_gives_the_same_documents_without_empty_ones(tmp_path: Path) -> None:
    sources = [
        write(tmp_path / "a.txt", [TEXTS[0], "", TEXTS[1], "  ", TEXTS[2], ""]),
        write(tmp_path / "a.jsonl", [{"text": t, "more": 1} for t in TEXTS]),
        parquet(tmp_path / "a.parquet", {"text": [TEXTS[0], None, "", *TEXTS[1:]], "id": range(5)}),
    ]
    for source in sources:
        assert list(documents.read(source)) == TEXTS


def test_documents_are_read_one_by_one(tmp_path: Path) -> None:
    """What is wrong further on doesn't keep the first ones back."""
    source = write(tmp_path / "a.jsonl", [{"text": "one"}, {"text": "two"}, "{"])
    assert list(itertools.islice(documents.read(source), 2)) == ["one", "two"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not JSON (Expecting property name"),
        ('{"text": "cut', "not JSON (Unterminated string"),
        ("[" * 100_000, "not JSON (maximum recursion"),
        ("3", 'no key "text": write {"text": "..."}'),
        ({"question": "a"}, 'no key "text": write {"text": "..."}'),
        ({"text": 3}, '"text" is no string: quote it'),
        ({"text": None}, '"text" is no string: quote it'),
        (b'{"text": "\xff"}', "not UTF-8"),
    ],
)
def test_a_line_that_is_no_document_is_refused_with_its_number(
    line: Any, reason: str, tmp_path: Path
) -> None:
    source = write(tmp_path / "a.jsonl", [{"text": "one"}, "", line])
    with pytest.raises(ValueError, match="line 3") as error:
        list(documents.read(source))
    assert str(error.value).startswith(f"{source}, line 3: {reason}")


def test_text_that_is_not_utf8_is_refused_with_its_line(tmp_path: Path) -> None:
    source = write(tmp_path / "a.txt", ["one", b"\xff"])
    with pytest.raises(ValueError, match=r"a\.txt, line 2: not UTF-8"):
        list(documents.read(source))


def test_what_is_no_table_of_texts_is_refused(tmp_path: Path) -> None:
    damaged = write(tmp_path / "damaged.parquet", ["PAR1"])
    for source in (
        damaged,
        parquet(tmp_path / "other.parquet", {"content": ["a"]}),
        parquet(tmp_path / "numbers.parquet", {"text": [1, 2]}),
    ):
        with pytest.raises(ValueError, match='no parquet file with texts in "text"') as error:
            list(documents.read(source))
        assert str(error.value).startswith(source)


def test_a_source_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.csv: documents are \.txt, \.jsonl or \.parquet"):
        documents.read(write(tmp_path / "a.csv", ["a"]))
    with pytest.raises(ValueError, match=r"b\.txt: no such file of documents"):
        documents.read(str(tmp_path / "b.txt"))


# TFDS


class TinyDocuments(tfds.core.GeneratorBasedBuilder):
    """The texts as a dataset."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[Any]]:
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[Any]:
        yield from enumerate({"text": text} for text in TEXTS)


def test_a_dataset_of_tfds_is_read_once_it_is_prepared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path))
    with pytest.raises(ValueError, match=r"tfds:tiny_documents can't be read .* tfds build"):
        list(documents.read("tfds:tiny_documents"))
    TinyDocuments(data_dir=tmp_path).download_and_prepare(file_format="array_record")
    assert list(documents.read("tfds:tiny_documents")) == TEXTS
