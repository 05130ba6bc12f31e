"""The transformer against its definition: who sees whom, and which rewrites change nothing."""

import functools
import itertools
import string
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import make_config
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh

from gsm_verifier import sharding
from gsm_verifier.data.packing import FIELDS, Branch, Tree
from gsm_verifier.model import cpu_kernels, transformer
from gsm_verifier.model.attention import (
    HIDDEN,
    LEAST_BLOCK,
    OWN,
    SHARED,
    BranchCache,
    Branches,
    Look,
    Packed,
    by_rows,
    part,
    softmax,
    union,
)
from gsm_verifier.model.config import ModelConfig
from gsm_verifier.model.transformer import Block, Params, Transformer, rotate, turn
from gsm_verifier.train.batch import Batch

CLOSE = {"rtol": 2e-5, "atol": 2e-5}
both_families = pytest.mark.parametrize("family", ["gpt3", "llama"])


@functools.cache
def make_params(config: ModelConfig) -> Params:
    """Parameters far from their initial values: no zero bias or unit gain hides a fault."""
    rng = np.random.default_rng(0)

    def one(path: Any, x: jax.ShapeDtypeStruct) -> jax.Array:
        one_centred = jax.tree_util.keystr(path).endswith(("scale_D']", "gain']"))
        return jnp.asarray(one_centred + 0.1 * rng.standard_normal(x.shape), jnp.float32)

    return jax.tree.map_with_path(one, transformer.shapes(config))


def random_tokens(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 100, shape).astype(np.int32)


def causal(T: int, rows: int = 1) -> Packed:
    return Packed.causal(rows, T)


@functools.partial(jax.jit, static_argnames=("config", "dropout"))
def apply(
    config: ModelConfig, params: Params, *inputs: Any, dropout: float = 0.0, key: Any = None
) -> Any:
    key_B = None if key is None else jax.random.split(key, inputs[0].shape[0])
    return Transformer(config, dropout).apply(params, *inputs, key_B=key_B)


@functools.partial(jax.jit, static_argnames=("config", "method"))
def head(config: ModelConfig, params: Params, hidden: jax.Array, method: str) -> jax.Array:
    return Transformer(config).apply(params, hidden, method=method)


def run(config: ModelConfig, params: Params, tokens_BT: Any, position_BT: Any = None) -> jax.Array:
    """Hidden states of plain sequences, positions counted from 0 unless given."""
    B, T = tokens_BT.shape
    if position_BT is None:
        position_BT = np.tile(np.arange(T), (B, 1))
    return apply(config, params, tokens_BT, position_BT, causal(T, B))[0]


def run_batch(config: ModelConfig, params: Params, batch: Batch) -> np.ndarray:
    visible = Packed(batch.end_BT)
    hidden_BTD, _ = apply(config, params, batch.tokens_BT, batch.position_BT, visible)
    return np.asarray(hidden_BTD)


def batch_of(trees: list[Tree], capacity: int) -> Batch:
    """One row of the trees as they come, padded to `capacity`."""
    row, start = {name: np.zeros((1, capacity), FIELDS[name]) for name in FIELDS}, 0
    for tree in trees:
        for name, x in tree.flatten().items():
            row[name][0, start : start + len(x)] = x + start * (name == "end")
        start += tree.length
    return Batch.of(row)


# Who sees whom


@both_families
def test_a_token_changes_no_state_before_it_and_every_state_after_it(family: str) -> None:
    config = make_config(family)
    params = make_params(config)
    tokens_BT = random_tokens(1, 9)
    before_TD = run(config, params, tokens_BT)[0]
    for t in range(9):
        changed_BT = tokens_BT.copy()
        changed_BT[0, t] = (tokens_BT[0, t] + 1) % 100
        moved_T = (run(config, params, changed_BT)[0] != before_TD).any(-1)
        assert moved_T.tolist() == [False] * t + [True] * (9 - t)


