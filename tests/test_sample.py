"""The sampler against naive decoding: no cache, no slots, no calculator in the device's loop."""

import dataclasses
import functools
import itertools
import math
import re
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh
from scipy import stats

from gsm_verifier import processes, sharding
from gsm_verifier.model import cpu_kernels, transformer
from gsm_verifier.model.attention import NOWHERE, Packed
from gsm_verifier.model.config import FAMILIES, ModelConfig
from gsm_verifier.model.transformer import Params, Transformer
from gsm_verifier.records import Completion
from gsm_verifier.sample import decode
from gsm_verifier.sample import engine as engine_module
from gsm_verifier.sample.decode import Sampling
from gsm_verifier.sample.engine import Engine, Request, _Run
from gsm_verifier.text import calculator
from gsm_verifier.text.tokenizer import Tokenizer

settings.register_profile("untimed", deadline=None)  # machines are shared
settings.load_profile("untimed")

TEXTS = [
    "Natalia sold 48/2 = <<48/2=24>>24 clips.\nNatalia sold 48+24 = <<48+24=72>>72.\n#### 72",
    "Weng earns $12/60 = $<<12/60=0.2>>0.2 per minute. That is $<<(8*2)=16.00>>16.00.\n#### 10",
    "Betty has 3-8 = <<3-8=-5>>-5 dollars, (3-8)/1 = <<(3-8)=-5>>-5.\n#### -5",
] * 20
MAX_TOKENS = 16
QUESTIONS = ["How many?\n", "Natalia sold 48 clips in May. How many in June?\n", "#"]
# 35 tokens and more: its keys take the second bucket of 32.
QUESTIONS += [
    "Betty has 3 dollars and Weng earns $12 per minute, so how many dollars in 16 days?\n"
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, 330)


def tiny(tokenizer: Tokenizer, family: str = "llama", **changes: Any) -> ModelConfig:
    sizes = dict(width=32, layers=2, heads=4, kv_heads=2, head_size=8, mlp_width=64)
    words = {**sizes, "max_length": 128, **FAMILIES[family], "tied": False, **changes}
    return ModelConfig(text_size=tokenizer.size, **words)


