"""The report of a run: one self-contained HTML page.

The page runs no script and fetches nothing, and its content security policy says so. Texts of
models and data sets are untrusted: every string that reaches the template passes `visible`, then
autoescaping.
"""

import json
import math
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from gsm_verifier.report import figures
from gsm_verifier.report.figures import Line

_MINUS = "\N{MINUS SIGN}"
_WIDE = (736, 420)
_NARROW = (358, 330)
_PANEL = (344, 240)


@dataclass(frozen=True)
class BrowsedCompletion:
    """One completion as the problem browser shows it.

    Attributes:
      tokens: the text of each token.
      values: the verifier's value after each token; None where nothing was scored.
      forced: whether the calculator wrote the token.
      score: what the completion was ranked by.
      correct: whether its final answer is right.
      answer: its final answer, if it gave one.
      logprob: the generator's log-probability of the completion, if it is known.
      sample: its index among the problem's samples.
    """

    tokens: list[str]
    values: list[float] | None
    forced: list[bool]
    score: float | None
    correct: bool
    answer: str | None
    logprob: float | None
    sample: int

    def __post_init__(self) -> None:
        if {len(self.forced), len(self.values or self.tokens)} != {len(self.tokens)}:
            raise ValueError("tokens, values and forced of a completion differ in length")


@dataclass(frozen=True)
class BrowsedProblem:
    """One problem as the browser shows it.

    Attributes:
      id: unique within a run.
      question: the text shown to the model.
      gold_solution: worked steps and answer of the data set.
      gold_answer: its final answer.
      completions: some of the sampled completions, top-ranked first.
      greedy: the completion at temperature 0, if there is one.
      total: how many completions were sampled.
      total_correct: how many of them are right.
    """

    id: str
    question: str
    gold_solution: str
    gold_answer: str
    completions: list[BrowsedCompletion]
    greedy: BrowsedCompletion | None
    total: int
    total_correct: int


@dataclass(frozen=True)
class _Method:
    """How a way to choose an answer is named and drawn."""

    label: str
    phrase: str
    explanation: str
    ink: str = "muted"
    dash: Any = "-"
    band: bool = False


_BOUND = "Upper bound"
_GROUPS: dict[str, dict[str, _Method]] = {
    "With the verifier": {
        "verifier": _Method(
            "Verifier",
            "the verifier",
            "the completion with the highest score",
            ink="verifier",
            band=True,
        ),
        "verifier_vote": _Method(
            "Verifier, then vote",
            "the vote among the verifier's best",
            "the best-scored k vote by final answer",
            ink="vote",
        ),
        "verifier_weighted": _Method(
            "Weighted vote",
            "the vote weighted by the verifier",
            "all vote, each with its score as weight",
            ink="weighted",
        ),
    },
    "Free baselines: no verifier needed": {
        "greedy": _Method(
            "Greedy",
            "greedy decoding",
            "one completion at temperature 0; does not depend on N",
            ink="ink",
            dash=(0, (1, 2)),
        ),
        "random": _Method(
            "Random pick", "a random pick", "any of the N completions", dash=(0, (1, 2))
        ),
        "majority": _Method(
            "Majority vote",
            "majority vote",
            "the commonest final answer",
            ink="majority",
            band=True,
        ),
        "logprob": _Method(
            "Log-probability",
            "the highest log-probability",
            "the completion the generator finds likeliest",
        ),
        "length": _Method("Shortest", "picking the shortest", "the shortest completion", dash="--"),
        "integer_only": _Method(
            "Integer only",
            "dropping non-integer answers",
            "a random pick among completions whose answer is an integer",
            dash="-.",
        ),
    },
    _BOUND: {
        "coverage": _Method(
            "Any is right",
            "a perfect picker",
            "a right solution exists among the N: what a perfect verifier would reach",
            ink="ink",
            dash=(0, (5, 3)),
        ),
    },
}
_METHODS = {name: method for group in _GROUPS.values() for name, method in group.items()}
_BASELINES = ("random", "majority", "logprob", "length", "integer_only")
_STAGES = {
    "pretrained": "Pretraining",
    "generator": "Generator",
    "baseline": "Fine-tuning baseline",
    "verifier": "Verifier",
}
_FEATURES = {
    "verifier": "the verifier's score",
    "length": "being short",
    "logprob": "log-probability",
    "integer": "answer is an integer",
}
_OUTCOMES = {
    "solved": ("Solved", "the answer picked is right"),
    "missed": ("Missed", "a right solution existed, another was picked"),
    "impossible": ("Out of reach", "none of the sampled solutions is right"),
}


