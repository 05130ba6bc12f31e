"""The generated problems and documents: right, readable, disjoint, and the same everywhere."""

import contextlib
import hashlib
import itertools
import re
from statistics import mean

import pytest

from gsm_verifier.data import synthetic
from gsm_verifier.data.stories import Dice, Expr, Reject, Scene, Template, compile_schema
from gsm_verifier.text import answers, calculator

# After an intended change of the generator:
#   python -c "from tests.test_synthetic import digests; print(digests())"
GOLDEN = {
    "problems": "9f5ac3ef4fd46c4eee03a02ff6e5669cec0b6b500771840b1bbcc5661b10f716",
    "documents": "6f16416c9476eda772b04b2a9fffcc74ba8a578a1f61a7e0d6e011dd8450fad5",
}


def digests() -> dict[str, str]:
    problems = [
        (problem.id, problem.question, problem.solution)
        for level in synthetic.LEVELS
        for problem in synthetic.generate("train", 40, seed=0, difficulty=level)
    ]
    texts = {"problems": problems, "documents": list(synthetic.documents(200, seed=0))}
    return {name: hashlib.sha256(repr(text).encode()).hexdigest() for name, text in texts.items()}


@pytest.fixture(scope="module")
def by_level():
    return {
        level: list(itertools.islice(synthetic.stream("train", 1, level), 800))
        for level in synthetic.LEVELS
    }


@pytest.fixture(scope="module")
def problems(by_level):
    return [problem for level in by_level.values() for _, problem in level]


def _scenes(schema, target, level, count, trial=False):
    dice = Dice(f"test/{schema.name}/{target}")
    found = []
    for _ in range(3000):
        try:
            found.append(Scene(schema, target, synthetic.LEVELS[level], (1, 9), dice, trial))
        except Reject:
            continue
        if len(found) == count:
            break
    return found


def _is_trial(problem):
    return problem.question.endswith(" What is x?")


def test_golden():
    assert digests() == GOLDEN


def test_all_schemas_are_reached(by_level):
    assert len(synthetic.SCHEMAS) >= 40
    assert {name for level in by_level.values() for name, _ in level} == set(synthetic.SCHEMAS)
    assert len({name for name, _ in by_level[2]}) >= 40


@pytest.mark.parametrize("name", synthetic.SCHEMAS)
def test_every_ask_of_a_schema_can_be_told(name):
    schema = synthetic.SCHEMAS[name]
    opening = schema.story[0][1]
    for target, ask in schema.asks:
        scenes = _scenes(schema, target, level=4, count=8)
        assert len(scenes) >= 4, f"{target}: its numbers almost never come out even"
        for scene in scenes:
            assert not scene.untold(ask)
            assert scene.told[0][1] is opening, f"{target}: the story lacks its first sentence"


def test_a_story_has_many_questions():
    asks = [ask for schema in synthetic.SCHEMAS.values() for ask in schema.asks]
    assert len(asks) >= 3 * len(synthetic.SCHEMAS)


def test_annotations_are_what_the_calculator_writes(problems):
    for problem in problems:
        assert calculator.annotations(problem.solution)
        assert not calculator.check(problem.solution)
        for match in re.finditer(r"<<([^=]+)=([^>]+)>>(\S+)", problem.solution):
            before = problem.question + "\n" + problem.solution[: match.start(2)]
            assert calculator.open_expression(before) == match[1]
            assert calculator.evaluate(match[1], context=before) == match[2]
            assert match[3].rstrip(".,") == match[2]


def test_final_answers(problems):
    for problem in problems:
        last = problem.solution.splitlines()[-1]
        answer = answers.extract(problem.solution)
        assert last == f"#### {answer}"
        assert answer.isdecimal()
        assert 0 < int(answer) < 10_000
        if _is_trial(problem):
            assert problem.solution.startswith(f"Let x be {answer}.\n")
        else:
            assert answer == calculator.annotations(problem.solution)[-1][1]


def test_solutions_use_only_numbers_they_have(problems):
    """Every operand stands in the question, is an earlier result, or belongs to the wording."""
    implied = {"1", "2", "3", "4", "5", "7", "10", "12", "25", "60", "100", "1000"}
    words = {w: str(n) for n, w in synthetic.schemas.NUMBER_WORDS.items()}
    for problem in problems:
        known = set(implied)
        for token in re.findall(r"[a-z]+|\d+(?:\.\d+)?", problem.question.lower()):
            known |= {words.get(token, token), re.sub(r"(\.\d)0$", r"\1", token)}
        if _is_trial(problem):
            known.add(answers.extract(problem.solution))
        for expression, result in calculator.annotations(problem.solution):
            assert set(re.findall(r"\d+(?:\.\d+)?", expression)) <= known, problem
            known.add(result)