def sharp_params(config: ModelConfig, seed: int = 0) -> Params:
    """Random parameters large enough that context and position matter, as numpy arrays."""
    rng = np.random.default_rng(seed)

    def one(path: Any, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        name = jax.tree_util.keystr(path)
        if "scale" in name or leaf.ndim == 0:
            return np.ones(leaf.shape, np.float32)
        scale = 0.5 if "_VD" in name or "_TD" in name else 0.25
        return rng.normal(0, scale, leaf.shape).astype(np.float32)

    return jax.tree.map_with_path(one, transformer.shapes(config))


@functools.cache
def _naive(config: ModelConfig) -> Any:
    model = Transformer(config)

    def logits(params: Params, tokens_T: jax.Array) -> jax.Array:
        T = len(tokens_T)
        hidden, _ = model.apply(params, tokens_T[None], jnp.arange(T)[None], Packed.causal(1, T))
        return model.apply(params, hidden, method="logits")[0]

    return jax.jit(logits)


def naive_logits(config: ModelConfig, params: Params, ids: Sequence[int]) -> np.ndarray:
    """Logits after each of `ids`, [len(ids), V], float64."""
    padded = np.zeros(-(-len(ids) // 128) * 128, np.int32)
    padded[: len(ids)] = ids
    return np.asarray(_naive(config)(params, padded), np.float64)[: len(ids)]


def naive_decoding(
    choose: Callable[[list[int]], int], count: int, end: int, tokenizer: Tokenizer | None = None
) -> tuple[list[int], list[bool]]:
    """(tokens, forced) where `choose` says what follows; with a tokenizer, the calculator too."""
    written: list[int] = []
    forced: list[bool] = []
    while len(written) < count and (not written or written[-1] != end):
        written.append(choose(written))
        forced.append(False)
        if tokenizer is None or len(written) == count:
            continue
        before, text = tokenizer.decode(written[:-1]), tokenizer.decode(written)
        if calculator.open_expression(before) is not None:
            continue
        expression = calculator.open_expression(text)
        result = None if expression is None else calculator.evaluate(expression, before)
        if result is None:
            continue
        upto = text[: text.rindex("<<")] + "<<" + expression + "="
        ids = tokenizer.encode(upto.removeprefix(before) + result + ">>")
        if len(ids) > decode.FORCED:
            continue
        own = written.pop()
        forced[-1:] = [ids[0] != own] + [True] * (len(ids) - 1)
        written += ids
    return written[:count], forced[:count]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def naive_logprobs(
    config: ModelConfig, params: Params, prompt: Sequence[int], tokens: Sequence[int]
) -> np.ndarray:
    """The log-probability, at temperature 1, of each of `tokens` after what comes before it."""
    logits = naive_logits(config, params, [*prompt, *tokens])[len(prompt) - 1 : -1]
    return log_softmax(logits)[np.arange(len(tokens)), list(tokens)]


Completions = dict[tuple[str, int], Completion]


def engine_of(
    config: ModelConfig,
    params: Params,
    mesh: Mesh,
    tokenizer: Tokenizer,
    *,
    prompts: int = 4,
    slots: int = 4,
    forces: bool = False,
    **changes: Any,
) -> Engine:
    words = dict(temperature=0.7, top_k=0, top_p=1.0, max_tokens=MAX_TOKENS, end=tokenizer.end)
    sampling = Sampling(**{**words, "seed": 0, "chunk": 8, "patience": 2, **changes})
    placed = jax.device_put(params, transformer.shardings(config, mesh))
    return Engine(
        config,
        placed,
        mesh,
        tokenizer,
        sampling,
        prompts=prompts,
        slots=slots,
        calculator=forces,
    )


def collect(engine: Engine, requests: Iterable[Request], longest: int = 0) -> Completions:
    """Completions by (problem, sample), each once."""
    found = list(engine.run(requests, longest))
    by_key = {(c.problem, c.sample): c for c in found}
    assert len(by_key) == len(found)
    return by_key


def tokens_of(completions: Completions) -> dict[tuple[str, int], list[int]]:
    return {key: c.tokens for key, c in completions.items()}


@pytest.fixture(scope="module")
def config(tokenizer: Tokenizer) -> ModelConfig:
    return tiny(tokenizer)


@pytest.fixture(scope="module")
def params(config: ModelConfig) -> Params:
    return sharp_params(config)


@pytest.fixture(scope="module")
def prompts(tokenizer: Tokenizer) -> dict[str, list[int]]:
    ids = {f"p{i}": tokenizer.encode(question) for i, question in enumerate(QUESTIONS)}
    assert min(map(len, ids.values())) == 1
    assert max(map(len, ids.values())) > 32
    return ids


@pytest.fixture(scope="module")
def common(config: ModelConfig, params: Params, prompts: dict[str, list[int]]) -> int:
    """A token likely enough to end completions at all lengths."""
    prob = [np.exp(log_softmax(naive_logits(config, params, ids))) for ids in prompts.values()]
    return int(np.concatenate(prob).mean(0).argmax())


def requests_of(prompts: dict[str, list[int]], samples: range) -> list[Request]:
    return [Request(name, ids, samples) for name, ids in prompts.items()]


# Greedy


@pytest.mark.parametrize("family", sorted({"llama", "gpt3"} & set(FAMILIES)))
def test_greedy_is_the_argmax_of_full_forwards(
    family: str, mesh: Mesh, tokenizer: Tokenizer, prompts: dict[str, list[int]]
) -> None:
    """Prompts of 1 to over 32 tokens, more than there is room for at one time."""
    config = tiny(tokenizer, family)
    params = sharp_params(config, seed=1)

    def choose(prompt: list[int], written: list[int]) -> int:
        return int(naive_logits(config, params, [*prompt, *written])[-1].argmax())

    expected = {
        name: naive_decoding(functools.partial(choose, ids), MAX_TOKENS, tokenizer.end)[0]
        for name, ids in prompts.items()
    }
    assert len({tuple(e) for e in expected.values()}) == len(prompts)
    assert sum(len(set(e)) for e in expected.values()) > 30
    engine = engine_of(config, params, mesh, tokenizer, prompts=2, slots=2, temperature=0.0)
    found = collect(engine, requests_of(prompts, range(2)))
    for (name, _), completion in found.items():
        assert completion.tokens == expected[name]
        assert completion.text == tokenizer.decode(expected[name])
        assert completion.finished == (expected[name][-1] == tokenizer.end)
        assert completion.forced == [False] * len(expected[name])
    assert len(found) == 2 * len(prompts)


@pytest.mark.skipif(not cpu_kernels.available(), reason="no compiler")
def test_the_kernel_of_attention_writes_what_jax_writes(
    config, params, mesh, tokenizer, prompts, monkeypatch
) -> None:
    requests = requests_of(prompts, range(2))
    words = dict(prompts=3, slots=2, temperature=0.0)
    by_kernel = collect(engine_of(config, params, mesh, tokenizer, **words), requests)
    monkeypatch.setattr(cpu_kernels, "available", lambda: False)
    in_jax = collect(engine_of(config, params, mesh, tokenizer, **words), requests)
    assert tokens_of(by_kernel) == tokens_of(in_jax)
    for key, completion in in_jax.items():
        assert completion.logprob == pytest.approx(by_kernel[key].logprob, abs=1e-4)


# What a completion must not depend on


@pytest.fixture(scope="module")
def engine(config: ModelConfig, params: Params, mesh: Mesh, tokenizer: Tokenizer, common) -> Engine:
    return engine_of(config, params, mesh, tokenizer, end=common)


@pytest.fixture(scope="module")
def reference(engine: Engine, prompts: dict[str, list[int]]) -> Completions:
    """Samples 0..9 of every prompt, of many lengths."""
    found = collect(engine, requests_of(prompts, range(10)))
    assert set(found) == {(name, m) for name in prompts for m in range(10)}
    assert len({tuple(c.tokens) for c in found.values()}) > 30
    assert len({len(c.tokens) for c in found.values()}) > 5
    return found


@pytest.mark.parametrize(
    "changes",
    [
        dict(prompts=1, slots=1),
        dict(prompts=3, slots=10, chunk=1),
        dict(prompts=2, slots=3, chunk=64, patience=1000),
        dict(prompts=11, slots=1),  # more prompts than problems, which share their samples
        dict(slots=10, page=3, chunk=7, kept_share=0.3),
        dict(slots=10, page=2, kept_share=0.01),  # room for one, if it is long
        dict(slots=10, page=4, kept_share=0.1, in_jax=True),
    ],
    ids=str,
)
def test_a_completion_does_not_depend_on_slots_prompts_in_flight_chunks_or_pages(
    changes: dict[str, Any],
    config,
    params,
    mesh,
    tokenizer,
    prompts,
    common,
    reference,
    monkeypatch,
) -> None:
    if changes.get("in_jax"):
        monkeypatch.setattr(cpu_kernels, "available", lambda: False)
    words = {name: value for name, value in changes.items() if name != "in_jax"}
    other = engine_of(config, params, mesh, tokenizer, end=common, **words)
    found = collect(other, requests_of(prompts, range(10)))
    assert tokens_of(found) == tokens_of(reference)
    for key, completion in found.items():
        assert completion.logprob == pytest.approx(reference[key].logprob, abs=1e-4)


@pytest.mark.parametrize("pools", [1, 2])
def test_pages_are_dealt_to_one_slot_each_and_come_back(
    pools: int, config, params, make_mesh, tokenizer, prompts, common, monkeypatch
) -> None:
    """More slots than there is room for: some wait, the oldest of each pool never."""
    words = dict(end=common, slots=10, page=3, kept_share=0.2, chunk=4)
    other = engine_of(config, params, make_mesh(pools), tokenizer, **words)
    U, Z, J, W = other._sampling.pages(other._mesh, other._C)
    assert pools == U
    assert J < Z < other._C * J
    runs, waited = [], np.zeros(pools, int)
    deal = _Run._deal

    def watched(run: _Run) -> None:
        runs.append(run)
        deal(run)
        for u in range(pools):
            dealt = run._table[u][run._table[u] != NOWHERE].tolist()
            assert sorted(dealt + run._free_pages[u]) == list(range(Z))
            room = W * (run._table[u] != NOWHERE).sum(-1)
            busy = run._sample[u] >= 0
            has = (room > run._length[u])[busy]
            waited[u] += (~has).sum()
            assert not busy.any() or has[run._started[u][busy].argmin()]

    monkeypatch.setattr(_Run, "_deal", watched)
    collect(other, requests_of(prompts, range(10 * pools)))
    assert waited.all()
    assert all(sorted(free) == list(range(Z)) for free in runs[-1]._free_pages)


@pytest.mark.parametrize("attention", ["auto", "jax"])
def test_no_slot_idles_while_a_prompt_may_have_it(
    attention: str, config, params, mesh, tokenizer, prompts, common, monkeypatch
) -> None:
    """One problem has nearly all samples; each of 4 prompts has 2 slots in the mean."""
    config = config.with_(attention=attention)
    engine = engine_of(config, params, mesh, tokenizer, end=common, slots=2)
    most = 8 if attention == "auto" and cpu_kernels.available() else 4
    deal = _Run._deal
    crowds = []

    def watched(run: _Run) -> None:
        deal(run)
        crowds.append(run._in_use.max())
        waits_UP = run._waiting() > 0
        assert (run._sample >= 0).all() or (run._in_use[waits_UP] == most).all()

    monkeypatch.setattr(_Run, "_deal", watched)
    first, *others = prompts
    requests = [Request(name, prompts[name], range(2)) for name in others]
    collect(engine, [Request(first, prompts[first], range(60)), *requests])
    assert 2 < max(crowds) <= most


@pytest.mark.parametrize("attention", ["auto", "jax"])
def test_a_completion_does_not_depend_on_order_company_or_resumption(
    attention: str, config, params, mesh, tokenizer, prompts, common
) -> None:
    """Samples 5..9 alone, in another order and beside others, are those of 0..9."""
    config = config.with_(attention=attention)
    engine = engine_of(config, params, mesh, tokenizer, end=common)
    reference = collect(engine, requests_of(prompts, range(10)))
    requests = [
        Request("p3", prompts["p3"], range(5, 10)),
        Request("p1", prompts["p1"], range(7, 9)),
        Request("other", prompts["p0"], range(3)),
        Request("p0", prompts["p0"], range(9, 10)),
    ]
    found = collect(engine, requests)
    assert {key for key in found if key[0] == "p3"} == {("p3", m) for m in range(5, 10)}
    assert len(found) == 11
    for key, completion in found.items():
        if key[0] != "other":  # bit for bit: the shapes are the same
            assert completion == reference[key]
    # Also without the longest prompt, if only its room is kept.
    short = {name: prompts[name] for name in ("p0", "p1")}
    found_short = collect(engine, requests_of(short, range(10)), len(prompts["p3"]))
    assert found_short == {key: c for key, c in reference.items() if key[0] in short}
    # The same prompt under another name is another problem, with draws of its own.
    assert [found["other", m].tokens for m in range(3)] != [
        reference["p0", m].tokens for m in range(3)
    ]


def test_a_shared_prefix_is_a_repeated_prefix(engine: Engine, prompts, reference) -> None:
    """Slots that share a prompt write what as many prompts of one completion each write."""
    requests = [
        Request(name, prompts[name], range(m, m + 1)) for name in ("p1", "p3") for m in range(6)
    ]
    found = collect(engine, requests)
    assert tokens_of(found) == {key: reference[key].tokens for key in found}
    assert len(found) == 12


def test_another_seed_draws_other_completions(
    config, params, mesh, tokenizer, prompts, common, reference
) -> None:
    other = engine_of(config, params, mesh, tokenizer, end=common, seed=1)
    found = collect(other, requests_of(prompts, range(10)))
    assert np.mean([found[key].tokens != c.tokens for key, c in reference.items()]) > 0.8


# What is drawn


def expected_probabilities(
    logits_V: np.ndarray, temperature: float, top_k: int, top_p: float
) -> np.ndarray:
    """The distribution drawn from, in numpy: temperature, then the top k, then the nucleus."""
    prob = np.exp(log_softmax(logits_V / temperature))
    order = np.argsort(-prob)
    if top_k:
        prob[order[top_k:]] = 0
        prob /= prob.sum()
    if top_p < 1:
        count = int(np.searchsorted(np.cumsum(prob[order]), top_p)) + 1
        prob[order[count:]] = 0
        prob /= prob.sum()
    return prob


def chi_square(counts_V: np.ndarray, prob_V: np.ndarray) -> float:
    """The p-value of counts under a distribution, rare tokens pooled; 0 for an impossible token."""
    if counts_V[prob_V == 0].sum():
        return 0.0
    expected_V = prob_V * counts_V.sum()
    pooled_V = expected_V < 5
    while 0 < expected_V[pooled_V].sum() < 5:
        pooled_V |= expected_V <= expected_V[~pooled_V].min()
    observed = np.append(counts_V[~pooled_V], counts_V[pooled_V].sum())
    expected = np.append(expected_V[~pooled_V], expected_V[pooled_V].sum())
    used = expected > 0
    assert used.sum() > 1, "nothing to compare"
    return stats.chisquare(observed[used], expected[used]).pvalue


def test_completions_follow_the_models_distribution(config, params, mesh, tokenizer, prompts):
    """4,000 first tokens, and the second tokens after the two commonest first ones."""
    prompt, V = prompts["p1"], config.vocab_size
    engine = engine_of(
        config, params, mesh, tokenizer, prompts=1, slots=500, max_tokens=2, patience=500, end=-1
    )
    found = collect(engine, [Request("p1", prompt, range(4000))])
    first, second = np.array([c.tokens for c in found.values()]).T
    assert len(first) == 4000
    logits = naive_logits(config, params, prompt)[-1]
    count_V = np.bincount(first, minlength=V)
    assert chi_square(count_V, expected_probabilities(logits, 0.7, 0, 1.0)) > 1e-3
    for token in np.argsort(-count_V)[:2].tolist():
        logits_after = naive_logits(config, params, [*prompt, token])[-1]
        count_after_V = np.bincount(second[first == token], minlength=V)
        assert count_after_V.sum() > 100
        prob = expected_probabilities(logits_after, 0.7, 0, 1.0)
        assert chi_square(count_after_V, prob) > 1e-3
    # Sharp enough to see a slightly wrong temperature, and the step before.
    assert chi_square(count_V, expected_probabilities(logits, 0.8, 0, 1.0)) < 1e-3
    assert chi_square(count_after_V, expected_probabilities(logits, 0.7, 0, 1.0)) < 1e-3


@pytest.mark.parametrize("attention", ["auto", "jax"])
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(0.7, 0, 1.0), (0.7, 6, 1.0), (0.7, 0, 0.8), (1.0, 12, 0.9), (0.7, 12, 0.999), (100, 0, 1.0)],
)
def test_top_k_and_top_p_keep_the_allowed_tokens_and_their_odds(
    temperature: float, top_k: int, top_p: float, attention: str, config, params, prompts
) -> None:
    """5,000 draws of other samples, for two problems at two positions each."""
    logits_V = naive_logits(config, params, prompts["p2"])[-1].astype(np.float32)
    sampling = Sampling(temperature, top_k, top_p, 1, end=-1, seed=0, chunk=1, patience=1)
    prob_V = expected_probabilities(np.float64(logits_V), temperature, top_k, top_p)
    prob_V[config.text_size :] = 0  # never drawn, at any temperature
    allowed = int((prob_V > 0).sum())
    assert allowed == (top_k if top_k and top_p == 1 else allowed)
    sample_UC = np.broadcast_to(np.arange(5_000), (2, 5_000))
    problem_UC = np.array([[7], [8]]) + 0 * sample_UC
    logits_UCV = jnp.broadcast_to(logits_V, (2, 5_000, len(logits_V)))

    def tokens(at: int) -> Any:
        who = problem_UC, sample_UC, np.full((2, 5_000), at)
        return decode.draw(logits_UCV, config.with_(attention=attention), sampling, *who)[0]

    drawn = np.array([tokens(0), tokens(3)]).reshape(4, -1)
    for row in drawn:
        count_V = np.bincount(row, minlength=config.vocab_size)
        assert chi_square(count_V, prob_V / prob_V.sum()) > 1e-3
    for i, j in itertools.combinations(range(4), 2):  # independent of each other
        same = np.mean(drawn[i] == drawn[j])
        chance = (prob_V**2).sum()
        assert abs(same - chance) < 5 * np.sqrt(chance * (1 - chance) / 5_000)


@settings(max_examples=60)
@given(data=st.data())
def test_inverse_cdf_is_exactly_searchsorted(data: st.DataObject) -> None:
    """On small integer weights, whose sums float32 holds exactly, many of them zero."""
    blocks = data.draw(st.integers(1, 5))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    weight_BV = rng.integers(0, 9, (32, blocks * decode.BLOCK)) * (
        rng.random((32, blocks * decode.BLOCK)) < data.draw(st.sampled_from([0.02, 0.3, 1.0]))
    )
    if blocks > 1:
        weight_BV[:16, decode.BLOCK : 2 * decode.BLOCK] = 0  # a block of nothing
    weight_BV[:, data.draw(st.integers(0, blocks * decode.BLOCK - 1))] += 1
    uniform_B = rng.integers(0, 1024, 32) / 1024
    uniform_B[:4] = 0, 1 / 1024, 1023 / 1024, 0.5
    got = decode.inverse_cdf(jnp.float32(weight_BV), jnp.float32(uniform_B))
    total = np.cumsum(weight_BV, -1)
    expected = [
        np.searchsorted(t, u * t[-1], side="right") for t, u in zip(total, uniform_B, strict=True)
    ]
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("tensor", [2, 4, 8])
def test_inverse_cdf_draws_the_same_from_a_vocabulary_in_parts(tensor: int, make_mesh) -> None:
    """Parts that are no whole number of the largest blocks; float32 sums the weights exactly."""
    rng = np.random.default_rng(0)
    weight_BV = rng.integers(0, 9, (64, 5 * decode.BLOCK)) * (rng.random((64, 320)) < 0.1)
    uniform_B = jnp.float32(rng.integers(0, 1024, 64) / 1024)
    expected = decode.inverse_cdf(jnp.float32(weight_BV), uniform_B)
    mesh = make_mesh(tensor=tensor)
    with jax.set_mesh(mesh):
        parts = jax.device_put(np.float32(weight_BV), sharding.named(mesh, "BV"))
        got = jax.jit(decode.inverse_cdf)(parts, uniform_B)
    np.testing.assert_array_equal(got, expected)


def test_inverse_cdf_on_real_weights_errs_by_rounding_only() -> None:
    rng = np.random.default_rng(0)
    weight_BV = np.exp(rng.normal(0, 4, (4000, 320))) * (rng.random((4000, 320)) < 0.5)
    weight_BV = weight_BV.astype(np.float32)
    uniform_B = rng.random(4000, np.float32)
    uniform_B[:1000] = np.nextafter(np.float32(1), np.float32(0))  # the largest there is
    uniform_B[1000:2000] = 0
    got = np.asarray(decode.inverse_cdf(jnp.asarray(weight_BV), jnp.asarray(uniform_B)))
    total = np.cumsum(weight_BV, -1, dtype=np.float64)
    low, high = (total - weight_BV)[np.arange(4000), got], total[np.arange(4000), got]
    target, slack = uniform_B * total[:, -1], 1e-5 * total[:, -1]
    assert (weight_BV[np.arange(4000), got] > 0).all()
    assert ((low <= target + slack) & (target <= high + slack)).all()


# What is told of a completion


def test_logprob_is_the_models_at_temperature_one(config, params, prompts, reference) -> None:
    for (name, _), completion in reference.items():
        expected = naive_logprobs(config, params, prompts[name], completion.tokens).sum()
        assert completion.logprob == pytest.approx(expected, abs=1e-4)


def test_a_completion_ends_with_the_end_or_at_max_tokens(reference, common: int, tokenizer) -> None:
    for completion in reference.values():
        ended = completion.tokens[-1] == common
        assert completion.finished == ended
        assert common not in completion.tokens[:-1]
        assert len(completion.tokens) <= MAX_TOKENS
        assert ended or len(completion.tokens) == MAX_TOKENS
        assert completion.text == tokenizer.decode(completion.tokens)
        assert len(completion.forced) == len(completion.tokens)
    assert {c.finished for c in reference.values()} == {True, False}


def test_useful_is_the_share_of_slot_steps_that_wrote(
    config, params, mesh, tokenizer, prompts
) -> None:
    """Over all that the engine has run."""
    engine = engine_of(config, params, mesh, tokenizer, prompts=2, slots=4, end=-1)
    assert engine.useful == 0
    collect(engine, [Request("p0", prompts["p0"], range(4))])
    assert engine.useful == 0.5
    collect(engine, [Request(p, prompts["p0"], range(4)) for p in ("p0", "p1")])
    assert engine.useful == 0.75


def test_nothing_to_do_and_too_much(engine: Engine, config, params, prompts) -> None:
    assert collect(engine, []) == {}
    assert collect(engine, [Request("p0", prompts["p0"], range(0))]) == {}
    room = config.max_length - MAX_TOKENS
    ids = (prompts["p3"] * 10)[: room + 1]
    with pytest.raises(ValueError, match=rf"lower max_tokens to {MAX_TOKENS - 1}$") as error:
        collect(engine, [Request("p1", prompts["p1"], range(1)), Request("p0", ids, range(1))])
    assert f"a prompt of {room + 1} tokens and max_tokens={MAX_TOKENS} " in str(error.value)
    assert f"max_length={config.max_length}" in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="the prompt alone fills it"):
        collect(engine, [Request("p0", ids[:1] * config.max_length, range(1))])
    fits = collect(engine, [Request("p0", ids[:room], range(3))])
    for completion in fits.values():
        expected = naive_logprobs(config, params, ids[:room], completion.tokens)
        assert completion.logprob == pytest.approx(expected.sum(), abs=1e-4)