def render(
    results: dict[str, Any],
    metrics: dict[str, list[dict[str, Any]]],
    browsed: list[BrowsedProblem],
    title: str,
) -> str:
    """Renders the report; the same input gives the same bytes.

    Args:
      results: the content of `results.json`; sections that were not measured may be missing.
      metrics: training metrics, one list of rows per stage.
      browsed: the problems to show in full.
      title: the page's heading.

    Returns:
      An HTML document without external references.
    """
    if results["schema"] != 1:
        raise ValueError(f"results have schema {results['schema']}; this report reads schema 1")
    accuracy = results.get("accuracy") or {}
    if unknown := accuracy.keys() - _METHODS.keys():
        raise ValueError(f"no name and explanation for the methods {sorted(unknown)}")
    verifier = {
        key: value for key, value in (results.get("verifier") or {}).items() if value is not None
    }
    split = _split(results)
    return (
        _environment()
        .get_template("page.html")
        .render(
            title=title,
            split=split,
            results=results,
            config=json.dumps(results.get("config"), indent=2, ensure_ascii=False),
            timing=results.get("timing") or {},
            headline=_headline(results, split["problems"]),
            tiles=_tiles(accuracy),
            table=_table(accuracy),
            accuracy_figure=_accuracy_figure(accuracy),
            votes=_votes(results.get("vote_size") or []),
            breakdown={"by": "verifier", **results["breakdown"]}
            if results.get("breakdown")
            else None,
            outcomes=_OUTCOMES,
            verifier=verifier,
            reliability=_reliability(verifier),
            audit=_audit(verifier),
            paired=_paired(results.get("paired") or []),
            training=[panel for stage, rows in metrics.items() for panel in _training(stage, rows)],
            browsed=[(_outcome(problem), problem) for problem in browsed],
            valued=any(shown.values for problem in browsed for shown in problem.completions),
        )
    )


def visible(text: str) -> str:
    """Replaces characters that hide, reorder or cannot be encoded by a name one can see.

    These are controls other than newline and tab, bidirectional overrides, zero-width characters,
    lone surrogates, line separators, private and unassigned code points.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        f"⟨U+{ord(char):04X}⟩"
        if char not in "\n\t" and unicodedata.category(char) in _INVISIBLE
        else char
        for char in text
    )


_INVISIBLE = frozenset(("Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp"))


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("gsm_verifier.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "label": lambda name: _METHODS[name].label,
        "percent": _percent,
        "points": _points,
        "p_value": _p_value,
        "duration": _duration,
        "spans": _spans,
        "sparkline": _sparkline,
    }
    return environment


def _finalize(value: Any) -> Any:
    """Applied by jinja to every expression of the template, before it is escaped."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _unit(share: float) -> str:
    return f"{_percent(share)}\N{NARROW NO-BREAK SPACE}%"


def _points(share: float) -> str:
    return f"{100 * share:+.1f}".replace("-", _MINUS)


