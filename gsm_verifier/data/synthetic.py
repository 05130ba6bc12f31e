"""Generated word problems in GSM8K's format, and plain text to pretrain a small model on.

Every experiment of the paper needs a base model that knows language, and problems that it does not
yet solve. `documents` gives the first and `generate` the second, small enough for a CPU:

    train = generate("train", size=5000, seed=0)
    test = generate("test", size=400, seed=0)
    corpus = documents(size=50000, seed=0)

The world they share (people, things, stories) is data in `schemas.py`; `stories.py` tells it.

Some of the problems ask for what comes of a story's numbers. The others are trials: a number is
hidden as x, what comes of it is told, and the solution supposes a number for x, works the story
with it and subtracts what is told. Such a problem is easier to check than to solve, which is what a
verifier lives on: the number is a guess, but whether it fits can be read off the last step.

Levels of difficulty (the numbers are in `LEVELS`):
  1  2-3 steps, small numbers, nothing irrelevant, the plainest wording
  2  2-4 steps, some irrelevant numbers, comparisons to be undone ("that is 3 more than Tom has")
  3  2-6 steps, larger numbers, facts in free order, some numbers in words
  4  3-8 steps, irrelevant numbers more often than not
  5  4-8 steps, the full range of numbers, mostly one to three irrelevant numbers
"""

import hashlib
import itertools
import re
from collections.abc import Iterator, Sequence
from functools import cache

from gsm_verifier.data import schemas
from gsm_verifier.data.stories import (
    Ask,
    Dice,
    Level,
    Reject,
    Scene,
    Schema,
    Template,
    annotated,
    compile_schema,
    divide,
    off,
    show,
)
from gsm_verifier.records import Problem
from gsm_verifier.text import answers, calculator

LEVELS = {
    1: Level(1, (2, 3), 0.30, (0.0, 0), keep=0.0, shuffle=0.0, words=0.0, phrasings=1),
    2: Level(2, (2, 4), 0.50, (0.4, 1), keep=0.4, shuffle=0.0, words=0.0, phrasings=9),
    3: Level(3, (2, 6), 0.70, (0.5, 1), keep=0.5, shuffle=0.5, words=0.2, phrasings=9),
    4: Level(4, (3, 8), 0.85, (0.6, 2), keep=0.6, shuffle=0.5, words=0.3, phrasings=9),
    5: Level(5, (4, 8), 1.00, (0.9, 3), keep=0.8, shuffle=0.5, words=0.4, phrasings=9),
}
TRIALS = 0.5  # the share of problems that are trials
# A question belongs to the one split that its own hash points at, whatever seed or size drew it.
SPLITS = {"train": (0, 50), "heldout": (50, 75), "test": (75, 100)}

SCHEMAS: dict[str, Schema] = {
    name: compile_schema(name, text) for name, text in schemas.TEXTS.items()
}


@cache
def _menu(level: int, low: int, high: int) -> list[tuple[Schema, list[Ask]]]:
    """The schemas, each with its asks, that can take `low` to `high` steps at this level."""
    wanted = set(range(low, high + 1))
    menu = []
    for schema in SCHEMAS.values():
        asks = [ask for ask in schema.asks if schema.step_counts(ask[0], level) & wanted]
        if asks:
            menu.append((schema, asks))
    return menu


def _scene(
    dice: Dice, level: int, steps: tuple[int, int], trials: float = TRIALS
) -> tuple[Scene, tuple[Template, ...]]:
    """A sensible instance of any schema, and the wordings of its question."""
    trial = dice.chance(trials)
    while True:
        schema, asks = dice.pick(_menu(level, *steps))
        target, ask = dice.pick(asks)
        # Most need a few tries. Giving up on the rest costs less than waiting for rare numbers.
        for _ in range(60):
            try:
                return Scene(schema, target, LEVELS[level], steps, dice, trial), ask
            except Reject:
                continue


def _verify(scene: Scene, ask: Sequence[Template], problem: Problem) -> None:
    """Raises unless the question tells all that the solution uses, and the solution is right."""
    faults = [f"{name} is not told" for name in scene.untold(ask)]
    for expression, result in calculator.annotations(problem.solution):
        if calculator.evaluate(expression) != result:
            faults.append(f"{expression} is not {result}")
    if answers.extract(problem.solution) != show(scene.answer):
        faults.append("wrong final answer")
    if faults:
        raise ValueError(f"schema {scene.schema.name!r}: {'; '.join(faults)}: {problem}")


def split_of(question: str) -> str:
    """The only split this question may appear in."""
    bucket = int(hashlib.sha256(question.encode()).hexdigest()[:8], 16) % 100
    return next(name for name, (low, high) in SPLITS.items() if low <= bucket < high)