# The calculator in the loop

# What the model writes, how much of it is kept, and what the calculator puts there.
ANSWERED: dict[str, tuple[list[str], int, list[str]]] = {
    "plain": (["<<", *"48/2", "="], 6, [*"24", ">>"]),
    "text before": (["4", " =", " <<", *"4+4", "="], 7, ["8", ">>"]),
    "negative, merged by the model": (["<<", *"3-8", "=-"], 5, ["5", ">>"]),
    "positive, merged by the model": (["<<", *"8-3", "=-"], 4, ["=", "5", ">>"]),
    "negative, not merged by the model": (["<<", *"3-8", "="], 4, ["=-", "5", ">>"]),
    "parenthesis merged": (["<<", *"(8-3", ")="], 6, ["5", ">>"]),
    "commas": (["<<", *"1,200/2", "="], 9, [*"600", ">>"]),
    "style of the text": ([*"16.00", "<<", *"8*2", "="], 10, [*"16.00", ">>"]),
    "a decimal": (["<<", *"1/8", "="], 5, [*"0.125", ">>"]),
    "after a refused one": (["<<", *"4/0", "=", ">>", "<<", *"4/2", "="], 11, ["2", ">>"]),
}
REFUSED: dict[str, list[str]] = {
    "division by zero": ["<<", *"4/0", "="],
    "no expression": ["<<", *"cat", "="],
    "nothing": ["<<", "="],
    "closed before": ["<<", "4", ">>", "="],
    "not opened": [*"4*2", "="],
    "one bracket": ["<", *"4*2", "="],
    "more digits than are forced": ["<<", *"9**99", "="],
    "a second equals sign": ["<<", *"cat", "=", *"4/2", "="],
}
ROOM = 20  # tokens of a completion
# Cut off after ROOM tokens: 11 leaves all three forced tokens, 14 none, not even time to ask.
CUT = {f"cut {i}": [*"." * i, "<<", *"48/2", "="] for i in (11, 12, 13, 14)}
SCRIPTS = {n: written for n, (written, _, _) in ANSWERED.items()} | REFUSED | CUT
FREE, TOLD = 64, 256  # dimensions of the residual stream: of the random model, of the script


