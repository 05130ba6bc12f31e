"""The mesh changes where numbers live and nothing else."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import DEVICES, MakeMesh, make_config
from jax.sharding import Mesh, PartitionSpec

from gsm_verifier import sharding
from gsm_verifier.data.packing import FIELDS
from gsm_verifier.model import transformer
from gsm_verifier.model.config import ModelConfig
from gsm_verifier.model.transformer import Params, Transformer
from gsm_verifier.train import loop, optimizer
from gsm_verifier.train.losses import Objective

MESHES = [(8, 1, 1), (2, 2, 2), (1, 4, 2), (1, 8, 1), (1, 1, 2)]


# Meshes and specs


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((8, 1, 1), (8, 1, 1)),
        ((-1, 1, 1), (8, 1, 1)),
        ((2, -1, 2), (2, 2, 2)),
        ((1, 8, -1), (1, 8, 1)),
    ],
)
def test_a_mesh_covers_all_devices(sizes: tuple[int, ...], expected: tuple[int, ...]) -> None:
    mesh = sharding.make_mesh(*sizes)
    assert tuple(mesh.shape.items()) == tuple(zip(sharding.AXES, expected, strict=True))
    assert set(mesh.devices.flat) == set(jax.devices())


@pytest.mark.parametrize(
    "sizes",
    [(1, 1, 1), (-1, 3, 1), (-1, 16, 1), (-1, -1, 8), (-1, 0, 1), (0, 1, 8), (-1, -8, 1)],
)
def test_a_mesh_that_does_not_cover_them_is_refused(sizes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=f"doesn't cover {DEVICES} devices") as caught:
        sharding.make_mesh(*sizes)
    assert "data=" in str(caught.value)
    assert "-1" in str(caught.value)


def test_letters_follow_the_rules_and_a_mesh_axis_serves_once() -> None:
    B, D, N = ("data", "fsdp"), "fsdp", "tensor"
    for letters, expected in {
        "": (),
        "BTD": (B, None, None),  # D yields fsdp to the rows
        "VD": (N, D),
        "DNH": (D, N, None),
        "NHD": (N, None, D),
        "LDF": (None, D, N),
        "BTNH": (B, None, N, None),
        "NK": (N, None),
        "ABT": (None, B, None),
    }.items():
        assert sharding.spec(letters) == PartitionSpec(*expected), letters
    assert sharding.spec(("V", None)) == PartitionSpec("tensor", None)
    with pytest.raises(KeyError):
        sharding.spec("X")


def test_host_arrays_go_to_the_mesh_and_come_back(make_mesh: MakeMesh) -> None:
    host = np.arange(8 * 4 * 6, dtype=np.float32).reshape(8, 4, 6)
    for sizes in [(1, 1, 1), *MESHES]:
        array = sharding.to_global(make_mesh(*sizes), "BTN", host)
        rows, heads = sizes[0] * sizes[1], sizes[2]
        assert array.addressable_shards[0].data.shape == (8 // rows, 4, 6 // heads)
        np.testing.assert_array_equal(sharding.to_host(array), host)


def test_local_work_sees_a_devices_part_or_where_it_cannot_be_cut_the_whole(
    make_mesh: MakeMesh,
) -> None:
    x = np.arange(16 * 3, dtype=np.float32).reshape(16, 3)

    def less_the_mean(x: jax.Array) -> jax.Array:  # it would notice other rows
        return x - x.mean(0)

    def local(x: np.ndarray, mesh: Mesh | None) -> np.ndarray:
        def function(x: jax.Array) -> jax.Array:
            return sharding.local(less_the_mean, ("BH",), "BH", x)

        if mesh is None:
            return np.asarray(function(jnp.asarray(x)))
        with jax.set_mesh(mesh):
            return np.asarray(jax.jit(function)(sharding.to_global(mesh, (None, "H"), x)))

    parts = np.concatenate([part - part.mean(0) for part in np.split(x, 4)])
    np.testing.assert_allclose(local(x, make_mesh(2, 2, 2)), parts)
    np.testing.assert_allclose(local(x, None), x - x.mean(0))
    np.testing.assert_allclose(local(x[:6], make_mesh(2, 2, 2)), x[:6] - x[:6].mean(0))


def test_a_letter_whose_axes_another_has_taken_need_not_be_divided(make_mesh: MakeMesh) -> None:
    """As of rows that lie beside those they came from."""
    x_UBK = np.arange(4 * 3 * 2.0).reshape(4, 3, 2)
    shapes = []

    def double(x: jax.Array) -> jax.Array:
        shapes.append(x.shape)
        return 2 * x

    with jax.set_mesh(make_mesh(2, 2, 2)):
        found = jax.jit(lambda x: sharding.local(double, ("UBK",), "UBK", x))(x_UBK)
    np.testing.assert_array_equal(found, 2 * x_UBK)
    assert shapes == [(1, 3, 1)]


def test_windows_of_layers_of_their_own_on_a_mesh(make_mesh: MakeMesh) -> None:
    config = make_config("llama", windows=(3, 0), attention="jax")
    params = transformer.init(config, jax.random.key(0), make_mesh())
    tokens_BT = np.random.default_rng(0).integers(0, 100, (2, 9))
    position_BT = np.tile(np.arange(9), (2, 1))

    def hidden(config: ModelConfig, params: Params) -> np.ndarray:
        context = transformer.Packed.causal(2, 9)
        apply = jax.jit(functools.partial(Transformer(config).apply, context=context))
        return np.asarray(apply(params, tokens_BT, position_BT)[0])

    expected = hidden(config, params)
    with jax.set_mesh(make_mesh(2, 1, 1)):
        placed = jax.device_put(params, transformer.shardings(config, make_mesh(2, 1, 1)))
        found = hidden(*transformer.unstack(config, placed))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert np.abs(hidden(config.with_(windows=()), params) - expected).max() > 1e-3


def test_constraints_bind_under_a_mesh_and_vanish_without(make_mesh: MakeMesh) -> None:
    config = make_config("llama")

    def text() -> str:
        tokens = jnp.zeros((8, 16), jnp.int32)
        context = transformer.Packed.causal(8, 16)
        apply = jax.jit(lambda *inputs: Transformer(config).apply(*inputs))  # traced anew
        return apply.lower(transformer.shapes(config), tokens, tokens, context).as_text()

    assert text().count("sharding_constraint") == 0
    with jax.set_mesh(make_mesh(2, 2, 2)):
        assert text().count("sharding_constraint") >= 9  # embedding 2, attention 4, mlp 3


# Parameters


def test_a_size_the_mesh_does_not_divide_is_refused_by_name(make_mesh: MakeMesh) -> None:
    mesh = make_mesh(1, 8, 1)
    with pytest.raises(ValueError, match="dimension D of size 36 can't be split over") as caught:
        transformer.shardings(make_config("llama", width=36), mesh)
    assert "mesh axes fsdp = 8: change the mesh or the size" in str(caught.value)
    assert "embed_VD" in str(caught.value)
    with pytest.raises(ValueError, match=r"wk_DKH.*dimension K of size 2 .* tensor = 4"):
        transformer.shardings(make_config("llama"), make_mesh(1, 2, 4))
    with pytest.raises(ValueError, match=r"VD.*dimension V of size 128 .* tensor = 3"):
        transformer.shardings(make_config("llama", heads=3, kv_heads=3), make_mesh(1, 1, 3))
    with pytest.raises(ValueError, match="dimension F of size 47"):
        transformer.init(make_config("llama", mlp_width=47), jax.random.key(0), make_mesh(1, 1, 2))
    transformer.shardings(make_config("llama", width=36), make_mesh(1, 4, 1))


def test_initial_parameters_do_not_depend_on_the_mesh(mesh: Mesh, make_mesh: MakeMesh) -> None:
    config, key = make_config("gpt3"), jax.random.key(0)
    one = transformer.init(config, key, mesh)
    many = transformer.init(config, key, make_mesh(2, 2, 2))
    jax.tree.map(np.testing.assert_array_equal, one, many)


# Training


def batch_fields(rows: int, T: int) -> dict[str, np.ndarray]:
    """Two documents a row, of unequal weights, with values judged at random places."""
    rng = np.random.default_rng(0)
    cut = rng.integers(3, T - 3, (rows, 1))
    t = np.arange(T)
    fields = {
        "tokens": rng.integers(0, 100, (rows, T)),
        "targets": rng.integers(0, 100, (rows, T)),
        "position": np.where(t < cut, t, t - cut),
        "end": np.where(t < cut, cut, T),
        "lm_weight": rng.integers(0, 3, (rows, T)),
        "value_weight": rng.integers(0, 2, (rows, T)),
        "label": np.broadcast_to(rng.integers(0, 2, (rows, 1)), (rows, T)),
    }
    return {name: fields[name].astype(dtype) for name, dtype in FIELDS.items()}


@functools.cache
def trained(family: str, mesh: Mesh, A: int) -> tuple[loop.TrainState, list[float]]:
    """The state and the losses of three steps of A microbatches, with dropout, on a mesh.

    Adam's epsilon is large: it would turn the rounding of a gradient that is 0 into a whole step.
    """
    config = make_config(family)
    tx = optimizer.make(
        0.01, 4, warmup=1, beta1=0.9, beta2=0.95, epsilon=1e-3, weight_decay=0.01, clip=1.0
    )
    shapes, where = loop.state_shardings(config, tx, mesh)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x, s: jax.device_put((0.2 * rng.standard_normal(x.shape)).astype(x.dtype), s),
        shapes.params,
        where.params,
    )
    step = loop.make_step(Transformer(config, dropout=0.2), Objective(chunk=8), tx, seed=0)
    with jax.set_mesh(mesh):
        opt_state = jax.jit(tx.init, out_shardings=where.opt_state)(params)
        state = loop.TrainState(params, opt_state, jnp.zeros((), jnp.int32))
        step = jax.jit(step, out_shardings=(where, None))
        batch = loop.device_batch(mesh, batch_fields(16, 16), A)
        losses = []
        for _ in range(3):
            state, metrics = step(state, batch)
            losses += [float(metrics[name]) for name in ("lm_loss", "value_loss", "grad_norm")]
    return state, losses


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        *[("llama", sizes) for sizes in MESHES],
        pytest.param("gpt3", (2, 2, 2), marks=pytest.mark.slow),
    ],
)
def test_training_is_the_same_on_every_mesh(
    family: str, sizes: tuple[int, ...], mesh: Mesh, make_mesh: MakeMesh
) -> None:
    """And by every cut of a step into microbatches."""
    one, one_losses = trained(family, mesh, 2)
    many, many_losses = trained(family, make_mesh(*sizes), 1)
    np.testing.assert_allclose(many_losses, one_losses, rtol=1e-5)
    assert one_losses[6] != pytest.approx(one_losses[0], rel=1e-3)  # it did train
    before = jax.tree.leaves(one.params)
    for a, b in zip(before, jax.tree.leaves(many.params), strict=True):
        assert np.linalg.norm(b - np.asarray(a)) <= 1e-5 * max(np.linalg.norm(a), 1e-2)


def test_parameters_and_moments_live_in_parts(make_mesh: MakeMesh) -> None:
    state, _ = trained("llama", make_mesh(1, 4, 2), 1)
    adam = next(s for s in state.opt_state if hasattr(s, "mu"))
    expected = {  # D is cut in 4, N, K, F and V in 2, the rest is whole
        "embed_VD": (64, 8),
        "unembed_VD": (64, 8),
        "wq_DNH": (2, 8, 2, 8),
        "wk_DKH": (2, 8, 1, 8),
        "wo_NHD": (2, 2, 8, 8),
        "w_in_DF": (2, 8, 24),
        "w_out_FD": (2, 24, 8),
    }
    for tree in (state.params, adam.mu, adam.nu):
        found = {}
        for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]:
            shards = x.addressable_shards
            assert len(shards) == 8
            assert len({s.data.shape for s in shards}) == 1
            found[jax.tree_util.keystr(path[-1:], simple=True)] = shards[0].data.shape
        assert {name: found[name] for name in expected} == expected
    # A device holds little more than its eighth of the whole state.
    leaves = jax.tree.leaves((state.params, adam.mu, adam.nu))
    held = sum(x.addressable_shards[0].data.size for x in leaves)
    assert held < 1.02 * sum(x.size for x in leaves) / 8
