"""Selection rules against enumeration of all subsets, statistics against their definitions."""

import dataclasses
import itertools
import json
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from gsm_verifier import rank, statistics
from gsm_verifier.rank import Ballot, Candidates, Choice

SAMPLES = 6
TOLERANCE = {"rtol": 0, "atol": 1e-12}
# Multiples of 1/4 tie often, leave [0, 1], and add without rounding.
QUARTERS = st.integers(-2, 6).map(lambda i: i / 4)
SAMPLE = st.tuples(st.sampled_from([None, "1", "2", "2.5"]), QUARTERS, QUARTERS, st.integers(1, 4))
GOLD = st.sampled_from(["1", "2.5"])


def gather(answers: Sequence, correct: Sequence, **columns: Sequence) -> Candidates:
    """Candidates of lists that have a row for each problem."""
    names = ["answer", "correct", *columns]
    rows = zip(answers, correct, *columns.values(), strict=True)
    return Candidates.gather(Choice(**dict(zip(names, row, strict=True))) for row in rows)


@st.composite
def candidates_strategy(draw: st.DrawFn) -> Candidates:
    """Two ragged problems, the first with at least one sample, a gold answer each."""
    problems = [
        (draw(GOLD), draw(st.lists(SAMPLE, min_size=fewest, max_size=SAMPLES))) for fewest in (1, 0)
    ]
    columns = [[list(c) for c in zip(*rows, strict=True)] or [[]] * 4 for _, rows in problems]
    answers, score, logprob, length = zip(*columns, strict=True)
    correct = [[a == gold for a in row] for (gold, _), row in zip(problems, answers, strict=True)]
    return gather(answers, correct, score=score, logprob=logprob, length=length)


def subsets_of(candidates: Candidates, p: int, n: int) -> list[tuple[int, ...]]:
    count = int(candidates.count_P[p])
    return list(itertools.combinations(range(count), min(n, count)))


def enumerate_rule(candidates: Candidates, n: int, rule) -> np.ndarray:
    """Mean over all n-subsets of `rule(problem, subset)`, a probability of being correct."""
    return np.array(
        [
            np.mean([rule(p, subset) if subset else 0.0 for subset in subsets_of(candidates, p, n)])
            for p in range(len(candidates.count_P))
        ]
    )


def elect(candidates: Candidates, p: int, subset: tuple[int, ...], ballot: Ballot) -> bool:
    """The voting rule, word by word."""
    answer, score = candidates.answer_PM[p], candidates.score_PM[p]
    ranked = sorted(subset, key=lambda m: (-score[m] if ballot.by_score else 0, m))[: ballot.k]
    total: dict[int, float] = {}
    for m in ranked:
        vote = min(max(score[m], 0), 1) if ballot.weighted else 1
        total[answer[m]] = total.get(answer[m], 0) + vote
    valid = [m for m in ranked if answer[m] != rank.NO_ANSWER] or ranked
    best = max(total[answer[m]] for m in valid)
    return bool(candidates.correct_PM[p, next(m for m in valid if total[answer[m]] == best)])


def random_candidates(problems: int = 40, samples: int = 20, seed: int = 0) -> Candidates:
    """An easy-to-hard spread of problems, an informative verifier, no ties."""
    rng = np.random.default_rng(seed)
    shape = (problems, samples)
    answer_PM = np.where(
        rng.random(shape) < rng.random((problems, 1)), 0, rng.integers(1, 5, shape)
    )
    answer_PM[rng.random(shape) < 0.1] = rank.NO_ANSWER
    return Candidates(
        answer_PM=answer_PM.astype(np.int32),
        correct_PM=answer_PM == 0,
        integer_PM=(answer_PM == 0) | (answer_PM == 1),
        count_P=np.full(problems, samples),
        score_PM=rng.normal(0.4, 0.3, shape) + 0.3 * (answer_PM == 0),
        logprob_PM=rng.normal(-50, 10, shape),
        length_PM=rng.permuted(np.tile(np.arange(samples), (problems, 1)), axis=-1),
    )


# Closed forms