@dataclasses.dataclass(frozen=True)
class Scripted:
    """A model that writes the scripts greedily, each after a prompt of its own length.

    A position's embedding tells, in dimensions nothing else touches, which token comes next. All
    other positions, those of forced tokens and those behind a script, keep the logits of a random
    transformer, which depend on all that was written: a wrong key or value shows in them.
    """

    config: ModelConfig
    params: Params
    prompts: dict[str, list[int]]
    ids: dict[str, list[int]]


def pieces_to_ids(tokenizer: Tokenizer, pieces: Sequence[str]) -> list[int]:
    """Each piece must be one token."""
    ids = [tokenizer.encode(piece) for piece in pieces]
    assert [len(i) for i in ids] == [1] * len(ids), pieces
    return [i[0] for i in ids]


@pytest.fixture(scope="module")
def scripted(tokenizer: Tokenizer) -> Scripted:
    config = tiny(tokenizer, "gpt3", width=FREE + TOLD, norm="rms", biases=False, max_length=512)
    params = sharp_params(config, seed=2)
    tree = params["params"]
    layer = tree["layers"]
    for leaf in (
        tree["embed_VD"], tree["unembed_VD"], tree["position_TD"],
        layer["attention"]["wo_NHD"], layer["mlp"]["w_out_FD"],
    ):  # fmt: skip
        leaf[..., FREE:] = 0
    rng, prompts, ids, told = np.random.default_rng(3), {}, {}, itertools.count(FREE)
    for number, (name, pieces) in enumerate(SCRIPTS.items()):
        prompts[name] = rng.integers(1, tokenizer.size, 1 + ROOM * number).tolist()
        ids[name] = pieces_to_ids(tokenizer, pieces)
        for position, token in enumerate(ids[name], len(prompts[name]) - 1):
            dimension = next(told)
            tree["position_TD"][position, dimension] = 100
            tree["unembed_VD"][token, dimension] = 12
    return Scripted(config, params, prompts, ids)


