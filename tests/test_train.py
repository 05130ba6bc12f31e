"""Batches, losses, the optimiser and the loop: equal mathematics however the work is cut."""

import functools
import itertools
import json
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import make_config
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh

from gsm_verifier import checkpoint, metrics, processes, sharding
from gsm_verifier import config as config_module
from gsm_verifier.data.packing import FIELDS, PackedRows, Tree
from gsm_verifier.metrics import Metrics
from gsm_verifier.model import cpu_kernels, transformer
from gsm_verifier.model.attention import Packed
from gsm_verifier.model.config import ModelConfig
from gsm_verifier.model.transformer import Params, Transformer
from gsm_verifier.train import loop, losses, optimizer
from gsm_verifier.train.batch import Batch, document_trees, finetuning_trees, verifier_trees
from gsm_verifier.train.losses import Objective

ROWS, T = 24, 40  # of every batch here: one shape, one compilation
Sequences = list[list[int]]


@functools.cache
def make_params(config: ModelConfig) -> Params:
    """Random parameters, large enough that every loss and gradient is of order 1."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: jnp.asarray(0.2 * rng.standard_normal(x.shape), x.dtype),
        transformer.shapes(config),
    )


def sequences(count: int, low: int, high: int, seed: int) -> Sequences:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 100, rng.integers(low, high + 1)).tolist() for _ in range(count)]


def one_batch(trees: list[Tree], separate: bool = False) -> Batch:
    """All the trees as one batch; `separate`: each in a row of its own."""
    if separate:
        rows = [PackedRows([tree], T, 1, 0)[0] for tree in trees]
    else:
        packed = PackedRows(trees, T, 1, 0)
        rows = [packed[i] for i in range(len(packed))]
    assert len(rows) <= ROWS
    empty = {name: np.zeros(T, dtype) for name, dtype in FIELDS.items()}
    rows += [empty] * (ROWS - len(rows))
    return Batch.of({name: np.stack([row[name] for row in rows]) for name in FIELDS})


PLAIN = Objective(chunk=8)


@jax.jit
def _gradients(params: Params, batch: Batch) -> tuple[Any, list[Params]]:
    model = Transformer(make_config())

    def both(params: Params) -> tuple[jax.Array, Any]:
        sums = losses.loss_sums(model, params, batch, PLAIN)
        return jnp.stack([sums["lm"], sums["value"]]), (sums, losses.mean_losses(sums, batch))

    _, back, values = jax.vjp(both, params, has_aux=True)
    return values, [back(unit)[0] for unit in jnp.eye(2)]


def gradients(batch: Batch) -> tuple[Any, list[Params]]:
    """(({"lm", "value"} summed, and as means), gradients of the two sums)."""
    return _gradients(make_params(make_config()), batch)


@functools.partial(jax.jit, static_argnames="objective")
def mean_losses(params: Params, batch: Batch, objective: Objective = PLAIN) -> dict[str, jax.Array]:
    sums = losses.loss_sums(Transformer(make_config()), params, batch, objective)
    return losses.mean_losses(sums, batch)


def assert_same_gradients(a: Batch, b: Batch) -> None:
    """Sums, means and the gradients of both sums; and there is something to compare."""
    (loss_a, gradient_a), (loss_b, gradient_b) = gradients(a), gradients(b)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5), loss_a, loss_b)
    for x, y in zip(jax.tree.leaves(gradient_a), jax.tree.leaves(gradient_b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=2e-5 * max(np.abs(x).max(), 1e-2))
    assert float(optax.tree.norm(gradient_a)) > 1


def judged(problems: list[tuple[list[int], list[int], Sequences]], **changes: Any) -> list[Tree]:
    """Verifier trees of (question, gold, completions); every other completion is right."""
    options = (
        dict(level="token", objective="joint", mix="weighted", branches=16, capacity=T) | changes
    )
    return [
        tree
        for q, gold, completions in problems
        for tree in verifier_trees(
            q, gold, completions, [i % 2 == 0 for i in range(len(completions))], **options
        )
    ]


def some_problems() -> list[tuple[list[int], list[int], Sequences]]:
    """Three problems with 3, 1 and 5 completions, of all lengths. Of the last ones two begin as the
    gold solution, one as another one, and two are the same, one of them right."""
    questions, golds = sequences(3, 3, 6, seed=1), sequences(3, 4, 8, seed=2)
    completions = [sequences(n, 1, 9, seed=n) for n in (3, 1, 5)]
    last, gold = completions[-1], golds[-1]
    last[0], last[1], last[3] = gold[:3] + last[0], gold[:2] + last[1], last[2][:4] + last[1]
    last[4] = last[1]
    return list(zip(questions, golds, completions, strict=True))


# Batches


@pytest.mark.parametrize("question_loss", [True, False])
def test_packed_trees_give_the_gradients_of_separate_rows(question_loss: bool) -> None:
    """Language and verifier losses alike."""
    questions, solutions = sequences(6, 2, 7, seed=3), sequences(6, 1, 9, seed=4)
    trees = finetuning_trees(questions, solutions, question_loss) + judged(some_problems())
    packed, separate = one_batch(trees), one_batch(trees, separate=True)
    assert ((packed.position_BT == 0) & (packed.end_BT > 0)).sum(1).max() >= 4  # trees of a row
    assert_same_gradients(packed, separate)


@pytest.mark.parametrize("objective", ["joint", "verifier_only"])
def test_branches_that_share_a_question_give_the_gradients_of_the_papers_batch(
    objective: str,
) -> None:
    shared = judged(some_problems(), branches=16, objective=objective)
    alone = judged(some_problems(), branches=1, objective=objective)
    assert (len(alone), max(len(tree.branches) for tree in shared) > 3) == (9, True)
    assert_same_gradients(one_batch(shared), one_batch(alone))


@pytest.mark.parametrize("branches", [1, 2, 16])
def test_the_weighted_mix_has_the_gradient_of_the_papers_mix(branches: int) -> None:
    """Paper: n copies of a problem's gold solution beside its n completions, all of weight 1.
    Weighted: gold once a tree, of the weight of the completions in it. Over the data set both sum
    to n times gold's cross-entropy and n times its tokens, so sums, means and gradients agree;
    `split` keeps this when a tree is longer than a row."""
    problems = some_problems()
    paper = judged(problems, mix="paper", branches=1)
    weighted = judged(problems, branches=branches)
    assert len(paper) == 2 * 9  # half of the mix is language
    assert sum(tree.length for tree in weighted) < sum(tree.length for tree in paper)
    a, b = one_batch(paper), one_batch(weighted)
    tokens = sum(len(gold) * len(completions) for _, gold, completions in problems)
    assert a.lm_weight_BT.sum() == b.lm_weight_BT.sum() == tokens
    assert_same_gradients(a, b)


def test_split_trees_keep_gold_weights_and_gradients() -> None:
    completions = [[i] * 9 for i in range(8)]
    problem = (sequences(1, 6, 6, seed=5)[0], sequences(1, 8, 8, seed=6)[0], completions)
    whole = judged([problem], capacity=10_000)
    parts = judged([problem], capacity=T)
    assert (len(whole), len(parts)) == (1, 3)
    weights = [b.lm_weight for tree in parts for b in tree.branches if b.value_weights is None]
    assert weights == [8.0]
    assert_same_gradients(one_batch(parts), one_batch(judged([problem], mix="paper", branches=1)))


def test_levels_say_which_values_are_judged() -> None:
    problem = ([1, 2, 3], [9, 9], [[4, 5, 6], [7], []])
    for level, expected in (("token", [1, 1, 1, 1]), ("solution", [0, 0, 1, 1])):
        (tree,) = judged([problem], level=level, objective="verifier_only")
        assert [b.label for b in tree.branches] == [1.0, 1.0, 0.0]  # the empty one comes first
        row = tree.flatten()
        judged_positions = np.isin(row["tokens"], [4, 5, 6, 7])
        assert row["value_weight"][judged_positions].tolist() == expected
        assert row["value_weight"].sum() == sum(expected)
        assert row["lm_weight"].sum() == 0


def test_objectives_say_whether_language_is_trained() -> None:
    joint, alone = (judged(some_problems(), objective=o) for o in ("joint", "verifier_only"))
    (_, means), (lm_gradient, value_gradient) = gradients(one_batch(alone))
    assert means["lm"] == 0  # not NaN: no token carries it
    assert float(optax.tree.norm(lm_gradient)) == 0
    (_, joint_means), (_, joint_value_gradient) = gradients(one_batch(joint))
    assert joint_means["lm"] > 1
    assert joint_means["value"] == pytest.approx(float(means["value"]), rel=1e-5)
    for x, y in zip(*map(jax.tree.leaves, (value_gradient, joint_value_gradient)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4 * max(np.abs(x).max(), 1e-2))


@given(st.lists(st.lists(st.integers(0, 99), max_size=30), max_size=8), st.integers(1, 12))
def test_documents_are_cut_without_losing_a_prediction(documents: Sequences, capacity: int) -> None:
    trees = list(document_trees(documents, capacity))
    assert all(1 <= tree.length <= capacity for tree in trees)
    pairs = [
        pair
        for tree in trees
        for pair in zip(*(tree.flatten()[n].tolist() for n in ("tokens", "targets")), strict=True)
    ]
    assert pairs == [pair for ids in documents for pair in itertools.pairwise(ids)]
    assert all((tree.flatten()["lm_weight"] == 1).all() for tree in trees)


# Losses


@functools.cache
def plain_outputs() -> dict[tuple[int, ...], tuple[np.ndarray, np.ndarray]]:
    """(logits [T, V], raw value [T]) of each line "question, completion", computed alone."""
    config = make_config()
    model, params = Transformer(config), make_params(config)
    lines = [q + c for q, gold, completions in some_problems() for c in [gold, *completions]]
    tokens = np.array([line + [0] * (20 - len(line)) for line in lines])
    n = len(lines)

    @jax.jit
    def outputs(params: Params) -> tuple[jax.Array, jax.Array]:
        position = np.tile(np.arange(20), (n, 1))
        hidden, _ = model.apply(params, tokens, position, Packed.causal(n, 20))
        return tuple(model.apply(params, hidden, method=m) for m in ("logits", "value"))

    logits, value = map(np.asarray, outputs(params))
    return {
        tuple(line): (logits[i].astype(float), value[i].astype(float))
        for i, line in enumerate(lines)
    }


@pytest.mark.parametrize(
    ("loss", "squash", "level"),
    [
        ("mse", "none", "token"),
        ("mse", "sigmoid", "token"),
        ("bce", "sigmoid", "token"),
        ("mse", "none", "solution"),
    ],
)
def test_losses_are_their_definitions_on_sequences_read_alone(
    loss: str, squash: str, level: str
) -> None:
    """In float64 numpy, from logits and values of unpacked sequences."""
    errors, entropies, weights = [], [], []
    for q, gold, completions in some_problems():
        for i, completion in enumerate(completions):
            _, raw = plain_outputs()[tuple(q + completion)]
            raw = raw[len(q) : len(q) + len(completion)]  # after every token of the completion
            raw = raw if level == "token" else raw[-1:]
            label, sigmoid = float(i % 2 == 0), 1 / (1 + np.exp(-raw))
            value = sigmoid if squash == "sigmoid" else raw
            if loss == "mse":
                errors += ((value - label) ** 2).tolist()
            else:
                errors += (-np.log(sigmoid if label else 1 - sigmoid)).tolist()
        logits, _ = plain_outputs()[tuple(q + gold)]
        for t, token in enumerate(gold, len(q) - 1):
            entropies.append(np.log(np.exp(logits[t, :100]).sum()) - logits[t, token])
            weights.append(len(completions))
    batch = one_batch(judged(some_problems(), level=level))
    means = mean_losses(make_params(make_config()), batch, Objective(loss, squash, 8))
    assert means["value"] == pytest.approx(np.mean(errors), rel=1e-4)
    assert means["lm"] == pytest.approx(np.average(entropies, weights=weights), rel=1e-4)


def test_question_loss_adds_the_questions_tokens() -> None:
    problems = some_problems()
    questions, golds = [q for q, _, _ in problems], [gold for _, gold, _ in problems]
    for question_loss in (True, False):
        entropies = []
        for q, gold in zip(questions, golds, strict=True):
            logits, _ = plain_outputs()[tuple(q + gold)]
            logprob = logits - np.log(np.exp(logits[:, :100]).sum(-1, keepdims=True))
            first = 1 if question_loss else len(q)
            line = q + gold
            entropies += [-logprob[t - 1, line[t]] for t in range(first, len(line))]
        batch = one_batch(finetuning_trees(questions, golds, question_loss))
        means = mean_losses(make_params(make_config()), batch)
        assert means["lm"] == pytest.approx(np.mean(entropies), rel=1e-4)
        assert means["value"] == 0


@pytest.mark.parametrize(("length", "chunk"), [(24, 999), (24, 8), (24, 7), (13, 5)])
def test_chunked_cross_entropy_is_plain_cross_entropy(length: int, chunk: int) -> None:
    """Values, and gradients of parameters and hidden states; 7 and 5 don't divide the length."""
    config = make_config()
    model, rng = Transformer(config), np.random.default_rng(0)
    hidden = rng.normal(size=(3, length, 32)).astype(np.float32)
    fields = {name: np.zeros((3, length), dtype) for name, dtype in FIELDS.items()}
    fields["targets"] = rng.integers(0, 100, (3, length))
    fields["lm_weight"] = rng.integers(0, 3, (3, length)).astype(np.float32)
    batch = Batch.of(fields)

    def plain(params: Params, hidden: jax.Array) -> jax.Array:
        logprob = jax.nn.log_softmax(hidden @ params["params"]["embed_VD"][:100].T)
        picked = jnp.take_along_axis(logprob, batch.targets_BT[..., None], -1)[..., 0]
        return -(picked * batch.lm_weight_BT).sum()

    def chunked(params: Params, hidden: jax.Array) -> jax.Array:
        return losses.cross_entropy_sum(model.config, params, hidden, batch, chunk)

    params = make_params(config)
    expected, got = (
        jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(params, hidden) for f in (plain, chunked)
    )
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4), got, expected)


