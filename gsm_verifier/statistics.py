"""Intervals, paired tests and calibration: how sure a number is, and what a verifier's values mean.

The dimensions are P problems, M samples per problem, K quantities measured on the same problems,
R resamples. Every interval is a two-sided 95 % interval over *problems*: it says how far the number
would move on another draw of test problems, not on another training run or another set of samples.
Everything random is a function of `seed`.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

Z_95 = 1.959963984540054  # the normal distribution's 97.5 % point
RESAMPLES = 10_000
CHUNK_BYTES = 2**21  # what is resampled or sorted at a time stays in a core's second cache


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """Wilson's score interval for a proportion.

    Raises:
      ValueError: unless 0 <= successes <= trials and trials >= 1.
    """
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(f"wilson needs 0 <= successes <= trials, got {successes} of {trials}")
    rate, z2 = successes / trials, Z_95**2
    centre = (rate + z2 / (2 * trials)) / (1 + z2 / trials)
    spread = rate * (1 - rate) / trials + z2 / (4 * trials**2)
    half = Z_95 * math.sqrt(spread) / (1 + z2 / trials)
    # At the ends the bound is exactly 0 or 1; rounding would put it a hair off.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == trials else centre + half
    return low, high


def bootstrap(
    value_KP: np.ndarray, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[np.ndarray, np.ndarray]:
    """Percentile bootstrap interval of each row's mean: `(low_K, high_K)`.

    All rows share their resamples of the problems, so rows stay comparable and K costs little.
    """
    rng = np.random.default_rng(seed)
    problems = value_KP.shape[1]
    mean_RK = np.concatenate(
        [
            _resample_counts(rng, rows, problems) @ value_KP.T
            for rows in _chunks(resamples, 8 * problems)
        ]
    )
    low_K, high_K = np.quantile(mean_RK / problems, [0.025, 0.975], axis=0)
    return low_K, high_K


def intervals(value_KP: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Interval of each row's mean: Wilson where every outcome is 0 or 1, else bootstrap.

    Fractional outcomes are expectations over random subsets, for which no binomial model holds.

    Returns:
      `(low_K, high_K)`, float64.
    """
    low_K, high_K = bootstrap(value_KP, seed)
    for k, value_P in enumerate(value_KP):
        if is_binary(value_P):
            low_K[k], high_K[k] = wilson(round(value_P.sum()), value_P.size)
    return low_K, high_K


def is_binary(value_P: np.ndarray) -> bool:
    """Whether every value is 0 or 1, up to the rounding of a closed form."""
    return bool(np.all(np.abs(value_P - np.round(value_P)) < 1e-9))


def mcnemar(a_P: np.ndarray, b_P: np.ndarray) -> float:
    """Exact two-sided McNemar p-value for binary outcomes: a fair coin on the discordant pairs."""
    difference_P = np.round(a_P) - np.round(b_P)
    a_only, b_only = int((difference_P > 0).sum()), int((difference_P < 0).sum())
    tail = sum(math.comb(a_only + b_only, i) for i in range(min(a_only, b_only) + 1))
    return min(1.0, 2 * tail / 2 ** (a_only + b_only))  # integers until the one division


def sign_flip(difference_P: np.ndarray, seed: int = 0, resamples: int = RESAMPLES) -> float:
    """Two-sided sign-flip permutation p-value that the differences are symmetric around zero.

    Monte Carlo with the observed assignment counted in, so p >= 1 / (resamples + 1) and the test
    is valid at every number of resamples.
    """
    size_P = np.abs(difference_P[difference_P != 0])
    if not size_P.size:
        return 1.0
    rng = np.random.default_rng(seed)
    # Rounding must not turn an equal statistic into a smaller one.
    observed = abs(difference_P.sum()) - 1e-9 * size_P.sum()
    extreme = 0
    for rows in _chunks(resamples, size_P.size):  # int8, and as many make the draws
        positive_RP = rng.integers(2, size=(rows, size_P.size), dtype=np.int8)
        statistic_R = 2 * (positive_RP @ size_P) - size_P.sum()
        extreme += int((np.abs(statistic_R) >= observed).sum())
    return (1 + extreme) / (1 + resamples)