@pytest.fixture(scope="module")
def written(scripted: Scripted, mesh: Mesh, tokenizer: Tokenizer) -> dict[bool, Completions]:
    """All scripts at temperature 0, three samples each, with and without the calculator."""
    found = {}
    for forces in (True, False):
        engine = engine_of(
            scripted.config, scripted.params, mesh, tokenizer,
            prompts=5, slots=2, forces=forces, temperature=0.0, max_tokens=ROOM,
        )  # fmt: skip
        found[forces] = collect(engine, requests_of(scripted.prompts, range(3)))
        assert len(found[forces]) == 3 * len(SCRIPTS)
    return found


@pytest.mark.parametrize("name", ANSWERED)
def test_the_result_is_forced(name: str, scripted: Scripted, written, tokenizer) -> None:
    pieces, kept, results = ANSWERED[name]
    ids = pieces_to_ids(tokenizer, [*pieces[:kept], *results])
    completion = written[True][name, 0]
    assert completion.tokens[: len(ids)] == ids, completion.text
    assert completion.text.startswith("".join([*pieces[:kept], *results]))
    assert completion.forced[: len(ids)] == [i >= kept for i in range(len(ids))]
    # Left alone, the model goes on otherwise: the result was the calculator's.
    alone = written[False][name, 0]
    assert alone.tokens[: len(pieces)] == scripted.ids[name]
    assert alone.tokens[len(pieces) :] != completion.tokens[len(pieces) :]
    assert not any(alone.forced)


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_expression_leaves_sampling_as_it_was(name: str, scripted, written) -> None:
    completion = written[True][name, 0]
    assert completion.tokens[: len(scripted.ids[name])] == scripted.ids[name]
    assert not any(completion.forced)
    assert completion == written[False][name, 0]


