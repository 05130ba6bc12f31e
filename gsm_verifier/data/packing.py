"""Problems as trees, and trees packed into rows of a fixed length.

A tree is a question and its branches; a branch is one solution. Flattened, the question comes first
(branch 0, without its last token) and then every branch, which repeats the question's last token
as its own first, so that every prediction belongs to exactly one branch:

    token     q0 q1 | q2 a0 a1 a2 | q2 b0 b1
    target    q1 q2 | a0 a1 a2  . | b0 b1  .
    position   0  1 |  2  3  4  5 |  2  3  4
    branch     0  0 |  1  1  1  1 |  2  2  2

The value after every token of a branch is read where the token is the input, the language model's
loss where it is the target. Padding is problem 0 with all weights zero.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import grain
import numpy as np

FIELDS: dict[str, type] = {
    "tokens": np.int32,
    "targets": np.int32,
    "position": np.int32,
    "problem": np.int32,
    "branch": np.int32,
    "lm_weight": np.float32,
    "value_weight": np.float32,
    "label": np.float32,
}
OPEN_ROWS = 64  # rows the packer tries before it opens a new one
KEPT_GROVES = 64  # the last ones used


@dataclass(frozen=True, slots=True)  # there is one for every completion
class Branch:
    """One solution of a tree.

    Attributes:
      tokens: its ids, the end-of-text token included where it ended.
      lm_weight: weight of each token's cross-entropy.
      value_weights: weight of the value after each token; None: no verifier loss, no positions.
      label: 1.0 if the solution is correct, else 0.0.
    """

    tokens: Sequence[int]
    lm_weight: float = 0.0
    value_weights: np.ndarray | None = None
    label: float = 0.0

    @property
    def length(self) -> int:
        return len(self.tokens) + (self.value_weights is not None)


@dataclass(frozen=True)
class Tree:
    """A question (or a document: a question without branches) and its branches."""

    question: Sequence[int]
    branches: Sequence[Branch] = ()
    lm_weight: float = 0.0

    @property
    def length(self) -> int:
        return len(self.question) - 1 + sum(b.length for b in self.branches)

    def flatten(self) -> dict[str, np.ndarray]:
        """The arrays of `FIELDS`, each [length]; problem is 1."""
        row = {name: np.zeros(self.length, dtype) for name, dtype in FIELDS.items()}
        row["problem"][:] = 1
        q = len(self.question) - 1
        row["tokens"][:q] = self.question[:-1]
        row["targets"][:q] = self.question[1:]
        row["position"][:q] = np.arange(q)
        row["lm_weight"][:q] = self.lm_weight
        start = q
        for number, branch in enumerate(self.branches, 1):
            m = len(branch.tokens)
            here = slice(start, start + branch.length)
            row["tokens"][here][:1] = self.question[-1]
            row["tokens"][here][1:] = branch.tokens[: max(branch.length - 1, 0)]
            row["targets"][start : start + m] = branch.tokens
            row["position"][here] = q + np.arange(branch.length)
            row["branch"][here] = number
            row["lm_weight"][start : start + m] = branch.lm_weight
            row["label"][here] = branch.label
            if branch.value_weights is not None:
                row["value_weight"][start + 1 : start + 1 + m] = branch.value_weights
            start += branch.length
        return row


class Forest(Sequence[Tree]):
    """Trees in groves. A grove is made when a tree of it is wanted; only lengths are always kept.

    Attributes:
      lengths: of all trees.
    """

    def __init__(
        self,
        groves: int,
        make: Callable[[int], list[Tree]],
        own: range | None = None,
        gather: Callable[[np.ndarray], list[np.ndarray]] = lambda numbers: [numbers],
    ):
        """
        Args:
          groves: how many. make: the trees of a grove, the same at every call.
          own: of many processes, the groves that this one measures; all.
          gather: every process's numbers, of this one's.
        """
        self._make = functools.lru_cache(KEPT_GROVES)(make)
        own = range(groves) if own is None else own
        measured = [(g, tree.length) for g in own for tree in self._make(g)]
        everyones = gather(np.array(measured, np.int32).ravel())
        grove, lengths = np.concatenate(everyones).reshape(-1, 2).T
        self._ends = np.cumsum([0, *np.bincount(grove, minlength=groves)])
        self.lengths = lengths[np.argsort(grove, kind="stable")]

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Tree:  # type: ignore[override]
        grove = int(np.searchsorted(self._ends, index, "right")) - 1
        return self._make(grove)[index - self._ends[grove]]


def split(tree: Tree, capacity: int) -> list[Tree]:
    """The tree as trees of at most `capacity` positions; the first keeps the question's weight.

    Raises:
      ValueError: the question and one branch don't fit.
    """
    parts: list[list[Branch]] = [[]]
    room = space = capacity - (len(tree.question) - 1)
    for branch in tree.branches:
        if branch.length > space:
            raise ValueError(
                f"a question of {len(tree.question)} tokens with a solution of {branch.length} "
                f"doesn't fit a row of {capacity}: raise row_tokens"
            )
        if branch.length > room:
            parts.append([])
            room = space
        parts[-1].append(branch)
        room -= branch.length
    return [
        Tree(tree.question, part, tree.lm_weight if i == 0 else 0.0) for i, part in enumerate(parts)
    ]


def pack(lengths: Sequence[int], capacity: int, order: Sequence[int]) -> list[list[int]]:
    """First-fit packing: rows of indices, each row's lengths summing to at most `capacity`."""
    rows: list[list[int]] = []
    open_rows: list[list[int]] = []  # [room left, row]
    for index in order:
        length = lengths[index]
        if length > capacity:
            raise ValueError(f"item {index} of {length} tokens doesn't fit a row of {capacity}")
        for slot in open_rows:
            if slot[0] >= length:
                slot[0] -= length
                rows[slot[1]].append(index)
                break
        else:
            rows.append([index])
            open_rows.append([capacity - length, len(rows) - 1])
            if len(open_rows) > OPEN_ROWS:
                open_rows.remove(min(open_rows))
    return rows


