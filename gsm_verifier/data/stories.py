"""The language of the generated problems: compiles schemas and tells stories from them.

A schema (its text: see `schemas.py`) is a little graph. *Givens* are drawn, *rules* derive one
quantity from others, *facts* say them in words and an *ask* names the quantity wanted. A `Scene`
is one drawn instance. No solution is written down anywhere: it is the rules on which the asked
quantity depends, in order. Hence one story with several asks is several problems, and a fact that
the ask does not need is a natural distractor.
"""

import contextlib
import copy
import itertools
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from gsm_verifier.data import schemas

Value = int | Fraction

LARGEST = 9999  # above it GSM8K writes thousands separators


@dataclass(frozen=True)
class Level:
    """What a difficulty means.

    Attributes:
      wording: the highest level of comparisons in use, see `schemas.RELATIONS`.
      steps: fewest and most steps of a solution.
      size: the part of each range of numbers that is drawn from.
      distractors: probability of any, and the most there can be.
      keep: probability that a fact the ask does not need is told all the same.
      shuffle: probability that facts without a fixed order are shuffled.
      words: probability that a number up to twelve is written in words.
      phrasings: how many of the phrasings of a sentence are in use.
    """

    wording: int
    steps: tuple[int, int]
    size: float
    distractors: tuple[float, int]
    keep: float
    shuffle: float
    words: float
    phrasings: int


class Dice:
    """Random choices that no Python version changes: only `random()` is promised to be stable."""

    def __init__(self, seed: str) -> None:
        self._random = random.Random(seed).random

    def below(self, n: int) -> int:
        return int(self._random() * n)

    def pick(self, items: Sequence):
        return items[int(self._random() * len(items))]

    def chance(self, p: float) -> bool:
        return self._random() < p

    def shuffled(self, items: Sequence) -> list:
        left = list(items)
        return [left.pop(self.below(len(left))) for _ in items]


# --- numbers and expressions ------------------------------------------------------------------


def show(value: Value) -> str:
    """A number as annotations write it: 24, 2.5. The value has at most two decimals."""
    if isinstance(value, int) or value.denominator == 1:
        return str(int(value))
    hundredths = value * 100
    if hundredths.denominator != 1:
        raise ValueError(f"{value} has more than two decimals")
    return f"{int(hundredths) // 100}.{int(hundredths) % 100:02d}".rstrip("0")


def _price(value: Value) -> str:
    text = show(value)
    return "$" + (text + "0" if text[-2:-1] == "." else text)


def annotated(formula: str, value: Value, unit: str = "") -> str:
    """A calculation as solutions write it: `14*3 = $<<14*3=42>>42`."""
    return f"{formula} = {unit}<<{formula}={show(value)}>>{show(value)}"


def off(formula: str, difference: Value) -> str:
    """The line that holds what is found against what it should be."""
    return f"It is off by {annotated(formula, difference)}."


def divide(a: Value, b: Value) -> Value:
    """The exact quotient, an int where it is whole."""
    quotient = Fraction(a) / b
    return int(quotient) if quotient.denominator == 1 else quotient


_TOKEN = re.compile(r"\s*([a-z_]\w*|\d+(?:\.\d+)?|[-+*/()])")


class Expr:
    """An arithmetic expression over named quantities, parsed once."""

    def __init__(self, text: str) -> None:
        self.tokens = _TOKEN.findall(text)
        self.names = tuple(dict.fromkeys(t for t in self.tokens if t[0].isalpha() or t[0] == "_"))
        if "".join(self.tokens) != text.replace(" ", ""):
            raise ValueError(f"cannot read {text!r}")
        self._position = 0
        self.value = self._sum()
        if self._position != len(self.tokens):
            raise ValueError(f"cannot parse {text!r}")

    def text(self, values: Mapping[str, Value]) -> str:
        return "".join(show(values[t]) if t in values else t for t in self.tokens)

    def _next(self, among: str) -> str | None:
        if self._position < len(self.tokens) and self.tokens[self._position] in among:
            self._position += 1
            return self.tokens[self._position - 1]
        return None

    def _sum(self) -> Callable[[Mapping[str, Value]], Value]:
        left = self._product()
        while sign := self._next("+-"):
            left = self._join(sign, left, self._product())
        return left

    def _product(self) -> Callable[[Mapping[str, Value]], Value]:
        left = self._atom()
        while sign := self._next("*/"):
            left = self._join(sign, left, self._atom())
        return left

    def _atom(self) -> Callable[[Mapping[str, Value]], Value]:
        if self._next("("):
            inner = self._sum()
            if not self._next(")"):
                raise ValueError("missing )")
            return inner
        token = self.tokens[self._position]
        self._position += 1
        if token in self.names:
            return lambda values: values[token]
        constant = divide(Fraction(token), 1)
        return lambda values: constant

    @staticmethod
    def _join(sign: str, a: Callable, b: Callable) -> Callable[[Mapping[str, Value]], Value]:
        if sign == "+":
            return lambda v: a(v) + b(v)
        if sign == "-":
            return lambda v: a(v) - b(v)
        if sign == "*":
            return lambda v: a(v) * b(v)
        return lambda v: divide(a(v), b(v))


