"""What is restored is what was saved, on any mesh, or the restore says what is wrong."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import MakeMesh
from hypothesis import given
from hypothesis import strategies as st

from gsm_verifier import checkpoint, sharding
from gsm_verifier.checkpoint import Checkpoints

LETTERS = {"params": {"table_VD": "VD", "wq_DNH": "DNH", "scale_D": "D", "gain": ""}, "step": ""}
MESHES = [(1, 1, 1), (8, 1, 1), (2, 2, 2), (1, 4, 2), (1, 8, 1), (1, 1, 8)]


def host_tree(seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    normal = {
        "table_VD": rng.normal(size=(64, 32)).astype(np.float32),
        "wq_DNH": rng.normal(size=(32, 8, 4)).astype(jnp.bfloat16),
        "scale_D": np.array([0.0, -0.0, np.inf, 1e-40] * 8, np.float32),
        "gain": np.float32(0.1),
    }
    return {"params": normal, "step": np.int32(2**31 - 1)}


def placed(make_mesh: MakeMesh, sizes: tuple[int, ...], tree: Any) -> Any:
    mesh = make_mesh(*sizes)
    return jax.tree.map(lambda x, s: jax.device_put(x, sharding.named(mesh, s)), tree, LETTERS)


def like(make_mesh: MakeMesh, sizes: tuple[int, ...] = (1, 1, 1)) -> Any:
    shardings = jax.tree.map(lambda s: sharding.named(make_mesh(*sizes), s), LETTERS)
    return checkpoint.abstract(host_tree(), shardings)


def same_bits(a: Any, b: Any) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)


@pytest.fixture
def saved(tmp_path: Path, make_mesh: MakeMesh) -> Path:
    """A folder with one checkpoint, of step 5."""
    store = Checkpoints(tmp_path / "run")
    store.save(5, placed(make_mesh, (2, 2, 2), host_tree()), {"note": ["x", 1]})
    store.close()
    return tmp_path / "run"


# Save and restore


@pytest.mark.parametrize("sizes", MESHES)
def test_a_restored_tree_is_bit_equal_on_any_mesh(
    sizes: tuple[int, ...], saved: Path, make_mesh: MakeMesh
) -> None:
    wanted = like(make_mesh, sizes)
    tree, meta = Checkpoints(saved).restore(wanted)
    assert meta == {"note": ["x", 1]}
    assert same_bits(tree, host_tree())
    for got, want in zip(jax.tree.leaves(tree), jax.tree.leaves(wanted), strict=True):
        assert got.sharding == want.sharding
        assert got.dtype == want.dtype
    # And back, from this mesh to one device.
    store = Checkpoints(saved)
    store.save(6, tree)
    again, meta = store.restore(like(make_mesh), 6)
    assert meta == {}
    assert same_bits(again, host_tree())


def test_hashes_do_not_depend_on_the_mesh(make_mesh: MakeMesh) -> None:
    tree = host_tree()
    expected = checkpoint.hashes(jax.tree.map(jnp.asarray, tree))
    assert list(expected) == [
        "params.gain", "params.scale_D", "params.table_VD", "params.wq_DNH", "step",
    ]  # fmt: skip
    for sizes in MESHES:
        assert checkpoint.hashes(placed(make_mesh, sizes, tree)) == expected


@given(
    st.sampled_from([np.float32, jnp.bfloat16, np.int32, np.uint8]),
    st.integers(0, 59),
    st.integers(0, 31),
)
def test_any_changed_bit_changes_the_hash(dtype: Any, at: int, bit: int) -> None:
    data = bytearray(np.random.default_rng(0).integers(0, 250, 60 * 4, np.uint8).tobytes())

    def value() -> int:
        size = np.dtype(dtype).itemsize * 60
        x = np.frombuffer(bytes(data[:size]), dtype).reshape(3, 4, 5)
        return checkpoint.hashes({"x": jnp.asarray(x)})["x"]

    before = value()
    bit %= np.dtype(dtype).itemsize * 8
    data[at * np.dtype(dtype).itemsize + bit // 8] ^= 1 << bit % 8
    assert value() != before


def test_hashes_tell_order_and_zero_signs_apart() -> None:
    values = [[0.0, 1.0, 2.0], [0.0, 2.0, 1.0], [-0.0, 1.0, 2.0]]
    assert len({checkpoint.hashes({"x": jnp.array(v)})["x"] for v in values}) == 3


def steps_in(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())


def test_the_newest_checkpoints_are_kept(tmp_path: Path, make_mesh: MakeMesh) -> None:
    store = Checkpoints(tmp_path, keep=2)
    assert store.latest is None
    for step in (1, 3, 12):
        store.save(step, placed(make_mesh, (1, 1, 1), host_tree(step)))
    assert (steps_in(tmp_path), store.latest) == ([3, 12], 12)
    store.close()
    store = Checkpoints(tmp_path, keep=2)
    assert store.latest == 12
    assert same_bits(store.restore(like(make_mesh))[0], host_tree(12))
    assert same_bits(store.restore(like(make_mesh), 3)[0], host_tree(3))


# What is wrong is said


def test_nothing_saved_says_so(tmp_path: Path, make_mesh: MakeMesh) -> None:
    with pytest.raises(ValueError, match=f"{tmp_path} holds no checkpoint"):
        Checkpoints(tmp_path).restore(like(make_mesh))


def test_a_step_that_is_not_there_is_named(saved: Path, make_mesh: MakeMesh) -> None:
    with pytest.raises(ValueError, match=f"checkpoint {saved}/4 can't be restored"):
        Checkpoints(saved).restore(like(make_mesh), 4)


def restore_or_complaint(folder: Path, wanted: Any) -> str:
    """What the restore of the damaged step says; "" if it gave the right tree after all."""
    try:
        store = Checkpoints(folder)
        tree, _ = store.restore(wanted)
        store.close()
    except ValueError as error:
        return str(error)
    assert same_bits(tree, host_tree())
    return ""


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of tensorstore
def test_a_damaged_file_never_passes(saved: Path, make_mesh: MakeMesh) -> None:
    """Every file, one byte flipped at several places or cut in half: an error that names the
    checkpoint, or the very same tree where the byte carries nothing."""
    caught: list[str] = []
    files = [p for p in sorted((saved / "5").rglob("*")) if p.is_file() and p.stat().st_size]
    arrays = max(files, key=lambda p: p.stat().st_size)
    for path in files:
        whole = path.read_bytes()
        versions = [whole[: len(whole) // 2]]
        for at in np.linspace(0, len(whole) - 1, 16 if path == arrays else 8).astype(int):
            flipped = bytearray(whole)
            flipped[at] ^= 0x10
            versions.append(bytes(flipped))
        for version in versions:
            path.write_bytes(version)
            complaint = restore_or_complaint(saved, like(make_mesh))
            if complaint:
                assert "checkpoint" in complaint
                assert str(saved) in complaint
                caught.append(complaint)
        path.write_bytes(whole)
    assert sum(f"checkpoint {saved}/5 is damaged in params." in c for c in caught) >= 5
    assert sum("can't be restored" in c for c in caught) >= 5
    assert restore_or_complaint(saved, like(make_mesh)) == ""


def test_other_shapes_dtypes_and_leaves_are_named(saved: Path, make_mesh: MakeMesh) -> None:
    right = like(make_mesh)
    one = sharding.named(make_mesh(), ())

    def refused(name: str, leaf: Any) -> str:
        params = {k: v for k, v in right["params"].items() if k != name}
        params |= {} if leaf is None else {name: leaf}
        with pytest.raises(ValueError, match="doesn't fit the config") as caught:
            Checkpoints(saved).restore(right | {"params": params})
        assert f"checkpoint {saved}/5" in str(caught.value)
        return str(caught.value)

    table = jax.ShapeDtypeStruct((64, 48), np.float32, sharding=one)
    expected = "params.table_VD is float32[64, 32] there and float32[64, 48] here (1 such)"
    assert expected in refused("table_VD", table)
    table = jax.ShapeDtypeStruct((64, 32), jnp.bfloat16, sharding=one)
    assert "float32[64, 32] there and bfloat16[64, 32] here" in refused("table_VD", table)
    assert "params.table_VD is float32[64, 32] there and missing here" in refused("table_VD", None)
    extra = jax.ShapeDtypeStruct((3,), np.float32, sharding=one)
    assert "params.new is missing there and float32[3] here" in refused("new", extra)


def test_a_stray_step_is_put_aside_and_blocks_nothing(saved: Path, make_mesh: MakeMesh) -> None:
    """Even when the same step was put aside before."""
    for time in range(3):
        (saved / "9").mkdir()
        (saved / "9" / "half").write_text(str(time))
        store = Checkpoints(saved, keep=2)
        assert steps_in(saved) == [5]
        assert same_bits(store.restore(like(make_mesh))[0], host_tree())
        store.close()
    aside = sorted(p for p in saved.iterdir() if p.name.startswith("damaged-9"))
    assert [(p / "half").read_text() for p in aside] == ["0", "1", "2"]
    store = Checkpoints(saved, keep=2)
    store.save(7, placed(make_mesh, (1, 1, 1), host_tree(7)))
    store.save(9, placed(make_mesh, (1, 1, 1), host_tree(9)))
    store.close()
    store = Checkpoints(saved, keep=2)
    assert steps_in(saved) == [7, 9]
    assert same_bits(store.restore(like(make_mesh))[0], host_tree(9))


def test_a_save_killed_half_way_leaves_the_one_before(saved: Path, make_mesh: MakeMesh) -> None:
    half = saved / "6.orbax-checkpoint-tmp"
    (half / "state").mkdir(parents=True)
    (half / "state" / "_METADATA").write_text("{")
    store = Checkpoints(saved)
    assert store.latest == 5
    assert same_bits(store.restore(like(make_mesh))[0], host_tree())
    store.save(6, placed(make_mesh, (1, 1, 1), host_tree(6)))
    assert store.latest == 6