def two_trees() -> tuple[list[Tree], list[list[int]]]:
    """A document of 5 inputs, and a question of 5 with two branches of 5 and 6, the first two of
    which are the same; and the sequences that they hold."""
    q, common, other = (random_tokens(n, seed=n).tolist() for n in (5, 2, 6))
    a, b = sorted([*common, *random_tokens(n, seed=n).tolist()] for n in (3, 4))
    judged = [Branch(s, value_weights=np.ones(len(s))) for s in (a, b)]
    return [Tree(other), Tree(q, judged)], [other[:-1], q + a, q + b]


@both_families
def test_positions_see_their_own_sequence_only(family: str) -> None:
    config = make_config(family)
    params = make_params(config)
    trees, (_, a, b) = two_trees()
    batch = batch_of(trees, 21)
    before_TD = run_batch(config, params, batch)[0]
    ends = np.cumsum([0, 5, 7, len(a) - 7, len(b) - 7, 2]).tolist()
    groups = dict(
        zip(("other", "both", "a", "b", "padding"), itertools.pairwise(ends), strict=True)
    )
    reaches = {n: {n} for n in groups} | {"both": {"both", "a", "b"}, "padding": set()}
    assert groups.pop("padding")[1] == 21
    for name, start in [*((n, low) for n, (low, _) in groups.items()), ("padding", 19)]:
        tokens_BT = np.array(batch.tokens_BT)
        tokens_BT[0, start] = (tokens_BT[0, start] + 1) % 100
        moved_T = run_batch(config, params, batch._replace(tokens_BT=tokens_BT))[0] != before_TD
        moved = {n for n, (low, high) in groups.items() if moved_T[low:high].any()}
        assert moved == reaches[name], name


@both_families
def test_a_packed_branch_is_the_question_and_the_branch_alone(family: str) -> None:
    """Neither company, nor padding, nor the place in the row changes a state."""
    config = make_config(family)
    params = make_params(config)
    trees, alone = two_trees()
    branches = [[*range(5, 9), *(5 + places_T)] for _, places_T in trees[1].places()]
    for capacity in (19, 32):
        packed_TD = run_batch(config, params, batch_of(trees, capacity))[0]
        for line, places in zip(alone, ([*range(5)], *branches), strict=True):
            alone_TD = run(config, params, np.array([line], np.int32))[0]
            np.testing.assert_allclose(packed_TD[places], alone_TD, **CLOSE)


@both_families
def test_order_is_in_positions_and_ends_not_in_the_place_in_the_row(family: str) -> None:
    """A question of 4, and branches of 3 and 2 in either order."""
    config = make_config(family)
    params = make_params(config)
    tokens_BT, order = random_tokens(1, 9), np.array([0, 1, 2, 3, 7, 8, 4, 5, 6])
    position_BT = np.array([[0, 1, 2, 3, 4, 5, 6, 4, 5]])
    end_BT = np.array([[9, 9, 9, 9, 7, 7, 7, 9, 9]])
    moved_BT = np.array([[9, 9, 9, 9, 6, 6, 9, 9, 9]])
    plain_BTD, _ = apply(config, params, tokens_BT, position_BT, Packed(end_BT))
    args = tokens_BT[:, order], position_BT[:, order], Packed(moved_BT)
    moved_BTD, _ = apply(config, params, *args)
    np.testing.assert_allclose(moved_BTD, plain_BTD[:, order], **CLOSE)


def test_a_shift_of_all_positions_changes_learned_but_not_rotary_ones() -> None:
    tokens_BT, position_BT = random_tokens(1, 10), np.arange(10)[None]
    for family, same in (("llama", True), ("gpt3", False)):
        config = make_config(family)
        params = make_params(config)
        near, far, sparse = (
            run(config, params, tokens_BT, p)
            for p in (position_BT, position_BT + 31, position_BT * 3)
        )
        assert np.allclose(near, far, atol=1e-4) == same
        assert not np.allclose(near, sparse, atol=1e-2)


