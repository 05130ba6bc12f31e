"""GSM8K through TensorFlow Datasets, read as array_record without TensorFlow.

Paper, section 2. The two files come from the paper's code release at a pinned commit, and must have
the sizes and sha256 in checksums.tsv, which TFDS expects beside this module. They are prepared
once, under TFDS's data directory, and from then on read from there.
"""

import contextlib
import dataclasses
import hashlib
import http.client
import os
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import tensorflow_datasets as tfds

from gsm_verifier.data import problems
from gsm_verifier.records import Problem

SPLITS = ("train", "test")
_URL = (
    "https://raw.githubusercontent.com/openai/grade-school-math/"
    "3101c7d5072418e28b9008a6636bde82a006892c/grade_school_math/data/{split}.jsonl"
)
_PROBE_SECONDS = 1.5


class GradeSchoolMath(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Rows are the fields of `Problem`, in the order of the source files.

    Named apart from TFDS's own gsm8k, whose prepared files may lie in the same data directory and
    have other fields.
    """

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        return tfds.core.DatasetInfo(
            builder=self,
            description="Grade-school math word problems with worked solutions (MIT licence).",
            features=tfds.features.FeaturesDict({"id": text, "question": text, "solution": text}),
            homepage="https://github.com/openai/grade-school-math",
            citation="@article{cobbe2021gsm8k, title={Training Verifiers to Solve Math Word "
            "Problems}, author={Cobbe, Karl and others}, journal={arXiv:2110.14168}, year={2021}}",
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        paths = dl_manager.download({split: _URL.format(split=split) for split in SPLITS})
        return {split: self._generate_examples(paths[split], split) for split in SPLITS}

    def _generate_examples(self, path: os.PathLike[str], split: str) -> Iterator:
        yield from enumerate(dataclasses.asdict(problem) for problem in problems.load(path, split))


def load(
    split: str,
    data_dir: str | os.PathLike[str] | None = None,
    manual_dir: str | os.PathLike[str] | None = None,
) -> list[Problem]:
    """Returns the problems of a split; the first call prepares the dataset, in about a second.

    Args:
      split: "train" or "test".
      data_dir: where TFDS keeps its datasets; None means $TFDS_DATA_DIR or ~/tensorflow_datasets.
      manual_dir: a folder that may hold train.jsonl and test.jsonl; None means $GSM8K_DIR or
        `<data_dir>/downloads/manual`. Files found there are not downloaded.

    Raises:
      ValueError: the split does not exist, or a file in `manual_dir` is not GSM8K's.
      FileNotFoundError: there are neither files nor a network; raised within 2 seconds.
    """
    if split not in SPLITS:
        raise ValueError(f'gsm8k: there is no split "{split}"; choose one of {", ".join(SPLITS)}')
    builder = GradeSchoolMath(data_dir=data_dir)
    if not builder.info.splits:  # not prepared yet
        _prepare(builder, manual_dir)
        builder = GradeSchoolMath(
            data_dir=data_dir
        )  # reads what this or a concurrent process prepared
    return [
        Problem(**{name: text.decode() for name, text in row.items()})
        for row in builder.as_data_source(split=split)
    ]


def _prepare(builder: GradeSchoolMath, manual_dir: str | os.PathLike[str] | None) -> None:
    data_dir = Path(builder.data_dir).parents[1]
    manual_dir = Path(
        manual_dir or os.environ.get("GSM8K_DIR") or data_dir / "downloads" / "manual"
    ).expanduser()
    missing = []
    for url, expected in builder.url_infos.items():
        path = manual_dir / expected.filename
        if path.is_file():
            _verify(path, expected.checksum)
        else:
            missing.append(url)
    # TFDS retries an unreachable host for minutes, so ask first.
    if missing and not _reachable(missing[0]):
        raise FileNotFoundError(
            f"GSM8K is neither in {data_dir} nor in {manual_dir}, and its source cannot be reached:"
            " give --config.data.path=<folder> with train.jsonl and test.jsonl, or GSM8K_DIR, or "
            f"fetch into {manual_dir}:\n" + "\n".join(missing)
        )
    tfds.disable_progress_bar()  # twenty lines of it for one second of work
    try:
        builder.download_and_prepare(
            file_format="array_record",
            download_config=tfds.download.DownloadConfig(
                manual_dir=manual_dir, force_checksums_validation=True, try_download_gcs=False
            ),
        )
    except OSError:
        # The last step renames a folder into place. If a concurrent process was faster, it fails,
        # and the dataset is there.
        if not builder.is_prepared():
            raise


def _verify(path: Path, expected: str) -> None:
    actual = hashlib.sha256(path.read_bytes()).hexdigest()
    if actual != expected:
        raise ValueError(
            f"{path} is not GSM8K's file: its sha256 is {actual}, expected {expected}. Replace it, "
            "or read your own data by giving its folder instead of the name gsm8k"
        )


def _reachable(url: str) -> bool:
    answered = threading.Event()

    def probe() -> None:
        with contextlib.suppress(OSError, http.client.HTTPException):
            request = urllib.request.Request(url, method="HEAD")
            urllib.request.urlopen(request, timeout=_PROBE_SECONDS).close()
            answered.set()

    # In a thread, because the timeout does not cover name resolution; a daemon, so that it cannot
    # keep the process alive.
    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(_PROBE_SECONDS)
    return answered.is_set()