@settings(max_examples=60, deadline=None)
@given(candidates_strategy(), st.integers(1, SAMPLES))
def test_closed_forms_equal_enumeration(candidates: Candidates, n: int) -> None:
    n = min(n, candidates.answer_PM.shape[1])
    correct_PM = candidates.correct_PM
    for key_PM in (candidates.score_PM, candidates.logprob_PM, -candidates.length_PM):

        def pick(p, subset, key_PM=key_PM):
            return correct_PM[p, max(subset, key=lambda m: (key_PM[p, m], -m))]

        expected_P = enumerate_rule(candidates, n, pick)
        np.testing.assert_allclose(rank.best_of(candidates, key_PM, n), expected_P, **TOLERANCE)

    def any_integer(p, subset):
        kept = [m for m in subset if candidates.integer_PM[p, m]] or list(subset)
        return correct_PM[p, kept].mean()

    for value_P, rule in [
        (rank.coverage(candidates, n), lambda p, s: correct_PM[p, list(s)].any()),
        (rank.random_choice(candidates), lambda p, s: correct_PM[p, list(s)].mean()),
        (rank.integer_only(candidates, n), any_integer),
    ]:
        np.testing.assert_allclose(value_P, enumerate_rule(candidates, n, rule), **TOLERANCE)


@pytest.mark.parametrize("n", [1, 2, 25, 400, 3199, 3200])
def test_coverage_is_the_unbiased_estimator_at_the_paper_s_largest_sample_count(n: int) -> None:
    samples, correct = 3200, np.array([0, 1, 7, 1600, 3200])
    correct_PM = np.arange(samples) < correct[:, None]
    candidates = Candidates(
        np.where(correct_PM, 0, 1), correct_PM, correct_PM, np.full(len(correct), samples)
    )
    exact = [1 - math.comb(samples - int(c), n) / math.comb(samples, n) for c in correct]
    np.testing.assert_allclose(rank.coverage(candidates, n), exact, rtol=1e-10, atol=1e-12)


def test_coverage_grows_with_n_and_bounds_every_rule() -> None:
    candidates = random_candidates()
    coverage_NP = np.stack([rank.coverage(candidates, n) for n in range(1, 21)])
    assert (np.diff(coverage_NP, axis=0) >= -1e-12).all()
    np.testing.assert_array_equal(coverage_NP[-1], candidates.correct_PM.any(-1))
    best_NP = np.stack([rank.best_of(candidates, candidates.score_PM, n) for n in range(1, 21)])
    assert (best_NP <= coverage_NP + 1e-12).all()


def test_ties_go_to_the_lowest_index_in_long_rows_too() -> None:
    candidates = random_candidates(samples=300)  # short rows are sorted stably by any algorithm
    parity_PM = np.tile(np.arange(300) % 2, (40, 1))
    expected_M = [*range(1, 300, 2), *range(0, 300, 2)]
    assert (candidates.order_PM(parity_PM) == expected_M).all()


def test_how_many_problems_are_ranked_at_a_time_does_not_matter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    candidates = random_candidates()
    at_once_P = rank.best_of(candidates, candidates.score_PM, 7)
    monkeypatch.setattr(statistics, "CHUNK_BYTES", 8 * 3 * 20)  # three problems
    np.testing.assert_array_equal(rank.best_of(candidates, candidates.score_PM, 7), at_once_P)


def test_best_of_is_unbiased_whatever_the_number_of_samples() -> None:
    """The value at n of M samples is the mean of the values at n of their (M-1)-subsets."""
    candidates = random_candidates(problems=8, samples=7)
    kept = [np.delete(np.arange(7), m) for m in range(7)]
    given = {name: v for name, v in vars(candidates).items() if name.endswith("PM")}
    for n in (1, 3, 6):
        fewer = []
        for columns in kept:
            part = {name: v[:, columns] for name, v in given.items() if v is not None}
            part["answer_PM"] = np.minimum(part["answer_PM"], 5)
            smaller = dataclasses.replace(candidates, count_P=np.full(8, 6), **part)
            fewer.append(rank.best_of(smaller, smaller.score_PM, n))
        whole_P = rank.best_of(candidates, candidates.score_PM, n)
        np.testing.assert_allclose(whole_P, np.mean(fewer, axis=0), **TOLERANCE)


# Votes


