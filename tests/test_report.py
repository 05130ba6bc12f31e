"""The report renders whatever a run can hold, shows its numbers and lets no text break out."""

import dataclasses
import itertools
import math
import random
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from jinja2 import UndefinedError

from gsm_verifier.report import figures, page
from gsm_verifier.report.page import BrowsedCompletion, BrowsedProblem

VOID = {"meta", "input", "br", "hr", "img", "link"}
HOSTILE = [
    "<script>alert(1)</script>",
    "</style></div></details><img src=x onerror=alert(1)>",
    "{{ 7 * 7 }}{% raw %}",
    "\"' onmouseover='x",
    "&amp; &lt;",
    "a\u202eb\u2066c",
    "\ud800 lone",
    "nul \x00 bell \x07 \x1b[31m",
    "line\u2028separator\u200bzero",
    "--> ]]> <!--",
]


def accuracy_rows(ns: list[int], first: float, last: float) -> list[dict[str, Any]]:
    rows = []
    for n in ns:
        value = first + (last - first) * math.log(n) / math.log(max(ns))
        half = 1.96 * math.sqrt(value * (1 - value) / 300)
        rows.append({"n": n, "value": value, "low": value - half, "high": value + half})
    return rows


def sample_results() -> dict[str, Any]:
    """Made-up numbers in the shape of `results.json`."""
    ns = [1, 2, 5, 10, 20, 50, 100]
    ends = {
        "random": (0.312, 0.312),
        "majority": (0.312, 0.553),
        "logprob": (0.312, 0.421),
        "length": (0.312, 0.287),
        "integer_only": (0.329, 0.346),
        "verifier": (0.312, 0.623),
        "verifier_vote": (0.312, 0.641),
        "verifier_weighted": (0.312, 0.608),
        "coverage": (0.312, 0.894),
    }
    accuracy = {name: accuracy_rows(ns, *values) for name, values in ends.items()}
    for row, k in zip(accuracy["verifier_vote"], (1, 1, 1, 2, 2, 4, 5), strict=True):
        row["k"] = k
    accuracy["greedy"] = [{"n": 1, "value": 0.45, "low": 0.394, "high": 0.506}]
    comparisons = [("verifier", "greedy", 0.173), ("verifier_vote", "greedy", 0.191)]
    comparisons += [("majority", "greedy", 0.103), ("verifier", "majority", 0.07)]
    comparisons += [("verifier", "random", 0.311), ("verifier", "logprob", -0.011)]
    return {
        "schema": 1,
        "commit": "3f2a9c1d77b04e5d8a61c0ffee1234567890abcd",
        "versions": {"python": "3.11.7", "jax": "0.10.2", "flax": "0.12.8"},
        "seed": 0,
        "config": {"model": {"family": "llama", "layers": 30}, "verifier": {"loss": "mse"}},
        "splits": {"test": {"problems": 300, "samples": 100}},
        "accuracy": accuracy,
        "vote_size": [
            {"n": 100, "k": k, "value": v, "low": v - 0.05, "high": v + 0.05}
            for k, v in [
                (1, 0.623),
                (2, 0.623),
                (3, 0.64),
                (5, 0.641),
                (10, 0.634),
                (20, 0.61),
                (30, 0.6),
                (50, 0.58),
                (100, 0.553),
            ]
        ],
        "paired": [
            {
                "a": a,
                "b": b,
                "n": n,
                "difference": d,
                "low": d - 0.054,
                "high": d + 0.054,
                "p": 0.0002 if d > 0.1 else 0.0131 if d > 0.06 else 0.69,
            }
            for n in (10, 100)
            for a, b, d in comparisons
        ],
        "verifier": {
            "auroc": 0.871,
            "auroc_within": 0.792,
            "brier": 0.137,
            "ece": 0.041,
            "reliability": [
                {
                    "low": i / 10,
                    "high": (i + 1) / 10,
                    "mean_value": (i + 0.45) / 10,
                    "fraction_correct": ((i + 0.45) / 10) ** 1.25,
                    "count": [9000, 4200, 2600, 1900, 1500, 1400, 1500, 1900, 2800, 3200][i],
                }
                for i in range(10)
            ],
            "shortcuts": {
                "integer": 0.561,
                "integer_within": 0.534,
                "length": 0.583,
                "length_within": 0.522,
                "logprob": 0.671,
                "logprob_within": None,
            },
        },
        "breakdown": {
            "n": 100,
            "by": "verifier",
            "solved": 0.623,
            "missed": 0.271,
            "impossible": 0.106,
        },
        "numeric": {"greedy": 0.2, "random": 0.15},
        "timing": {
            "pretrain": 5231.4,
            "finetune": 312.0,
            "sample": 4210.5,
            "label": 12.3,
            "verify": 2841.0,
            "score": 640.2,
            "evaluate": 8.4,
        },
    }