def test_trials_hide_one_number_and_tell_what_comes_of_it(by_level):
    for found in by_level.values():
        trials = [problem for _, problem in found if _is_trial(problem)]
        assert len(trials) / len(found) == pytest.approx(synthetic.TRIALS, abs=0.08)
        for problem in trials:
            story = problem.question.removesuffix(" What is x?")
            assert len(re.findall(r"(?<![a-z])x(?![a-z])", story)) >= 1, story
            check, zero = calculator.annotations(problem.solution)[-1]
            assert zero == "0"
            assert f"So x is {answers.extract(problem.solution)}.\n####" in problem.solution
            outcome = check.rpartition("-")[2]
            told = story.split(". ")[-1]
            assert re.search(rf"(?<![\d.]){re.escape(outcome)}(?!\d)", told), problem


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_share_of_trials_can_be_set(share):
    assert {_is_trial(p) for p in synthetic.generate("train", 20, 0, 1, share)} == {share == 1.0}


def test_only_one_number_fits_a_trial():
    tried = set()
    for schema in synthetic.SCHEMAS.values():
        for target, _ in schema.asks:
            for scene in _scenes(schema, target, level=2, count=3, trial=True):
                fitting = []
                for value in scene.choices():
                    with contextlib.suppress(Reject):
                        fitting += [value] if scene.supposing(value).fits else []
                assert fitting == [scene.answer]
                tried.add(schema.name)
    assert len(tried) >= 40


def test_levels(by_level):
    steps, lengths = [], []
    for level, found in by_level.items():
        low, high = synthetic.LEVELS[level].steps
        counts = [len(calculator.annotations(problem.solution)) for _, problem in found]
        assert (min(counts), max(counts)) == (low, high)
        steps.append(mean(counts))
        lengths.append(mean(len(problem.question.split()) for _, problem in found))
    assert steps == sorted(steps)
    assert steps[-1] > steps[0] + 1.5
    assert lengths == sorted(lengths)


def _unused_numbers(problem):
    told = re.findall(r"\d+", problem.question)
    used = re.findall(r"\d+", problem.solution)
    return set(told) - set(used)


def test_distractors(by_level):
    share = {
        level: mean(bool(_unused_numbers(problem)) for _, problem in found)
        for level, found in by_level.items()
    }
    assert share[1] < 0.1
    assert 0.3 < share[2] < share[4] < share[5]


def test_text_is_clean(problems):
    for problem in problems:
        text = problem.question + " " + problem.solution
        assert not re.search(r"[{}|@~]|\s\s|\bNone\b| ,|\.\.|\?.*\?", text), text
        assert problem.question.endswith("?")
        assert ". " in problem.question  # what keeps documents free of questions
        assert not re.search(r"\ba [aeio]\w|\ban (?!hour)[^aeiou8]", text), text
        assert not re.search(r"(?<![\d.$])1 [a-z]+s\b", problem.question), text
        for sentence in re.split(r"(?<=[.?]) ", problem.question):
            assert sentence[0].isupper() or sentence[0] in "$0123456789", text
        for line in problem.solution.splitlines()[:-1]:
            assert line.endswith("."), text


def test_sizes_at_the_default_level(by_level):
    questions = [len(problem.question.split()) for _, problem in by_level[2]]
    solutions = [len(problem.solution.split()) for _, problem in by_level[2]]
    assert 30 <= mean(questions) <= 50
    assert 20 <= mean(solutions) <= 50
    assert max(questions) <= 80


def test_ids_and_uniqueness():
    found = synthetic.generate("heldout", 300, seed=3)
    assert [problem.id for problem in found] == [f"heldout-{i:05d}" for i in range(300)]
    assert len({problem.question for problem in found}) == 300


def test_splits_are_disjoint_whatever_the_seed():
    questions = {
        split: {
            problem.question
            for seed in (0, 1)
            for size, level in ((400, 1), (200, 2))
            for problem in synthetic.generate(split, size, seed, level)
        }
        for split in synthetic.SPLITS
    }
    for a, b in itertools.combinations(questions.values(), 2):
        assert not a & b
    for split, found in questions.items():
        assert {synthetic.split_of(question) for question in found} == {split}


