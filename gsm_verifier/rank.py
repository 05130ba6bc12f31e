"""Choosing one answer out of many samples, and how often that is right (section 4.2, figure 7).

Every rule is judged at subset size N by its *expected* correctness over random N-subsets of a
problem's M samples, never by the first N: closed forms for the rules that return the best sample by
some key, seeded random subsets for the votes, one exact evaluation at N = M.

The dimensions are P problems, M samples per problem, S random subsets, N (or n) subset size.
Everywhere a tie goes to the lowest sample index.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from gsm_verifier import statistics
from gsm_verifier.text import answers

NO_ANSWER = -1
SUBSETS = 200
BASELINES = ("majority", "random", "logprob", "integer_only")
CHALLENGERS = ("verifier", "verifier_vote", "verifier_weighted", "majority")


_DTYPES = {
    "answer": np.int32,
    "correct": np.bool_,
    "integer": np.bool_,
    "score": np.float64,
    "logprob": np.float64,
    "length": np.int32,
    "value": np.float64,
}


class Choice(NamedTuple):
    """The samples of one problem; each field has an entry for every sample.

    Attributes:
      answer: final answers; equal strings are equal answers, None is no answer.
      correct: is it right? score, logprob, length, value: as in `Candidates`, None where unknown.
      integer: by default whether the answer is written as an integer, `-?[0-9]+`.
    """

    answer: Sequence[str | None]
    correct: Sequence[bool]
    integer: Sequence[bool] | None = None
    score: Sequence[float] | None = None
    logprob: Sequence[float] | None = None
    length: Sequence[int] | None = None
    value: Sequence[float] | None = None


@dataclass(frozen=True)
class Candidates:
    """The samples of every problem, one row per problem, short rows padded on the right.

    A problem with fewer samples than a rule asks for is judged on all it has; one with none counts
    as wrong.

    Attributes:
      answer_PM: int32 in -1..M-1; equal codes in a row are equal final answers, `NO_ANSWER` (-1)
        is none.
      correct_PM: bool; the final answer is right.
      integer_PM: bool; the final answer is an integer.
      count_P: int; samples of each problem. Beyond it the row is padding: no answer, not correct,
        not an integer.
      score_PM: float; the verifier's score, or None if not scored.
      logprob_PM: float; the log-probability of the sample under the generator, or None.
      length_PM: tokens in the sample, or None.
      value_PM: float; what the verifier takes for the probability that the sample is right, where
        `score_PM` is something else.

    Raises:
      ValueError: a shape or type differs from the above, padding is not empty, or a float is not
        finite.
    """

    answer_PM: np.ndarray
    correct_PM: np.ndarray
    integer_PM: np.ndarray
    count_P: np.ndarray
    score_PM: np.ndarray | None = None
    logprob_PM: np.ndarray | None = None
    length_PM: np.ndarray | None = None
    value_PM: np.ndarray | None = None

    def __post_init__(self) -> None:
        shape = self.answer_PM.shape
        if len(shape) != 2 or 0 in shape:
            raise ValueError(f"answer_PM must be [P, M] with P, M >= 1, got {shape}")
        if self.count_P.shape != shape[:1] or not np.issubdtype(self.count_P.dtype, np.integer):
            raise ValueError(f"count_P must be integers [{shape[0]}], got {self.count_P.shape}")
        if self.count_P.min() < 0 or self.count_P.max() > shape[1]:
            raise ValueError(f"count_P must lie in 0..{shape[1]}")
        kinds = {"answer_PM": np.integer, "correct_PM": np.bool_, "integer_PM": np.bool_}
        for name, kind in kinds.items():
            if not np.issubdtype(getattr(self, name).dtype, kind):
                raise ValueError(f"{name} must be {kind.__name__}, got {getattr(self, name).dtype}")
        for name in (f"{name}_PM" for name in _DTYPES if name != "answer"):
            value = getattr(self, name)
            if value is not None and value.shape != shape:
                raise ValueError(f"{name} has shape {value.shape}, answer_PM has {shape}")
            if value is not None and not np.isfinite(value).all():
                p, m = np.argwhere(~np.isfinite(value))[0]
                raise ValueError(f"{name} is {value[p, m]} at problem {p}, sample {m}")
        if self.answer_PM.min() < NO_ANSWER or self.answer_PM.max() >= shape[1]:
            raise ValueError(f"answer_PM must lie in {NO_ANSWER}..{shape[1] - 1}")
        used = (self.answer_PM != NO_ANSWER) | self.correct_PM | self.integer_PM
        if (used & ~self.present_PM).any():
            raise ValueError("samples beyond count_P must be empty: no answer, not correct")

    @classmethod
    def gather(cls, choices: Iterable[Choice]) -> "Candidates":
        """Put problems together, which may differ in their number of samples.

        Codes of answers follow the order of first appearance. A field that is None of any problem
        is None of all. Nothing but the arrays is kept in memory.

        Raises:
          ValueError: a field does not hold one entry for each of the answers, or as in the class.
        """
        kept: dict[str, list[np.ndarray | None]] = {name: [] for name in _DTYPES}
        for choice in choices:
            code_M, distinct = _codes(choice.answer)
            integer = choice.integer
            if integer is None:  # `NO_ANSWER` reads the last entry
                integer = np.array([*map(answers.is_integer, distinct), False])[code_M]
            coded = choice._replace(answer=code_M, integer=integer)
            for name, dtype in _DTYPES.items():
                value = getattr(coded, name)
                if value is not None and len(value) != len(choice.answer):
                    raise ValueError(f"{name} does not hold one entry for each of the answers")
                kept[name].append(None if value is None else np.asarray(value, dtype))
        count_P = np.array([len(row) for row in kept["answer"]], np.int32)

        def pad(name: str) -> np.ndarray | None:
            rows = kept.pop(name)
            if any(row is None for row in rows):
                return None
            fill = NO_ANSWER if name == "answer" else 0
            padded = np.full((len(rows), count_P.max(initial=0)), fill, _DTYPES[name])
            for p, row in enumerate(rows):
                padded[p, : len(row)] = row
            return padded

        return cls(count_P=count_P, **{f"{name}_PM": pad(name) for name in _DTYPES})

    @property
    def present_PM(self) -> np.ndarray:
        """bool: the sample exists."""
        return np.arange(self.answer_PM.shape[1]) < self.count_P[:, None]

    def order_PM(self, key_PM: np.ndarray, rows: slice = slice(None)) -> np.ndarray:
        """Sample indices of some problems by falling key, ties by index, padding last."""
        present_PM = np.arange(key_PM.shape[1]) < self.count_P[rows, None]
        descending_PM = np.where(present_PM, -key_PM[rows].astype(np.float64), np.inf)
        return np.argsort(descending_PM, axis=-1, kind="stable")

    def ranked_PM(self, value_PM: np.ndarray, key_PM: np.ndarray) -> np.ndarray:
        """The samples' values by falling key, as `order_PM`."""
        ranked_PM = np.empty_like(value_PM)
        for rows in _slices(*value_PM.shape):
            order_PM = self.order_PM(key_PM, rows)
            ranked_PM[rows] = np.take_along_axis(value_PM[rows], order_PM, -1)
        return ranked_PM


