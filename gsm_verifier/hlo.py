"""What a compiled program does, read off its HLO: every loop counted as often as it runs.

XLA's own cost analysis counts the body of a loop once, which of 32 scanned layers hides 31. Loops
say how often they run: on CPU in so many words, on TPU by the number their counter is compared
with. One that its data
end, as the sampler's, is taken to run as often as the caller says. Of what is fused only the
products and collectives count, and memory where the fusion reads and writes it; of what lies in
the chip's own fast memory nothing.
"""

import functools
import itertools
import math
import re
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from gsm_verifier.model import cpu_kernels

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
_CALLED = re.compile(r"(calls|body|condition|branch_computations|to_apply)=(\{[^}]*\}|%[\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_GROUPS = re.compile(  # their size: of a list, of an iota, of named axes of a mesh
    r"replica_groups=(?:\{\{([\d,]*)\}|\[\d+,(\d+)\]|mesh\[([^\]]*)\] ?\{([^}]*)\})"
)
_SIZE = re.compile(r"'(\w+)'=(\d+)")
_PART = re.compile(r"'(\w+)'(?::\(\d+\)(\d+))?")
_GEMM = re.compile(r'"__cublas\$.*"lhs_contracting_dimensions":\[([^\]]*)\]')
_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
_SLICES = ("dynamic-slice", "slice", "gather")
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # in place, of the first operand, by which
_FREE = {  # moves nothing by itself
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
    "call", "partition-id", "replica-id", "after-all", "opt-barrier", "async-start",
}  # fmt: skip


@dataclass
class Work:
    """Of one device in one run of a program.

    Attributes:
      flops: multiplications and additions of its matrix products.
      hbm: bytes read from and written to its main memory.
      sent: bytes it sends to other devices, by kind of collective, around rings.
    """

    flops: float = 0.0
    hbm: float = 0.0
    sent: Counter[str] = field(default_factory=Counter)


def work(text: str, steps: int = 1) -> Work:
    """The work of a compiled program, of its text.

    Args:
      steps: how often a loop runs that doesn't say so, since its data end it.
    """
    module, total = _Module(text, steps), Work()
    module.add(total, module.entry, 1, None)
    return total


@dataclass
class _Instruction:
    name: str
    type: str
    opcode: str
    operands: list[str]
    number: str  # of a parameter, value of a constant
    attributes: str
    root: bool

    @property
    def called(self) -> dict[str, list[str]]:
        found = _CALLED.findall(self.attributes)
        if self.opcode != "call":  # what a reduction applies is no product
            found = [(key, names) for key, names in found if key != "to_apply"]
        return {key: _NAME.findall(names) for key, names in found}


def _shapes(type_: str) -> list[list[int]]:
    return [[int(n) for n in shape.split(",") if n] for _, _, shape, _ in _ARRAY.findall(type_)]


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


def _parse(line: str) -> _Instruction:
    left, right = line.split(" = ", 1)
    end = _closing(right, 0) + 1 if right.startswith("(") else right.index(" ")
    opened = right.index("(", end)
    closed = _closing(right, opened)
    return _Instruction(
        name=left.split("%")[-1].strip(),
        type=right[:end],
        opcode=right[end:opened].strip(),
        operands=_NAME.findall(right[opened:closed]),
        number=right[opened + 1 : closed],
        attributes=right[closed:],
        root="ROOT" in left,
    )


def _dot(x: _Instruction, types: list[str]) -> float:
    (out,), (lhs,) = _shapes(x.type), _shapes(types[0])
    contracting = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", x.attributes)
    axes = contracting.group(1).split(",") if contracting else []
    return 2 * math.prod(out) * math.prod(lhs[int(axis)] for axis in axes if axis)


def _gemm(x: _Instruction, types: list[str]) -> float:
    """A matrix product as GPUs have it, which cuBLAS computes; its second result is scratch."""
    out, (lhs,) = _shapes(x.type)[0], _shapes(types[0])
    axes = _GEMM.search(x.attributes).group(1).replace('"', "")  # type: ignore[union-attr]
    return 2 * math.prod(out) * math.prod(lhs[int(axis)] for axis in axes.split(",") if axis)


def _told(x: _Instruction) -> float:
    """Of a kernel in another language, which says so itself."""
    return float(re.search(r"flops = (\d+)", x.attributes).group(1))  # type: ignore[union-attr]