def paired(a_P: np.ndarray, b_P: np.ndarray, seed: int = 0) -> dict[str, float]:
    """Compare two methods on the same problems.

    Between single runs on 1,319 problems unpaired differences under 3 points are noise; pairing
    removes the part of that noise which both methods share.

    Args:
      a_P, b_P: outcomes or expected outcomes in [0, 1], problem by problem.
      seed: of the bootstrap and the permutation test.

    Returns:
      `difference` = mean(a - b), its paired bootstrap interval `low`, `high`, and a two-sided `p`:
      exact McNemar when both outcomes are binary, else a sign-flip permutation test. No correction
      for the number of comparisons.

    Raises:
      ValueError: the two do not have one value each for the same, at least one, problems.
    """
    a_P, b_P = np.asarray(a_P, np.float64), np.asarray(b_P, np.float64)
    if a_P.ndim != 1 or a_P.shape != b_P.shape or not a_P.size:
        raise ValueError(f"paired needs two equally long vectors, got {a_P.shape} and {b_P.shape}")
    difference_P = a_P - b_P
    low_K, high_K = bootstrap(difference_P[None], seed)
    binary = is_binary(a_P) and is_binary(b_P)
    p = mcnemar(a_P, b_P) if binary else sign_flip(difference_P, seed)
    return {
        "difference": float(difference_P.mean()),
        "low": float(low_K[0]),
        "high": float(high_K[0]),
        "p": p,
    }


def auroc(key: np.ndarray, label: np.ndarray) -> float | None:
    """P(a correct sample's key > an incorrect one's), ties counting half; None if a class is empty.

    Args:
      key: any real or boolean array.
      label: boolean array of the same size.
    """
    key, label = np.ravel(key), np.ravel(label)
    positive, negative = np.sort(key[label]), np.sort(key[~label])
    if not positive.size or not negative.size:
        return None
    less, not_more = (negative.searchsorted(positive, side).sum() for side in ("left", "right"))
    return float((int(less) + int(not_more)) / 2 / (positive.size * negative.size))


def auroc_within(key_PM: np.ndarray, label_PM: np.ndarray, count_P: np.ndarray) -> float | None:
    """AUROC inside each problem, averaged over the problems that have both classes.

    Choosing among the samples of one problem needs only this; the pooled AUROC also rewards
    telling easy problems from hard ones. None if no problem has both classes.

    Args:
      key_PM, label_PM: key and boolean label of each sample.
      count_P: how many leading samples of a row are real.
    """
    rows = zip(key_PM, label_PM, count_P, strict=True)
    area = [auroc(key_M[:count], label_M[:count]) for key_M, label_M, count in rows]
    defined = [value for value in area if value is not None]
    return float(np.mean(defined)) if defined else None


def calibration(value: np.ndarray, label: np.ndarray, bins: int = 10) -> dict[str, Any]:
    """Brier score, expected calibration error and reliability curve of predicted probabilities.

    A head trained with MSE and no squashing may leave [0, 1]; values are clipped to it first.

    Args:
      value: predicted probability of being correct.
      label: boolean array of the same size, not empty.
      bins: number of equal-width bins on [0, 1]; the last one is closed.

    Returns:
      `brier`, `ece` and `reliability`: per bin `low`, `high`, `count`, `mean_value` and
      `fraction_correct`, the last two None in an empty bin.
    """
    value, label = np.clip(np.ravel(value), 0, 1), np.ravel(label)
    bin_of = np.minimum((value * bins).astype(int), bins - 1)
    count = np.bincount(bin_of, minlength=bins)
    value_sum = np.bincount(bin_of, value, minlength=bins)
    correct = np.bincount(bin_of, label, minlength=bins)
    return {
        "brier": float(np.mean((value - label) ** 2)),
        "ece": float(np.abs(value_sum - correct).sum() / value.size),
        "reliability": [
            {
                "low": b / bins,
                "high": (b + 1) / bins,
                "mean_value": float(value_sum[b] / count[b]) if count[b] else None,
                "fraction_correct": float(correct[b] / count[b]) if count[b] else None,
                "count": int(count[b]),
            }
            for b in range(bins)
        ],
    }


def _resample_counts(rng: np.random.Generator, rows: int, problems: int) -> np.ndarray:
    """How often each problem occurs in each of `rows` draws with replacement: float [R, P]."""
    drawn_RP = rng.integers(problems, size=(rows, problems)) + problems * np.arange(rows)[:, None]
    count_RP = np.bincount(drawn_RP.ravel(), minlength=rows * problems).reshape(rows, problems)
    return count_RP.astype(np.float64)


def _chunks(total: int, width: int) -> Iterator[int]:
    """Row counts summing to `total`, each of a bounded number of rows of `width` bytes."""
    step = max(1, CHUNK_BYTES // width)
    for start in range(0, total, step):
        yield min(step, total - start)