# Rotary embedding and attention


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2000), st.integers(0, 2000), st.integers(0, 2000))
def test_rotary_products_depend_on_the_distance_only(i: int, j: int, shift: int) -> None:
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, 1, 1, 1, 8)).astype(np.float32)

    def product(i: int, j: int) -> float:
        turned = [rotate(x, turn(np.array([[p]]), 10_000.0, 4)) for x, p in ((q, i), (k, j))]
        np.testing.assert_allclose(
            [np.linalg.norm(x) for x in turned], [np.linalg.norm(x) for x in (q, k)], rtol=1e-5
        )
        return float((turned[0] * turned[1]).sum())

    assert product(i, j) == pytest.approx(product(i + shift, j + shift), abs=5e-3)


def test_rotary_embedding_multiplies_by_unit_complex_numbers() -> None:
    """The halves are real and imaginary parts; frequencies fall from 1 by powers of theta."""
    x = np.random.default_rng(0).normal(size=(2, 7, 3, 8)).astype(np.float32)
    position_BT = np.random.default_rng(1).integers(0, 50, (2, 7))
    for theta in (10_000.0, 100.0):
        frequency = theta ** (-np.arange(4) / 4)
        turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(
            1j * position_BT[..., None, None] * frequency
        )
        expected = np.concatenate([turned.real, turned.imag], -1)
        np.testing.assert_allclose(rotate(x, turn(position_BT, theta, 4)), expected, atol=1e-5)
    np.testing.assert_array_equal(rotate(x, turn(np.zeros((2, 7), int), 100.0, 4)), x)


def oracle_attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, visible: np.ndarray
) -> np.ndarray:
    """One query head [T, H] on keys and values [T, S, H]: the definition, in float64."""
    out = np.zeros(q.shape)
    for t in range(len(q)):
        logits = k[t][visible[t]].astype(float) @ q[t] / np.sqrt(q.shape[-1])
        weights = np.exp(logits - logits.max())
        out[t] = weights / weights.sum() @ v[t][visible[t]]
    return out


def test_a_union_of_parts_is_the_softmax_over_their_concatenation() -> None:
    """A part shared by all queries, one of each query's own, and both: against numpy."""
    rng = np.random.default_rng(0)
    B, T, K, G, H, S, W = 2, 5, 2, 3, 8, 6, 4

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    q = normal(B, T, K, G, H) * 3
    shared = [normal(B, K, S, H) for _ in "kv"]
    own = [normal(B, T, K, W, H) for _ in "kv"]
    sees_shared = rng.random((B, T, S)) < 0.5
    sees_own = rng.random((B, T, W)) < 0.5
    sees_shared[..., 0] = sees_own[..., 0] = True
    parts = {
        "shared": part(q, SHARED, *shared, sees_shared[:, None, :, None]),
        "own": part(q, OWN, *own, sees_own[:, None, :, None]),
    }
    for names in (["shared"], ["own"], ["shared", "own"], ["own", "shared"]):
        out = softmax(union([parts[n] for n in names]))
        assert out.shape == q.shape
        for b, kv, g in itertools.product(range(B), range(K), range(G)):
            keys, values = (
                np.concatenate(
                    [np.tile(shared[i][b, kv], (T, 1, 1)) if n == "shared" else own[i][b, :, kv]
                     for n in names], 1,
                )
                for i in range(2)
            )  # fmt: skip
            sees = [{"shared": sees_shared, "own": sees_own}[n][b] for n in names]
            expected = oracle_attention(q[b, :, kv, g], keys, values, np.concatenate(sees, -1))
            np.testing.assert_allclose(out[b, :, kv, g], expected, atol=1e-5)


def test_attention_survives_huge_logits_and_rows_that_see_nothing() -> None:
    k = v = jnp.asarray(np.random.default_rng(0).normal(size=(1, 1, 4, 8)) * 1e4)
    q = k.reshape(1, 4, 1, 1, 8)
    visible = jnp.tril(jnp.ones((4, 4), bool), -1)[None, None, :, None]  # the first sees nothing
    out, gradient = jax.value_and_grad(lambda q: softmax(part(q, SHARED, k, v, visible)).sum())(q)
    assert np.isfinite(out)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("T", [5, 2 * LEAST_BLOCK + 6])