def sample_sizes(samples: int) -> list[int]:
    """Subset sizes 1, 2, 5, 10, 20, 50, ... below `samples`, and `samples` itself (figure 7a)."""
    return _series(samples, (1, 2, 5))


def vote_sizes(samples: int) -> list[int]:
    """Numbers of voters 1, 2, 3, 5, 10, 20, 30, ... and `samples` itself (figure 7b)."""
    return _series(samples, (1, 2, 3, 5))


def default_vote_k(n: int) -> int:
    """How many of n samples vote: sqrt(n) / 2, fixed beforehand and never tuned on test problems.

    Figure 7b finds the best number to be 3-5 of 100 and about 30 of 3200; this gives 5 and 28.
    """
    return max(1, round(math.sqrt(n) / 2))


def best_of(candidates: Candidates, key_PM: np.ndarray, n: int) -> np.ndarray:
    """Expected correctness of the sample with the highest key in a random n-subset.

    The sample of rank r (from 0) is the best of the subset exactly when it is drawn and none of the
    r better ones is: probability C(M-1-r, n-1) / C(M, n).

    Returns:
      value_P in [0, 1], exact up to rounding.

    Raises:
      ValueError: unless 1 <= n <= M.
    """
    return _of_the_best(candidates, candidates.ranked_PM(candidates.correct_PM, key_PM), n)