def test_prefix_and_seed():
    assert synthetic.generate("test", 60, seed=5) == synthetic.generate("test", 120, seed=5)[:60]
    assert synthetic.generate("test", 60, seed=5) != synthetic.generate("test", 60, seed=6)
    few, many = synthetic.documents(50, seed=5), synthetic.documents(100, seed=5)
    assert list(few) == list(many)[:50]


@pytest.mark.parametrize(("split", "difficulty"), [("dev", 2), ("train", 0), ("train", 6)])
def test_unknown_names_are_refused(split, difficulty):
    with pytest.raises(ValueError, match="is none of"):
        synthetic.generate(split, 1, 0, difficulty)


def test_documents_contain_no_question(problems):
    corpus = list(synthetic.documents(4000, seed=0))
    text = "\n\n".join(corpus)
    for problem in problems[:1500]:
        assert problem.question not in text
    for document in corpus:
        # The structural reason: a question is said only at the very start, with no story before.
        head, mark, rest = document.partition("?")
        assert not mark or head.startswith('"')
        assert "?" not in rest
        assert not re.search(r"[{}|@~]", document), document


def test_documents_work_out_stories_of_the_train_split_only():
    for level in (1, 2):
        whole = [
            document.split("\n")[0] + " What is x?"
            for document in synthetic.documents(3000, seed=1, difficulty=level)
            if document.endswith(synthetic.schemas.FITS) and "Let x be" in document
        ]
        assert len(whole) > 200
        assert {synthetic.split_of(question) for question in whole} == {"train"}


def test_documents_tell_answers_of_the_train_split_only(monkeypatch):
    """Here the questions that begin with a letter before M."""
    early = re.compile("[A-L]")
    others = "".join(synthetic.documents(500, seed=1))
    assert re.search(r"(?m)^[M-Z].*\n(.*\n)+?#### ", others)
    monkeypatch.setattr(
        synthetic, "split_of", lambda question: "train" if early.match(question) else "test"
    )
    answered = [text for text in synthetic.documents(500, seed=1) if "####" in text]
    assert len(answered) > 200
    assert all(early.match(text) for text in answered)


def test_documents_are_sound_and_varied():
    corpus = list(synthetic.documents(3000, seed=2))
    assert len(set(corpus)) > 2900
    worked = [document for document in corpus if "<<" in document]
    assert 0.4 < len(worked) / len(corpus) < 0.9
    for document in worked:
        for expression, result in calculator.annotations(document):
            assert calculator.evaluate(expression) == result


def test_documents_share_the_words_of_the_problems_of_their_difficulty(by_level):
    def words(texts):
        return {w for text in texts for w in re.findall(r"[A-Za-z']+", text)}

    learned = words(synthetic.documents(8000, seed=0))
    problems = [problem for _, problem in by_level[2]]
    asked = words(text for problem in problems for text in (problem.question, problem.solution))
    assert len(asked - learned) <= 0.02 * len(asked)
    assert len(asked) < 1000  # a small vocabulary is enough


def test_expressions():
    values = {"a": 6, "b": 4}
    assert Expr("2 * a + b").value(values) == 16
    assert Expr("(a - b) / 2").text(values) == "(6-4)/2"
    assert Expr("a - b - 1").value(values) == 1
    assert Expr("a / b").value(values) * 2 == 3
    for bad in ("a +", "a % b", "(a", "a b"):
        with pytest.raises((ValueError, IndexError)):
            Expr(bad)


@pytest.mark.parametrize(
    "broken",
    [
        "p: person\n> {p} has {a} cats.",  # no such quantity
        "p: person\na: 2..9\n> {p} has {a} cats. | {p} has cats.",  # the phrasings differ
        "p: person\na: 2..9\n> {p} has {a} cats.\nb = a * 2\n  = So many.",  # result not shown
        "p: person\na: 2..9\n> {p} has {a} cats.\nb = a * c\n  = {p} has {b}.",  # no such parent
    ],
)
def test_a_broken_schema_does_not_load(broken):
    with pytest.raises(ValueError, match="broken"):
        compile_schema("broken", broken)


def test_nothing_overflows():
    schema = synthetic.SCHEMAS["water tank"]
    for scene in _scenes(schema, "after", level=5, count=100):
        assert scene.values["now"] <= scene.values["size"]


def test_placeholders_are_checked():
    with pytest.raises(ValueError, match="placeholder"):
        Template("{p has a cat.")