def test_a_refused_expression_does_not_change_what_is_drawn(scripted, mesh, tokenizer) -> None:
    requests = requests_of({name: scripted.prompts[name] for name in REFUSED}, range(4))
    asked, alone = (
        collect(
            engine_of(
                scripted.config, scripted.params, mesh, tokenizer,
                slots=2, forces=forces, max_tokens=ROOM,
            ),
            requests,
        )
        for forces in (True, False)
    )  # fmt: skip
    assert asked == alone
    assert len({tuple(c.tokens) for c in asked.values()}) > len(asked) / 2
    for (name, _), completion in asked.items():
        assert completion.tokens[: len(scripted.ids[name])] == scripted.ids[name]


def test_every_token_is_that_of_naive_decoding(scripted, written, tokenizer) -> None:
    """Also behind a rewritten token, at the limit of tokens, and in a slot used before."""
    config, params = scripted.config, scripted.params

    def choose(final: list[int], logits: np.ndarray, at: int, before: list[int]) -> int:
        assert before == final[: len(before)]  # or one forward of the final text says nothing
        return int(logits[at + len(before)].argmax())

    for name, prompt in scripted.prompts.items():
        final = written[True][name, 0].tokens
        logits = naive_logits(config, params, [*prompt, *final])
        follows = functools.partial(choose, final, logits, len(prompt) - 1)
        tokens, forced = naive_decoding(follows, ROOM, tokenizer.end, tokenizer)
        logprob = naive_logprobs(config, params, prompt, tokens)[~np.array(forced)].sum()
        for sample in range(3):
            completion = written[True][name, sample]
            assert completion.tokens == tokens, name
            assert completion.forced == forced, name
            assert completion.logprob == pytest.approx(logprob, abs=1e-4), name
            assert completion.text == tokenizer.decode(tokens)
    assert [sum(written[True][name, 0].forced) for name in CUT] == [3, 2, 1, 0]