def coverage(candidates: Candidates, n: int) -> np.ndarray:
    """P(a random n-subset holds a correct sample): test@n, pass@n, 1 - C(M-c, n) / C(M, n).

    It is the best of n by a verifier that knows the label: unbiased, and the hit rate at n = M.

    Returns:
      value_P in [0, 1].
    """
    return _of_the_best(candidates, _first(candidates.correct_PM), n)


def random_choice(candidates: Candidates) -> np.ndarray:
    """Share of correct samples, value_P: a random sample's correctness, whatever the subset."""
    return candidates.correct_PM.sum(-1) / np.maximum(candidates.count_P, 1)


def integer_only(candidates: Candidates, n: int) -> np.ndarray:
    """Expected correctness of a random integer answer in a random n-subset.

    GSM8K's answers are all integers, so this baseline is free. A subset without an integer
    (hypergeometric) falls back to any of its samples. Given the case, each sample of the kind
    chosen from is equally likely to be returned.

    Returns:
      value_P in [0, 1].
    """
    integer_PM, correct_PM = candidates.integer_PM, candidates.correct_PM
    integers_P = integer_PM.sum(-1)
    others_P = candidates.count_P - integers_P
    found_P = _of_the_best(candidates, _first(integer_PM), n)
    right_P = (correct_PM & integer_PM).sum(-1) / np.maximum(integers_P, 1)
    right_other_P = (correct_PM & ~integer_PM).sum(-1) / np.maximum(others_P, 1)
    return found_P * right_P + (1 - found_P) * right_other_P


class Ballot(NamedTuple):
    """A vote by final answer inside an n-subset (section 4.2).

    Attributes:
      n: subset size.
      k: how many of the subset's samples vote, the best ones first; None is all.
      by_score: the samples rank by verifier score, else by sample index.
      weighted: a vote weighs its verifier score clipped to [0, 1], else one.
    """

    n: int
    k: int | None = None
    by_score: bool = False
    weighted: bool = False


def vote(
    candidates: Candidates, ballots: Sequence[Ballot], subsets: int = SUBSETS, seed: int = 0
) -> list[np.ndarray]:
    """Expected correctness of votes over random subsets of the samples.

    The answer with the most weight wins, a tie going to the answer of the best-ranked voter. A
    sample without an answer wins only if no voter has one. All ballots see the same subsets, those
    of a smaller n inside those of a larger one, so that comparing ballots carries little noise.
    Exact, without random subsets: n = M, and a single voter, which is `best_of`. Memory does not
    grow with P beyond the samples themselves.

    Args:
      candidates: the samples.
      ballots: the votes to hold.
      subsets: S, random subsets per problem.
      seed: of the subsets.

    Returns:
      For each ballot value_P in [0, 1]: the share of subsets whose winner is correct, taking the
      best-ranked voter for the winning answer.

    Raises:
      ValueError: n not in 1..M, k not in 1..n, no score where one is needed, or subsets < 1.
    """
    problems, samples = candidates.answer_PM.shape
    if subsets < 1:
        raise ValueError(f"subsets must be at least 1, got {subsets}")
    for ballot in ballots:
        _check_size(ballot.n, samples)
        if ballot.k is not None and not 1 <= ballot.k <= ballot.n:
            raise ValueError(f"k must lie in 1..{ballot.n}, got {ballot.k}")
        if (ballot.by_score or ballot.weighted) and candidates.score_PM is None:
            raise ValueError(f"{ballot} needs scores")
    key_PM = {False: np.broadcast_to(0.0, (problems, samples)), True: candidates.score_PM}
    values = [
        best_of(candidates, key_PM[ballot.by_score], ballot.n)
        if 1 in (ballot.n, ballot.k)
        else np.empty(problems)
        for ballot in ballots
    ]
    # Ballots that rank alike and are of one size have the same voters, which are sorted once.
    alike: dict[bool, dict[int, list[tuple[Ballot, np.ndarray]]]] = {}
    for ballot, value_P in zip(ballots, values, strict=True):
        if 1 not in (ballot.n, ballot.k):
            held = alike.setdefault(ballot.by_score, {}).setdefault(ballot.n, [])
            held.append((ballot, value_P))
    if all(n == samples for sizes in alike.values() for n in sizes):
        subsets = 1
    rng = np.random.default_rng(seed)
    for p in range(problems):
        key_SM = rng.random((subsets, samples))
        key_SM[:, candidates.count_P[p] :] = np.inf
        drawn_SM = key_SM.argsort(-1)
        for by_score, sizes in alike.items():
            order_M = candidates.order_PM(key_PM[by_score], slice(p, p + 1))[0]
            answer_M = candidates.answer_PM[p, order_M]
            correct_M = candidates.correct_PM[p, order_M]
            weight_M = None
            if candidates.score_PM is not None:
                weight_M = candidates.score_PM[p, order_M].clip(0, 1)
            for n, held in sizes.items():
                rank_SN = np.arange(samples)[None]  # all, unless fewer are drawn
                if n < samples:
                    rank_SN = _ranks(order_M, drawn_SM[:, :n])
                for ballot, value_P in held:
                    weight = weight_M if ballot.weighted else None
                    value_P[p] = _hold(answer_M, correct_M, weight, rank_SN[:, : ballot.k])
    return values