def test_no_logits_are_computed_where_there_is_no_loss() -> None:
    """Or what isn't a number there would be in the loss and the table's gradient, times 0."""
    config, rng = make_config(), np.random.default_rng(0)
    fields = {name: np.zeros((3, 24), dtype) for name, dtype in FIELDS.items()}
    fields["targets"] = rng.integers(0, 100, (3, 24))
    fields["lm_weight"] = rng.permuted(np.tile(np.arange(24.0) < 8, (3, 1)), axis=1)
    weighs_BT, batch = fields["lm_weight"] > 0, Batch.of(fields)

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1))
    def both(params: Params, hidden: jax.Array) -> jax.Array:
        return losses.cross_entropy_sum(config, params, hidden, batch, 8)

    hidden = rng.normal(size=(3, 24, 32)).astype(np.float32)
    unknown = np.where(weighs_BT[..., None], hidden, np.nan)
    expected, found = (both(make_params(config), x) for x in (hidden, unknown))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert np.array_equal(np.any(found[1][1] != 0, -1), weighs_BT)


@pytest.mark.skipif(not cpu_kernels.has_tiles(), reason="the processor has no tiles (AMX)")
def test_the_loss_in_tiles_is_that_of_jax() -> None:
    """Of pieces of more positions, of which some have no loss; for a mean of rounded gradients."""
    rng = np.random.default_rng(0)
    B, T = 2, 1280
    fields = {name: np.zeros((B, T), dtype) for name, dtype in FIELDS.items()}
    fields["targets"] = rng.integers(0, 60, (B, T))
    fields["lm_weight"] = rng.random((B, T)) * (rng.random((B, T)) < 0.4)
    batch = Batch.of(fields)
    hidden = jnp.asarray(rng.normal(size=(B, T, 32)), jnp.bfloat16)

    def found(attention: str) -> tuple[str, Any]:
        config = make_config(dtype="bfloat16", text_size=60, attention=attention)

        def loss(params: Params, hidden: jax.Array) -> jax.Array:
            return losses.cross_entropy_sum(config, params, hidden, batch, 128)

        params = make_params(config)
        both = jax.jit(jax.value_and_grad(loss, (0, 1)))
        value, gradients = both(params, hidden)
        np.testing.assert_allclose(jax.jit(loss)(params, hidden), value, rtol=1e-6)
        return both.lower(params, hidden).as_text(), (value, gradients)

    (ours, one), (theirs, other) = found("auto"), found("jax")
    assert "cross_entropy_bfloat16" in ours
    assert ours.count("product_bfloat16") == 2  # its gradients' products
    assert cpu_kernels.TARGET not in theirs
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        assert np.linalg.norm(a - b) <= 2e-3 * np.linalg.norm(b)


