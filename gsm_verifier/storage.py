"""Files of this machine, or of a bucket on Google Cloud Storage: where the two differ.

What a user names becomes a path here, by `path`. A file of this machine is a `pathlib.Path`; one of
a bucket is an `etils.epath.Path`, which has the same methods, those of pathlib that this package
uses. All else that differs is in this room: a bucket has no folders but names that begin alike, and
its files are put whole, in place of the one before, and never appended to.
"""

import importlib.util
import logging
import os
import re
import uuid
from pathlib import Path

BUCKETS = "gs://"
_PATTERNS = "*?[]#"  # in a name, they would be read as a pattern, or as a version of the file


def path(name: str | os.PathLike[str]) -> Path:
    """A file or folder of this machine, or of a bucket: gs://<bucket>/<name>.

    Raises:
      ValueError: another kind of address; or what reads buckets isn't installed.
    """
    name = os.fspath(name)
    if not re.match(r"\w{2,}:/", name):  # gs:/ too, but not C:/
        return Path(name)
    bucket, _, rest = name.removeprefix(BUCKETS).partition("/")
    if not name.startswith(BUCKETS) or not bucket or not rest or set(name) & set(_PATTERNS):
        raise ValueError(
            f"{name}: give a folder, or {BUCKETS}<bucket>/<name> without any of {_PATTERNS}"
        )
    if not importlib.util.find_spec("gcsfs"):
        raise ValueError(f"{name}: reading buckets needs gcsfs: pip install -e '.[gs]'")
    os.environ.setdefault("EPATH_USE_TF", "no")  # or it would import TensorFlow, if there is one
    import fsspec
    from etils import epath

    # A list of a folder's files, once got, would be kept and hide what other processes write.
    fsspec.config.conf["gcs"] = {"use_listings_cache": False} | fsspec.config.conf.get("gcs", {})
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # a trace of every try, beside the error
    return epath.Path(name)


def reach(path: Path) -> None:
    """Ask for what a run will need, before the work.

    Raises:
      ValueError: a bucket that doesn't answer.
    """
    if not in_bucket(path):
        return
    try:
        path.exists()
    except Exception as error:  # of the libraries below, each its own
        told = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(
            f"{path} can't be reached ({told}): check the bucket's name, the network, and "
            "`gcloud auth application-default login`"
        ) from error


def in_bucket(path: Path) -> bool:
    """Is it a path of a bucket?"""
    return os.fspath(path).startswith(BUCKETS)


def below(folder: Path) -> set[str]:
    """All files and folders in a folder and in those of it; none if it isn't there."""
    from etils import epath  # pathlib can't walk before Python 3.12

    walked = epath.Path(folder).walk()
    return {f"{root}/{name}" for root, folders, files in walked for name in [*folders, *files]}


def write_atomically(path: Path, data: bytes) -> None:
    """Write a whole file or none: temporary name, fsync, rename; a bucket does so by itself.

    The temporary name is no other writer's, on whatever host of a shared file system.
    """
    if in_bucket(path):
        path.write_bytes(data)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