# --- schemas, compiled ------------------------------------------------------------------------


class Template:
    """A sentence with `{name}`, `{name.form}` and `{name~}` (a comparison) to be filled in."""

    def __init__(self, text: str) -> None:
        parts = re.split(r"\{([a-z_]\w*)(~|\.\w+)?\}", text)
        self.text = text
        self.head = parts[0]
        self.slots = [(n, (f or "").lstrip("."), after) for n, f, after in _threes(parts[1:])]
        self.names = {name for name, _, _ in self.slots}
        if re.search(r"[{}|]", "".join([self.head, *(after for _, _, after in self.slots)])):
            raise ValueError(f"bad placeholder in {text!r}")


def _threes(items: Sequence) -> Iterator[tuple]:
    return zip(items[0::3], items[1::3], items[2::3], strict=True)


def _phrasings(text: str) -> tuple[Template, ...]:
    return tuple(Template(part.strip()) for part in text.split(" | "))


Ask = tuple[str, tuple[Template, ...]]  # the quantity asked for, and phrasings of the question


@dataclass
class Given:
    """A quantity to draw: a range with a step, or one of a list."""

    choices: tuple[Value, ...]
    ranged: bool
    money: bool

    def within(self, size: float) -> Sequence[Value]:
        """The choices there are when ranges are cut to a part of them."""
        return (
            self.choices[: max(2, int(len(self.choices) * size))] if self.ranged else self.choices
        )


@dataclass
class Way:
    """One way in which a quantity comes about: how it is worked out, and how the story says so."""

    expr: Expr
    relation: Template | None = None
    level: int = 1
    fact: tuple[Template, ...] = ()
    optional: bool = False
    work: tuple[Template, ...] = ()


@dataclass
class Schema:
    """A family of problems; see the grammar in `schemas.py`."""

    name: str
    cast: dict[str, str] = field(default_factory=dict)
    givens: dict[str, Given] = field(default_factory=dict)
    rules: dict[str, list[Way]] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)
    story: list[tuple[str, str | tuple[Template, ...]]] = field(default_factory=list)
    distractors: list[Template] = field(default_factory=list)
    asks: list[Ask] = field(default_factory=list)
    limit: int = LARGEST
    checks: list[Expr] = field(default_factory=list)
    plain: bool = False  # general distractors would contradict the story

    def steps(self, target: str, ways: Mapping[str, Way]) -> list[str]:
        """The quantities to work out for `target`, in order."""
        needed = self.closure(target, ways)
        return [name for name in self.rules if name in needed]

    def closure(self, target: str, ways: Mapping[str, Way]) -> set[str]:
        """`target` and every quantity, given or derived, that it depends on."""
        found, todo = set(), [target]
        while todo:
            name = todo.pop()
            if name not in found:
                found.add(name)
                todo += ways[name].expr.names if name in ways else ()
        return found

    def step_counts(self, target: str, level: int) -> set[int]:
        """Every number of steps that `target` can take, over all ways there at this level."""
        distinct = []
        for name, ways in self.rules.items():
            by_parents = {
                tuple(n for n in way.expr.names if n in self.rules): (name, way)
                for way in ways
                if way.level <= level
            }
            distinct.append(list(by_parents.values()) or [(name, None)])
        counts = set()
        for combo in itertools.product(*distinct):
            ways = {name: way for name, way in combo if way}
            steps = self.steps(target, ways)
            if all(name in ways for name in steps):
                counts.add(len(steps))
        return counts