def sample_metrics() -> dict[str, list[dict[str, Any]]]:
    """Made-up training curves."""
    rng = random.Random(0)
    metrics = {}
    for stage, steps in (("pretrained", 4000), ("generator", 72), ("verifier", 1200)):
        metrics[stage] = rows = []
        for step in range(1, steps + 1):
            decay = math.exp(-3 * step / steps)
            row = {
                "step": step,
                "lm_loss": 0.7 + 1.6 * decay + 0.06 * rng.gauss(0, 1),
                "value_loss": 0.12 + 0.12 * decay + 0.01 * rng.gauss(0, 1)
                if stage == "verify"
                else 0.0,
                "lr": 1e-5,
                "tokens": 32000 * step,
                "seconds": 0.3 * step,
            }
            row["loss"] = row["lm_loss"] + row["value_loss"]
            if step % max(1, steps // 8) == 0:
                row["heldout_lm_loss"] = 0.78 + 1.6 * decay
                row["heldout_value_loss"] = 0.13 + 0.12 * decay if stage == "verify" else None
            rows.append(row)
    return metrics


def sample_completion(rng: random.Random, correct: bool, sample: int) -> BrowsedCompletion:
    text = (
        "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nAltogether she sold 48+24 = "
        "<<48+24=72>>72 clips in April and May.\n#### " + ("72" if correct else "96")
    )
    tokens = re.findall(r"\s?[A-Za-z]+|\s?\d|\n|[^\w\s]+|\s", text)
    forced = [False] * len(tokens)
    for index in range(1, len(tokens)):
        if "=" in tokens[index - 1] and "<<" in "".join(tokens[max(0, index - 8) : index]):
            forced[index] = tokens[index].strip().isdigit()
    end = 0.95 if correct else 0.12
    values = []
    for index in range(len(tokens)):
        at = index / len(tokens)
        values.append(0.45 * (1 - at) + end * at + 0.16 * (1 - at) * rng.gauss(0, 1))
    return BrowsedCompletion(
        tokens, values, forced, values[-1], correct, "72" if correct else "96", -23.41, sample
    )


def sample_problems(count: int = 8, completions: int = 4) -> list[BrowsedProblem]:
    """Made-up problems for the browser."""
    rng = random.Random(1)
    problems = []
    for index in range(count):
        kind = index % 4
        right = [kind < 2 or (kind == 2 and rank > 0) for rank in range(completions)]
        shown = [sample_completion(rng, ok, rng.randrange(100)) for ok in right]
        problems.append(
            BrowsedProblem(
                id=f"test-{index:05d}",
                question="Natalia sold clips to 48 of her friends in April, and then she sold half "
                "as many clips in May. How many clips did Natalia sell altogether in "
                "April and May?",
                gold_solution="She sold 48/2 = <<48/2=24>>24 clips in May.\nAltogether 48+24 = "
                "<<48+24=72>>72 clips.\n#### 72",
                gold_answer="72",
                completions=shown,
                greedy=dataclasses.replace(
                    sample_completion(rng, kind == 0, 0), values=None, score=None
                ),
                total=100,
                total_correct=(61, 34, 7, 0)[kind],
            )
        )
    return problems


def render(**changes: Any) -> str:
    parts = {
        "results": sample_results(),
        "metrics": sample_metrics(),
        "browsed": sample_problems(),
        "title": "A verifier for word problems",
    }
    return page.render(**(parts | changes))


class Document(HTMLParser):
    """Parses a page strictly: every element closed in order, every id once."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.stack: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(html)
        self.close()
        assert not self.stack

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.stack.append(dict(attrs).get("class") or tag)
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag
        self.stack.pop()

    def handle_data(self, data: str) -> None:
        for name in self.stack[::2]:
            self.texts.setdefault(name, []).append(data)

    def text(self, name: str) -> str:
        return "".join(self.texts[name])

    def values(self, attribute: str) -> list[str]:
        return [value for name, value in self.attributes if name == attribute]


def without(*keys: str) -> dict[str, Any]:
    return {key: value for key, value in sample_results().items() if key not in keys}


def unscored() -> dict[str, Any]:
    """Results of completions that no verifier has seen."""
    results = without("vote_size", "paired")
    results["accuracy"] = {
        name: rows for name, rows in results["accuracy"].items() if "verifier" not in name
    }
    results["verifier"] = {"auroc": None, "shortcuts": {"length": 0.583}}
    results["breakdown"]["by"] = "majority"
    return results


BARE = without("accuracy", "vote_size", "paired", "verifier", "breakdown", "timing", "config")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"metrics": {}, "browsed": []},
        {"results": unscored()},
        {"results": unscored() | {"verifier": None, "breakdown": None}},
        {"results": BARE, "metrics": {}, "browsed": []},
        {"results": BARE | {"accuracy": {"greedy": sample_results()["accuracy"]["greedy"]}}},
        {"results": BARE | {"accuracy": {"random": accuracy_rows([1, 4], 0.2, 0.2)[1:]}}},
    ],
    ids=["all", "no-training", "no-verifier", "no-quality", "bare", "greedy-only", "one-n"],
)
def test_is_a_sound_document_without_external_references(changes: dict[str, Any]) -> None:
    html = render(**changes)
    document = Document(html)
    ids = document.values("id")
    assert len(ids) == len(set(ids))
    assert document.tags.isdisjoint({"script", "link", "img", "iframe", "object", "base"})
    links = document.values("href") + document.values("xlink:href")
    assert all(link.startswith("#") and link[1:] in ids for link in links)
    assert all(target in ids for target in document.values("for"))
    assert all(target[1:] in ids for target in re.findall(r"url\(([^)]*)\)", html))
    assert not document.values("src")
    assert not re.search(r"https?:|@import|//\w", html)
    assert not any(name.startswith("on") for name, _ in document.attributes)


def test_same_input_gives_same_bytes() -> None:
    assert render() == render()


@pytest.mark.parametrize("text", HOSTILE)
def test_texts_cannot_break_out(text: str) -> None:
    problem = sample_problems(1, 1)[0]
    completion = dataclasses.replace(
        problem.completions[0],
        tokens=[text, "\n", text],
        values=[0.1, 0.2, 0.3],
        forced=[False, True, False],
        answer=text,
    )
    unvalued = dataclasses.replace(completion, values=None)
    problem = dataclasses.replace(
        problem,
        id=text,
        question=text,
        gold_solution=text,
        gold_answer=text,
        completions=[completion],
        greedy=unvalued,
    )
    results = sample_results()
    results["config"] = {text: text}
    results["versions"] = {text: text}
    results["timing"] = {text: 1.0}
    results["resumed"] = [text]
    results["verifier"]["shortcuts"] = {text: 0.5}
    metrics = {text: [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}]}
    html = page.render(results, metrics, [problem], text)
    document = Document(html)
    plain = Document(render(metrics={"verify": metrics[text]}, browsed=sample_problems(1, 1)))
    assert document.tags <= plain.tags
    assert {name for name, _ in document.attributes} <= {name for name, _ in plain.attributes}
    shown = page.visible(text)
    assert document.text("h1") == shown
    assert document.text("text question") == shown
    assert document.text("text gold") == shown
    assert document.text("text tokens valued") == f"{shown}\n{shown}"
    assert document.text("text tokens") == f"{shown}\n{shown}"
    html.encode("utf-8")
    assert not re.search(
        "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069]", html
    )


def test_visible_keeps_what_can_be_seen() -> None:
    text = "3 × 4 = 12 €\n\t½ – “naïve” 数学 🍎"
    assert page.visible(text) == text
    assert page.visible("a\r\x1b\u202e\ud800\ufffe") == "a⟨U+000D⟩⟨U+001B⟩⟨U+202E⟩⟨U+D800⟩⟨U+FFFE⟩"


def test_undefined_names_raise() -> None:
    environment = page._environment()
    with pytest.raises(UndefinedError):
        environment.from_string("{{ absent }}").render()
    with pytest.raises(UndefinedError):
        render(results=without("commit"))


def test_refuses_what_it_cannot_name() -> None:
    with pytest.raises(ValueError, match="schema 2"):
        render(results=sample_results() | {"schema": 2})
    with pytest.raises(ValueError, match="oracle"):
        render(results=sample_results() | {"accuracy": {"oracle": []}})
    with pytest.raises(ValueError, match="differ in length"):
        BrowsedCompletion(["a", "b"], [0.5], [False, False], 0.5, True, "1", -1.0, 0)


def test_numbers_shown_are_the_numbers_given() -> None:
    results = sample_results()
    document = Document(render())
    table = document.text("table")
    for name, rows in results["accuracy"].items():
        for row in rows:
            if row["n"] in (1, 10, 100) or name == "greedy":
                low, high = 100 * row["low"], 100 * row["high"]
                assert f"{100 * row['value']:.1f}{low:.1f}–{high:.1f}" in table
    for row in results["paired"]:
        low, high = 100 * row["low"], 100 * row["high"]
        expected = f"{100 * row['difference']:+.1f}{low:+.1f} to {high:+.1f}".replace("-", "−")
        assert expected in document.text("paired")
    for name in ("auroc", "auroc_within", "brier", "ece"):
        assert f"{results['verifier'][name]:.3f}" in table
    for share in ("62.3", "27.1", "10.6"):
        assert share in document.text("key")
    assert results["commit"] in table
    assert document.text("text config").count("llama") == 1


def test_a_stage_that_was_cut_is_said_to_be_timed_in_part() -> None:
    told = "of sample, score in the last attempt alone"
    assert told in render(results=sample_results() | {"resumed": ["sample", "score"]})
    assert "last attempt" not in render(results=sample_results() | {"resumed": []})


def test_tokens_carry_their_values() -> None:
    problem = sample_problems(1, 1)[0]
    completion = BrowsedCompletion(
        ["a", "b", "c", "d"], [0.834, -0.3, 1.7, math.nan], [False, True, False, False],
        0.5, True, None, -1.0, 3,
    )  # fmt: skip
    html = render(browsed=[dataclasses.replace(problem, completions=[completion])])
    assert (
        '<span style="--v:0.83" title="0.83">a</span>'
        '<span class="forced" style="--v:0.00" title="-0.30">b</span>'
        '<span style="--v:1.00" title="1.70">c</span>d</div>'
    ) in html
    assert "no answer" in html


def headline(difference: float, half: float) -> str:
    results = sample_results()
    for row in results["paired"]:
        row |= {"difference": difference, "low": difference - half, "high": difference + half}
    return " ".join(page._headline(results, 300)).replace("\xa0", " ").replace("\u202f", " ")


def test_headline_says_what_the_interval_allows() -> None:
    ahead = headline(0.173, 0.054)
    assert "62.3 % [56.8, 67.8] of 300 problems at N = 100; greedy decoding 45.0 %" in ahead
    assert "is ahead of greedy decoding by +17.3 points [+11.9, +22.7], p < 0.001" in ahead
    assert "strongest free baseline is majority vote with 55.3 %" in ahead
    assert "is behind greedy decoding: −8.0 points [−9.0, −7.0]" in headline(-0.08, 0.01)
    for difference in (-0.01, 0.01):
        unclear = headline(difference, 0.05)
        assert "not established: its interval includes zero" in unclear
        assert "ahead" not in unclear
        assert "behind" not in unclear
    untested = " ".join(page._headline(without("paired"), 300))
    assert "without a paired test" in untested
    assert page._headline(BARE, 300) == ["Nothing has been measured yet."]
    assert page._headline(unscored(), 300)[-1] == "The verifier was not measured in this run."


def test_spread_keeps_order_and_distance() -> None:
    rng = random.Random(0)
    for size in range(1, 12):
        wanted = sorted(rng.uniform(0, 100) for _ in range(size))
        placed = figures.spread(wanted, 16)
        assert all(b - a >= 16 - 1e-9 for a, b in itertools.pairwise(placed))
        assert sum(placed) == pytest.approx(sum(wanted))
    assert figures.spread([0, 40, 80], 16) == [0, 40, 80]


def test_figures_take_their_colours_from_the_page() -> None:
    svg = "".join(re.findall(r"<svg.*?</svg>", render(), flags=re.DOTALL))
    assert "var(--verifier)" in svg
    assert not re.search(r"(fill|stroke): #", svg)
    defined = set(re.findall(r"(--[\w-]+):", render()))
    assert set(re.findall(r"var\((--[\w-]+)", render())) <= defined | {"--v"}


def test_long_curves_are_thinned_to_means() -> None:
    rows = [(step, float(step % 2)) for step in range(1000)]
    thinned = list(page._thinned(rows))
    assert len(thinned) <= 240
    assert sum(value for _, value in thinned) / len(thinned) == pytest.approx(0.5, abs=0.05)
    assert list(page._thinned(rows[:10])) == rows[:10]