def stream(
    split: str, seed: int, difficulty: int = 2, trials: float = TRIALS
) -> Iterator[tuple[str, Problem]]:
    """(name of the schema, problem) without end; each question at most once.

    Args:
      trials: the share of them that are trials.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is none of {list(SPLITS)}")
    if difficulty not in LEVELS:
        raise ValueError(f"difficulty {difficulty!r} is none of {list(LEVELS)}")
    dice = Dice(f"problems/{split}/{seed}/{difficulty}")
    seen: set[str] = set()
    while True:
        scene, ask = _scene(dice, difficulty, LEVELS[difficulty].steps, trials)
        question = f"{scene.story()} {scene.asked(ask)}"
        if question in seen or split_of(question) != split:
            continue
        problem = Problem(f"{split}-{len(seen):05d}", question, scene.solution())
        _verify(scene, ask, problem)
        seen.add(question)
        yield scene.schema.name, problem


def generate(
    split: str, size: int, seed: int, difficulty: int = 2, trials: float = TRIALS
) -> list[Problem]:
    """The first `size` problems of a split for a seed; `trials` as in `stream`.

    Splits share no question, whatever their sizes and seeds, and a larger size only adds.
    """
    found = itertools.islice(stream(split, seed, difficulty, trials), size)
    return [problem for _, problem in found]


# --- text for pretraining ---------------------------------------------------------------------


def documents(size: int, seed: int, difficulty: int = 2, trials: float = TRIALS) -> Iterator[str]:
    """Short texts from the same world, for the language model that fine-tuning starts from.

    They teach the words, the copying of numbers and names, the annotations, arithmetic in context,
    and to tell a right step or a fitting number from others. Some work a story of the train split
    out to its answer; but no question is ever followed by its story or its solution. A question
    mark occurs only in the first sentence of a document, while every question of `generate` has a
    statement before it: so no document contains one.
    """
    dice = Dice(f"documents/{seed}/{difficulty}")
    fewest, most = LEVELS[difficulty].steps
    steps = fewest, most + 1  # a little more than is asked for

    def drawn() -> tuple[Scene, tuple[Template, ...]]:
        scene, ask = _scene(dice, difficulty, steps, trials)
        return _supposed(scene), ask

    for _ in range(size):
        u = dice.below(100)
        if u < 8:
            yield _drill(dice, LEVELS[difficulty].size)
        elif u < 16:
            yield _copying(dice)
        elif u < 18:
            yield _compared(dice)
        else:
            scene, ask = drawn()
            if u < 25:
                yield _one_step(scene)
            elif u < 35:
                yield _judged(scene)
            elif u < 40:
                yield _retold(scene)
            elif u < 45:
                other, _ = _scene(dice, difficulty, steps, trials)
                name = dice.pick(schemas.WORDS["person"])[""]
                asked = dice.pick(schemas.ASKING).format(name=name, ask=scene.asked(ask))
                yield f"{asked} {_excerpt(other)}"
            else:
                story = scene.story()
                while any(split_of(f"{story} {scene.asked((w,))}") != "train" for w in ask):
                    scene, ask = drawn()
                    story = scene.story()
                yield _worked(scene, story)


def _supposed(scene: Scene) -> Scene:
    """A trial with some number for x that makes sense, whether it fits or not."""
    if not scene.unknown:
        return scene
    for _ in range(20):
        try:
            return scene.supposing(scene.dice.pick(scene.choices()))
        except Reject:
            continue
    return scene


def _worked(scene: Scene, story: str) -> str:
    """A story and its steps to the end; in a trial, for some numbers that fit or don't."""
    if not scene.unknown:
        return f"{story}\n{scene.solution()}"
    scenes = [scene, *(_supposed(scene) for _ in range(scene.dice.below(3)))]
    tried = {supposed.answer: supposed for supposed in scenes}.values()
    return "\n".join([story, *(f"{s.solution()}\n{schemas.FITS[s.fits]}" for s in tried)])


def _excerpt(scene: Scene) -> str:
    """Two or three sentences of a story in a row, and perhaps something beside the point."""
    first = scene.dice.below(max(1, len(scene.told) - 1))
    length = 2 + scene.dice.below(2)
    told = [scene.say(f, words=0.1) for _, f, _ in scene.told[first : first + length]]
    return " ".join([*told, *map(scene.distract, scene.distractors())])