class PackedRows:
    """A random-access source of packed rows over all epochs: a pure function of its arguments.

    Every epoch packs the trees anew, in an order of its own. Rows are plain numpy; `batches` reads
    them through grain.
    """

    def __init__(self, trees: Sequence[Tree], capacity: int, epochs: float, seed: int):
        self.trees, self.capacity = trees, capacity
        known = trees.lengths if isinstance(trees, Forest) else [t.length for t in trees]
        self._lengths = np.asarray(known, np.int32)
        lengths = self._lengths.tolist()
        self._rows: list[list[int]] = []
        whole, part = divmod(epochs, 1)
        for epoch in range(int(whole) + (part > 0)):
            order = np.random.default_rng([seed, epoch]).permutation(len(trees))
            if epoch == whole:
                order = order[: round(part * len(trees))]
            self._rows += pack(lengths, capacity, order.tolist())

    def __len__(self) -> int:
        return len(self._rows)

    def layout(self, index: int) -> list[tuple[int, int]]:
        """(tree, its first position) of a row's trees; rows past the end are empty."""
        trees = self._rows[index] if index < len(self._rows) else []
        starts = np.cumsum([0, *self._lengths[trees]])
        return list(zip(trees, starts.tolist(), strict=False))

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        row = {name: np.zeros(self.capacity, dtype) for name, dtype in FIELDS.items()}
        for number, (tree, start) in enumerate(self.layout(index), 1):
            for name, values in self.trees[tree].flatten().items():
                row[name][start : start + len(values)] = values * (
                    number if name == "problem" else 1
                )
        return row

    def batches(
        self, rows: int, start: int = 0, *, mine: Sequence[int] | None = None, at_least: int = 0
    ) -> grain.DatasetIterator:
        """Iterator over batches of `rows` rows from batch `start` on; the last is padded.

        Batch i holds the same examples whatever was read before, on any number of processes.

        Args:
          mine: which rows of a batch to make, in this order; those from `rows` on are empty. None:
            all.
          at_least: batches, the empty ones after the last being padding alone.
        """
        mine = range(rows) if mine is None else mine

        def batch(index: int) -> dict[str, np.ndarray]:
            parts = [self[index * rows + r if r < rows else len(self)] for r in mine]
            return {name: np.stack([p[name] for p in parts]) for name in FIELDS}

        count = max(at_least, -(-len(self) // rows))
        dataset = grain.MapDataset.range(start, count).map(batch)
        return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1)))