def _p_value(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"


def _spans(completion: BrowsedCompletion) -> Iterator[tuple[str, bool, float | None, str]]:
    """Each token with whether it was forced, its value if it has one, and its shade in 0..1.

    The verifier's head is not bounded, colours are.
    """
    values = completion.values or [math.nan] * len(completion.tokens)
    for token, forced, value in zip(completion.tokens, completion.forced, values, strict=True):
        if math.isfinite(value):
            yield token, forced, value, f"{min(max(value, 0.0), 1.0):.2f}"
        else:
            yield token, forced, None, ""


def _sparkline(values: Sequence[float] | None) -> Markup:
    finite = [value for value in values or () if math.isfinite(value)]
    return Markup(figures.sparkline(finite) if finite else "")


def _split(results: dict[str, Any]) -> dict[str, Any]:
    """The split that was measured: "test" where there are several."""
    splits = results["splits"]
    name = "test" if "test" in splits else next(iter(splits))
    return {"name": name, "samples": None, **splits[name]}


def _largest(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return max(rows, key=lambda row: row["n"])


def _at(rows: Sequence[dict[str, Any]], n: int) -> dict[str, Any] | None:
    return next((row for row in rows if row["n"] == n), None)


def _measured(row: dict[str, Any]) -> str:
    return f"{_unit(row['value'])} [{_percent(row['low'])}, {_percent(row['high'])}]"


def _at_n(n: int) -> str:
    return f"N\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}{n:,}"


def _best_baseline(accuracy: dict[str, Any], n: int) -> tuple[str, dict[str, Any]] | None:
    """The free baseline with the highest accuracy at N, chosen with hindsight in its favour."""
    rows = [(name, _at(accuracy.get(name) or [], n)) for name in _BASELINES]
    return max(
        ((name, row) for name, row in rows if row),
        key=lambda pair: pair[1]["value"],
        default=None,
    )


def _headline(results: dict[str, Any], problems: int) -> list[str]:
    """The result in sentences: the fact, what the interval allows to say, the best baseline."""
    accuracy = results.get("accuracy") or {}
    measured = [row for name in ("verifier", *_BASELINES) for row in accuracy.get(name) or []]
    if not measured:
        return ["Nothing has been measured yet."]
    greedy = accuracy.get("greedy")
    against_greedy = f"; greedy decoding {_measured(greedy[-1])}" if greedy else ""
    if not accuracy.get("verifier"):
        n = _largest(measured)["n"]
        name, row = _best_baseline(accuracy, n)
        return [
            f"Without a verifier, {_METHODS[name].phrase} gives a right answer for "
            f"{_measured(row)} of {problems} problems at {_at_n(n)}{against_greedy}.",
            "The verifier was not measured in this run.",
        ]
    row = _largest(accuracy["verifier"])
    n = row["n"]
    sentences = [
        f"The verifier picks a right solution for {_measured(row)} of {problems} problems "
        f"at {_at_n(n)}{against_greedy}."
    ]
    if greedy:
        sentences.append(_comparison(results, "greedy", row["value"] - greedy[-1]["value"], n))
    if best := _best_baseline(accuracy, n):
        name, other = best
        sentences.append(
            f"The strongest free baseline is {_METHODS[name].phrase} with {_measured(other)}. "
            + _comparison(results, name, row["value"] - other["value"], n)
        )
    return sentences


def _comparison(results: dict[str, Any], other: str, difference: float, n: int) -> str:
    """What may be said about verifier and another method, whichever of them is ahead."""
    name = _METHODS[other].phrase
    test = next(
        (
            row
            for row in results.get("paired") or []
            if (row["a"], row["b"], row["n"]) == ("verifier", other, n)
        ),
        None,
    )
    if test is None:
        return (
            f"The difference is {_points(difference)} points, without a paired test: "
            "it may be chance."
        )
    p = "" if test["p"] is None else f", p {_equals(_p_value(test['p']))}"
    amount = (
        f"{_points(test['difference'])} points [{_points(test['low'])}, {_points(test['high'])}]{p}"
    )
    if test["low"] > 0:
        return f"The verifier is ahead of {name} by {amount}."
    if test["high"] < 0:
        return f"The verifier is behind {name}: {amount}."
    return f"The difference to {name}, {amount}, is not established: its interval includes zero."


def _equals(p: str) -> str:
    return p if p.startswith("<") else f"= {p}"


def _tiles(accuracy: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """The few numbers worth large type: (label, note, row)."""
    sampled = [row for name, rows in accuracy.items() if name != "greedy" for row in rows]
    if not sampled:
        return []
    n = _largest(sampled)["n"]
    best = _best_baseline(accuracy, n)
    wanted = [
        ("Verifier", _at_n(n), _at(accuracy.get("verifier") or [], n)),
        (_METHODS[best[0]].label, "strongest free baseline", best[1]) if best else ("", "", None),
        ("Greedy", "one sample, T = 0", (accuracy.get("greedy") or [None])[-1]),
        ("Any is right", "upper bound", _at(accuracy.get("coverage") or [], n)),
    ]
    return [tile for tile in wanted if tile[2]]


def _table(accuracy: dict[str, Any]) -> dict[str, Any]:
    """Methods by group x a few N, with the best method that is no upper bound in each column."""
    sampled = {row["n"] for name, rows in accuracy.items() if name != "greedy" for row in rows} or {
        row["n"] for row in accuracy.get("greedy") or []
    }
    columns = sorted(n for n in sampled if n in (1, 10, 100, max(sampled)))
    groups = []
    for heading, methods in _GROUPS.items():
        rows = [
            {
                "label": method.label,
                "explanation": method.explanation + _voters(accuracy[name], columns),
                "cells": [_at(_repeated(name, accuracy[name], columns), n) for n in columns],
            }
            for name, method in methods.items()
            if accuracy.get(name)
        ]
        if rows:
            groups.append((heading, rows))
    picks = [row["cells"] for heading, rows in groups if heading != _BOUND for row in rows]
    best = [
        _percent(max((cells[i]["value"] for cells in picks if cells[i]), default=0.0))
        for i in range(len(columns))
    ]
    return {"columns": columns, "groups": groups, "best": best}


def _repeated(
    name: str, rows: list[dict[str, Any]], columns: Sequence[int]
) -> list[dict[str, Any]]:
    """Greedy decoding has one number; it belongs in the first column under whatever N it came."""
    return [{**rows[-1], "n": columns[0]}] if name == "greedy" else rows


def _voters(rows: Sequence[dict[str, Any]], columns: Sequence[int]) -> str:
    voters = [f"{row['k']:,}" for n in columns if (row := _at(rows, n)) and "k" in row]
    return f"; k = {', '.join(voters)}" if voters else ""


def _line(rows: Sequence[dict[str, Any]], x: str, band: bool, **style: Any) -> Line:
    """Rows of value and interval as a line in percent."""
    rows = sorted(rows, key=lambda row: row[x])
    return Line(
        x=[row[x] for row in rows],
        y=[100 * row["value"] for row in rows],
        low=[100 * row["low"] for row in rows] if band else (),
        high=[100 * row["high"] for row in rows] if band else (),
        **style,
    )


def _both_sizes(name: str, lines: Sequence[Line], **text: Any) -> dict[str, Markup]:
    """A wide drawing, and a narrow one for phones, where a shrunk one could not be read."""
    return {
        "wide": Markup(figures.curves(f"{name}-wide", lines, size=_WIDE, **text)),
        "narrow": Markup(
            figures.curves(f"{name}-narrow", lines, size=_NARROW, labels="below", **text)
        ),
    }


def _accuracy_figure(accuracy: dict[str, Any]) -> dict[str, Markup] | None:
    order = ("random", "length", "integer_only", "logprob", "coverage", "greedy")
    order += ("majority", "verifier_weighted", "verifier_vote", "verifier")
    present = [name for name in order if accuracy.get(name)]
    if not any(name != "greedy" for name in present):
        return None
    lines = []
    for name in present:
        method = _METHODS[name]
        lines.append(
            _line(
                accuracy[name],
                "n",
                method.band,
                label=method.label,
                ink=method.ink,
                dash=method.dash,
                width=2.4 if name == "verifier" else 1.5,
                across=name == "greedy",
            )
        )
    ends = ", ".join(f"{line.label} {line.y[-1]:.1f} %" for line in reversed(lines))
    return _both_sizes(
        "accuracy",
        lines,
        x_label="completions per problem, N",
        y_label="problems solved, %",
        floor=0.0,
        alt=f"Accuracy against the number of completions per problem. At the largest N: {ends}.",
    )


def _votes(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    if not rows:
        return None
    n = _largest(rows)["n"]
    most = [row for row in rows if row["n"] == n]
    best = max(most, key=lambda row: row["value"])
    alone = next((row for row in most if row["k"] == 1), None)
    lines = [
        _line(
            [row for row in rows if row["n"] == size],
            "k",
            size == n,
            label=f"N = {size}",
            ink="verifier" if size == n else "muted",
            width=2.4 if size == n else 1.5,
        )
        for size in sorted({row["n"] for row in rows})
    ]
    figure = _both_sizes(
        "vote",
        lines,
        x_label="top-ranked completions that vote, k",
        y_label="problems solved, %",
        alt=f"Accuracy against the number of voters at N = {n}: best {_percent(best['value'])} % "
        f"with {best['k']}.",
    )
    return {"figure": figure, "n": n, "best": best, "alone": alone}


def _reliability(verifier: dict[str, Any]) -> Markup | None:
    if not any(row["count"] for row in verifier.get("reliability") or []):
        return None
    points = "; ".join(
        f"value {row['mean_value']:.2f}, right {row['fraction_correct']:.2f}"
        for row in verifier["reliability"]
        if row["count"]
    )
    return Markup(
        figures.reliability(
            "reliability",
            verifier["reliability"],
            size=(_PANEL[0], 440),
            alt=f"Share of right completions by the verifier's value: {points}.",
        )
    )


def _audit(verifier: dict[str, Any]) -> list[tuple[str, float | None, float | None]]:
    """AUROC of each feature, pooled and within problems; the verifier's own first."""
    areas = {"verifier": verifier.get("auroc"), "verifier_within": verifier.get("auroc_within")}
    areas |= verifier.get("shortcuts") or {}
    return [
        (_FEATURES.get(name, name), areas[name], areas.get(f"{name}_within"))
        for name in areas
        if not name.endswith("_within") and (name != "verifier" or "auroc" in verifier)
    ]


def _paired(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The tests grouped by N, the largest first, and the scale on which they are drawn."""
    if not rows:
        return None
    groups = [
        (n, [row for row in rows if row["n"] == n])
        for n in sorted({row["n"] for row in rows}, reverse=True)
    ]
    span = max(abs(row[end]) for row in rows for end in ("low", "high")) or 1.0
    return {"groups": groups, "scale": 100 / span}


def _outcome(problem: BrowsedProblem) -> str:
    if problem.completions and problem.completions[0].correct:
        return "solved"
    return "missed" if problem.total_correct else "impossible"


def _training(stage: str, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A stage's losses; `loss` itself only where it is not split into its parts."""
    columns = (("lm_loss", "language-model loss"), ("value_loss", "value loss"))
    panels = [_panel(stage, rows, *column) for column in columns]
    return [panel for panel in panels if panel] or [
        panel for panel in [_panel(stage, rows, "loss", "loss")] if panel
    ]


def _series(rows: Sequence[dict[str, Any]], column: str) -> list[tuple[int, float]]:
    return [
        (row["step"], row[column])
        for row in rows
        if row.get(column) is not None and math.isfinite(row[column])
    ]


def _panel(
    stage: str, rows: Sequence[dict[str, Any]], column: str, label: str
) -> dict[str, Any] | None:
    train, heldout = _series(rows, column), _series(rows, f"heldout_{column}")
    if not any(value for _, value in train + heldout):
        return None  # a stage without this loss logs zeros
    lines = []
    if train:
        steps, values = zip(*_thinned(train), strict=True)
        lines.append(Line("train", "train", steps, values, width=1.2))
    if heldout:
        steps, values = zip(*heldout, strict=True)
        lines.append(Line("held out", "verifier", steps, values, width=2.0))
    best = min(heldout, key=lambda point: point[1], default=None)
    words = [f"train {train[-1][1]:.3f}"] if train else []
    if best:
        words.append(f"held out {heldout[-1][1]:.3f} (lowest {best[1]:.3f} at step {best[0]:,})")
    caption = f"Last {', '.join(words)}."
    return {
        "name": _STAGES.get(stage, visible(stage)),
        "steps": rows[-1]["step"],
        "figure": Markup(
            figures.curves(
                f"{_identifier(stage)}-{column}",
                lines,
                size=_PANEL,
                x_label="step",
                y_label=label,
                log=False,
                labels="below",
                alt=f"{_STAGES.get(stage, visible(stage))}, {label} by step. {caption}",
            )
        ),
        "caption": caption,
    }


def _identifier(name: str) -> str:
    return "".join(char if char.isascii() and char.isalnum() else "-" for char in name)


def _thinned(series: Sequence[tuple[int, float]], most: int = 240) -> Iterator[tuple[float, float]]:
    """Means over blocks of steps, so that a long run draws no more than the eye can separate."""
    block = math.ceil(len(series) / most)
    for start in range(0, len(series), block):
        part = series[start : start + block]
        yield (
            sum(step for step, _ in part) / len(part),
            sum(value for _, value in part) / len(part),
        )