def test_after_a_rewritten_token_its_own_keys_are_seen(scripted, written) -> None:
    """The check above sees the difference: the model's own `=-` would give other numbers."""
    name = "positive, merged by the model"
    completion, at = written[True][name, 0], 4
    stale = [*completion.tokens]
    stale[at] = scripted.ids[name][at]
    assert stale != completion.tokens
    free = ~np.array(completion.forced)
    logprob = naive_logprobs(scripted.config, scripted.params, scripted.prompts[name], stale)[free]
    assert abs(logprob.sum() - completion.logprob) > 0.1


# Meshes


def on_mesh(temperature, mesh, config, params, tokenizer, prompts, common) -> Completions:
    engine = engine_of(
        config, params, mesh, tokenizer,
        prompts=8, slots=2, forces=True, temperature=temperature, end=common,
    )  # fmt: skip
    return collect(engine, requests_of(prompts, range(4)))


@pytest.fixture(scope="module")
def on_one_device(mesh, config, params, tokenizer, prompts, common) -> dict[float, Completions]:
    return {
        temperature: on_mesh(temperature, mesh, config, params, tokenizer, prompts, common)
        for temperature in (0.0, 0.7)
    }


def compiled(caplog: pytest.LogCaptureFixture) -> Counter[str]:
    """How often each of the sampler's programs was compiled, since it was asked last."""
    told = " ".join(record.getMessage() for record in caplog.records)
    caplog.clear()
    return Counter(re.findall(r"Compiling jit\((prefill|advance)\)", told))


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)], ids=str)
def test_programs_are_compiled_once_and_before_there_are_slots(
    sizes: tuple[int, int, int], make_mesh, config, params, tokenizer, prompts,
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    engine = engine_of(config, params, make_mesh(*sizes), tokenizer, max_tokens=MAX_TOKENS - 1)
    made = []

    def idle_slots(*arguments: Any) -> decode.Slots:
        made.append(compiled(caplog))
        return idle(*arguments)

    idle = decode.idle_slots
    monkeypatch.setattr(decode, "idle_slots", idle_slots)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        for samples in (range(4), range(4, 8)):
            collect(engine, requests_of(prompts, samples))
    assert made == [{"prefill": 1, "advance": 1}, {}]
    assert not compiled(caplog)


def test_without_requests_nothing_is_compiled(mesh, config, params, tokenizer) -> None:
    engine = engine_of(config, params, mesh, tokenizer)
    engine._compile = pytest.fail
    assert not collect(engine, [], longest=40)


@pytest.mark.parametrize("attention", ["auto", "jax"])
def test_what_an_earlier_run_left_is_not_seen(
    attention: str, config: ModelConfig, params: Params, mesh: Mesh, tokenizer: Tokenizer,
    prompts: dict[str, list[int]], common: int,
) -> None:  # fmt: skip
    """The second run takes the caches of the first, of other prompts, and some slots' ends."""
    config = config.with_(attention=attention)
    requests = requests_of(prompts, range(9))
    first, second = requests[::2], requests[1::2]
    longest = max(map(len, prompts.values()))
    engine = engine_of(config, params, mesh, tokenizer, end=common)
    collect(engine, first, longest)
    taken = engine._kept[1]
    assert taken
    again = collect(engine, second, longest)
    assert all(x.is_deleted() for x in jax.tree.leaves(taken))  # donated, not beside new ones
    fresh = collect(engine_of(config, params, mesh, tokenizer, end=common), second, longest)
    assert {k: (c.tokens, c.logprob) for k, c in again.items()} == {
        k: (c.tokens, c.logprob) for k, c in fresh.items()
    }


def test_caches_that_do_not_fit_are_freed_before_others_are_made(
    mesh, config, params, tokenizer, prompts
) -> None:
    engine = engine_of(config, params, mesh, tokenizer)
    collect(engine, requests_of(prompts, range(2)))
    left = [weakref.ref(x) for x in jax.tree.leaves(engine._kept) if isinstance(x, jax.Array)]
    assert left
    compile_ = engine._compile

    def checked(*arguments: Any) -> None:
        assert not any(ref() is not None for ref in left)
        compile_(*arguments)

    engine._compile = checked
    collect(engine, requests_of(prompts, range(2)), longest=100)


def test_slots_and_their_keys_lie_on_all_data_axes(config, make_mesh) -> None:
    """Before and after a prefill and a chunk of steps."""
    mesh = make_mesh(2, 2, 2)
    model = config.with_(scan_layers=False)
    sampling = Sampling(0.7, 0, 1.0, MAX_TOKENS, end=0, seed=0, chunk=8, patience=2)
    pages = sampling.pages(mesh, 4)
    with jax.set_mesh(mesh):
        slots = decode.idle_slots(decode.slot_shapes(model, mesh, 2, 4, 16, pages))
        initial = transformer.init(config, jax.random.key(0), mesh)
        params = transformer.unstack(config, initial, cast="all")[1]
        prefill, advance = engine_module.programs(model, mesh, sampling)
        tokens = sharding.to_global(mesh, "BT", np.ones((4, 16), np.int32))
        length, row = (sharding.to_global(mesh, "B", np.full(4, n, np.int32)) for n in (9, 1))
        slots = prefill(params, slots, tokens, length, row)
        rows = decode.Orders.rows(4, 4, pages.J)
        orders = sharding.to_global(mesh, ("U", "C", None), rows)
        grammar = jnp.zeros((model.vocab_size, engine_module.GRAMMAR), jnp.int32)
        slots, _ = advance(params, slots, orders, grammar)
    for cache in slots.caches:
        for x in cache:  # U over data and fsdp, K over tensor
            assert x.sharding.shard_shape(x.shape)[0] == x.shape[0] // 4
            assert math.prod(x.sharding.shard_shape(x.shape)) == x.size // 8
    assert slots.status_UC.sharding.shard_shape((4, 4)) == (1, 4)
    np.testing.assert_array_equal(slots.prompt_length_UP, [[0, 8]] * 4)


def test_asked_to_end_it_stops_between_chunks(mesh, config, params, tokenizer, prompts) -> None:
    engine = engine_of(config, params, mesh, tokenizer, prompts=1, slots=1)
    termination = processes.Termination()
    collect(engine, requests_of(prompts, range(1)))
    found = engine.run(requests_of(prompts, range(4)), termination=termination)
    next(found)
    termination.noted = True
    with pytest.raises(processes.Stopped, match="run again to go on"):
        list(found)
    assert engine._kept == (0, None)  # those it took are donated


def test_a_run_that_is_left_leaves_no_caches(mesh, config, params, tokenizer, prompts) -> None:
    engine = engine_of(config, params, mesh, tokenizer)
    requests = requests_of(prompts, range(4))
    whole = collect(engine, requests)
    found = engine.run(requests)
    next(found)
    found.close()
    assert engine._kept == (0, None)
    assert tokens_of(collect(engine, requests)) == tokens_of(whole)


@pytest.mark.parametrize(
    ("sizes", "attention"),
    [
        *[((8, 1, 1), "auto"), ((2, 2, 2), "auto"), ((1, 8, 1), "auto"), ((1, 1, 2), "auto")],
        *[((2, 1, 1), "jax"), ((2, 2, 2), "jax")],
    ],
    ids=str,
)
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_mesh_samples_the_same(
    temperature: float,
    sizes: tuple[int, int, int],
    attention: str,
    on_one_device,
    make_mesh,
    config,
    params,
    tokenizer,
    prompts,
    common,
) -> None:
    one = on_one_device[temperature]
    config = config.with_(attention=attention)
    many = on_mesh(temperature, make_mesh(*sizes), config, params, tokenizer, prompts, common)
    assert tokens_of(one) == tokens_of(many)
    assert len(one) == 4 * len(prompts)
    for key, completion in one.items():
        assert completion.logprob == pytest.approx(many[key].logprob, abs=1e-4)