def vote_size(
    candidates: Candidates,
    n: int,
    ks: Sequence[int],
    subsets: int = SUBSETS,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Accuracy against the number of top-ranked samples that vote (figure 7b).

    Returns:
      One `{"n", "k", "value", "low", "high"}` per k.
    """
    value_KP = np.stack(vote(candidates, [Ballot(n, k, by_score=True) for k in ks], subsets, seed))
    return [{"n": n, "k": k, **row} for k, row in zip(ks, _summaries(value_KP, seed), strict=True)]


def breakdown(candidates: Candidates) -> dict[str, Any]:
    """Split the problems: solved, missed (a right sample exists, another was picked), impossible.

    Returns:
      `n` = M, `by` the rule that picks (the verifier, or the majority where there are no scores),
      and the three fractions, which sum to one.
    """
    n = candidates.answer_PM.shape[1]
    if candidates.score_PM is None:
        by, (picked_P,) = "majority", vote(candidates, [Ballot(n)])
    else:
        by, picked_P = "verifier", best_of(candidates, candidates.score_PM, n)
    solved, possible = float(picked_P.mean()), float(coverage(candidates, n).mean())
    return {
        "n": n,
        "by": by,
        "solved": solved,
        "missed": possible - solved,
        "impossible": 1.0 - possible,
    }


def shortcut_auroc(candidates: Candidates) -> dict[str, float | None]:
    """How well format alone predicts the label: what a verifier could know without reading.

    Returns:
      The AUROC of shortness (`length`), log-probability (`logprob`) and being an integer
      (`integer`), pooled and within problems (`..._within`). One half is no information; below one
      half the opposite sign predicts. Keys whose input is missing are left out; None where a class
      is missing.
    """
    keys = {"integer": candidates.integer_PM}
    if candidates.length_PM is not None:
        keys["length"] = -candidates.length_PM
    if candidates.logprob_PM is not None:
        keys["logprob"] = candidates.logprob_PM
    areas: dict[str, float | None] = {}
    for name, key_PM in keys.items():
        areas[name], areas[f"{name}_within"] = _auroc_pair(candidates, key_PM)
    return areas


def verifier_quality(candidates: Candidates) -> dict[str, Any]:
    """Ranking and calibration of the verifier's scores, and the shortcut audit.

    Returns:
      `auroc`, `auroc_within`, `brier`, `ece`, `reliability` (see `statistics.calibration`; left
      out where there are no scores) and `shortcuts` (see `shortcut_auroc`).
    """
    shortcuts = {"shortcuts": shortcut_auroc(candidates)}
    if candidates.score_PM is None or not candidates.count_P.any():
        return shortcuts
    pooled, within = _auroc_pair(candidates, candidates.score_PM)
    present_PM = candidates.present_PM
    value_PM = candidates.score_PM if candidates.value_PM is None else candidates.value_PM
    calibration = statistics.calibration(value_PM[present_PM], candidates.correct_PM[present_PM])
    return {"auroc": pooled, "auroc_within": within, **calibration, **shortcuts}


def evaluate(
    candidates: Candidates,
    greedy_correct_P: np.ndarray | None = None,
    ns: Sequence[int] | None = None,
    ks: Sequence[int] | None = None,
    seed: int = 0,
    subsets: int = SUBSETS,
    vote_k: Callable[[int], int] = default_vote_k,
) -> dict[str, Any]:
    """Every number of the paper's test-time comparison, ready for `results.json`.

    Args:
      candidates: the samples of the test problems. Rules whose input is None are left out.
      greedy_correct_P: bool; the finetuning baseline, one sample at temperature 0, or None.
      ns: subset sizes, by default `sample_sizes(M)`.
      ks: voters of the vote-size curve at n = M, by default `vote_sizes(M)`.
      seed: of subsets, bootstrap and permutation tests.
      subsets: S of the votes.
      vote_k: voters of `verifier_vote` at subset size n. It must not be chosen on these problems.

    Returns:
      `accuracy`: {rule: [{"n", "value", "low", "high"}]}, `verifier_vote` also with its "k".
      `paired`: [{"a", "b", "n", "difference", "low", "high", "p"}], the verifier, the votes and the
      majority against greedy, and the verifier against the free baselines, at n = 10, n = 100 and
      the largest n, as far as `ns` holds them. `vote_size`, `verifier`, `breakdown`: as the
      functions of those names; `vote_size` is empty without scores. Plain ints and floats, no NaN.

    Raises:
      ValueError: an n or k out of range, or `greedy_correct_P` not one bool per problem.
    """
    problems, samples = candidates.answer_PM.shape
    ns = sample_sizes(samples) if ns is None else ns
    ks = vote_sizes(samples) if ks is None else ks
    value_P: dict[tuple[str, int], np.ndarray] = {}
    if greedy_correct_P is not None:
        greedy_correct_P = np.asarray(greedy_correct_P)
        if greedy_correct_P.shape != (problems,) or greedy_correct_P.dtype != np.bool_:
            raise ValueError(f"greedy_correct_P must be bool [{problems}]")
        value_P["greedy", 1] = greedy_correct_P.astype(np.float64)

    keys = {"logprob": candidates.logprob_PM}
    if candidates.length_PM is not None:
        keys["length"] = -candidates.length_PM
    keys["verifier"] = candidates.score_PM
    ranked = {  # sorted once, not for every n
        name: candidates.ranked_PM(candidates.correct_PM, key_PM)
        for name, key_PM in keys.items()
        if key_PM is not None
    }
    ballots = {("majority", n): Ballot(n) for n in ns}
    for n in ns:
        value_P["random", n] = random_choice(candidates)
        value_P["integer_only", n] = integer_only(candidates, n)
        value_P["coverage", n] = coverage(candidates, n)
        for name, ranked_PM in ranked.items():
            value_P[name, n] = _of_the_best(candidates, ranked_PM, n)
        if candidates.score_PM is not None:
            ballots["verifier_vote", n] = Ballot(n, vote_k(n), by_score=True)
            ballots["verifier_weighted", n] = Ballot(n, by_score=True, weighted=True)
    votes = vote(candidates, list(ballots.values()), subsets, seed)
    value_P.update(zip(ballots, votes, strict=True))

    accuracy: dict[str, list[dict[str, Any]]] = {}
    summaries = _summaries(np.stack(list(value_P.values())), seed)
    for (name, n), summary in zip(value_P, summaries, strict=True):
        k = {"k": ballots[name, n].k} if name == "verifier_vote" else {}
        accuracy.setdefault(name, []).append({"n": n, **summary, **k})

    pairs = [(a, ("greedy", 1)) for a in CHALLENGERS]
    compared = sorted({n for n in ns if n in (10, 100)} | {max(ns)})
    comparisons = []
    for n in compared:
        for a, b in pairs + [("verifier", (b, n)) for b in BASELINES]:
            if (a, n) in value_P and b in value_P:
                test = statistics.paired(value_P[a, n], value_P[b], seed)
                comparisons.append({"a": a, "b": b[0], "n": n, **test})

    scored = candidates.score_PM is not None
    return {
        "accuracy": accuracy,
        "paired": comparisons,
        "vote_size": vote_size(candidates, samples, ks, subsets, seed) if scored else [],
        "verifier": verifier_quality(candidates),
        "breakdown": breakdown(candidates),
    }


def _codes(answers: Sequence[str | None]) -> tuple[np.ndarray, list[str]]:
    """A problem's answers, numbered by first appearance, and which they are."""
    code_of: dict[str | None, int] = {None: NO_ANSWER}
    codes = [code_of.setdefault(a, len(code_of) - 1) for a in answers]
    return np.array(codes, np.int32), list(code_of)[1:]


def _slices(problems: int, width: int) -> Iterator[slice]:
    """All problems, as many at a time as bound the memory of `width` float64 for each."""
    step = max(1, statistics.CHUNK_BYTES // (8 * width))
    for start in range(0, problems, step):
        yield slice(start, min(start + step, problems))


def _series(limit: int, digits: Sequence[int]) -> list[int]:
    powers = [10**e for e in range(len(str(limit)))]
    return [d * power for power in powers for d in digits if d * power < limit] + [limit]


def _check_size(n: int, samples: int) -> None:
    if not 1 <= n <= samples:
        raise ValueError(f"the subset size must lie in 1..{samples}, got {n}")


def _first(found_PM: np.ndarray) -> np.ndarray:
    """Ranked by themselves: all that are true come first."""
    return np.arange(found_PM.shape[1]) < found_PM.sum(-1)[:, None]


def _of_the_best(candidates: Candidates, ranked_PM: np.ndarray, n: int) -> np.ndarray:
    """P(the best sample of a random n-subset is one of those marked, by rank, in `ranked_PM`)."""
    problems, samples = ranked_PM.shape
    counts, which_P = np.unique(candidates.count_P, return_inverse=True)  # there are few
    best_CM = _best_probability(counts, samples, n)
    value_P = np.empty(problems)
    for rows in _slices(problems, samples):
        value_P[rows] = (best_CM[which_P[rows]] * ranked_PM[rows]).sum(-1)
    return np.minimum(value_P, 1.0)


def _best_probability(count_P: np.ndarray, samples: int, n: int) -> np.ndarray:
    """P(the sample of rank r is the best of a random n-subset), [P, M] over ranks r.

    By the recurrence w[0] = n/M, w[r+1] = w[r] (M-n-r) / (M-1-r): no binomial that could overflow,
    no subtraction that could cancel.
    """
    _check_size(n, samples)
    count_P1 = count_P[:, None]
    drawn_P1 = np.minimum(count_P1, n)
    rank_M = np.arange(samples - 1)
    ratio_PM = np.maximum(count_P1 - drawn_P1 - rank_M, 0) / np.maximum(count_P1 - 1 - rank_M, 1)
    return np.cumprod(np.concatenate([drawn_P1 / np.maximum(count_P1, 1), ratio_PM], -1), -1)


def _ranks(order_M: np.ndarray, drawn_SN: np.ndarray) -> np.ndarray:
    """The ranks, best first, of drawn sample indices, where `order_M` has the indices by rank."""
    rank_M = np.empty(len(order_M), np.uint16 if len(order_M) <= 2**16 else np.uint32)
    rank_M[order_M] = np.arange(len(order_M))
    return np.sort(rank_M.take(drawn_SN), -1)


def _hold(
    answer_M: np.ndarray, correct_M: np.ndarray, weight_M: np.ndarray | None, rank_SK: np.ndarray
) -> float:
    """Hold one vote in every subset of a problem's samples; the share of correct winners.

    Args:
      answer_M, correct_M, weight_M: of the samples by rank. rank_SK: the voters, best first.
    """
    codes = answer_M.max() + 2  # of a subset's row of totals, the first one for no answer
    cell_SK = (answer_M.astype(np.intp) + 1).take(rank_SK)
    cell_SK += codes * np.arange(len(rank_SK))[:, None]
    weight = None if weight_M is None else weight_M.take(rank_SK).ravel()
    total = np.bincount(cell_SK.ravel(), weight, minlength=codes * len(rank_SK))
    total[::codes] = -1
    # argmax returns the first maximum: the winning answer's best-ranked voter, also after a tie.
    elected_S1 = total.take(cell_SK).argmax(-1)[:, None]
    return correct_M.take(np.take_along_axis(rank_SK, elected_S1, -1)).mean()


def _summaries(value_KP: np.ndarray, seed: int) -> list[dict[str, float]]:
    """Mean and interval of each row."""
    low_K, high_K = statistics.intervals(value_KP, seed)
    columns = zip(value_KP.mean(-1).tolist(), low_K.tolist(), high_K.tolist(), strict=True)
    return [{"value": value, "low": low, "high": high} for value, low, high in columns]


def _auroc_pair(candidates: Candidates, key_PM: np.ndarray) -> tuple[float | None, float | None]:
    """AUROC pooled over all samples, and averaged within problems."""
    present_PM, correct_PM = candidates.present_PM, candidates.correct_PM
    pooled = statistics.auroc(key_PM[present_PM], correct_PM[present_PM])
    return pooled, statistics.auroc_within(key_PM, correct_PM, candidates.count_P)