@settings(max_examples=80, deadline=None)
@given(candidates_strategy(), st.integers(1, SAMPLES), st.booleans(), st.booleans())
def test_vote_in_every_subset_follows_the_rule(
    candidates: Candidates, k: int, by_score: bool, weighted: bool
) -> None:
    """The counting core on all subsets of each problem, ties and missing answers included."""
    key_PM = candidates.score_PM if by_score else np.zeros_like(candidates.score_PM)
    order_PM = candidates.order_PM(key_PM)
    weight_PM = np.clip(candidates.score_PM, 0, 1) if weighted else None
    for n in range(1, candidates.answer_PM.shape[1] + 1):
        ballot = Ballot(n, min(k, n), by_score, weighted)
        expected_P = enumerate_rule(
            candidates, n, lambda p, s, ballot=ballot: elect(candidates, p, s, ballot)
        )
        for p in np.flatnonzero(candidates.count_P):
            row, order_M = slice(p, p + 1), order_PM[p]
            rank_SN = rank._ranks(order_M, np.array(subsets_of(candidates, p, n)))
            value_P = rank._hold(
                candidates.answer_PM[p, order_M],
                candidates.correct_PM[p, order_M],
                None if weight_PM is None else weight_PM[p, order_M],
                rank_SN[:, : ballot.k],
            )
            np.testing.assert_allclose(value_P, expected_P[row], **TOLERANCE)
            if ballot.k == 1:
                value_P = rank.best_of(candidates, key_PM, n)[row]
                np.testing.assert_allclose(value_P, expected_P[row], **TOLERANCE)


@settings(max_examples=40, deadline=None)
@given(candidates_strategy())
def test_votes_of_all_samples_and_of_one_voter_are_exact(candidates: Candidates) -> None:
    samples = candidates.answer_PM.shape[1]
    ballots = [Ballot(samples), Ballot(samples, by_score=True, weighted=True)]
    ballots += [Ballot(samples, k, by_score=True) for k in range(1, samples + 1)]
    ballots += [Ballot(n, 1, by_score=True) for n in range(1, samples + 1)] + [Ballot(1)]
    for ballot, value_P in zip(ballots, rank.vote(candidates, ballots, subsets=3), strict=True):
        expected_P = enumerate_rule(
            candidates, ballot.n, lambda p, s, ballot=ballot: elect(candidates, p, s, ballot)
        )
        np.testing.assert_allclose(value_P, expected_P, **TOLERANCE)


def test_random_subsets_converge_to_enumeration() -> None:
    """Within five standard errors, on ragged problems, in one pass for all ballots."""
    full = random_candidates(problems=6, samples=8, seed=3)
    count_P = np.array([8, 8, 7, 5, 3, 8])
    present_PM = np.arange(8) < count_P[:, None]
    candidates = dataclasses.replace(
        full,
        answer_PM=np.where(present_PM, full.answer_PM, rank.NO_ANSWER),
        correct_PM=full.correct_PM & present_PM,
        integer_PM=full.integer_PM & present_PM,
        count_P=count_P,
    )
    ballots = [
        Ballot(4),
        Ballot(3, 2, by_score=True),
        Ballot(5, 3, by_score=True),
        Ballot(5, by_score=True, weighted=True),
    ]
    subsets = 4000
    for ballot, value_P in zip(ballots, rank.vote(candidates, ballots, subsets), strict=True):
        exact_P = enumerate_rule(
            candidates, ballot.n, lambda p, s, ballot=ballot: elect(candidates, p, s, ballot)
        )
        allowed_P = 5 * np.sqrt(exact_P * (1 - exact_P) / subsets) + 1e-12
        assert (np.abs(value_P - exact_P) <= allowed_P).all(), ballot


def test_votes_equal_a_plain_count_in_the_same_subsets() -> None:
    """Many samples, many answers, several ballots of a size, and a problem with fewer samples."""
    full, samples, subsets = random_candidates(problems=3, samples=300), 300, 4
    rng = np.random.default_rng(5)
    count_P = np.array([300, 300, 170])
    answer_PM = np.where(full.correct_PM, 0, rng.integers(-1, 250, (3, samples)))
    answer_PM[np.arange(samples) >= count_P[:, None]] = rank.NO_ANSWER
    correct_PM = answer_PM == 0
    candidates = Candidates(answer_PM, correct_PM, correct_PM, count_P, full.score_PM)
    ballots = [
        Ballot(n, k, by_score, weighted)
        for n in (2, 40, 200)
        for k, by_score, weighted in (
            (None, False, False),
            (2, True, False),
            (30, True, True),
            (None, True, True),
            (None, False, True),
        )
        if k is None or k <= n
    ]
    key_PSM = np.random.default_rng(7).random((3, subsets, samples))
    for ballot, value_P in zip(ballots, rank.vote(candidates, ballots, subsets, 7), strict=True):
        for p, count in enumerate(count_P):
            drawn = [key_M[:count].argsort()[: ballot.n].tolist() for key_M in key_PSM[p]]
            right = [elect(candidates, p, subset, ballot) for subset in drawn]
            assert value_P[p] == np.mean(right), ballot


