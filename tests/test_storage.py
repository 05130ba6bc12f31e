"""Files of a bucket behave as those of a folder do, by the service's own clients.

They speak with a stand-in of the service, see `bucket`; no real bucket is ever asked.
"""

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import bucket
import jax
import jax.numpy as jnp
import pytest

from gsm_verifier import metrics, records, storage
from gsm_verifier.checkpoint import Checkpoints
from gsm_verifier.records import Label
from gsm_verifier.text.tokenizer import Tokenizer


def test_what_is_no_bucket_is_a_folder_of_this_machine(tmp_path: Path) -> None:
    for name in ("runs/a", "/runs/[a]", tmp_path):
        assert storage.path(name) == Path(name)
        assert type(storage.path(name)) is type(tmp_path)
        assert not storage.in_bucket(storage.path(name))


@pytest.mark.parametrize(
    "name", ["s3://b/run", "gs:/b/run", "gs://", "gs://b", "gs:///run", "gs://b/run[1]"]
)
def test_other_addresses_are_refused_in_one_line(name: str) -> None:
    with pytest.raises(ValueError, match="give a folder, or gs://<bucket>/<name>") as error:
        storage.path(name)
    assert str(error.value).startswith(f"{name}: ")
    assert "\n" not in str(error.value)


def test_without_gcsfs_the_mend_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"gs://b/run: .*pip install -e '\.\[gs\]'"):
        storage.path("gs://b/run")


def test_a_bucket_that_does_not_answer_is_told_in_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.reach(folder)
    storage.reach(Path("nothing/of/it"))
    import gcsfs.core

    async def refuse(*args: object, **words: object) -> None:
        raise OSError("no such host\nand more")

    monkeypatch.setattr(gcsfs.core.GCSFileSystem, "_call", refuse)
    with pytest.raises(ValueError, match=r"gs://bucket/run can't be reached") as error:
        storage.reach(folder)
    assert "no such host" in str(error.value)
    assert "login" in str(error.value)
    assert "\n" not in str(error.value)


def test_all_below_a_folder_is_seen(tmp_path: Path) -> None:
    assert storage.below(tmp_path / "none") == set()
    storage.write_atomically(tmp_path / "a" / ".b", b"")
    (tmp_path / "c").mkdir()
    assert storage.below(tmp_path) == {f"{tmp_path}/{name}" for name in ("a", "a/.b", "c")}


@pytest.fixture(scope="module")
def server() -> Iterator[bucket.Bucket]:
    """One for all tests: the clients keep its address."""
    pytest.importorskip("gcsfs")
    from tensorboardX.record_writer import GCSRecordWriter

    # As the process ends it puts its files once more, and would wait for a server that has gone.
    GCSRecordWriter.__del__ = lambda writer: None
    with bucket.serve() as served, pytest.MonkeyPatch.context() as patch:
        for name, value in served.environment.items():
            patch.setenv(name, value)
        yield served


@pytest.fixture
def folder(server: bucket.Bucket) -> Path:
    """An empty one of the bucket."""
    server.objects.clear()
    return storage.path("gs://bucket/run")


def test_a_file_is_put_whole_and_replaced(folder: Path, server: bucket.Bucket) -> None:
    path = folder / "deep" / "results.json"
    assert not path.exists()
    assert not folder.is_dir()
    assert storage.below(folder) == set()
    for content in (b"1", b"2" * 20_000_000, b""):  # the long one in several pieces
        storage.write_atomically(path, content)
        assert path.read_bytes() == content
    assert path.is_file()
    assert folder.is_dir()
    assert list(server.objects) == ["run/deep/results.json"]
    assert len(storage.below(folder)) == 2
    path.unlink()
    assert not path.exists()
    with pytest.raises(FileNotFoundError):
        path.read_bytes()


def test_what_other_processes_write_is_seen(folder: Path, server: bucket.Bucket) -> None:
    path = records.shard_path(folder, 0, 1)
    storage.write_atomically(folder / "other", b"")
    assert [p.name for p in folder.iterdir()] == ["other"]
    assert not path.exists()
    server.objects["run/00000-of-00001.parquet"] = b"", 1
    assert path.exists()
    assert records.shards(folder) == [path]