def factors(program: str) -> list[str]:
    """The dtypes of both sides of each product of two matrices in a compiled program."""
    found, dtypes = [], {}
    for line in program.splitlines():
        if made := re.match(r"\s+(?:ROOT )?(%\S+) = (\w+)\[", line):
            dtypes[made[1]] = made[2]
        if product := re.search(r" dot\((%[^,]+), (%[^,)]+)\)", line):
            found.append("{} {}".format(*(dtypes[name] for name in product.groups())))
    return found


@pytest.mark.skipif(
    sharding.fast_dtype("cpu") != "bfloat16" or jax.default_backend() != "cpu",
    reason="a CPU with units for bfloat16 multiplies in it",
)
def test_products_with_the_table_are_in_bfloat16_on_cpu() -> None:
    """The logits, and what their gradients are, of large matrices: in float32 they take twice the
    time, and XLA turns to that by how the sides lie."""
    config = make_config(width=256, text_size=1000, dtype="bfloat16", attention="jax")
    params = transformer.shapes(config)
    batch = Batch.of({name: np.zeros((2, 64), dtype) for name, dtype in FIELDS.items()})
    hidden = jax.ShapeDtypeStruct((2, 64, config.width), jnp.bfloat16)

    def loss(params: Params, hidden: jax.Array) -> jax.Array:
        return losses.cross_entropy_sum(config, params, hidden, batch, 32)

    def logits(params: Params, hidden: jax.Array) -> jax.Array:
        return Transformer(config).apply(params, hidden, method="logits")

    for program, products in ((jax.grad(loss, (0, 1)), 3), (logits, 1)):
        compiled = jax.jit(program).lower(params, hidden).compile().as_text()
        assert factors(compiled) == ["bf16 bf16"] * products