def test_votes_depend_on_the_seed_only() -> None:
    candidates = random_candidates()
    first, other = (rank.vote(candidates, [Ballot(7)], 50, seed)[0] for seed in (0, 1))
    assert (first != other).any()
    together = rank.vote(candidates, [Ballot(3, 2, by_score=True), Ballot(7)], 50, 0)[1]
    np.testing.assert_array_equal(first, together)


def test_ties_and_missing_answers_by_example() -> None:
    candidates = gather(
        [["7", "5", "5", "7"], [None, None, "5"], [None, None, None]],
        [[False, True, True, False], [False, False, True], [False] * 3],
        score=[[0.2, 0.9, 0.1, 0.3], [0.9, 0.8, -3.0], [0.1, 0.2, 0.3]],
    )
    majority, weighted, top2 = rank.vote(
        candidates,
        [Ballot(4), Ballot(4, by_score=True, weighted=True), Ballot(4, 2, by_score=True)],
    )
    assert majority.tolist() == [0, 1, 0]  # 2:2 goes to sample 0; no answer never wins
    assert weighted.tolist() == [1, 1, 0]  # 1.0 against 0.5; a weight of 0 still beats no answer
    assert top2.tolist() == [1, 0, 0]  # a tie goes to the higher score; nobody voting has an answer


# Candidates