def test_records_are_written_and_read(folder: Path, tmp_path: Path) -> None:
    rows = [Label(f"p{i // 2}", i % 2, None, False, i > 3) for i in range(6)]
    for run in (folder, tmp_path):
        for i in (0, 1):
            path = records.shard_path(run / "samples/test", i, 2)
            records.write(path, Label, rows[3 * i :][:3])
    ours, theirs = (records.shards(run / "samples/test") for run in (folder, tmp_path))
    assert [p.read_bytes() for p in ours] == [p.read_bytes() for p in theirs]
    assert records.read_all(folder / "samples/test", Label) == rows
    assert records.places(folder, "test") == records.places(tmp_path, "test")
    storage.write_atomically(ours[1], ours[1].read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"can't read gs://bucket/run/samples/test/00001"):
        records.read_all(folder / "samples/test", Label)
    with pytest.raises(ValueError, match=r"can't read gs://bucket/run/none"):
        records.read(folder / "none", Label)


def test_metrics_are_the_same_file_after_a_rewind(folder: Path, tmp_path: Path) -> None:
    def run(where: Path) -> bytes:
        log = metrics.Metrics(where, "verify")
        log.rewind(0)
        for step in (1, 2, 3):
            log.write(step, {"loss": step / 3})
            if step == 2:
                log.flush()  # then it is killed
        log._board.close()
        log = metrics.Metrics(where, "verify")
        log.rewind(2)
        log.write(3, {"loss": 9.0})
        log.close()
        return log.path.read_bytes()

    assert run(folder) == run(tmp_path)
    assert [row["loss"] for row in metrics.read(folder / "verify.jsonl")] == [1 / 3, 2 / 3, 9.0]
    assert list((folder / "tensorboard/verify").iterdir())


def test_a_tokenizer_is_kept(folder: Path, tmp_path: Path) -> None:
    made = Tokenizer.train(["one and two"], 270)
    for where in (folder, tmp_path):
        made.save(where / "tokenizer.json")
        assert Tokenizer.load(where / "tokenizer.json").encode("one two") == made.encode("one two")
    ours, theirs = ((f / "tokenizer.json").read_bytes() for f in (folder, tmp_path))
    assert ours == theirs


def test_checkpoints_are_kept_and_half_ones_are_not(folder: Path, server: bucket.Bucket) -> None:
    tree = {"a": jnp.arange(10.0), "b": jnp.ones((4, 4))}
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
    store = Checkpoints(folder)
    assert store.latest is None
    for step in (3, 5):
        store.save(step, jax.tree.map(lambda x, s=step: x * s, tree), {"note": step})
    store.close()
    objects = server.objects
    assert not [name for name in objects if name.startswith("run/3/")]
    objects |= {name.replace("/5/", f"/{n}/"): x for n in (7, 9) for name, x in objects.items()}
    del objects["run/7/commit_success.txt"]  # as a killed save leaves it
    del objects["run/9/_CHECKPOINT_METADATA"]
    objects["run/training/4/state"] = b"", 1  # the store of a training in progress
    store = Checkpoints(folder)
    assert {name.split("/")[1] for name in objects} == {"5", "damaged-9", "training"}
    found, meta = store.restore(like)
    assert meta == {"note": 5}
    assert found["a"].tolist() == (5 * tree["a"]).tolist()
    store.save(7, tree)
    store.close()
    assert Checkpoints(folder).restore(like)[0]["a"].tolist() == tree["a"].tolist()
    assert "run/training/4/state" in objects
    array = max((n for n in objects if "/7/" in n), key=lambda n: len(objects[n][0]))
    objects[array] = objects[array][0][:-1], 10**6
    with pytest.raises(ValueError, match="checkpoint gs://bucket/run/7"):
        Checkpoints(folder).restore(like)


def test_json_of_a_run_is_read(folder: Path) -> None:
    storage.write_atomically(folder / "config.json", json.dumps({"seed": 1}).encode())
    from gsm_verifier import api

    assert api._keys(folder) == {"seed": 1}
    with pytest.raises(ValueError, match="gs://bucket/run is neither a run's"):
        api.load("gs://bucket/run")