# One step


def step_of(
    A: int, batch: Batch, *, dropout: float = 0.0, steps: int = 1, seed: int = 0
) -> tuple[Params, list[dict[str, float]]]:
    """Parameters and metrics after steps of plain gradient descent at rate 1, A microbatches."""
    config = make_config()
    tx = optax.sgd(1.0)
    step = jitted_step(dropout, seed)
    params = make_params(config)
    state = loop.TrainState(params, tx.init(params), jnp.zeros((), jnp.int32))
    batch = jax.tree.map(lambda x: x.reshape(A, ROWS // A, T), batch)
    rows = []
    for _ in range(steps):
        state, row = step(state, batch)
        rows.append({name: float(x) for name, x in row.items()})
    return state.params, rows


@functools.cache
def jitted_step(dropout: float, seed: int) -> Any:
    model = Transformer(make_config(), dropout)
    return jax.jit(loop.make_step(model, PLAIN, optax.sgd(1.0), seed))


def test_microbatches_accumulate_to_the_gradient_of_the_whole_batch() -> None:
    """Though their weights differ: a mean of means would be another gradient."""
    gold = finetuning_trees(sequences(13, 2, 5, seed=7), sequences(13, 1, 9, seed=8), True)
    batch = one_batch(judged(some_problems(), branches=1) + gold, separate=True)
    weight_A = np.asarray(batch.lm_weight_BT).reshape(4, -1).sum(-1)
    assert len({*weight_A.tolist(), 0.0}) == 5
    whole, (row,) = step_of(1, batch)
    (_, means), (lm, value) = gradients(batch)
    assert row["lm_loss"] == pytest.approx(float(means["lm"]), rel=1e-5)
    assert row["value_loss"] == pytest.approx(float(means["value"]), rel=1e-5)
    assert row["loss"] == pytest.approx(row["lm_loss"] + row["value_loss"])
    assert row["tokens"] == (batch.end_BT > 0).sum()
    weights = batch.lm_weight_BT.sum(), batch.value_weight_BT.sum()
    gradient = jax.tree.map(lambda x, y: x / weights[0] + y / weights[1], lm, value)
    assert row["grad_norm"] == pytest.approx(float(optax.tree.norm(gradient)), rel=1e-4)
    start = make_params(make_config())
    moved = jax.tree.map(lambda a, b: np.asarray(a - b), start, whole)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5), moved, gradient)
    cut, (cut_row,) = step_of(4, batch)
    assert cut_row == pytest.approx(row, rel=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5), whole, cut)