def test_attention_in_blocks_of_queries_is_attention_of_the_whole(T: int) -> None:
    """Values and gradients; the rows see different things of what isn't later."""
    rng = np.random.default_rng(0)
    q = rng.normal(size=(2, T, 2, 2, 8)).astype(np.float32)
    k, v = rng.normal(size=(2, 2, T, 2, 8)).astype(np.float32)
    end_BT = rng.integers(0, T + 1, (2, T))
    before = np.tril(np.ones((T, T), bool), -1)
    visible = before & (np.arange(T)[:, None] < end_BT[:, None]) | np.eye(T, dtype=bool)

    def in_blocks(*qkv: jax.Array) -> jax.Array:
        return by_rows(*qkv, end_BT, scale=0.5, cap=2.0)

    def whole(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
        return softmax(part(q, SHARED, k, v, visible[:, None, :, None], scale=0.5, cap=2.0))

    results = []
    for attention in (in_blocks, whole):
        out, back = jax.vjp(jax.jit(attention), q, k, v)
        results.append((out, back(jnp.asarray(q) + 1)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), *results)


def test_scale_and_cap_shape_the_logits_by_definition() -> None:
    rng = np.random.default_rng(0)
    q = 3 * rng.normal(size=(1, 4, 1, 1, 8)).astype(np.float32)
    k, v = rng.normal(size=(2, 1, 1, 6, 8)).astype(np.float32)
    for scale, cap in ((0.0, 0.0), (0.3, 0.0), (0.0, 1.5), (0.3, 1.5)):
        logits = q[0, :, 0, 0] @ k[0, 0].T * (scale or 8**-0.5)
        logits = cap * np.tanh(logits / cap) if cap else logits
        weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        out = softmax(part(jnp.asarray(q), SHARED, k, v, True, scale, cap))
        np.testing.assert_allclose(out[0, :, 0, 0], weights @ v[0, 0], atol=1e-5)


def test_a_window_counts_positions_not_places() -> None:
    position_BT = np.array([[0, 1, 2, 3, 2, 3]])  # a question and two branches of it
    visible = np.ones((1, 6, 6), bool)
    for window, reach in ((2, 2), (1, 1), (0, 99)):
        seen = Look(position_BT, jnp.int32(window)).near(visible, position_BT[:, None])
        distance = position_BT[0][:, None] - position_BT[0]
        np.testing.assert_array_equal(seen[0], distance < reach)
    assert Look(position_BT).near(visible, position_BT) is visible


def test_grouped_heads_are_shared_heads_repeated() -> None:
    grouped = make_config("llama", kv_heads=2)
    params = make_params(grouped)

    def repeat(path: Any, x: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path[-1:], simple=True)
        return jnp.repeat(x, 2, name.split("_")[1].index("K") + 1) if "_DKH" in name else x

    repeated = jax.tree.map_with_path(repeat, params)
    assert optax.tree.size(repeated) > optax.tree.size(params)
    tokens_BT = random_tokens(2, 8)
    np.testing.assert_allclose(
        run(grouped, params, tokens_BT),
        run(grouped.with_(kv_heads=4), repeated, tokens_BT),
        **CLOSE,
    )


# Decoding from caches


@pytest.mark.parametrize("scan", [True, False])
@both_families
def test_cached_branches_equal_the_whole_sequence(family: str, scan: bool) -> None:
    """Token by token, slots of two prompts, four and two, started at different times."""
    config = make_config(family)
    params = make_params(config)
    tokens = random_tokens(2, 7)
    length_P = np.array([7, 4])  # of the questions; the second is padded with other tokens
    prompt_C = np.array([0, 1, 0, 0, 1, 0])
    branch_CT = random_tokens(6, 6, seed=1)
    branch_CT[:, 0] = tokens[prompt_C, length_P[prompt_C] - 1]  # repeats the last token
    expected = [
        run(config, params, np.concatenate([tokens[p, : length_P[p] - 1], branch_T])[None])[0]
        for p, branch_T in zip(prompt_C, branch_CT, strict=True)
    ]
    if not scan:
        config, params = transformer.unstack(config, params)
    position_BT = np.tile(np.arange(7), (2, 1))
    context: Any = Packed.causal(2, 7, keep=True)
    _, kept = apply(config, params, tokens, position_BT, context)
    K, H, L = config.kv_heads, config.head_size, config.layers
    table_UCJ = np.random.default_rng(0).permutation(13)[:12].reshape(1, 6, 2)
    stale = jnp.full((1, 13, K, 4, H), 7.0)  # what finished slots left behind
    caches: Any = (
        BranchCache(*(x[:, None] for x in kept), *[jnp.broadcast_to(stale, (L, *stale.shape))] * 2)
        if scan
        else [BranchCache(*(x[None] for x in kv), stale, stale) for kv in kept]
    )
    starts_C = np.array([0, 1, 2, 3, 0, 3])
    for now in range(6):
        age_C = np.maximum(now - starts_C, 0)
        slots = [x[None] for x in (length_P - 1, prompt_C, age_C)]
        context = Branches(*map(jnp.asarray, (*slots, table_UCJ)))
        position_C = length_P[prompt_C] - 1 + age_C
        token_C = branch_CT[np.arange(6), age_C]
        hidden_UCD, caches = apply(config, params, token_C[None], position_C[None], context, caches)
        for c, hidden_TD in enumerate(expected):
            np.testing.assert_allclose(hidden_UCD[0, c], hidden_TD[position_C[c]], **CLOSE)


# Heads


@pytest.mark.parametrize("tied", [True, False])
def test_only_text_is_ever_likely(tied: bool) -> None:
    config = make_config(tied=tied)
    params = make_params(config)
    hidden_BTD = 1e3 * np.random.default_rng(0).normal(size=(1, 5, 32)).astype(np.float32)
    logits = head(config, params, hidden_BTD, "logits")
    assert logits.shape == (1, 5, 128)
    assert logits.dtype == jnp.float32
    assert (logits[..., 100:] == HIDDEN).all()
    table_VD = params["params"]["embed_VD" if tied else "unembed_VD"]
    np.testing.assert_allclose(logits[..., :100], hidden_BTD @ table_VD[:100].T, rtol=1e-4)
    assert (jax.nn.softmax(logits)[..., 100:] == 0).all()
    gradient = jax.grad(lambda p: jax.nn.logsumexp(head(config, p, hidden_BTD, "logits")).sum())(
        params
    )["params"]["embed_VD" if tied else "unembed_VD"]
    assert (gradient[100:] == 0).all()
    assert (gradient[:100] != 0).any()


@pytest.mark.parametrize("tied", [True, False])
def test_value_is_gain_times_the_reserved_logit_plus_bias(tied: bool) -> None:
    config = make_config(tied=tied)
    assert (config.reserved_token, config.vocab_size) == (100, 128)
    params = make_params(config)
    tree = params["params"]
    hidden_BTD = np.random.default_rng(0).normal(size=(2, 5, 32)).astype(np.float32)
    row_D = tree["embed_VD" if tied else "unembed_VD"][100]
    np.testing.assert_allclose(
        head(config, params, hidden_BTD, "value"),
        tree["value_gain"] * (hidden_BTD @ row_D) + tree["value_bias"],
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize("tied", [True, False])
def test_neutral_head_says_its_value_and_can_learn(tied: bool) -> None:
    config = make_config(tied=tied)
    before = make_params(config)
    params = transformer.neutral_head(config, before, 0.25)
    tokens_BT = random_tokens(2, 6)

    def value(params: Params) -> jax.Array:
        return head(config, params, run(config, params, tokens_BT), "value")

    assert (value(params) == 0.25).all()
    assert not (value(before) == 0.25).any()
    # The language model is the same one.
    logits = [head(config, p, run(config, p, tokens_BT), "logits") for p in (before, params)]
    np.testing.assert_array_equal(*logits)
    gradient = jax.jit(jax.grad(lambda p: jnp.square(value(p) - 1).sum()))(params)["params"]
    table_VD = gradient["embed_VD" if tied else "unembed_VD"]
    assert (table_VD[100] != 0).all()
    assert gradient["value_bias"] == pytest.approx(12 * 2 * -0.75)
    assert gradient["value_gain"] == 0  # times a logit of 0: only the row and the bias move


def test_tied_models_have_one_table_and_untied_two() -> None:
    for tied in (True, False):
        config = make_config(tied=tied)
        tree = make_params(config)["params"]
        assert ("unembed_VD" in tree) == (not tied)
        changed = {"params": tree | {"embed_VD": tree["embed_VD"] + 1.0}}
        hidden = jnp.ones((1, 1, 32))
        same = [head(config, p, hidden, "logits") for p in ({"params": tree}, changed)]
        assert np.array_equal(*same) == (not tied)


# Parameters


def boxes(config: ModelConfig) -> list[tuple[str, nn.LogicallyPartitioned]]:
    one = jnp.zeros((1, 1), jnp.int32)
    boxed = jax.eval_shape(Transformer(config).init, jax.random.key(0), one, one, causal(1))
    leaves, _ = jax.tree_util.tree_flatten_with_path(
        boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned)
    )
    return [(jax.tree_util.keystr(path, simple=True, separator="."), box) for path, box in leaves]


@pytest.mark.parametrize("scan", [True, False])
@both_families
def test_every_parameter_is_boxed_with_letters_of_the_alphabet(family: str, scan: bool) -> None:
    """And they are the suffix of its name, after the L of stacked layers."""
    for name, box in boxes(make_config(family, scan_layers=scan)):
        assert isinstance(box, nn.LogicallyPartitioned), name
        assert len(box.names) == len(box.value.shape), name
        assert all(letter in sharding.RULES for letter in box.names), name
        suffix = name.split("_")[-1]
        letters = suffix if set(suffix) <= set(string.ascii_uppercase) else ""
        stacked = "L" if scan and ".layers." in name else ""
        assert "".join(box.names) == stacked + letters, name


def test_an_axis_the_rules_do_not_know_is_an_error() -> None:
    with pytest.raises(KeyError):
        sharding.spec("DX")


@both_families
def test_parameter_count_is_the_formula_of_scaling_laws(family: str) -> None:
    config = make_config(family)
    D, F, V, L, H, N, K = 32, 48, 128, 2, 8, 4, 2
    matrices = {"gpt3": D * H * 2 * (N + K) + 2 * D * F, "llama": D * H * 2 * (N + K) + 3 * D * F}
    rest = {
        "gpt3": L * ((N + 2 * K) * H + D + F + D + 4 * D) + 2 * D + V * D + 64 * D,
        "llama": L * 2 * D + D + 2 * V * D,
    }
    head = 2
    assert config.parameters == L * matrices[family]
    shapes = transformer.shapes(config)
    assert (
        sum(x.size for x in jax.tree.leaves(shapes)) == L * matrices[family] + rest[family] + head
    )
    weights = [
        x.size
        for path, x in jax.tree_util.tree_flatten_with_path(shapes)[0]
        if jax.tree_util.keystr(path[-1:], simple=True).startswith("w")
    ]
    assert sum(weights) == config.parameters


def test_published_sizes_of_gpt3_are_their_names() -> None:
    """96 layers of width 12,288 are 175 billion parameters."""
    big = make_config(width=12288, layers=96, heads=96, kv_heads=96, head_size=128, mlp_width=49152)
    assert 173e9 < big.parameters < 175e9


@both_families
def test_initial_parameters_are_scaled_by_width(family: str, mesh: Mesh) -> None:
    config = make_config(family, width=64, mlp_width=128, layers=3)
    params = transformer.init(config, jax.random.key(0), mesh)
    for path, x in jax.tree_util.tree_flatten_with_path(params)[0]:
        name = jax.tree_util.keystr(path[-1:], simple=True)
        if name.startswith(("b", "scale", "value")):
            assert (x == (1.0 if name.startswith(("scale", "value_gain")) else 0.0)).all(), name
            continue
        # What is added to the residual stream 2 L times has its variance divided by 2 L.
        scale = 64**-0.5 * (6**-0.5 if name.startswith(("wo", "w_out")) else 1.0)
        assert x.dtype == jnp.float32
        assert np.std(x) == pytest.approx(scale, rel=6 / np.sqrt(2 * x.size)), name
        assert abs(np.mean(x)) < 5 * scale / np.sqrt(x.size), name
    first, second = params["params"]["layers"]["attention"]["wo_NHD"][:2]
    assert not np.array_equal(first, second)  # each layer has its own draw


# Rewrites that change nothing


@functools.cache
def loss_and_gradient(config: ModelConfig) -> tuple[jax.Array, Params]:
    """Of the same model, with its layers stacked or not."""
    params = make_params(config.with_(scan_layers=True, remat=False))
    if not config.scan_layers:
        config, params = transformer.unstack(config, params)
    tokens_BT = random_tokens(2, 8)

    def loss(params: Params) -> jax.Array:
        logits = head(config, params, run(config, params, tokens_BT), "logits")
        return jax.nn.log_softmax(logits)[..., :50].mean()

    return jax.jit(jax.value_and_grad(loss))(params)


@both_families
def test_layers_of_their_own_equal_scanned_layers(family: str) -> None:
    config = make_config(family)
    flat, params = transformer.unstack(config, make_params(config))
    assert not flat.scan_layers
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, transformer.shapes(flat))
    loss, gradient = loss_and_gradient(config)
    flat_loss, flat_gradient = loss_and_gradient(flat)
    assert loss == pytest.approx(float(flat_loss), rel=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        transformer.unstack(config, gradient)[1],
        flat_gradient,
    )