def test_gather_numbers_answers_by_first_appearance_and_pads() -> None:
    candidates = gather(
        [["3", None, "-4", "3", "3.0"], ["9"], []], [[True, False, False, True, False], [False], []]
    )
    assert candidates.answer_PM.tolist() == [[0, -1, 1, 0, 2], [0] + [-1] * 4, [-1] * 5]
    assert candidates.integer_PM[0].tolist() == [True, False, True, True, False]
    assert candidates.count_P.tolist() == [5, 1, 0]
    assert candidates.present_PM.sum() == 6
    assert rank.random_choice(candidates).tolist() == [0.4, 0.0, 0.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score": [[0.1, math.nan]]}, "score_PM is nan at problem 0, sample 1"),
        ({"logprob": [[-math.inf, 0.0]]}, "logprob_PM is -inf at problem 0, sample 0"),
        ({"score": [[0.1]]}, "score does not hold one entry"),
        ({"correct": [[True]]}, "correct does not hold one entry"),
        ({"answers": [[]], "correct": [[]]}, "P, M >= 1"),
        ({"answers": [], "correct": []}, "P, M >= 1"),
    ],
)
def test_gather_refuses(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gather(**{"answers": [["1", "2"]], "correct": [[True, False]], **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer_PM": np.array([0, 1])}, "P, M >= 1"),
        ({"answer_PM": np.array([[0.0, 1.0]])}, "answer_PM must be integer"),
        ({"answer_PM": np.array([[0, 2]])}, "must lie in -1..1"),
        ({"correct_PM": np.array([[1, 0]])}, "correct_PM must be bool"),
        ({"score_PM": np.array([[0.5]])}, "score_PM has shape"),
        ({"count_P": np.array([3])}, r"must lie in 0\.\.2"),
        ({"count_P": np.array([2, 2])}, "count_P must be integers"),
        ({"count_P": np.array([1])}, "beyond count_P must be empty"),
    ],
)
def test_candidates_refuse(change: dict, message: str) -> None:
    right = gather([["1", "2"]], [[True, False]])
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(right, **change)


@pytest.mark.parametrize(
    ("ballot", "message"),
    [
        (Ballot(0), "subset size"),
        (Ballot(21), "subset size"),
        (Ballot(5, 6), "k must lie"),
        (Ballot(5, 2, by_score=True), "needs scores"),
    ],
)
def test_votes_refuse(ballot: Ballot, message: str) -> None:
    candidates = dataclasses.replace(random_candidates(), score_PM=None)
    with pytest.raises(ValueError, match=message):
        rank.vote(candidates, [ballot])


def test_sizes() -> None:
    assert rank.sample_sizes(100) == [1, 2, 5, 10, 20, 50, 100]
    assert rank.sample_sizes(3200)[-4:] == [500, 1000, 2000, 3200]
    assert rank.sample_sizes(1) == [1]
    assert rank.vote_sizes(100) == [1, 2, 3, 5, 10, 20, 30, 50, 100]
    assert [rank.default_vote_k(n) for n in (1, 2, 100, 3200)] == [1, 1, 5, 28]
    assert all(rank.default_vote_k(n) <= n for n in range(1, 200))


# Intervals and tests


@pytest.mark.parametrize(
    ("successes", "low", "high"),
    [(286, 19.5, 24.0), (515, 36.4, 41.7), (458, 32.2, 37.3), (742, 53.6, 58.9)],
)
def test_wilson_gives_the_intervals_of_the_published_systems(
    successes: int, low: float, high: float
) -> None:
    assert [round(100 * bound, 1) for bound in statistics.wilson(successes, 1319)] == [low, high]


@given(st.integers(1, 2000), st.data())
def test_wilson_equals_scipy(trials: int, data: st.DataObject) -> None:
    successes = data.draw(st.integers(0, trials))
    expected = stats.binomtest(successes, trials).proportion_ci(method="wilson")
    assert statistics.wilson(successes, trials) == pytest.approx(tuple(expected), abs=1e-12)


def test_bootstrap_agrees_with_the_normal_interval_of_a_mean() -> None:
    value_KP = np.random.default_rng(0).random((2, 1319))
    low_K, high_K = statistics.bootstrap(value_KP)
    half_K = statistics.Z_95 * value_KP.std(-1) / np.sqrt(1319)
    np.testing.assert_allclose(low_K, value_KP.mean(-1) - half_K, atol=0.05 * half_K[0])
    np.testing.assert_allclose(high_K, value_KP.mean(-1) + half_K, atol=0.05 * half_K[0])


def test_bootstrap_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    low_K, high_K = statistics.bootstrap(rng.beta(0.5, 1.5, (400, 300)), resamples=1000)
    assert 0.92 <= np.mean((low_K <= 0.25) & (high_K >= 0.25)) <= 0.98


def test_intervals_are_wilson_for_binary_rows_only() -> None:
    binary_P = np.arange(100) < 30
    fractional_P = np.where(binary_P, 0.9, 0.1)
    almost_P = binary_P * (1 - 1e-15)  # a closed form's rounding
    low_K, high_K = statistics.intervals(np.stack([binary_P, fractional_P, almost_P]))
    assert (low_K[0], high_K[0]) == (low_K[2], high_K[2]) == statistics.wilson(30, 100)
    assert fractional_P.mean() - low_K[1] < binary_P.mean() - low_K[0]


@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 5))
def test_mcnemar_equals_the_binomial_test(a_only: int, b_only: int, agree: int) -> None:
    a_P = np.array([1] * a_only + [0] * b_only + [1] * agree)
    b_P = np.array([0] * a_only + [1] * b_only + [1] * agree)
    discordant = a_only + b_only
    expected = stats.binomtest(a_only, discordant).pvalue if discordant else 1.0
    assert statistics.mcnemar(a_P, b_P) == pytest.approx(expected, rel=1e-9)


def test_sign_flip_equals_enumeration_and_scipy() -> None:
    difference_P = np.random.default_rng(1).normal(0.4, 1, 11)
    flips = np.array(list(itertools.product([-1, 1], repeat=11)))
    exact = np.mean(np.abs(flips @ difference_P) >= abs(difference_P.sum()) - 1e-12)
    p = statistics.sign_flip(difference_P, resamples=40_000)
    assert p == pytest.approx(exact, abs=5 * math.sqrt(exact * (1 - exact) / 40_000))
    assert statistics.sign_flip(np.ones(1000), resamples=99) == 0.01  # never below 1 / (R + 1)
    # On binary outcomes it is McNemar's test again: every flip is a fair coin.
    binary_P = np.array([1] * 14 + [-1] * 5 + [0] * 30)
    expected = stats.binomtest(5, 19).pvalue
    assert statistics.sign_flip(binary_P, resamples=40_000) == pytest.approx(expected, abs=0.006)