def test_how_a_step_is_cut_does_not_change_what_dropout_drops() -> None:
    batch = one_batch(judged(some_problems()))
    cuts = [step_of(A, batch, dropout=0.3, steps=2)[1] for A in (1, 2, 4)]
    for cut in cuts[1:]:
        for row, expected in zip(cut, cuts[0], strict=True):
            assert row == pytest.approx(expected, rel=1e-5)
    assert cuts[0][0]["loss"] != pytest.approx(step_of(1, batch)[1][0]["loss"], rel=1e-3)


def test_dropout_differs_between_steps_and_microbatches_and_nothing_else() -> None:
    half = jax.tree.map(lambda x: x[: ROWS // 2], one_batch(judged(some_problems())))
    twice = jax.tree.map(lambda x: np.concatenate([x, x]), half)
    _, one = step_of(2, twice, dropout=0.3, steps=2)
    assert step_of(2, twice, dropout=0.3, steps=2)[1] == one
    # Were the masks of both microbatches equal, their mean loss would be the loss of the first.
    model, params = Transformer(make_config(), 0.3), make_params(make_config())
    key = jax.random.fold_in(jax.random.key(0), 0)

    @jax.jit
    def lm_loss(index: jax.Array) -> jax.Array:
        rows = index * ROWS // 2 + jnp.arange(ROWS // 2)
        key_B = jax.vmap(jax.random.fold_in, (None, 0))(key, rows)
        sums = losses.loss_sums(model, params, half, PLAIN, key_B)
        return losses.mean_losses(sums, half)["lm"]

    parts = [float(lm_loss(i)) for i in (0, 1)]
    assert abs(parts[0] - parts[1]) > 1e-3
    assert one[0]["lm_loss"] == pytest.approx(np.mean(parts), rel=1e-5)


def shapes_in(jaxpr: Any) -> Iterator[tuple[int, ...]]:
    """Of everything computed, in loops and branches too."""
    for equation in jaxpr.eqns:
        yield from (v.aval.shape for v in equation.outvars)
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from shapes_in(inner)


def test_no_step_holds_the_logits_of_the_whole_batch() -> None:
    """V = 192 is no other dimension here; no array of V has as many numbers as [B, T, V]."""
    config = make_config(text_size=191)
    B, V = 8, config.vocab_size
    assert V == 192
    tx = optax.adam(1e-3)
    params = transformer.shapes(config)
    state = loop.TrainState(
        params, jax.eval_shape(tx.init, params), jax.ShapeDtypeStruct((), jnp.int32)
    )

    def largest(chunk: int, A: int) -> int:
        step = loop.make_step(Transformer(config), Objective(chunk=chunk), tx, 0)
        batch = Batch.of({n: jax.ShapeDtypeStruct((A, B, T), d) for n, d in FIELDS.items()})
        shapes = list(shapes_in(jax.make_jaxpr(step)(state, batch).jaxpr))
        assert (B, T, 32) in shapes  # the walk reaches the transformer
        return max(int(np.prod(shape)) for shape in shapes if V in shape)

    for A in (1, 2):
        assert largest(8, A) == B * 8 * V
    assert largest(T, 1) == B * T * V  # it would have been found


# Optimiser


def test_schedule_warms_up_and_decays_linearly_to_zero() -> None:
    flat = optimizer.schedule(0.5, 10, 0)
    np.testing.assert_allclose(
        [flat(i) for i in range(11)], 0.5 * (1 - np.arange(11) / 10), atol=1e-7
    )
    warm = optimizer.schedule(0.5, 10, 4)
    expected = [0.125, 0.21875, 0.3125, 0.40625] + [0.5 * (1 - i / 6) for i in range(7)]
    np.testing.assert_allclose([warm(i) for i in range(11)], expected, atol=1e-7)
    assert optimizer.schedule(0.5, 3, 3)(3) == 0.5  # all of it warm-up
    assert optimizer.schedule(0.5, 0, 0)(0) == 0.5  # no steps: never asked


def test_defaults_are_table_1s() -> None:
    for stage in ("finetune", "baseline", "verify"):
        options = config_module.default()[stage]
        assert (options.adam_beta1, options.adam_beta2) == (0.9, 0.95)
        assert (options.batch_tokens, options.learning_rate) == (32_000, 1e-5)
        assert (options.warmup_steps, options.clip_norm, options.weight_decay) == (0, 0, 0)
        assert loop.make_optimizer(options, 10).init({"w": jnp.zeros(3)}) is not None


@pytest.mark.parametrize(("clip", "decay"), [(0.0, 0.0), (0.5, 0.0), (0.0, 0.1), (0.5, 0.1)])
def test_optimizer_is_adamw_with_clipping_by_hand(clip: float, decay: float) -> None:
    rng = np.random.default_rng(0)
    gradients = rng.normal(size=(5, 4)) * [[1], [0.01], [3], [0.1], [1]]
    tx = optimizer.make(
        0.1, 5, warmup=2, beta1=0.9, beta2=0.95, epsilon=1e-8, weight_decay=decay, clip=clip
    )
    w = x = np.array([1.0, -2.0, 0.5, 3.0])
    params = {"w": jnp.asarray(w, jnp.float32)}
    state, m, v = tx.init(params), np.zeros(4), np.zeros(4)
    rate = optimizer.schedule(0.1, 5, 2)
    for t, g in enumerate(gradients):
        updates, state = tx.update({"w": jnp.asarray(g, jnp.float32)}, state, params)
        params = optax.apply_updates(params, updates)
        if clip:
            g = g * min(1, clip / np.linalg.norm(g))
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
        adam = m / (1 - 0.9 ** (t + 1)) / (np.sqrt(v / (1 - 0.95 ** (t + 1))) + 1e-8)
        x = x - float(rate(t)) * (adam + decay * x)
        np.testing.assert_allclose(params["w"], x, rtol=1e-5)


@given(
    st.integers(0, 5000),
    st.integers(1, 100_000),
    st.integers(1, 2048),
    st.integers(1, 64),
    st.sampled_from([1, 2, 8]),
)
def test_plan_cuts_every_row_into_steps(
    source_rows: int, batch_tokens: int, row_tokens: int, microbatch: int, devices: int
) -> None:
    options = config_module.training(
        batch_tokens=batch_tokens, row_tokens=row_tokens, microbatch_rows=microbatch
    )
    rows, accumulate, steps, batch = loop.plan(source_rows, options, devices)
    assert rows % devices == 0
    assert rows < microbatch + devices
    assert batch <= rows * accumulate < batch + rows
    assert (steps - 1) * batch < source_rows <= steps * batch
    wanted = max(1, round(batch_tokens / row_tokens))
    assert abs(batch - wanted) <= min(wanted, microbatch) / 2
    assert (steps, batch) == loop.plan(source_rows, options, 1)[2:]


def test_a_host_batch_is_cut_into_microbatches_in_order(mesh: Mesh) -> None:
    fields = {n: np.arange(6 * T).reshape(6, T).astype(d) for n, d in FIELDS.items()}
    batch = loop.device_batch(mesh, fields, 3)
    for name, values in batch._asdict().items():
        assert values.shape == (3, 2, T), name
        np.testing.assert_array_equal(np.asarray(values).reshape(6, T), fields[name[:-3]])


# Metrics


def test_metrics_rewind_to_a_step_and_survive_a_torn_line(tmp_path: Path) -> None:
    log = Metrics(tmp_path, "finetune")
    log.rewind(0)
    for step in (1, 2, 3):
        log.write(step, {"loss": step / 2})
    log.close()
    with open(log.path, "a", encoding="utf-8") as file:
        file.write('{"step": 4, "lo')
    assert metrics.read(log.path) == [{"step": i, "loss": i / 2} for i in (1, 2, 3)]
    log = Metrics(tmp_path, "finetune")
    log.rewind(2)
    log.write(3, {"loss": 9.0})
    log.close()
    lines = log.path.read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["loss"] for line in lines] == [0.5, 1.0, 9.0]
    assert any((tmp_path / "tensorboard" / "finetune").iterdir())
    assert metrics.read(tmp_path / "none.jsonl") == []


def test_metrics_of_other_processes_write_nothing(tmp_path: Path) -> None:
    log = Metrics(tmp_path / "m", "finetune", enabled=False)
    log.rewind(0)
    log.write(1, {"loss": 1.0})
    log.close()
    assert not (tmp_path / "m").exists()


# The loop


class Interrupted(Metrics):
    """The power goes when the metrics of step `last` should be written, or will: SIGTERM comes."""

    def __init__(self, folder: Path, last: int, warned: bool):
        super().__init__(folder, "finetune")
        self._last, self._warned = last, warned

    def write(self, step: int, row: dict[str, Any]) -> None:
        if step == self._last and not self._warned:
            raise KeyboardInterrupt
        if step == self._last:
            signal.raise_signal(signal.SIGTERM)
        super().write(step, row)


def small_params() -> Params:
    config = make_config()
    return transformer.neutral_head(
        config, jax.tree.map(lambda x: x / 10, make_params(config)), 0.5
    )


def fit(
    folder: Path,
    mesh: Mesh,
    last: int | None = None,
    warned: bool = False,
    initial: Callable[[], Params] = small_params,
    **changes: Any,
) -> tuple[Params, list[dict[str, Any]]]:
    """Steps of two microbatches with dropout, on trees of both losses: (parameters, metrics)."""
    options = config_module.training(
        epochs=32.0,
        learning_rate=0.03,
        batch_tokens=4 * T,
        row_tokens=T,
        microbatch_rows=2,
        clip_norm=1.0,
        dropout=0.05,
        eval_every=20,
        checkpoint_every=60,
    )
    options.update(changes)
    config = make_config()
    log = Metrics(folder, "finetune") if last is None else Interrupted(folder, last, warned)
    try:
        params = loop.fit(
            model=config,
            initial=initial,
            trees=memorisable(),
            held_out=judged(some_problems(), branches=2),
            options=options,
            objective=PLAIN,
            folder=folder / "training",
            mesh=mesh,
            seed=0,
            name="finetune",
            log=log,
        )
    finally:
        log.close()
    return params, metrics.read(log.path)


def memorisable() -> list[Tree]:
    """About eight rows: problems that differ in their first token, with right and wrong answers."""
    problems = [([i, 50, 51], [60 + i] * 6, [[60 + i] * 6, [80 + i] * 5]) for i in range(12)]
    return judged(problems)


@pytest.fixture(scope="module")
def whole_run(
    tmp_path_factory: pytest.TempPathFactory, mesh: Mesh
) -> tuple[Params, list[dict[str, Any]]]:
    return fit(tmp_path_factory.mktemp("whole"), mesh)


def test_a_memorisable_set_is_memorised(whole_run: tuple[Params, list[dict[str, Any]]]) -> None:
    _, rows = whole_run
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert len(rows) > 40
    assert rows[0]["lm_loss"] > 3
    assert rows[-1]["lm_loss"] < 0.2 * rows[0]["lm_loss"]
    assert rows[0]["value_loss"] == pytest.approx(0.25)  # the neutral head
    assert rows[-1]["value_loss"] < 0.1


def test_metrics_hold_the_learning_rate_and_count_tokens(
    whole_run: tuple[Params, list[dict[str, Any]]],
) -> None:
    _, rows = whole_run
    n = len(rows)
    np.testing.assert_allclose([r["lr"] for r in rows], 0.03 * (1 - np.arange(n) / n), rtol=1e-5)
    packed = PackedRows(memorisable(), T, 32, 0)
    assert rows[-1]["tokens"] == 32 * sum(tree.length for tree in memorisable())
    assert n == -(-len(packed) // 4)


def test_held_out_losses_are_means_over_all_weights(
    whole_run: tuple[Params, list[dict[str, Any]]],
) -> None:
    """Over batches of unequal weights, without dropout."""
    params, rows = whole_run
    measured = [row["step"] for row in rows if "heldout_lm_loss" in row]
    assert measured == sorted({*range(20, len(rows) + 1, 20), len(rows)})
    trees = judged(some_problems(), branches=2)
    assert len(PackedRows(trees, T, 1, 0)) > 2  # rows of a batch
    means = mean_losses(params, one_batch(trees))
    assert rows[-1]["heldout_lm_loss"] == pytest.approx(float(means["lm"]), rel=1e-5)
    assert rows[-1]["heldout_value_loss"] == pytest.approx(float(means["value"]), rel=1e-5)


def test_a_run_moves_and_takes_the_memory_of_what_it_started_from(
    whole_run: tuple[Params, list[dict[str, Any]]], tmp_path: Path, mesh: Mesh
) -> None:
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), small_params(), whole_run[0])
    assert optax.tree.norm(moved) > 0.1
    start = small_params()
    fit(tmp_path, mesh, initial=lambda: start, epochs=1.0)
    assert all(x.is_deleted() for x in jax.tree.leaves(start))