@pytest.mark.parametrize("scan", [True, False])
def test_remat_changes_neither_values_nor_gradients(scan: bool) -> None:
    config = make_config("llama", scan_layers=scan)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
        loss_and_gradient(config),
        loss_and_gradient(config.with_(remat=True)),
    )


@both_families
def test_bfloat16_computes_nearly_the_same_with_float32_parameters(family: str) -> None:
    config = make_config(family)
    params, tokens_BT = make_params(config), random_tokens(2, 8)
    exact = np.asarray(run(config, params, tokens_BT))
    rough = np.asarray(run(config.with_(dtype="bfloat16"), params, tokens_BT))
    assert rough.dtype == jnp.bfloat16
    error = np.sqrt(np.mean((rough.astype(np.float32) - exact) ** 2) / np.mean(exact**2))
    assert 1e-4 < error < 0.03  # it really was bfloat16, and near


@pytest.mark.parametrize(("platform", "kernel"), [("cpu", False), ("cpu", True), ("tpu", False)])
@pytest.mark.parametrize("formula", ["BTD,DNH->BTNH", "BTNH,NHD->BTD", "...D,VD->...V"])
def test_the_gradient_of_a_product_is_that_of_the_einsum(
    formula: str, platform: str, kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also as accelerators and the kernel compute it, where one that will be rounded is at once."""
    monkeypatch.setattr(transformer.sharding, "platform", lambda: platform)
    sizes = dict(B=2, T=cpu_kernels.LEAST if kernel else 3, D=4, N=5, H=6, V=7)
    shapes = [
        [sizes[letter] for letter in part.replace("...", "BT")]
        for part in formula.split("->")[0].split(",")
    ]
    x, w = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes))

    def gradient(product: Any, dtype: str) -> Any:
        x_rounded = x.astype(dtype)
        return jax.grad(lambda x, w: jnp.sin(product(x, w)).sum(), (0, 1))(x_rounded, w)

    narrow = platform == "tpu" or kernel
    in_cpp = kernel and cpu_kernels.multiplies(formula, x.astype("bfloat16"), w)
    ours = functools.partial(transformer._product, formula, narrow, kernel)
    rounded = ours(x.astype("bfloat16"), w).dtype
    assert rounded == ("bfloat16" if platform == "tpu" or in_cpp else "float32")
    expected = gradient(functools.partial(jnp.einsum, formula), "float32")
    for dtype, tolerance in (("float32", 1e-5), ("bfloat16", 0.05)):
        found = gradient(ours, dtype)
        assert [part.dtype for part in found] == [dtype, "float32"]
        for a, b in zip(found, expected, strict=True):
            error = np.linalg.norm(np.asarray(a, np.float32) - b) / np.linalg.norm(b)
            assert error < tolerance


# Residual dropout


def test_residual_dropout_drops_what_a_sublayer_adds() -> None:
    """Each number is kept with probability 1 - rate and scaled so that the mean is preserved."""
    config, rate = make_config("llama"), 0.25
    layer = jax.tree.map(lambda x: x[0], make_params(config)["params"]["layers"])
    x_BTD = jax.random.normal(jax.random.key(5), (8, 32, 32))
    position_BT = np.tile(np.arange(32), (8, 1))
    out_of = {"attention": "wo_NHD", "mlp": "w_out_FD"}
    kept = {}
    for name, other in (("attention", "mlp"), ("mlp", "attention")):
        silent = layer[other] | {out_of[other]: jnp.zeros_like(layer[other][out_of[other]])}
        variables = {"params": layer | {other: silent}}  # the other sublayer adds nothing

        def added(rate: float, key: jax.Array | None, variables: Any = variables) -> jax.Array:
            out, _ = Block(config, rate).apply(
                variables,
                x_BTD,
                None,
                position_BT,
                [],
                causal(32, 8),
                key_B=None if key is None else jax.random.split(key, 8),
            )
            return out - x_BTD

        whole, dropped = added(0.0, None), added(rate, jax.random.key(0))
        kept[name] = np.asarray(dropped != 0)
        np.testing.assert_allclose(dropped[kept[name]], whole[kept[name]] / (1 - rate), atol=1e-5)
        deviation = np.sqrt(rate * (1 - rate) / kept[name].size)
        assert kept[name].mean() == pytest.approx(1 - rate, abs=4 * deviation)
    agree = (kept["attention"] == kept["mlp"]).mean()
    assert agree == pytest.approx(0.75**2 + 0.25**2, abs=0.02)  # two independent masks


def test_residual_dropout_is_a_function_of_its_key() -> None:
    config = make_config()
    params = make_params(config)
    tokens_BT, position_BT = random_tokens(2, 8), np.tile(np.arange(8), (2, 1))

    def states(rate: float, key: int | None, config: ModelConfig = config) -> np.ndarray:
        rng = None if key is None else jax.random.key(key)
        return np.asarray(
            apply(config, params, tokens_BT, position_BT, causal(8, 2), dropout=rate, key=rng)[0]
        )

    np.testing.assert_array_equal(states(0.3, 0), states(0.3, 0))
    np.testing.assert_allclose(states(0.3, 0), states(0.3, 0, config.with_(remat=True)), **CLOSE)
    assert not np.allclose(states(0.3, 0), states(0.3, 1), atol=1e-2)
    np.testing.assert_array_equal(states(0.0, 0), states(0.0, None))
    with pytest.raises(Exception, match="dropout"):
        states(0.3, None)


def test_every_layer_draws_its_own_dropout() -> None:
    """Two equal layers that add small and so nearly equal parts: kept by none or by both of them, a
    part is lost or doubled; kept by one of the two, which equal masks never do, it is as it was."""
    config = make_config("llama", layers=2)
    params = make_params(config)
    layers = jax.tree.map(lambda x: jnp.stack([x[0], x[0]]), params["params"]["layers"])
    layers["attention"]["wo_NHD"] *= 0
    layers["mlp"]["w_out_FD"] *= 1e-2  # the second layer sees almost what the first saw
    tree = params["params"] | {"layers": layers}
    tokens_BT, position_BT = random_tokens(2, 16), np.tile(np.arange(16), (2, 1))

    def states(rate: float, layers: int) -> np.ndarray:
        part = {"params": tree | {"layers": jax.tree.map(lambda x: x[:layers], tree["layers"])}}
        inputs = tokens_BT, position_BT, causal(16, 2)
        some, key = config.with_(layers=layers), jax.random.key(0)
        return np.asarray(apply(some, part, *inputs, dropout=rate, key=key)[0])

    whole, one_part = states(0.0, 2), states(0.0, 2) - states(0.0, 1)
    large = np.abs(one_part) > np.median(np.abs(one_part))
    changed = np.abs((states(0.5, 2) - whole)[large] / one_part[large])  # about 0 or 2 parts
    assert 0.4 < (changed < 1).mean() < 0.6
