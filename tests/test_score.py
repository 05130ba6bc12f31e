"""The scorer against one naive forward for each completion, and the aggregates against numpy."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh

from gsm_verifier import processes
from gsm_verifier.model import transformer
from gsm_verifier.model.attention import Packed
from gsm_verifier.model.config import FAMILIES, ModelConfig
from gsm_verifier.model.transformer import Params, Transformer
from gsm_verifier.score import AGGREGATES, Scorer, aggregate, prepared

settings.register_profile("untimed", deadline=None)  # machines are shared
settings.load_profile("untimed")

Items = list[tuple[list[int], list[list[int]]]]
TEXT_SIZE = 90
LENGTH = 64


def tiny(family: str = "llama") -> ModelConfig:
    sizes = dict(width=32, layers=2, heads=4, kv_heads=2, head_size=8, mlp_width=64, max_length=128)
    return ModelConfig(text_size=TEXT_SIZE, **sizes, **FAMILIES[family])


def random_params(config: ModelConfig, seed: int = 0) -> Params:
    """Weights large enough that context matters; a head with a gain and a bias of its own."""
    rng = np.random.default_rng(seed)

    def one(path: Any, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        name = jax.tree_util.keystr(path)
        if "scale" in name:
            return np.ones(leaf.shape, np.float32)
        return rng.normal(0, 0.25, leaf.shape).astype(np.float32)

    params = jax.tree.map_with_path(one, transformer.shapes(config))
    params["params"] |= {"value_gain": np.float32(0.7), "value_bias": np.float32(0.3)}
    return params


@pytest.fixture(scope="module")
def items() -> Items:
    """Questions of 1 to 20 tokens, with none to many completions of 1 to 25."""
    rng = np.random.default_rng(0)

    def ids(low: int, high: int) -> list[int]:
        return rng.integers(0, TEXT_SIZE, rng.integers(low, high + 1)).tolist()

    counts = [1, 0, 3, 17, 2, 40, 5]
    items = [(ids(1, 20), [ids(1, 25) for _ in range(count)]) for count in counts]
    items[2] = ([7], items[2][1])
    items[4][1][1] = list(items[4][1][0])  # the same completion twice
    return items


def naive_values(
    config: ModelConfig, params: Params, question: Sequence[int], completion: Sequence[int]
) -> np.ndarray:
    """The value after each token of the completion, from a forward of nothing else."""
    padded = np.zeros((1, LENGTH), np.int32)
    padded[0, : len(question) + len(completion)] = [*question, *completion]
    values = _naive(config)(params, padded)[0]
    return np.asarray(values)[len(question) : len(question) + len(completion)]


def _naive(config: ModelConfig) -> Any:
    if config not in _COMPILED:
        model = Transformer(config)

        def values(params: Params, tokens_BT: jax.Array) -> jax.Array:
            causal = Packed.causal(1, LENGTH)
            hidden, _ = model.apply(params, tokens_BT, jnp.arange(LENGTH)[None], causal)
            return model.apply(params, hidden, method="value")

        _COMPILED[config] = jax.jit(values)
    return _COMPILED[config]


_COMPILED: dict[ModelConfig, Any] = {}


def scored(
    config: ModelConfig,
    params: Params,
    mesh: Mesh,
    items: Items,
    *,
    squash: str = "none",
    row_tokens: int = 64,
    rows: int = 4,
) -> list[list[np.ndarray]]:
    placed = jax.device_put(params, transformer.shardings(config, mesh))
    scorer = Scorer(config, placed, mesh, squash=squash, row_tokens=row_tokens, rows=rows)
    return list(scorer(items))


def check(found: list[list[np.ndarray]], expected: list[list[np.ndarray]]) -> None:
    assert [len(group) for group in found] == [len(group) for group in expected]
    for group, wanted in zip(found, expected, strict=True):
        for values, other in zip(group, wanted, strict=True):
            assert values.dtype == np.float32
            np.testing.assert_allclose(values, other, rtol=0, atol=1e-5)


def expected_values(config: ModelConfig, params: Params, items: Items) -> list[list[np.ndarray]]:
    return [
        [naive_values(config, params, question, c) for c in completions]
        for question, completions in items
    ]


@pytest.mark.parametrize("family", sorted({"llama", "gpt3"} & set(FAMILIES)))
def test_values_are_those_of_each_completion_alone(family: str, mesh: Mesh, items: Items) -> None:
    """Many completions share their question; one question's fill many rows."""
    config = tiny(family)
    params = random_params(config)
    expected = expected_values(config, params, items)
    everything = np.concatenate([v for group in expected for v in group])
    assert everything.std() > 0.1
    check(scored(config, params, mesh, items), expected)