_HEAD = re.compile(r"(\$|\.)?([a-z]\w*)\s*(=|~<|~)\s*(.*)")


def compile_schema(name: str, text: str) -> Schema:
    """The schema a text of `gsm_verifier.data.schemas` writes down."""
    schema = Schema(name)
    current: list[Way] = []
    for line in _logical_lines(text):
        mark, _, rest = line.strip().partition(" ")
        inner = line.startswith("  ")
        if inner and mark in (">", "~"):
            for way in current:
                way.fact, way.optional = _phrasings(rest), mark == "~"
        elif inner and mark == "=":
            for way in current:
                way.work = _phrasings(rest)
        elif mark in (">", "&"):
            schema.story.append((mark, _phrasings(rest)))
        elif mark == "!":
            schema.distractors += _phrasings(rest)
        elif mark == "limit:":
            schema.limit = int(rest)
        elif mark == "check:":
            schema.checks.append(Expr(rest))
        elif mark == "!!":
            schema.plain = True
        elif mark == "?":
            targets, _, wording = rest.partition(" : ")
            schema.asks += [(target, _phrasings(wording)) for target in targets.split()]
        elif head := _HEAD.fullmatch(line):
            kind, target, sign, definition = head.groups()
            if target not in schema.rules:
                schema.rules[target] = []
                schema.story.append(("rule", target))
            schema.kinds[target] = kind or ""
            current = (
                [Way(Expr(definition))]
                if sign == "="
                else _relations(schema, target, definition, inverse=sign == "~<")
            )
            schema.rules[target] += current
        else:
            names, _, kind = line.partition(": ")
            for declared in names.split():
                if kind in schemas.WORDS:
                    schema.cast[declared] = kind
                else:
                    schema.givens[declared] = _given(kind)
    _lint(schema)
    return schema


def _logical_lines(text: str) -> Iterator[str]:
    """Lines with the deeper-indented ones that continue them, macros expanded."""
    lines: list[str] = []
    for line in text.strip("\n").splitlines():
        if line.startswith("    "):
            lines[-1] += " " + line.strip()
        elif line.startswith("then "):
            _, x, p, t = line.split()
            for tail in schemas.TAILS:
                filled = tail.replace("@x", x).replace("@p", p).replace("@t", t)
                lines += _logical_lines(filled)
        elif line.strip():
            lines.append(line)
    return iter(lines)


def _given(text: str) -> Given:
    money = text.startswith("$")
    text = text.lstrip("$")
    if ".." not in text:
        return Given(tuple(divide(Fraction(n), 1) for n in text.split(",")), False, money)
    span, _, step = text.partition("/")
    low, high = (Fraction(n) for n in span.split(".."))
    by = Fraction(step or 1)
    count = int((high - low) / by) + 1
    return Given(tuple(divide(low + i * by, 1) for i in range(count)), True, money)


def _relations(schema: Schema, target: str, definition: str, inverse: bool) -> list[Way]:
    """`b ~ a many t`: all the ways in which English compares b with a."""
    base, sort, noun, span, *_ = [*definition.split(), "", ""]
    if ".." in noun:
        noun, span = "", noun
    if noun in schema.cast:
        noun = "{" + noun + "}"
    extra = f"{target}_k"
    money = sort == "much"
    schema.givens[extra] = _given(("$" if money else "") + (span or "3..30"))
    forms = schemas.COMPARISONS[sort]
    ways = []
    for forward, backward, wording, level in schemas.RELATIONS:
        for slot, phrase in forms.items():
            wording = wording.replace(slot, phrase)
        wording = wording.replace("K", "{" + extra + "}").replace("NOUN", noun)
        formula = (backward if inverse else forward).replace("A", base).replace("K", extra)
        # Undoing a comparison is harder than following it, whatever the comparison is.
        ways.append(Way(Expr(formula), Template(wording), max(level, 2) if inverse else level))
    return ways


def _lint(schema: Schema) -> None:
    """A schema that would one day tell a story with a number missing does not load."""
    facts = [f for _, f in schema.story if not isinstance(f, str)]
    facts += [way.fact for ways in schema.rules.values() for way in ways]
    others = [way.work for ways in schema.rules.values() for way in ways]
    others += [wording for _, wording in schema.asks]
    known = {*schema.cast, *schema.givens, *schema.rules}
    for phrasings in facts + others:
        said = [t.names - set(schema.cast) for t in phrasings]
        uneven = phrasings in facts and any(s != said[0] for s in said)
        if uneven or not all(t.names <= known for t in phrasings):
            raise ValueError(f"{schema.name}: {[t.text for t in phrasings]}")
    for target, ways in schema.rules.items():
        if not all(set(way.expr.names) <= known and way.work for way in ways):
            raise ValueError(f"{schema.name}: rule {target}")
        if any(target not in t.names for way in ways for t in way.work):
            raise ValueError(f"{schema.name}: the work of {target} does not show it")


# --- telling a story --------------------------------------------------------------------------

MOST_TRIED = 12  # numbers that a hidden one could be: few enough to be found by trial
_TRIAL_ASK = (Template("What is x?"),)
_GENERAL_DISTRACTORS = [Template(text) for text in schemas.DISTRACTORS]


class Reject(Exception):
    """What was drawn makes no sensible story, or not one of the length wanted; draw again."""


class Scene:
    """One drawn instance of a schema: who, what, how many, and how each quantity came about.

    In a `trial` one of the givens is hidden: the story calls it x and tells the target instead. The
    solution's last step then holds what comes of x against it.
    """

    def __init__(
        self,
        schema: Schema,
        target: str,
        level: Level,
        steps: tuple[int, int],
        dice: Dice,
        trial: bool = False,
    ) -> None:
        self.schema, self.target, self.level, self.dice = schema, target, level, dice
        self.ways: dict[str, Way] = {}
        for name, ways in schema.rules.items():
            allowed = [way for way in ways if way.level <= level.wording]
            if allowed:
                self.ways[name] = dice.pick(allowed)
        self.steps = schema.steps(target, self.ways)
        if not steps[0] <= len(self.steps) <= steps[1] or set(self.steps) - set(self.ways):
            raise Reject
        self.values: dict[str, Value] = {
            name: dice.pick(given.within(level.size)) for name, given in schema.givens.items()
        }
        self.told = self._choose_facts()
        self._derive_all()
        self.stated = self.values[target]
        self.unknown = self._hide() if trial else ""
        self.cast = self._choose_cast()

    @property
    def answer(self) -> Value:
        return self.values[self.unknown or self.target]

    @property
    def fits(self) -> bool:
        """Does what is supposed lead to what is told?"""
        return self.values[self.target] == self.stated

    def supposing(self, value: Value) -> "Scene":
        """The same trial with another number for x, which what is told needn't fit.

        Raises:
          Reject: the story makes no sense with it.
        """
        other = copy.copy(self)
        other.values = self.values | {self.unknown: value}
        other._derive_all()
        return other

    def choices(self) -> Sequence[Value]:
        """The numbers that x could be, for all that is known of such stories."""
        return self.schema.givens[self.unknown].within(self.level.size)

    def _hide(self) -> str:
        """A given that can be hidden: told as a plain number, and the only one that fits."""
        schema, needed = self.schema, self.schema.closure(self.target, self.ways)
        told: dict[str, set[str]] = {}  # the forms in which every number is told
        for _, phrasings, rule in self.told:
            relation = self.ways[rule].relation if rule else None
            for template in (*phrasings, *([relation] if relation else [])):
                for i, (name, form, _) in enumerate(template.slots):
                    begins = not (i or template.head)  # a sentence, which x should not
                    told.setdefault(name, set()).add("begins" if begins else form)
        more = any(t.names - set(schema.cast) != {self.target} for t in self.ways[self.target].work)
        if more or self.stated == 1 or needed - set(schema.rules) - told.keys():
            raise Reject  # what comes of it can't be told alone; "1 hours"; an ask tells a number
        hidden = [
            name
            for name, given in schema.givens.items()
            if name in needed
            and told[name] == {""}
            and given.ranged
            and len(given.within(self.level.size)) <= MOST_TRIED
            and self._only(name)
        ]
        if not hidden:
            raise Reject
        return self.dice.pick(hidden)

    def _only(self, name: str) -> bool:
        """No other choice for this given leads to the same target."""
        fitting = 0
        for value in self.schema.givens[name].within(self.level.size):
            values = self.values | {name: value}
            with contextlib.suppress(ZeroDivisionError):
                for step in self.steps:
                    values[step] = self.ways[step].expr.value(values)
                fitting += values[self.target] == self.stated
        return fitting == 1

    def _derive_all(self) -> None:
        for name in self.schema.rules:
            if name in self._active:
                self._derive(name)
        if Fraction(self.values[self.target]).denominator != 1:
            raise Reject
        for check in self.schema.checks:
            if self.values.keys() >= set(check.names) and check.value(self.values) < 0:
                raise Reject

    def _derive(self, name: str) -> None:
        try:
            value = self.ways[name].expr.value(self.values)
        except ZeroDivisionError as error:
            raise Reject from error
        smallest = Fraction(1, 10) if self.schema.kinds[name] else 2  # 2: always the plural
        if not smallest <= value <= self.schema.limit:
            raise Reject
        if not isinstance(value, int) and (not self.schema.kinds[name] or 100 % value.denominator):
            raise Reject
        self.values[name] = value

    def _choose_facts(self) -> list[tuple[str, tuple[Template, ...], str]]:
        """(mark, phrasings, rule) of the facts to tell: the needed ones, and perhaps others."""
        schema = self.schema
        self._active = schema.closure(self.target, self.ways)
        told = []
        for mark, entry in schema.story:
            if mark == "rule":
                way = self.ways.get(entry)
                if not way or not way.fact:
                    continue
                said = self._said(way.fact[0], way) | {entry}
                wanted = entry in self._active
                # Without what it is compared with, a comparison means nothing.
                fits = way.optional and all(n in said or n in self._active for n in way.expr.names)
                if wanted or (fits and self.dice.chance(self.level.keep)):
                    told.append((mark, way.fact, entry))
                    self._active |= said
            else:
                said = entry[0].names - set(schema.cast)
                if not said or said & self._active or self.dice.chance(self.level.keep):
                    told.append((mark, entry, ""))
                    self._active |= said
        return told

    @staticmethod
    def _said(template: Template, way: Way) -> set[str]:
        return template.names | (way.relation.names if way.relation else set())

    def _choose_cast(self) -> dict[str, Mapping[str, str]]:
        cast: dict[str, Mapping[str, str]] = {}
        for name, kind in self.schema.cast.items():
            word = self.dice.pick(schemas.WORDS[kind])
            while word in cast.values():
                word = self.dice.pick(schemas.WORDS[kind])
            cast[name] = word
        return cast

    def say(self, phrasings: Sequence[Template], work: str = "", words: float = 0.0) -> str:
        """One of the phrasings with its gaps filled; `work` is the quantity shown worked out."""
        text = self._fill(self.dice.pick(phrasings[: self.level.phrasings]), work, words)
        return text[0].upper() + text[1:]

    def _fill(self, template: Template, work: str, words: float) -> str:
        parts = [template.head]
        for name, form, after in template.slots:
            if name in self.cast:
                parts.append(self.cast[name][form])
            elif form == "~":
                parts.append(self._fill(self.ways[name].relation, work, words))
            elif name == work:
                parts.append(self._worked(name))
            else:
                parts.append(self._number(name, form, words if after.startswith(" ") else 0.0))
            parts.append(after)
        return "".join(parts)

    def _money(self, name: str) -> bool:
        given = self.schema.givens.get(name)
        return given.money if given else self.schema.kinds[name] == "$"

    def _number(self, name: str, form: str, words: float) -> str:
        if name == self.unknown:
            return "$x" if self._money(name) else "x"
        value = self.values[name]
        if form:
            return schemas.NUMBER_FORMS[form].get(value) or f"{value} {form}"
        if self._money(name):
            return _price(value)
        if words and value in schemas.NUMBER_WORDS and self.dice.chance(words):
            return schemas.NUMBER_WORDS[value]
        return show(value)

    def _worked(self, name: str) -> str:
        formula, unit = self.ways[name].expr.text(self.values), "$" if self._money(name) else ""
        return annotated(formula, self.values[name], unit)

    def asked(self, ask: Sequence[Template]) -> str:
        """The sentence that asks: for the target in words of its own, or for x."""
        return self.say(_TRIAL_ASK if self.unknown else ask, words=self.level.words)

    def story(self) -> str:
        """All that is told, which a trial ends with what has come of it."""
        told = list(self.told)
        if self.dice.chance(self.level.shuffle):
            told = self._reordered(told)
        sentences = [self.say(phrasings, words=self.level.words) for _, phrasings, _ in told]
        for template in self.distractors():
            # Said of somebody else it goes last, or a later "she" could mean that person.
            stays = template.names & set(self.cast) <= {"p"}
            place = 1 + self.dice.below(len(sentences)) if stays else len(sentences)
            sentences.insert(place, self.distract(template))
        return " ".join([*sentences, *([self.outcome()] if self.unknown else [])])

    def outcome(self) -> str:
        """What the story of a trial says has come of x, whatever is supposed for it."""
        true = copy.copy(self)
        true.values = self.values | {self.target: self.stated}
        return true.work(self.target, worked=False)

    def supposition(self) -> str:
        return f"Let x be {show(self.values[self.unknown])}."

    def _reordered(self, told: list) -> list:
        """Shuffles each run of facts marked as free in their order."""
        groups = [list(group) for _, group in itertools.groupby(told, key=lambda fact: fact[0])]
        return [
            fact
            for group in groups
            for fact in (self.dice.shuffled(group) if group[0][0] == "&" else group)
        ]

    def distractors(self) -> list[Template]:
        """Sentences beside the point, as many as the level has it."""
        chance, most = self.level.distractors
        if not self.dice.chance(chance):
            return []
        own, general = self.schema.distractors, [] if self.schema.plain else _GENERAL_DISTRACTORS
        chosen: list[Template] = []
        for _ in range(1 + self.dice.below(most)):
            # Its own distractors speak of the same things as the story and mislead best.
            pool = own if own and (not general or self.dice.chance(0.5)) else general
            pool = [t for t in pool if t not in chosen]
            if pool:
                chosen.append(self.dice.pick(pool))
        return chosen

    def distract(self, template: Template) -> str:
        dice = self.dice
        parts = [template.head]
        for name, form, after in template.slots:
            if name == "n":
                parts.append(str(3 + dice.below(2 + int(60 * self.level.size))))
            elif name == "adult":
                parts.append(str(20 + dice.below(40)))
            elif name == "few":
                parts.append(str(2 + dice.below(8)))
            elif name == "m":
                parts.append(f"${2 + dice.below(2 + int(60 * self.level.size))}")
            else:
                parts.append(self.cast[name][form])
            parts.append(after)
        text = "".join(parts)
        return text[0].upper() + text[1:]

    def work(self, name: str, worked: bool = True) -> str:
        """How `name` is worked out or, not `worked`, merely what it is."""
        return self.say(self.ways[name].work, work=name if worked else "")

    def untold(self, ask: Sequence[Template]) -> set[str]:
        """The givens that the solution uses but the question does not tell: there must be none."""
        said = set() if self.unknown else set(ask[0].names)
        for _, phrasings, rule in self.told:
            said |= self._said(phrasings[0], self.ways[rule]) if rule else phrasings[0].names
        return self.schema.closure(self.target, self.ways) - set(self.schema.rules) - said

    def solution(self) -> str:
        return "\n".join([self.worked(), f"#### {show(self.answer)}"])

    def worked(self) -> str:
        """The lines that work the target out; a trial supposes a number and checks it last."""
        if not self.unknown:
            return "\n".join(self.work(name) for name in self.steps)
        lines = [self.work(name) for name in self.steps[:-1]]
        return "\n".join([self.supposition(), *lines, self.checked(), self.concluded()])

    def checked(self) -> str:
        """The last step less what is told: 0 if x fits, which the calculator finds out.

        What comes of x isn't worked out before: it would be the nearest number to subtract, and
        gold solutions, in which the two are equal, couldn't teach otherwise.
        """
        formula = self.ways[self.target].expr.text(self.values)
        return off(f"{formula}-{show(self.stated)}", self.values[self.target] - self.stated)

    def concluded(self) -> str:
        return f"So x is {show(self.answer)}."