def _convolution(x: _Instruction, types: list[str]) -> float:
    """A matrix product as TPUs have it; batched and contracted dimensions may be its space."""
    (out,), (lhs,), (rhs,) = _shapes(x.type), _shapes(types[0]), _shapes(types[1])
    left, right, result = _LABELS.search(x.attributes).groups()  # type: ignore[union-attr]
    window = re.search(r"window=\{([^}]*)\}", x.attributes)
    words = dict(word.split("=") for word in window.group(1).split()) if window else {}
    flops = 2.0 * out[result.index("b")] * out[result.index("f")] * rhs[right.index("i")]
    for axis in range(len(left) - 2):

        def of(word: str, default: str, axis: int = axis) -> str:
            return words[word].split("x")[axis] if word in words else default

        place = str(axis)
        o = np.arange(out[result.index(place)])[:, None] * int(of("stride", "1"))
        k = np.arange(rhs[right.index(place)])[None] * int(of("rhs_dilate", "1"))
        at = o + k - int(of("pad", "0_0").split("_")[0])
        dilate, size = int(of("lhs_dilate", "1")), lhs[left.index(place)]
        flops *= int(((at % dilate == 0) & (at >= 0) & (at // dilate < size)).sum())
    return flops


class _Module:
    def __init__(self, text: str, steps: int):
        self._steps = steps
        self._computations: dict[str, dict[str, _Instruction]] = {}
        self.entry = ""
        here: dict[str, _Instruction] = {}
        for line in text.splitlines():
            if line.startswith(("%", "ENTRY")) and line.endswith("{"):
                name = _NAME.search(line).group(1)  # type: ignore[union-attr]
                here = self._computations[name] = {}
                self.entry = name if line.startswith("ENTRY") else self.entry
            elif line.startswith("  ") and " = " in line:
                instruction = _parse(line)
                here[instruction.name] = instruction

    def add(self, total: Work, computation: str, times: int, channels: set[str] | None) -> None:
        """Add a computation run so many times; of a fusion no memory.

        Args:
          channels: of a fusion, the channels of collectives already seen beside it. A TPU's
            collective that goes on beside other work is repeated in each piece of that work.
        """
        here = self._computations[computation]
        fused, seen = channels is not None, set() if channels is None else channels
        for x in here.values():
            types = [here[name].type for name in x.operands]
            kind = x.opcode.removesuffix("-start")
            if kind in COLLECTIVES and _channel(x) not in seen:
                seen |= {_channel(x)} - {""}
                if "all-reduce-scatter" in computation:  # how a TPU fuses the two
                    kind = "reduce-scatter"
                total.sent[kind] += times * _sent(kind, x, types)
            elif kind == "dot":
                total.flops += times * _dot(x, types)
            elif kind == "convolution":
                total.flops += times * _convolution(x, types)
            elif kind == "custom-call" and cpu_kernels.TARGET in x.attributes:
                total.flops += times * _told(x)
            elif kind == "custom-call" and _GEMM.search(x.attributes):
                total.flops += times * _gemm(x, types)
            if not fused and x.opcode not in _FREE and not x.opcode.endswith("-done"):
                total.hbm += times * self._moved(x, types)
            runs = self._trips(here, x) if kind == "while" else 1
            for name in itertools.chain(*x.called.values()):
                inside = seen if fused or x.opcode == "fusion" else None
                self.add(total, name, times * runs, inside)

    def _root(self, computation: str) -> _Instruction:
        return next(x for x in self._computations[computation].values() if x.root)

    def _trips(self, here: dict[str, _Instruction], loop: _Instruction) -> int:
        """How often a loop runs; on TPU its counter, of the carried tuple, goes up to a limit."""
        told = _TRIPS.search(loop.attributes)
        if told:
            return int(told.group(1))
        names = loop.called
        condition, body = (self._computations[names[key][0]] for key in ("condition", "body"))
        test, result = self._root(names["condition"][0]), self._root(names["body"][0])
        start = here[loop.operands[0]]
        if test.opcode != "compare" or "direction=LT" not in test.attributes:
            return self._steps
        counter, limit = (condition[name] for name in test.operands)

        def carried(x: _Instruction) -> int:
            return int(re.search(r"index=(\d+)", x.attributes).group(1))  # type: ignore[union-attr]

        if limit.opcode == "get-tuple-element":  # carried along unchanged
            limit = here[start.operands[carried(limit)]]
        end = _value([limit], here)
        if end is None or counter.opcode != "get-tuple-element":
            return self._steps
        place = carried(counter)
        begin = _value([here[start.operands[place]]], here) or 0
        following = body[result.operands[place]]
        step = _value([body[name] for name in following.operands], body) or 1
        return -(-(end - begin) // step)

    def _moved(self, x: _Instruction, types: list[str]) -> float:
        """Bytes of main memory an instruction reads and writes."""
        if x.opcode == "fusion":
            (inner,) = x.called["calls"]
            read = sum(
                min(_bytes(t), self._read(inner, i)) for i, t in enumerate(types) if _bytes(t)
            )
            return read + self._written(inner, x.type)
        if x.opcode == "slice-start":  # its type: the whole, the slice, the rest
            taken = x.type[_closing(x.type, 1) :]
            return _bytes(taken, everywhere=True) + _bytes(taken)
        if x.opcode.endswith("-start") and x.type.startswith("("):  # what is read and written
            return _bytes(x.type)
        if x.opcode == "custom-call" and _GEMM.search(x.attributes):
            made = _ARRAY.search(x.type).group()  # type: ignore[union-attr]
            return sum(map(_bytes, types)) + _bytes(made)
        if x.opcode in _SLICES:
            return (_bytes(x.type, everywhere=True) if _bytes(types[0]) else 0) + _bytes(x.type)
        if x.opcode in _UPDATES:
            update = types[_UPDATES[x.opcode]]
            written = min(_bytes(x.type), _bytes(update, everywhere=True))
            return sum(map(_bytes, types[1:])) + written
        return sum(map(_bytes, types)) + _bytes(x.type)

    @functools.cache  # noqa: B019 - a module lives as long as one call
    def _users(self, computation: str) -> dict[str, list[tuple[_Instruction, int]]]:
        found: dict[str, list[tuple[_Instruction, int]]] = {}
        for x in self._computations[computation].values():
            for place, name in enumerate(x.operands):
                found.setdefault(name, []).append((x, place))
        return found

    @functools.cache  # noqa: B019
    def _read(self, computation: str, parameter: int) -> float:
        """Bytes a fused computation reads of a parameter: a slice of it, where it takes a slice."""
        for x in self._computations[computation].values():
            if x.opcode == "parameter" and x.number == str(parameter):
                return self._read_of(computation, x)
        return math.inf

    def _read_of(self, computation: str, read: _Instruction) -> float:
        total = 0.0
        for x, place in self._users(computation).get(read.name, []):
            if x.opcode in _SLICES and place == 0:
                total += _bytes(x.type, everywhere=True)
            elif x.opcode in _UPDATES and place == 0:
                continue  # written in place
            elif x.opcode in ("tuple", *COLLECTIVES):
                continue  # passed along
            elif x.opcode == "bitcast":
                total += self._read_of(computation, x)
            elif x.opcode == "fusion":
                inner = x.called["calls"][0]
                total += self._read(inner, place)
                if self._passes(inner, place):
                    total += self._read_of(computation, x)
            else:
                return math.inf
        return total

    def _passes(self, computation: str, parameter: int) -> bool:
        """Is a fused computation's result a parameter, seen in another shape?"""
        x = self._root(computation)
        while x.opcode == "bitcast":
            x = self._computations[computation][x.operands[0]]
        return x.opcode == "parameter" and x.number == str(parameter)

    def _written(self, computation: str, type_: str) -> float:
        """Bytes a fused computation writes: of what it updates in place the update."""
        here, root = self._computations[computation], self._root(computation)
        results = [here[name] for name in root.operands] if root.opcode == "tuple" else [root]
        sizes = [_bytes(array.group()) for array in _ARRAY.finditer(type_)]
        if len(results) != len(sizes):
            return sum(sizes)
        return sum(
            min(size, self._updated(computation, x)) for x, size in zip(results, sizes, strict=True)
        )

    def _updated(self, computation: str, x: _Instruction) -> float:
        here = self._computations[computation]
        while x.opcode == "bitcast":
            x = here[x.operands[0]]
        if x.opcode == "fusion":
            inner = x.called["calls"][0]
            root = self._root(inner)
            return math.inf if root.opcode == "tuple" else self._updated(inner, root)
        if x.opcode in _UPDATES:
            update = here[x.operands[_UPDATES[x.opcode]]].type
            # What it updates is written as a whole if it is made here.
            return self._updated(computation, here[x.operands[0]]) + _bytes(update, everywhere=True)
        # Passed along, as by the pieces of work among which a collective goes on.
        return 0 if x.opcode in ("parameter", *COLLECTIVES) else math.inf


def _sent(kind: str, x: _Instruction, types: list[str]) -> float:
    """Bytes a device sends around a ring of its group."""
    given = sum(_bytes(type_, everywhere=True) for type_ in types)
    if kind == "collective-permute":
        return given
    n = _group(x.attributes)
    rounds = {"all-gather": n - 1, "all-reduce": 2 * (n - 1) / n}
    return given * rounds.get(kind, (n - 1) / n)


def _value(found: list[_Instruction], here: dict[str, _Instruction]) -> int | None:
    """The number that is among some instructions, or is copied by one."""
    for x in found:
        while x.opcode == "copy":
            x = here[x.operands[0]]
        if x.opcode == "constant":
            return int(x.number)
    return None


def _channel(x: _Instruction) -> str:
    found = re.search(r"channel_id=\d+", x.attributes)
    return found.group() if found else ""


def _group(attributes: str) -> int:
    """How many devices take part in one group of a collective."""
    found = _GROUPS.search(attributes)
    if not found:
        return 1
    listed, iota, mesh, axes = found.groups()
    if mesh is None:
        return int(iota or len(listed.split(",")))
    sizes = dict(_SIZE.findall(mesh))
    return math.prod(int(part or sizes[name]) for name, part in _PART.findall(axes))