def _retold(scene: Scene) -> str:
    """An excerpt, then the same numbers again: in other words, or as results of an unseen step."""
    text = _excerpt(scene)
    if scene.dice.chance(0.5):
        first = scene.dice.below(len(scene.steps))
        known = " ".join(scene.work(name, worked=False) for name in scene.steps[first : first + 2])
        return f"{text} {known} {known}"
    fact = scene.dice.pick(scene.told)[1]
    return f"{text} {scene.say(fact)} {scene.dice.pick(schemas.AGAIN)} {scene.say(fact)}"


def _known(scene: Scene) -> tuple[str, list[str]]:
    """One or two steps of a longer solution, and what they rest on, told as known."""
    dice, steps = scene.dice, scene.steps
    count = 1 + (len(steps) > 2 and dice.chance(0.3))
    first = dice.below(len(steps) - count + 1)
    shown = steps[first : first + count]
    parents = {n for name in shown for n in scene.ways[name].expr.names} - set(shown)
    context = []
    for _, phrasings, rule in scene.told:
        said = phrasings[0].names
        if rule in shown or (not rule and said & parents):
            context.append(scene.say(phrasings, words=0.1))
    context += [scene.work(name, worked=False) for name in steps if name in parents]
    if scene.unknown in parents:
        context.append(scene.supposition())
    return " ".join(context), shown


def _one_step(scene: Scene) -> str:
    """Something known, and the one or two steps that rest on it."""
    known, shown = _known(scene)
    return "\n".join([*([known] if known else []), *(scene.work(name) for name in shown)])


def _judged(scene: Scene) -> str:
    """Something known, and tries at the steps that rest on it, each called right or wrong."""
    known, shown = _known(scene)
    lines = [known] if known else []
    for _ in range(3 + scene.dice.below(3)):
        line = scene.work(scene.dice.pick(shown))
        spoilt = _spoil(line, known, scene.dice) if scene.dice.chance(0.5) else line
        lines.append(f"{spoilt} {'Right' if spoilt == line else 'Wrong'}.")
    return "\n".join(lines)


def _spoil(line: str, known: str, dice: Dice) -> str:
    """A step with another number or sign in its expression, rightly calculated."""
    (expression, result), *_ = calculator.annotations(line)
    numbers = [*re.findall(r"\d+", known), str(1 + dice.below(30))]
    places = list(re.finditer(r"\d+(?:\.\d+)?|[-+*/]", expression))
    place = dice.pick(places)
    if place[0] in "+-*/":
        other = dice.pick([sign for sign in "+-*" if sign != place[0]])
    else:
        other = dice.pick([*numbers, place[0] + str(dice.below(10)), place[0][1:] or "1"])
    wrong = expression[: place.start()] + other + expression[place.end() :]
    value = calculator.evaluate(wrong)
    if value is None or value == result or value.startswith("-"):
        return line
    return line.replace(expression, wrong).replace(f"={result}>>{result}", f"={value}>>{value}")


def _drill(dice: Dice, size: float) -> str:
    """A few bare calculations with their annotations."""
    lines = []
    for _ in range(2 + dice.below(3)):
        small, large = 2 + dice.below(12), 2 + dice.below(int(400 * size))
        formula, result = dice.pick(
            (
                (f"{large}+{small}", large + small),
                (f"{large}+{large + small}", large + large + small),
                (f"{large + small}-{small}", large),
                (f"{large + small}-{large}", small),
                (f"{large}*{small}", large * small),
                (f"{large * small}/{small}", large),
                (f"{large}/4", divide(large, 4)),
                (f"{large}*{5 * small}/100", divide(large * small, 20)),
            )
        )
        lines.append(annotated(formula, result))
    return "\n".join(lines)


def _compared(dice: Dice) -> str:
    """Pairs of numbers, the same or nearly so, called that."""
    lines = []
    for _ in range(2 + dice.below(3)):
        one = str(1 + dice.below(10 ** (1 + dice.below(4))))
        place = dice.below(len(one))
        other = one[:place] + str(1 + dice.below(9)) + one[place + 1 :]
        other = one if dice.chance(0.4) else other
        checked = off(f"{other}-{one}", int(other) - int(one))
        lines.append(f"It should be {one}. It is {other}. {checked} {schemas.FITS[one == other]}")
    return "\n".join(lines)


def _copying(dice: Dice) -> str:
    """A list of numbers, names and things, twice: each is too rare in stories to teach copying."""
    items = []
    for _ in range(3 + dice.below(6)):
        number = str(dice.below(10 ** (1 + dice.below(3))))
        word = dice.pick(schemas.WORDS[dice.pick(("person", "person", *schemas.WORDS))])[""]
        items.append(number if dice.chance(0.4) else word)
    listed = " ".join(items)
    return f"{listed} {dice.pick(schemas.AGAIN)} {listed}"
