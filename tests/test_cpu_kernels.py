"""What is in C++ against what JAX makes of it, which takes its place where there is no compiler."""

import functools
import itertools
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_config

from gsm_verifier import sharding
from gsm_verifier.model import cpu_kernels, transformer
from gsm_verifier.model.attention import (
    CACHE,
    HIDDEN,
    NOWHERE,
    BranchCache,
    Branches,
    Look,
    Packed,
    by_rows,
    seats,
    sees,
)
from gsm_verifier.model.cpu_kernels import NEW, SLOTS
from gsm_verifier.sample import decode

needs_compiler = pytest.mark.skipif(
    shutil.which("c++") is None, reason="the kernel is compiled by c++"
)
LETTERS = (*NEW, *CACHE, *SLOTS)


def example(B: int, T: int, K: int, G: int, H: int, S: int, W: int, J: int = 3) -> list[np.ndarray]:
    """Arrays of LETTERS; B prompts from 0 to S positions, slots, T of each in the mean, with the
    pages they need.

    Ages are from 0 to J * W, which a done slot has. What a slot doesn't see is so large that it
    would show.
    """
    rng = np.random.default_rng(0)
    U = B if B % 4 else 4  # pools, which a mesh can cut
    P, C = B // U, B // U * T
    Z = C * J + 1
    new, prompts, own = (U, C, K, H), (U, P, K, S, H), (U, Z, K, W, H)
    shapes = ((U, C, K, G, H), new, new, prompts, prompts, own, own)
    # Of numbers that are bfloat16 too.
    arrays = [np.asarray(jnp.bfloat16(rng.normal(size=s)), np.float32) for s in shapes]
    prompt_k, prompt_v, own_k, own_v = arrays[3:]
    length_UP = np.linspace(0, S, B).round().astype(np.int32).reshape(U, P)
    prompt_UT = rng.integers(0, P, (U, C))
    age_UT = (np.arange(B * T, dtype=np.int32) * 7 % (J * W + 1)).reshape(U, C)
    dealt_UTJ = np.stack([rng.permutation(Z)[:-1] for _ in range(U)]).reshape(U, C, J)
    table_UTJ = np.where(np.arange(J) <= age_UT[..., None] // W, dealt_UTJ, NOWHERE)
    for u, p in np.ndindex(U, P):
        prompt_k[u, p, :, length_UP[u, p] :] = prompt_v[u, p, :, length_UP[u, p] :] = 1e3
    for u, t, j in np.ndindex(U, C, J):
        # What is at its age is about to be replaced.
        unseen = slice(max(age_UT[u, t] - j * W, 0), None)
        own_k[u, dealt_UTJ[u, t, j], :, unseen] = own_v[u, dealt_UTJ[u, t, j], :, unseen] = 1e3
    return [*arrays, length_UP, prompt_UT.astype(np.int32), age_UT, table_UTJ.astype(np.int32)]


def running(arrays: list[Any]) -> np.ndarray:
    """Which slots of an example aren't done, [U, T]."""
    return np.asarray(arrays[-2]) < arrays[-1].shape[2] * arrays[5].shape[3]


def both(
    arrays: list[jax.Array], dtype: str = "float32", **look: float
) -> tuple[np.ndarray, np.ndarray]:
    """(by the kernel, in JAX), of caches in `dtype`; what they keep must be the same."""
    assert cpu_kernels.available()

    @jax.jit
    def outs(q: jax.Array, k: jax.Array, v: jax.Array, *rest: jax.Array) -> Any:
        kept = BranchCache(*(x.astype(dtype) for x in rest[:4]))
        slots = Branches(*rest[4:])
        return [step(q, k, v, kept, Look(**look)) for step in (slots._kernel, slots._pages)]

    (kernel, ours), (pages, theirs) = jax.tree.map(np.asarray, outs(*arrays))
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == dtype
        np.testing.assert_array_equal(a, b)
    assert np.isfinite(pages).all()
    return kernel[running(arrays)], pages[running(arrays)]


@needs_compiler
@pytest.mark.parametrize(
    ("K", "G", "H", "S", "W"),
    [
        *((K, G, H, 32, 40) for K, G, H in itertools.product((1, 3), (1, 3), (32, 64))),
        (2, 2, 8, 5, 7),  # nothing fills a vector
        (2, 2, 7, 5, 7),  # nor a last pair
        (1, 5, 48, 33, 70),  # several tiles, and what is left of each
    ],
)
def test_the_kernel_is_the_attention_in_jax(K: int, G: int, H: int, S: int, W: int) -> None:
    B = 8
    arrays = example(B, -(-(3 * W + 1) // B), K, G, H, S, W)
    assert set(arrays[-2].flat) == set(range(3 * W + 1))
    kernel, pages = both(arrays)
    np.testing.assert_allclose(kernel, pages, atol=1e-5)
    assert np.abs(pages).max() < 10  # nothing hidden was seen
    alike(both(arrays, "bfloat16")[0], kernel)


def alike(narrow: np.ndarray, wide: np.ndarray) -> None:
    """The same numbers, of queries, weights and results that may be rounded to bfloat16."""
    np.testing.assert_allclose(narrow, wide, atol=0.01 * np.abs(wide).max())
    assert np.square(narrow - wide).mean() < 0.003**2 * np.square(wide).mean()


@needs_compiler
def test_prompts_of_many_slots_and_of_none() -> None:
    """More than the kernel works on together; as many as JAX has seats for; and none."""
    arrays = example(16, 40, 1, 2, 16, 8, 6)
    crowds = [80, 79, 1, 0]
    arrays[-3][:] = np.random.default_rng(0).permutation(np.repeat(range(4), crowds))
    assert max(crowds) == seats(4, 160)
    kernel, pages = both(arrays)
    np.testing.assert_allclose(kernel, pages, atol=1e-5)
    assert np.abs(pages).max() < 10


@needs_compiler
@pytest.mark.parametrize("window", [0, 1, 6, 50])
def test_windows_and_a_scale(window: int) -> None:
    arrays = example(4, 11, 2, 3, 32, 32, 40)
    kernel, pages = both(arrays, window=window, scale=0.3)
    np.testing.assert_allclose(kernel, pages, atol=1e-5)
    alike(both(arrays, "bfloat16", window=window, scale=0.3)[0], kernel)


@needs_compiler
@pytest.mark.parametrize("dtype", cpu_kernels.DTYPES)
def test_a_slots_numbers_are_the_same_in_any_place(dtype: str) -> None:
    """Which slots of its prompt come before it, and how many, changes no bit."""
    arrays = example(4, 33, 1, 3, 32, 17, 8)
    order = np.random.default_rng(1).permutation(arrays[-2].shape[1])[::2]
    some = [
        x[:, order] if letters.startswith("UT") else x
        for x, letters in zip(arrays, LETTERS, strict=True)
    ]
    whole, part = (np.full(x[0].shape, np.nan, np.float32) for x in (arrays, some))
    for to, each in ((whole, arrays), (part, some)):
        to[running(each)] = both(each, dtype)[0]
    np.testing.assert_array_equal(part, whole[:, order])


@needs_compiler
def test_every_length_of_a_prompt() -> None:
    arrays = example(33, 1, 1, 3, 32, 32, 16)
    assert arrays[-4].ravel().tolist() == list(range(33))
    np.testing.assert_allclose(*both(arrays), atol=1e-5)


@needs_compiler
@pytest.mark.parametrize("sizes", [(2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 2)], ids=str)
def test_on_a_mesh(sizes: tuple[int, int, int], make_mesh) -> None:
    mesh, arrays = make_mesh(*sizes), example(8, 5, 2, 3, 32, 32, 24)
    alone, _ = both(arrays)
    with jax.set_mesh(mesh):
        placed = [
            jax.device_put(x, sharding.named(mesh, letters))
            for x, letters in zip(arrays, LETTERS, strict=True)
        ]
        kernel, pages = both(placed)
    np.testing.assert_array_equal(kernel, alone)
    np.testing.assert_allclose(kernel, pages, atol=1e-5)


@needs_compiler
def test_a_slot_without_a_page_is_left_out() -> None:
    """Both ways it writes nothing, which `both` compares, and changes nothing for the others."""
    arrays = example(8, 7, 2, 2, 16, 8, 6)
    waits = np.arange(56).reshape(4, 14) % 3 == 1
    waits |= arrays[-3] == np.array([[0], [2], [2], [1]])  # all slots of some prompts
    table_UTJ = arrays[-1].copy()
    last_UT = np.minimum(arrays[-2] // 6, 2)
    others = np.take_along_axis(table_UTJ, last_UT[..., None], -1)
    np.put_along_axis(
        table_UTJ, last_UT[..., None], np.where(waits[..., None], NOWHERE, others), -1
    )
    full, some = both(arrays), both([*arrays[:-1], table_UTJ])
    stay = ~waits[running(arrays)]
    assert 0 < stay.sum() < stay.size
    for a, b in zip(full, some, strict=True):
        np.testing.assert_allclose(a[stay], b[stay], atol=1e-6)
    assert not some[0][~stay].any()


def rows_example(
    B: int, T: int, K: int, G: int, H: int, window: int = 0, seed: int = 0
) -> list[np.ndarray]:
    """q, k, v, what is seen, by ends, positions and a window, and the gradient of the result."""
    rng = np.random.default_rng(seed)
    shapes = ((B, T, K, G, H), (B, T, K, H), (B, T, K, H), (B, T, K, G, H))
    q, k, v, d_out = (np.float32(rng.normal(size=shape)) for shape in shapes)
    depth = np.zeros((B, T), np.int32)  # of a trie; every tenth position begins another sequence
    for t in range(1, T):
        back = rng.integers(0, depth[:, t - 1] + 1)
        depth[:, t] = np.where(rng.random(B) < 0.1, back, depth[:, t - 1] + 1)
    return [q, k, v, ends_of(depth), depth, np.int32(window), d_out]


def ends_of(depth_BT: np.ndarray) -> np.ndarray:
    B, T = depth_BT.shape
    end_BT = np.full((B, T), T, np.int32)
    for b, t in np.ndindex(B, T):
        later = np.flatnonzero(depth_BT[b, t + 1 :] <= depth_BT[b, t])
        end_BT[b, t] = t + 1 + later[0] if len(later) else T
    return end_BT


def test_a_position_sees_those_that_lead_to_it() -> None:
    end_BT, depth_BT = rows_example(3, 90, 1, 1, 1)[3:5]
    for b in range(3):
        leads: list[int] = []
        for t, depth in enumerate(depth_BT[b]):
            leads = [*leads[:depth], t]
            assert np.flatnonzero(sees(end_BT, t)[b, 0]).tolist() == leads


def results_and_gradients(attention: Any, arrays: list[Any], dtype: str) -> list[np.ndarray]:
    q, k, v, *what, d_out = arrays
    narrow = [jnp.asarray(x, dtype) for x in (q, k, v)]

    @jax.jit
    def both(q: jax.Array, k: jax.Array, v: jax.Array, d_out: jax.Array) -> Any:
        out, back = jax.vjp(lambda *qkv: attention(*qkv, *what, scale=0.3), q, k, v)
        return out, *back(d_out)

    found = both(*narrow, jnp.asarray(d_out, dtype))
    assert {x.dtype for x in found} == {jnp.dtype(dtype)}
    return [np.asarray(x, np.float32) for x in found]


def whole(*arrays: Any, scale: float) -> jax.Array:
    assert cpu_kernels.available()
    return cpu_kernels.whole_attention(*arrays, scale)


@needs_compiler
@pytest.mark.parametrize(
    ("B", "T", "K", "G", "H"),
    [
        *[(2, 200, 2, 3, 32), (1, 1, 1, 1, 8), (3, 16, 1, 4, 64), (2, 77, 3, 1, 20)],
        *[(1, 129, 2, 2, 8), (1, 129, 2, 2, 7)],
    ],
    ids=str,
)
@pytest.mark.parametrize("window", [0, 9])
def test_rows_forwards_and_backwards_are_those_in_jax(
    B: int, T: int, K: int, G: int, H: int, window: int
) -> None:
    arrays = rows_example(B, T, K, G, H, window)
    wide = results_and_gradients(whole, arrays, "float32")
    for a, b in zip(wide, results_and_gradients(by_rows, arrays, "float32"), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    for a, b in zip(wide, results_and_gradients(whole, arrays, "bfloat16"), strict=True):
        # At least 2e-5 as above: a token alone has gradients of 0 to q and k, and only noise there.
        np.testing.assert_allclose(a, b, atol=max(0.02 * np.abs(a).max(), 2e-5))


@needs_compiler
@pytest.mark.parametrize("dtype", cpu_kernels.DTYPES)
def test_what_a_row_does_not_see_is_not_read(dtype: str) -> None:
    arrays = rows_example(2, 60, 1, 2, 16)
    expected = results_and_gradients(whole, arrays, dtype)
    for x in arrays[1:3]:
        x[:, 40:] = np.nan  # after the queries that are looked at
    out, d_q, *_ = results_and_gradients(whole, arrays, dtype)
    for a, b in zip((out, d_q), expected, strict=False):
        np.testing.assert_array_equal(a[:, :32], b[:, :32])  # whole tiles of queries
    assert np.isnan(out[:, 40:]).all()  # and it shows where it is seen


@needs_compiler
@pytest.mark.parametrize("dtype", cpu_kernels.DTYPES)
def test_what_lies_before_the_window_is_not_read(dtype: str) -> None:
    arrays = rows_example(1, 90, 1, 2, 16, window=6)
    arrays[4][:] = np.arange(90)
    expected = results_and_gradients(whole, arrays, dtype)
    for x in arrays[1:3]:
        x[:, :40] = np.nan
    out, *_ = results_and_gradients(whole, arrays, dtype)
    np.testing.assert_array_equal(out[:, 64:], expected[0][:, 64:])  # whole tiles and vectors


@needs_compiler
@pytest.mark.parametrize("dtype", cpu_kernels.DTYPES)
def test_how_threads_share_the_work_changes_nothing(dtype: str) -> None:
    """Many rows are shared as they are; one alone in parts of its queries."""
    arrays = rows_example(32, 70, 1, 2, 16)
    alone = [x[-1:] if x.ndim else x for x in arrays]
    for a, b in zip(
        *(results_and_gradients(whole, x, dtype) for x in (arrays, alone)), strict=True
    ):
        np.testing.assert_array_equal(a[-1:], b)


@needs_compiler
@pytest.mark.parametrize("sizes", [(2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 2)], ids=str)
def test_rows_on_a_mesh(sizes: tuple[int, int, int], make_mesh) -> None:
    arrays = rows_example(4, 40, 2, 3, 32, window=7)
    q, k, v, end_BT, position_BT, window, d_out = arrays
    alone = results_and_gradients(whole, arrays, "float32")
    mesh, look = make_mesh(*sizes), Look(position_BT, window, scale=0.3)

    @jax.jit
    def gradient(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
        out, back = jax.vjp(lambda *qkv: Packed(end_BT)(*qkv, None, look)[0], q, k, v)
        return out, *back(d_out)

    with jax.set_mesh(mesh):
        letters = ("BTKGH", "BTKH", "BTKH")
        placed = [
            jax.device_put(x, sharding.named(mesh, names))
            for x, names in zip((q, k, v), letters, strict=True)
        ]
        assert cpu_kernels.TARGET in gradient.lower(*placed).as_text()
        found = gradient(*placed)
    for a, b in zip(found, alone, strict=True):
        np.testing.assert_array_equal(a, b)


# Products

needs_tiles = pytest.mark.skipif(
    not (shutil.which("c++") and cpu_kernels.has_tiles()),
    reason="the processor has no tiles (AMX)",
)
PRODUCTS = [
    ("BTD,DNH->BTNH", (2, 600, 96), (96, 5, 16)),
    ("BTNH,NHD->BTD", (2, 600, 5, 16), (5, 16, 700)),  # several panels of columns
    ("BTNH,DNH->BTD", (2, 600, 5, 16), (96, 5, 16)),  # m lies transposed
    ("BTD,BTNH->DNH", (2, 600, 96), (2, 600, 5, 16)),  # x does; its inner dimension has parts
    ("BTD,DF->BTF", (1, 1025, 34), (34, 37)),  # nothing fills a tile
    ("BTF,DF->BTD", (1, 1025, 34), (37, 34)),
    ("BTD,BTF->DF", (1, 1026, 33), (1, 1026, 37)),
]


def factors(*shapes: tuple[int, ...]) -> list[jax.Array]:
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in shapes]


@needs_tiles
@pytest.mark.parametrize(("formula", "of_x", "of_m"), PRODUCTS, ids=str)
def test_products_are_those_of_einsum(
    formula: str, of_x: tuple[int, ...], of_m: tuple[int, ...]
) -> None:
    x, m = factors(of_x, of_m)
    assert cpu_kernels.multiplies(formula, x, m)
    exact = np.einsum(formula, *(np.asarray(a, np.float64) for a in (x, m)))
    largest = np.abs(exact).max()
    for dtype, share in (("float32", 1e-6), ("bfloat16", 2**-8)):
        found = jax.jit(cpu_kernels.product, static_argnums=(0, 3))(formula, x, m, dtype)
        assert found.dtype == dtype
        np.testing.assert_allclose(np.asarray(found, np.float64), exact, atol=share * largest)


@needs_tiles
def test_a_products_rows_do_not_depend_on_those_beside_them() -> None:
    x, m = factors((1, 1500, 96), (96, 40))
    product = jax.jit(cpu_kernels.product, static_argnums=(0, 3))
    whole = product("BTD,DF->BTF", x, m, "float32")
    some = product("BTD,DF->BTF", x[:, 11:1200].at[:, 200:].set(jnp.nan), m, "float32")
    np.testing.assert_array_equal(some[:, :200], whole[:, 11:211])


@needs_tiles
@pytest.mark.parametrize("rows", [16, 1040])
@pytest.mark.parametrize("columns", [31, 700])
@pytest.mark.parametrize("inner", [2048, 2114])  # more than the second cache takes
def test_products_of_long_rows(rows: int, inner: int, columns: int) -> None:
    x, m = factors((rows, inner), (columns, inner))
    exact = np.einsum("BV,DV->BD", *(np.asarray(a, np.float64) for a in (x, m)))
    assert cpu_kernels.in_tiles("BV,DV->BD", x, m)
    for dtype, share in (("float32", 1e-6), ("bfloat16", 2**-8)):
        found = jax.jit(cpu_kernels.product, static_argnums=(0, 3))("BV,DV->BD", x, m, dtype)
        np.testing.assert_allclose(
            np.asarray(found, np.float64), exact, atol=share * np.abs(exact).max()
        )


ACTIVATED = {
    False: lambda x: x / (1 + np.exp(-x)),
    True: lambda x: x / 2 * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3))),
}


@needs_tiles
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize(("inner", "columns"), [(96, 37), (96, 96), (100, 600)])
def test_a_gate_lets_through_what_its_activation_says(inner: int, columns: int, gelu: bool) -> None:
    """By numpy in float64, of the products before they are rounded, which are kept rounded."""
    formula, spread = "BTD,DF->BTF", np.linspace(0.01, 3, columns)
    x, gate, value = factors((2, 600, inner), (inner, columns), (inner, columns))
    gate = gate * jnp.asarray(spread, jnp.bfloat16)  # some are far from 0, some near
    assert cpu_kernels.in_tiles(formula, x, gate)
    product = jax.jit(cpu_kernels.product, static_argnums=(0, 3))
    products, precise = (
        [product(formula, x, w, dtype) for w in (gate, value)] for dtype in ("bfloat16", "float32")
    )
    gated = jax.jit(cpu_kernels.gated, static_argnums=(0, 4, 5))
    found, *kept = gated(formula, x, gate, value, gelu, True)
    jax.tree.map(np.testing.assert_array_equal, kept, products)
    with np.errstate(over="ignore"):
        first, second = (np.asarray(p, np.float64) for p in precise)
        exact = ACTIVATED[gelu](first) * second
    np.testing.assert_allclose(np.asarray(found, np.float64), exact, rtol=2**-8, atol=1e-13)
    alone, *nothing = gated(formula, x, gate, value, gelu, False)
    np.testing.assert_array_equal(alone, found)
    assert [part.size for part in nothing] == [0, 0]


@needs_tiles
@pytest.mark.parametrize("family", ["swiglu", "geglu"])
def test_the_gradient_of_what_a_gate_lets_through(family: str) -> None:
    """As of the two products and the activation by themselves, but for rounding."""
    formula = "BTD,DF->BTF"
    x, *ws = factors((1, 1024, 64), (64, 96), (64, 96))
    ws = [w.astype(jnp.float32) / 8 for w in ws]

    def apart(x: jax.Array, *ws: jax.Array) -> jax.Array:
        products = (transformer._product(formula, True, True, x, w) for w in ws)
        return transformer._activated(family, *products)

    def gradients(way: Callable[..., jax.Array]) -> Any:
        def loss(*arrays: jax.Array) -> jax.Array:
            return jnp.sin(way(*arrays).astype(jnp.float32)).sum()

        return jax.jit(jax.grad(loss, (0, 1, 2)))(x, *ws)

    ours = functools.partial(transformer._gated, family, formula)
    assert cpu_kernels.TARGET in jax.jit(ours).lower(x, *ws).as_text()
    for a, b in zip(gradients(ours), gradients(apart), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        a, b = (np.asarray(part, np.float32) for part in (a, b))
        assert np.linalg.norm(a - b) < 0.01 * np.linalg.norm(b)


@needs_tiles
@pytest.mark.parametrize("formula", ["BD,VD->BV", "BD,DV->BV"])
@pytest.mark.parametrize(
    ("V", "text_size", "D"), [(100, 77, 96), (1000, 1000, 96), (3000, 2991, 96), (1500, 1499, 90)]
)
def test_cross_entropy_errs_by_rounding_only(formula: str, V: int, text_size: int, D: int) -> None:
    """By numpy in float64: its gradient too, of rows of which some have no weight."""
    B = 333
    x, table = factors((B, D), (V, D))
    rng = np.random.default_rng(1)
    target_B = rng.integers(0, text_size, B).astype(np.int32)
    weight_B = (rng.random(B) * (rng.random(B) < 0.8)).astype(np.float32)
    logits = np.einsum("BD,VD->BV", *(np.asarray(a, np.float64) for a in (x, table)))
    logits = logits[:, :text_size]
    assert np.ptp(logits) > 60  # more than floats could tell from each other without the highest
    log_total = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
    rows = np.arange(B)
    expected = weight_B * (log_total - logits[rows, target_B])
    gradient = np.zeros((B, V))
    gradient[:, :text_size] = np.exp(logits - log_total[:, None])
    gradient[rows, target_B] -= 1
    gradient *= weight_B[:, None]

    lying = jnp.asarray(table.T if "DV" in formula else table)
    found = jax.jit(cpu_kernels.cross_entropy, static_argnums=(0, 5, 6))
    loss, d_logits = found(formula, x, lying, target_B, weight_B, text_size, True)
    np.testing.assert_allclose(loss, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(np.asarray(d_logits, np.float64), gradient, rtol=2**-8, atol=1e-5)
    assert not d_logits[:, text_size:].any()
    alone, nothing = found(formula, x, lying, target_B, weight_B, text_size, False)
    np.testing.assert_array_equal(alone, loss)
    assert nothing.size == 0


def test_products_are_in_cpp_where_that_is_faster(make_mesh) -> None:
    x, w = factors((2, 600, 96), (96, 40))
    formula = "BTD,DF->BTF"
    assert cpu_kernels.multiplies(formula, x, w) == cpu_kernels.has_tiles()
    assert not cpu_kernels.multiplies(formula, x[:, :500], w)  # few positions
    assert not cpu_kernels.multiplies(formula, x.astype(jnp.float32), w)
    assert not cpu_kernels.multiplies(formula, x[:, :, :95], w[:95])  # an odd inner dimension
    assert not cpu_kernels.multiplies("BTD,FD->FBT", x, w.T)  # not a product of matrices
    with jax.set_mesh(make_mesh(2, 1, 1)):
        assert not cpu_kernels.multiplies(formula, x, w)


# Draws


def some_logits(P: int, C: int, V: int, spread: float) -> np.ndarray:
    """Half of them hidden, some slots' best far above the rest."""
    rng = np.random.default_rng(0)
    logits = np.where(rng.random((P, C, V)) < 0.5, HIDDEN, rng.normal(5, spread, (P, C, V)))
    logits[..., 3] = 5
    logits[0, :, V // 2] = 300
    return logits.astype(np.float32)


@needs_compiler
@pytest.mark.parametrize("temperature", [0.0, 0.3, 0.7, 1.0, 5.0])
@pytest.mark.parametrize("V", [60, 128, 1871])
def test_a_draw_errs_by_rounding_only(V: int, temperature: float) -> None:
    """By numpy in float64; at the ends of the interval of uniform numbers too."""
    assert cpu_kernels.available()
    P, C = 3, 1000
    logits = some_logits(P, C, V, 4.0)
    uniform = np.random.default_rng(1).random((P, C), np.float32)
    uniform[:, :100], uniform[:, 100:200] = 0, np.nextafter(np.float32(1), np.float32(0))
    beyond = np.full((P, C, 9), 400, np.float32)  # ids that aren't text
    draw = jax.jit(cpu_kernels.draw, static_argnums=(2, 3))
    token, log_total = map(
        np.asarray, draw(np.concatenate([logits, beyond], -1), uniform, temperature, V)
    )
    exact = logits.astype(np.float64)
    np.testing.assert_allclose(log_total, np.log(np.exp(exact).sum(-1)), rtol=1e-6)
    if not temperature:
        np.testing.assert_array_equal(token, logits.argmax(-1))
        return
    weight = np.exp((exact - exact.max(-1, keepdims=True)) / temperature)
    total = weight.cumsum(-1)
    drawn, high = (np.take_along_axis(x, token[..., None], -1)[..., 0] for x in (weight, total))
    target, slack = uniform * total[..., -1], 1e-5 * total[..., -1]
    assert (drawn > 0).all()
    assert ((high - drawn <= target + slack) & (target <= high + slack)).all()
    assert len(np.unique(token)) > V // 4


@needs_compiler
@pytest.mark.parametrize(
    ("words", "by_kernel"),
    [
        (dict(), True),
        (dict(temperature=0.0), True),
        (dict(top_k=5), False),
        (dict(top_p=0.9), False),
        (dict(tensor=2), False),
        (dict(data=2), True),
    ],
    ids=str,
)
def test_where_the_kernel_draws_it_draws_what_jax_draws(
    words: dict[str, Any], by_kernel: bool, make_mesh
) -> None:
    sizes = {axis: words.pop(axis, 1) for axis in ("data", "tensor")}
    plain = dict(temperature=0.7, top_k=0, top_p=1.0, max_tokens=9, end=0, seed=0)
    sampling = decode.Sampling(**plain | words, chunk=1, patience=1)
    U, C = 4, 50
    problem, sample = np.indices((U, C), np.uint32)

    def drawn(attention: str) -> Any:
        def draw(logits: Any, *who: Any) -> Any:
            config = make_config(text_size=200, attention=attention)
            return decode.draw(logits, config, sampling, *who)

        jitted = jax.jit(draw)
        arguments = jnp.asarray(some_logits(U, C, 256, 1.0)), problem, sample, sample
        uses = cpu_kernels.TARGET in jitted.lower(*arguments).as_text()
        return uses, [np.asarray(x) for x in jitted(*arguments)]

    with jax.set_mesh(make_mesh(**sizes)):
        (ours, found), (theirs, expected) = drawn("auto"), drawn("jax")
    assert (ours, theirs) == (by_kernel, False)
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-6)


@needs_compiler
def test_what_are_no_numbers_draws_something() -> None:
    logits = np.full((1, 4, 128), np.nan, np.float32)
    for temperature in (0.0, 0.7):
        token, _ = cpu_kernels.draw(logits, np.full((1, 4), 0.5, np.float32), temperature, 128)
        assert ((token >= 0) & (token < 128)).all()


def calls_the_kernel(dtype: str = "float32", **look: float) -> bool:
    """Whether one step of every slot does, of caches in `dtype`."""
    q, k, v, *rest = example(2, 3, 1, 2, 8, 4, 5)
    own = [jnp.asarray(x, dtype) for x in rest[:4]]

    def step() -> jax.Array:
        return Branches(*rest[4:])(q, k, v, BranchCache(*own), Look(**look))[0]

    return cpu_kernels.TARGET in str(jax.make_jaxpr(step)())


@needs_compiler
def test_it_is_used_where_it_applies() -> None:
    assert calls_the_kernel()
    assert calls_the_kernel(scale=0.5)
    assert not calls_the_kernel(cap=30.0)
    assert not calls_the_kernel(attention="jax")
    assert calls_the_kernel("bfloat16")


@pytest.fixture
def asked_anew() -> Iterator[None]:
    cpu_kernels.loaded.cache_clear()
    yield
    cpu_kernels.loaded.cache_clear()


@pytest.mark.usefixtures("asked_anew")
@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_without_a_compiler_there_is_jax(compiler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", compiler)
    with pytest.warns(UserWarning, match=f"in JAX.* can't be compiled .*{compiler}"):
        assert not cpu_kernels.available()
    assert not calls_the_kernel()


@pytest.mark.usefixtures("asked_anew")
def test_a_compilers_error_is_told(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the first line of what it wrote, which says where it was."""
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho 'In file included from ffi.h:49,' >&2\n"
                        "echo 'ffi.h:1: error: no C++17' >&2\nexit 1\n")  # fmt: skip
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.warns(UserWarning, match=r"loaded: ffi\.h:1: error: no C\+\+17"):
        assert not cpu_kernels.available()


@needs_compiler
@pytest.mark.usefixtures("asked_anew")
def test_without_a_place_for_it_there_is_jax(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match=r"in JAX.* Not a directory"):
        assert not calls_the_kernel()
