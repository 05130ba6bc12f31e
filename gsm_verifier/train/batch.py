"""The one Batch of all training, and the trees each stage makes its batches from."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from gsm_verifier.data.packing import Branch, Tree, split


class Batch(NamedTuple):
    """Packed trees, each [B, T]. See `gsm_verifier.data.packing` for the layout.

    Attributes:
      tokens_BT: inputs. targets_BT: the next token, where it is predicted.
      position_BT: position in the question followed by the branch.
      end_BT: in the row, past the last position that sees this one; 0 for padding.
      lm_weight_BT: weight of the cross-entropy of targets_BT.
      value_weight_BT: weight of the verifier's error after tokens_BT.
      label_BT: is it a correct solution that is judged here? The mean over those that go through,
        by their weights; 0 where nobody is judged.
    """

    tokens_BT: jax.Array
    targets_BT: jax.Array
    position_BT: jax.Array
    end_BT: jax.Array
    lm_weight_BT: jax.Array
    value_weight_BT: jax.Array
    label_BT: jax.Array

    @classmethod
    def of(cls, fields: dict[str, np.ndarray]) -> "Batch":
        return cls(**{f"{name}_BT": array for name, array in fields.items()})


def document_trees(documents: Iterable[Sequence[int]], capacity: int) -> Iterator[Tree]:
    """Pretraining: documents in pieces of at most `capacity` predictions, all of weight 1."""
    for ids in documents:
        for start in range(0, len(ids) - 1, capacity):
            yield Tree(ids[start : start + capacity + 1], lm_weight=1.0)


def finetuning_trees(
    questions: Sequence[Sequence[int]], solutions: Sequence[Sequence[int]], question_loss: bool
) -> list[Tree]:
    """Finetuning: one gold branch for each problem (section 4.1: the loss is over all tokens)."""
    return [
        Tree(q, [Branch(s, lm_weight=1.0)], lm_weight=float(question_loss))
        for q, s in zip(questions, solutions, strict=True)
    ]


def verifier_trees(
    question: Sequence[int],
    gold: Sequence[int],
    completions: Sequence[Sequence[int]],
    labels: Sequence[bool],
    *,
    level: str,
    objective: str,
    mix: str,
    branches: int,
    capacity: int,
) -> list[Tree]:
    """Verifier training: the trees of one problem's labelled completions (section 4.2).

    Args:
      level: "token", a value after every token, or "solution", after the last one only.
      objective: "joint" with the language model's loss on gold solutions, or "verifier_only".
      mix: how language data becomes half of the mix. "paper": as many copies of the gold solution
        as there are completions, in trees of their own. "weighted": the gold solution once, as a
        branch of the same tree, weighted by their number: the same expected gradient for less.
      branches: most completions of a tree, which share what they begin with, the question at
        least, and its dropout; 1 is the paper's literal batch. They are taken as they were sampled:
        sorted, more would be shared, but a step would be of completions that are alike.
      capacity: most positions of a tree.
    """
    trees = []
    judged = []
    longest = max(map(len, completions), default=0)
    weights = np.ones(longest, np.float32)  # of all: each completion's are its last ones
    if level == "solution":
        weights[:-1] = 0.0
    for tokens, label in zip(completions, labels, strict=True):
        own = weights[longest - len(tokens) :]
        judged.append(Branch(tokens, value_weights=own, label=float(label)))
    for start in range(0, len(judged), branches):
        group = judged[start : start + branches]
        if objective == "joint" and mix == "weighted":
            group = [*group, Branch(gold, lm_weight=float(len(group)))]
        trees.append(Tree(question, group))
    if objective == "joint" and mix == "paper":
        trees += [Tree(question, [Branch(gold, lm_weight=1.0)]) for _ in judged]
    return [part for tree in trees for part in split(tree, capacity)]
