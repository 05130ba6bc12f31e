"""Trees of arrays on disk at a step, through orbax, with their content verified.

Orbax restores a damaged array without a word, so every checkpoint carries a hash of each leaf that
doesn't depend on the mesh it was saved from.
"""

import contextlib
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from gsm_verifier import processes, storage

_COMMITTED = "_CHECKPOINT_METADATA"  # orbax itself takes any folder with a number for a checkpoint
_WHOLE = "commit_success.txt"  # the last file of a checkpoint, by which orbax knows one in a bucket
_BITS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def _leaf_hash(x: jax.Array) -> jax.Array:
    """A uint32 sum of the bits times odd numbers: one changed bit always changes it."""
    bits = jax.lax.bitcast_convert_type(x, _BITS[x.dtype.itemsize]).astype(jnp.uint32)
    index = jnp.zeros(x.shape, jnp.uint32)
    for axis in range(x.ndim):  # not a reshape, which would gather a sharded array
        stride = math.prod(x.shape[axis + 1 :])
        index += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride % 2**32)
    return (bits * (2 * index + 1)).sum(dtype=jnp.uint32)


@jax.jit
def _hash_all(leaves: list[jax.Array]) -> list[jax.Array]:
    return [_leaf_hash(leaf) for leaf in leaves]


def by_name(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by their dotted paths: the form of a tree on disk."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def hashes(tree: Any) -> dict[str, int]:
    """Content hash of every leaf by its name; equal for equal values on any mesh."""
    leaves = by_name(tree)
    # In one program: of several under way at once, each with a sum over processes, one process
    # may begin another than the others do, and all wait forever.
    return dict(zip(leaves, map(int, _hash_all(list(leaves.values()))), strict=True))


class Checkpoints:
    """The checkpoints of one training run: a folder with one checkpoint a step, the newest kept.

    `meta` is a small JSON dictionary kept beside the arrays.
    """

    def __init__(self, folder: str | Path, keep: int = 1):
        folder = storage.path(folder)
        self._folder = folder if storage.in_bucket(folder) else folder.absolute()
        if processes.first():
            self._quarantine()
        processes.wait_for_all(f"{self._folder} is in order")
        with _told(f"a checkpoint in {self._folder}"):
            self._checkpointer = ocp.training.Checkpointer(
                self._folder,
                preservation_policy=ocp.training.preservation_policies.LatestN(keep),
                # In a bucket it would take any folder for a checkpoint half saved, and delete it.
                cleanup_tmp_directories=not storage.in_bucket(self._folder),
            )

    def _quarantine(self) -> None:
        """A step without its metadata would silently block every later save.

        In a bucket, where a checkpoint has its name from the start, a killed save leaves a step
        that isn't whole; it is deleted.
        """
        if not self._folder.is_dir():
            return
        for step in self._folder.iterdir():
            if not step.name.isdecimal():
                continue
            if storage.in_bucket(step) and not (step / _WHOLE).is_file():
                step.rmtree()
            elif not (step / _COMMITTED).is_file():
                names = (f"damaged-{step.name}" + f".{i}" * (i > 0) for i in itertools.count())
                step.rename(next(p for n in names if not (p := step.with_name(n)).exists()))

    @property
    def latest(self) -> int | None:
        """The newest step, None where nothing has been saved."""
        return self._checkpointer.latest.step if self._checkpointer.latest else None

    def save(self, step: int, tree: Any, meta: dict[str, Any] | None = None) -> None:
        """Save and wait until it is on disk; what a killed run left at the step is replaced."""
        self._checkpointer.save(
            step,
            by_name(tree),
            force=True,
            overwrite=True,
            custom_metadata={"hashes": hashes(tree), "meta": meta or {}},
        )

    def restore(self, like: Any, step: int | None = None) -> tuple[Any, dict[str, Any]]:
        """The tree saved at a step (default: the newest), with the shardings of `like`, and meta.

        Args:
          like: tree of `jax.ShapeDtypeStruct` with shardings.

        Raises:
          ValueError: nothing saved, other shapes or dtypes than `like`'s, or damaged content.
        """
        step = self.latest if step is None else step
        if step is None:
            raise ValueError(f"{self._folder} holds no checkpoint: run the stage that makes it")
        where = f"checkpoint {self._folder}/{step}"
        with _told(where):
            metadata = self._checkpointer.metadata(step)
            custom = metadata.custom_metadata or {}
            if metadata.metadata is None or not {"hashes", "meta"} <= custom.keys():
                raise ValueError("its metadata is damaged")  # orbax leaves it out without a word
        _check_shapes(where, metadata.metadata, by_name(like))
        with _told(where):
            leaves = self._checkpointer.load(step, by_name(like))
        saved, found = custom["hashes"], hashes(leaves)
        damaged = [name for name in found if found[name] != saved.get(name)]
        if damaged:
            raise ValueError(f"{where} is damaged in {', '.join(damaged)}: remove it to go on")
        tree = jax.tree.unflatten(jax.tree.structure(like), [leaves[n] for n in by_name(like)])
        return tree, custom["meta"]

    def close(self) -> None:
        self._checkpointer.close()


@contextlib.contextmanager
def _told(where: str) -> Iterator[None]:
    """Whatever goes wrong in reading becomes one line that names the checkpoint."""
    try:
        yield
    except Exception as error:
        cause = error.__cause__ or error
        raise ValueError(f"{where} can't be restored: {cause}; remove it to go on") from error


def _check_shapes(where: str, saved: dict[str, Any], like: dict[str, Any]) -> None:
    """Orbax casts a wrong dtype silently and words a wrong shape badly."""

    def words(leaf: Any) -> str:
        return f"{jnp.dtype(leaf.dtype)}{list(leaf.shape)}" if leaf is not None else "missing"

    wrong = [n for n in {**saved, **like} if words(saved.get(n)) != words(like.get(n))]
    if wrong:
        name = wrong[0]
        raise ValueError(
            f"{where} doesn't fit the config: {name} is {words(saved.get(name))} there and "
            f"{words(like.get(name))} here ({len(wrong)} such): use the config it was made with"
        )


def abstract(tree: Any, shardings: Any) -> Any:
    """Shapes and dtypes of a tree (of arrays or of `jax.eval_shape`) on the given shardings."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )
