"""What a compiled program moves, read off its HLO text, every loop counted as often as it runs.

XLA's own cost analysis counts the body of a loop once, which hides all layers but one.
"""

import functools
import math
import re
from collections import Counter
from dataclasses import dataclass, field

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
)
_ARRAY = re.compile(r"([a-z]+)(\d*)[a-z0-9]*\[([\d,]*)\](\{[^}]*\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"(calls|body|condition|branch_computations)=(\{[^}]*\}|%[\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_GROUPS = re.compile(r"replica_groups=(?:\{\{([\d,]*)\}|\[\d+,(\d+)\])")
_FREE = {  # moves nothing by itself
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
    "call", "partition-id", "replica-id", "after-all", "opt-barrier",
}  # fmt: skip


@dataclass
class _Instruction:
    name: str
    type: str
    opcode: str
    operands: list[str]
    number: str  # of a parameter
    attributes: str
    root: bool

    @property
    def called(self) -> dict[str, list[str]]:
        return {key: _NAME.findall(names) for key, names in _CALLED.findall(self.attributes)}


@dataclass
class Traffic:
    """Of one device in one run of a program.

    Attributes:
      hbm: bytes read from and written to its main memory.
      collectives: bytes it sends in collectives, by kind.
    """

    hbm: float = 0.0
    collectives: Counter[str] = field(default_factory=Counter)


def traffic(text: str) -> Traffic:
    """The traffic of a compiled program; a loop of unknown length is counted once."""
    return _Module(text).traffic()


def _bytes(type_: str, everywhere: bool = False) -> float:
    """Bytes of the arrays of a type which lie in main memory, or of all."""
    total = 0.0
    for kind, bits, shape, layout in _ARRAY.findall(type_):
        if everywhere or "S(" not in layout:  # S(n): on the chip itself
            size = 1 if kind == "pred" else int(bits or 0) / 8
            total += size * math.prod(int(n) for n in shape.split(",") if n)
    return total


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at `start` closes."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match.group() == "(" else -1
        if not depth:
            return match.start()
    raise ValueError(f"unbalanced: {text[start : start + 80]}")


class _Module:
    def __init__(self, text: str):
        self._computations: dict[str, dict[str, _Instruction]] = {}
        self._entry = ""
        here: dict[str, _Instruction] = {}
        for line in text.splitlines():
            if line.startswith(("%", "ENTRY")) and line.endswith("{"):
                name = _NAME.search(line).group(1)  # type: ignore[union-attr]
                here = self._computations[name] = {}
                self._entry = name if line.startswith("ENTRY") else self._entry
            elif line.startswith("  ") and " = " in line:
                instruction = self._parse(line)
                here[instruction.name] = instruction

    @staticmethod
    def _parse(line: str) -> _Instruction:
        left, right = line.split(" = ", 1)
        end = _closing(right, 0) + 1 if right.startswith("(") else right.index(" ")
        opened = right.index("(", end)
        closed = _closing(right, opened)
        return _Instruction(
            name=_NAME.search(left).group(1),  # type: ignore[union-attr]
            type=right[:end],
            opcode=right[end:opened].strip(),
            operands=_NAME.findall(right[opened:closed]),
            number=right[opened + 1 : closed],
            attributes=right[closed:],
            root="ROOT" in left,
        )

    def traffic(self) -> Traffic:
        total = Traffic()
        self._add(total, self._entry, 1, fused=False)
        return total

    def _add(self, total: Traffic, computation: str, times: int, fused: bool) -> None:
        """Add a computation run so many times; of what is fused only collectives count."""
        here = self._computations[computation]
        for x in here.values():
            kind = x.opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                total.collectives[kind] += times * self._sent(here, x, kind)
            if not fused and x.opcode not in _FREE and not x.opcode.endswith("-done"):
                total.hbm += times * self._moved(here, x)
            trips = _TRIPS.search(x.attributes)
            for key, names in x.called.items():
                runs = int(trips.group(1)) if trips and key in ("body", "condition") else 1
                for name in names:
                    self._add(total, name, times * runs, fused or x.opcode == "fusion")

    def _sent(self, here: dict[str, _Instruction], x: _Instruction, kind: str) -> float:
        """Bytes a device sends around a ring of its group."""
        given = sum(_bytes(here[name].type, everywhere=True) for name in x.operands)
        groups = _GROUPS.search(x.attributes)
        if kind == "collective-permute" or not groups:
            return given
        n = int(groups.group(2) or len(groups.group(1).split(",")))
        rounds = {"all-gather": n - 1, "all-reduce": 2 * (n - 1) / n}
        return given * rounds.get(kind, (n - 1) / n)

    def _moved(self, here: dict[str, _Instruction], x: _Instruction) -> float:
        """Bytes of main memory an instruction reads and writes."""
        types = [here[name].type for name in x.operands]
        if x.opcode == "fusion":
            (inner,) = x.called["calls"]
            read = sum(
                min(_bytes(t), self._read(inner, i)) for i, t in enumerate(types) if _bytes(t)
            )
            return read + min(_bytes(x.type), self._written(inner))
        if x.opcode in ("dynamic-slice", "slice", "gather"):
            return 2 * _bytes(x.type)
        if x.opcode == "dynamic-update-slice":
            return 2 * _bytes(types[1])
        if x.opcode.endswith("-start"):  # its type has the operands and more beside the result
            return 2 * sum(map(_bytes, types))
        return sum(map(_bytes, types)) + _bytes(x.type)

    @functools.cache  # noqa: B019 - a module lives as long as one call
    def _users(self, computation: str) -> dict[str, list[tuple[_Instruction, int]]]:
        found: dict[str, list[tuple[_Instruction, int]]] = {}
        for x in self._computations[computation].values():
            for place, name in enumerate(x.operands):
                found.setdefault(name, []).append((x, place))
        return found

    def _read(self, computation: str, parameter: int) -> float:
        """Bytes a fused computation reads of a parameter: a slice of it, where it takes a slice."""
        for x in self._computations[computation].values():
            if x.opcode == "parameter" and x.number == str(parameter):
                return self._read_of(computation, x)
        return math.inf

    def _read_of(self, computation: str, read: _Instruction) -> float:
        total = 0.0
        for x, place in self._users(computation).get(read.name, []):
            if x.opcode in ("dynamic-slice", "slice", "gather") and place == 0:
                total += _bytes(x.type, everywhere=True)
            elif x.opcode == "dynamic-update-slice" and place == 0:
                continue  # written in place
            elif x.opcode == "bitcast":
                total += self._read_of(computation, x)
            elif x.opcode == "fusion":
                total += self._read(x.called["calls"][0], place)
            else:
                return math.inf
        return total

    def _written(self, computation: str) -> float:
        """Bytes a fused computation writes: the update, where it updates in place."""
        here = self._computations[computation]
        root = next(x for x in here.values() if x.root)
        while root.opcode == "bitcast" and root.operands[0] in here:
            root = here[root.operands[0]]
        if root.opcode == "fusion":
            return self._written(root.called["calls"][0])
        if root.opcode == "dynamic-update-slice":
            return _bytes(here[root.operands[1]].type, everywhere=True)
        return math.inf