@pytest.mark.parametrize(("row_tokens", "rows"), [(46, 1), (128, 3), (1024, 2)])
def test_any_packing_gives_the_same_values(
    row_tokens: int, rows: int, mesh: Mesh, items: Items
) -> None:
    """From a row that barely holds a question with one completion to one that holds everything."""
    config = tiny()
    params = random_params(config)
    expected = expected_values(config, params, items)
    found = scored(config, params, mesh, items, row_tokens=row_tokens, rows=rows)
    check(found, expected)


def test_a_scorer_is_called_again_and_order_is_kept(mesh: Mesh, items: Items) -> None:
    config = tiny()
    params = random_params(config)
    expected = expected_values(config, params, items)
    placed = jax.device_put(params, transformer.shardings(config, mesh))
    scorer = Scorer(config, placed, mesh, squash="none", row_tokens=64, rows=4)
    check(list(scorer(items[:3])), expected[:3])
    check(list(scorer(iter(items[::-1]))), expected[::-1])
    assert list(scorer([])) == []
    assert list(scorer([items[1]])) == [[]]


def test_what_is_cast_ahead_gives_the_same_values(mesh: Mesh, items: Items) -> None:
    """But for the sums' order; the value's row isn't rounded."""
    config = tiny().with_(dtype="bfloat16")
    params = jax.device_put(random_params(config), transformer.shardings(config, mesh))
    alike = []
    for model, weights in ((config, params), prepared(config, params, mesh)):
        scorer = Scorer(model, weights, mesh, squash="none", row_tokens=64, rows=4)
        alike.append(np.concatenate([v for group in scorer(items) for v in group]))
    assert {x.dtype for x in jax.tree.leaves(weights["params"]["layers_0"])} > {
        jnp.dtype("bfloat16")
    }
    assert weights["params"][transformer.table(config)].dtype == jnp.float32
    np.testing.assert_allclose(*alike, atol=0.02)
    assert prepared(tiny(), params, mesh)[1] is params


def test_squashed_values_are_the_sigmoid_of_the_raw_ones(mesh: Mesh, items: Items) -> None:
    config = tiny()
    params = random_params(config)
    raw = expected_values(config, params, items)
    expected = [[1 / (1 + np.exp(-v)) for v in group] for group in raw]
    check(scored(config, params, mesh, items, squash="sigmoid"), expected)


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2), (1, 8, 1), (1, 1, 2)], ids=str)
def test_a_mesh_scores_the_same(sizes: tuple[int, int, int], make_mesh, items: Items) -> None:
    """Rows are rounded up to what the devices divide."""
    config = tiny()
    params = random_params(config)
    check(
        scored(config, params, make_mesh(*sizes), items, rows=3),
        scored(config, params, make_mesh(), items, rows=3),
    )


def test_asked_to_end_it_stops_before_a_batch(mesh: Mesh, items: Items) -> None:
    config = tiny()
    scorer = Scorer(config, random_params(config), mesh, squash="none", row_tokens=64, rows=1)
    termination = processes.Termination()
    found = scorer(items, termination)
    termination.noted = True
    with pytest.raises(processes.Stopped, match="run again to go on"):
        list(found)


def test_too_long_is_refused_naming_the_mend(mesh: Mesh) -> None:
    config = tiny()
    params = random_params(config)
    fits = [([1] * 30, [[2] * 34])]  # the question's last token is the branch's first
    check(scored(config, params, mesh, fits), expected_values(config, params, fits))
    with pytest.raises(ValueError, match="doesn't fit a row of 64: raise row_tokens") as error:
        scored(config, params, mesh, [([1], [[2]]), ([1] * 30, [[2], [2] * 35])])
    assert "\n" not in str(error.value)


# Aggregates


@given(st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=50))
def test_aggregates_are_numpys(values: list[float]) -> None:
    array = np.array(values)
    assert aggregate(values, "last") == array[-1]
    assert aggregate(values, "mean") == pytest.approx(array.mean())
    assert aggregate(values, "min") == array.min()
    inside = np.minimum(np.maximum(array, 0), 1)  # as probabilities
    assert aggregate(values, "product") == pytest.approx(np.prod(inside))
    assert set(AGGREGATES) == {"last", "mean", "min", "product"}
    assert all(type(aggregate(np.float32(values), how)) is float for how in AGGREGATES)