def test_paired_is_antisymmetric_and_tells_noise_from_effect() -> None:
    rng = np.random.default_rng(0)
    a_P, b_P = rng.random(500), rng.random(500)
    forward, backward = statistics.paired(a_P, b_P), statistics.paired(b_P, a_P)
    assert forward["difference"] == pytest.approx(-backward["difference"])
    assert forward["low"] == pytest.approx(-backward["high"])
    assert forward["p"] == backward["p"] > 0.001
    assert forward["low"] < forward["difference"] < forward["high"]
    assert statistics.paired(a_P, a_P - 0.05)["p"] < 0.001
    assert statistics.paired(a_P, a_P) == {"difference": 0, "low": 0, "high": 0, "p": 1.0}
    assert statistics.paired(np.ones(1319), np.zeros(1319))["p"] == 0  # below the least float
    binary_P = np.repeat([1.0, 0.0], [9, 11])
    p = statistics.paired(binary_P, np.zeros(20))["p"]
    assert p == pytest.approx(stats.binomtest(9, 9).pvalue)
    with pytest.raises(ValueError, match="equally long"):
        statistics.paired(a_P, b_P[1:])


# Verifier quality


@given(st.lists(st.tuples(QUARTERS, st.booleans()), min_size=1, max_size=30))
def test_auroc_counts_pairs(rows: list[tuple[float, bool]]) -> None:
    key, label = (np.array(column) for column in zip(*rows, strict=True))
    pairs = [(p > n) + 0.5 * (p == n) for p in key[label] for n in key[~label]]
    assert statistics.auroc(key, label) == (pytest.approx(np.mean(pairs)) if pairs else None)


def test_within_problem_auroc_ignores_difficulty() -> None:
    key_PM = np.array([[0.9, 0.8, 0.7], [0.2, 0.1, 0.0], [0.5, 0.6, 9.0]])
    label_PM = np.array([[True, True, False], [False, True, False], [True, True, False]])
    count_P = np.array([3, 3, 2])  # the last has one class among its two samples
    expected = (1.0 + 0.5) / 2
    assert statistics.auroc_within(key_PM, label_PM, count_P) == pytest.approx(expected)
    assert statistics.auroc_within(key_PM, label_PM, np.array([2, 1, 2])) is None


def test_calibration_of_a_calibrated_and_of_a_constant_verifier() -> None:
    rng = np.random.default_rng(0)
    value = rng.random(200_000)
    label = rng.random(200_000) < value
    honest = statistics.calibration(value, label)
    assert honest["ece"] < 0.01
    assert honest["brier"] == pytest.approx(1 / 6, abs=0.002)  # E[v (1 - v)]
    assert sum(b["count"] for b in honest["reliability"]) == 200_000
    sure = statistics.calibration(np.full(4, 1.7), np.array([True, False, False, False]))
    assert (sure["brier"], sure["ece"]) == (0.75, 0.75)
    assert sure["reliability"][-1] == {
        "low": 0.9,
        "high": 1.0,
        "mean_value": 1.0,
        "fraction_correct": 0.25,
        "count": 4,
    }
    assert sure["reliability"][0]["mean_value"] is None


def test_shortcut_auroc_finds_a_length_cue() -> None:
    candidates = random_candidates()
    longer_PM = np.where(candidates.correct_PM, 100, 20)
    audit = rank.shortcut_auroc(dataclasses.replace(candidates, length_PM=longer_PM))
    assert audit["length"] == audit["length_within"] == 0.0
    assert audit["integer_within"] > 0.8  # by construction: every right answer is an integer
    assert 0.4 < audit["logprob"] < 0.6


# The whole