def test_on_cpu_training_is_compiled_for_memory(
    mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sharding.xla_options(**loop.CPU_OPTIONS), "XLA's option has another name now"
    assert sharding.xla_options(xla_cpu_no_such_option="") == {}
    config = make_config()
    tx = loop.make_optimizer(config_module.training(), 10)
    shapes, where = loop.state_shardings(config, tx, mesh)
    batch_ABT = loop.device_batch(mesh, next(PackedRows(memorisable(), T, 1, 0).batches(4)), 2)

    def temporaries() -> int:
        with jax.set_mesh(mesh):
            step = loop.jit_step(Transformer(config), PLAIN, tx, 0, where)
            compiled = step.lower(checkpoint.abstract(shapes, where), batch_ABT).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    small = temporaries()
    monkeypatch.setattr(loop, "CPU_OPTIONS", {})
    assert small < temporaries()


def test_a_signal_after_the_last_look_ends_the_process_as_it_leaves() -> None:
    def noted(number: int, frame: Any) -> None:
        came.append(number)

    def stopped() -> None:
        with processes.Termination():
            signal.raise_signal(signal.SIGTERM)
            raise processes.Stopped

    came: list[int] = []
    before = signal.signal(signal.SIGTERM, noted)
    try:
        with processes.Termination() as termination:
            signal.raise_signal(signal.SIGTERM)
            assert termination.noted
            assert not came
        assert came == [signal.SIGTERM]
        with pytest.raises(processes.Stopped):
            stopped()
        assert came == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("warned", [False, True])
def test_an_interrupted_run_goes_on_bit_for_bit(
    warned: bool, whole_run: tuple[Params, list[dict[str, Any]]], tmp_path: Path, mesh: Mesh
) -> None:
    """From the checkpoint of step 6, the metrics after it being rewound, or of the last step."""
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(processes.Stopped if warned else KeyboardInterrupt, match=r"step 9|^$"):
        fit(tmp_path, mesh, last=9, warned=warned, checkpoint_every=3)
    assert signal.getsignal(signal.SIGTERM) == before
    rows = metrics.read(tmp_path / "finetune.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 9 + warned))
    assert checkpoint.Checkpoints(tmp_path / "training").latest == (9 if warned else 6)
    params, rows = fit(tmp_path, mesh, initial=pytest.fail)  # not called
    expected_params, expected_rows = whole_run
    jax.tree.map(np.testing.assert_array_equal, params, expected_params)

    def numbers(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        timing = ("seconds", "tokens")  # since the last start
        return [{k: v for k, v in row.items() if k not in timing} for row in rows]

    assert numbers(rows) == numbers(expected_rows)
    last = 8 if warned else 5  # whose row was written before the restart
    assert rows[last + 1]["tokens"] < rows[last]["tokens"]


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path, mesh: Mesh) -> None:
    with pytest.raises(FloatingPointError) as caught:
        fit(tmp_path, mesh, learning_rate=1e38, microbatch_rows=4, clip_norm=0.0, dropout=0.0)
    message = str(caught.value)
    assert message.startswith("finetune: the loss is nan at step 2: lower finetune.learning_rate")
    assert "(now 1e+38)" in message
    assert "finetune.clip_norm" in message
    assert [row["step"] for row in metrics.read(tmp_path / "finetune.jsonl")] == [1]


def test_no_held_out_trees_and_no_epochs_are_fine(tmp_path: Path, mesh: Mesh) -> None:
    config = make_config()
    log = Metrics(tmp_path, "pretrain")
    before = small_params()
    after = loop.fit(
        model=config,
        initial=lambda: before,
        trees=memorisable(),
        held_out=[],
        options=config_module.training(epochs=0.0, row_tokens=T),
        objective=Objective(),
        folder=tmp_path / "training",
        mesh=mesh,
        seed=0,
        name="pretrain",
        log=log,
    )
    log.close()
    jax.tree.map(np.testing.assert_array_equal, before, after)
    assert metrics.read(log.path) == []