def test_evaluate_fills_the_contract_and_is_strict_json() -> None:
    candidates = random_candidates()
    greedy_P = candidates.correct_PM[:, 0]
    result = rank.evaluate(candidates, greedy_P, subsets=20)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    names = "random majority logprob length integer_only verifier verifier_vote verifier_weighted"
    assert set(result["accuracy"]) == {*names.split(), "greedy", "coverage"}
    for name, rows in result["accuracy"].items():
        assert [row["n"] for row in rows] == ([1] if name == "greedy" else [1, 2, 5, 10, 20])
        assert all(0 <= r["low"] <= r["value"] <= r["high"] <= 1 for r in rows), name
    greedy = result["accuracy"]["greedy"][0]
    assert (greedy["low"], greedy["high"]) == statistics.wilson(int(greedy_P.sum()), 40)
    assert [r["k"] for r in result["accuracy"]["verifier_vote"]] == [1, 1, 1, 2, 2]
    assert {(r["a"], r["b"]) for r in result["paired"] if r["n"] == 10} == {
        ("verifier", "greedy"),
        ("verifier_vote", "greedy"),
        ("verifier_weighted", "greedy"),
        ("majority", "greedy"),
        ("verifier", "majority"),
        ("verifier", "random"),
        ("verifier", "logprob"),
        ("verifier", "integer_only"),
    }
    assert {r["n"] for r in result["paired"]} == {10, 20}
    assert result["vote_size"][0]["value"] == result["accuracy"]["verifier"][-1]["value"]
    assert [r["k"] for r in result["vote_size"]] == [1, 2, 3, 5, 10, 20]
    split = result["breakdown"]
    assert split["solved"] + split["missed"] + split["impossible"] == pytest.approx(1)
    assert split["solved"] == result["accuracy"]["verifier"][-1]["value"]
    assert split["impossible"] == pytest.approx(1 - result["accuracy"]["coverage"][-1]["value"])
    assert rank.evaluate(candidates, greedy_P, subsets=20) == result


def test_evaluate_at_one_sample_is_the_same_for_every_rule() -> None:
    result = rank.evaluate(random_candidates(), subsets=2)
    values = [rows[0]["value"] for rows in result["accuracy"].values()]
    np.testing.assert_allclose(values, values[0], **TOLERANCE)


def test_evaluate_leaves_out_what_it_cannot_know() -> None:
    candidates = gather([["1", None], ["2"]], [[False, False], [False]])
    result = rank.evaluate(candidates)
    json.dumps(result, allow_nan=False)
    assert set(result["accuracy"]) == {"random", "majority", "integer_only", "coverage"}
    assert (result["paired"], result["vote_size"]) == ([], [])
    assert result["verifier"] == {"shortcuts": {"integer": None, "integer_within": None}}
    assert result["breakdown"]["by"] == "majority"
    with pytest.raises(ValueError, match="greedy_correct_P"):
        rank.evaluate(candidates, np.array([True]))


@settings(max_examples=20, deadline=None)
@given(candidates_strategy())
def test_evaluate_survives_ties_missing_answers_and_empty_problems(candidates: Candidates) -> None:
    json.dumps(rank.evaluate(candidates, np.array([True, False]), subsets=3), allow_nan=False)


def test_without_ties_the_order_of_samples_does_not_matter() -> None:
    """Closed forms and weighted votes; majority breaks its ties by index, so it may move."""
    candidates = random_candidates()
    rng = np.random.default_rng(1)
    shuffle_PM = rng.permuted(np.tile(np.arange(20), (40, 1)), axis=-1)
    given = {name: v for name, v in vars(candidates).items() if name.endswith("PM")}
    shuffled = dataclasses.replace(
        candidates,
        **{
            name: np.take_along_axis(v, shuffle_PM, -1)
            for name, v in given.items()
            if v is not None
        },
    )
    exact = ("random", "coverage", "integer_only", "logprob", "length", "verifier")
    results = [rank.evaluate(c, ns=[1, 4, 20], subsets=2) for c in (candidates, shuffled)]
    for name in exact:
        before, after = ([r["value"] for r in result["accuracy"][name]] for result in results)
        np.testing.assert_allclose(before, after, **TOLERANCE)
    for name in ("verifier_vote", "verifier_weighted"):
        before, after = (result["accuracy"][name][-1]["value"] for result in results)
        assert before == after
    assert results[0]["vote_size"] == results[1]["vote_size"]
    for key in ("auroc", "auroc_within", "brier", "ece"):
        assert results[0]["verifier"][key] == pytest.approx(results[1]["verifier"][key])
