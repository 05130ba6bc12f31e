"""Trees in rows: the layout by hand, packing by its invariants, batches as a pure function."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gsm_verifier.data import packing
from gsm_verifier.data.packing import (
    FIELDS,
    OPEN_ROWS,
    Branch,
    Forest,
    PackedRows,
    Tree,
    pack,
    split,
)


def trees_of(lengths: list[int]) -> list[Tree]:
    """Documents of the given lengths; tree i holds no token but i + 1."""
    return [Tree([i + 1] * (n + 1), lm_weight=1.0) for i, n in enumerate(lengths)]


def documents(count: int = 30, seed: int = 0) -> list[Tree]:
    return trees_of(np.random.default_rng(seed).integers(1, 20, count).tolist())


# Layout


def test_a_tree_is_laid_out_as_documented() -> None:
    tree = Tree(
        [10, 11, 12],
        [
            Branch([20, 31], value_weights=np.array([3.0, 3.0])),
            Branch([20, 21, 22], value_weights=np.array([0.0, 0.5, 1.0]), label=1.0),
            Branch(np.array([20, 21, 7]), lm_weight=4.0),
            Branch([20, 21, 22], value_weights=np.array([1.0, 0.5, 1.0]), label=1.0),
        ],
        lm_weight=0.25,
    )
    assert tree.length == 7
    expected = {
        "tokens": [10, 11, 12, 20, 21, 22, 31],
        "targets": [11, 12, 20, 21, 7, 0, 0],
        "position": [0, 1, 2, 3, 4, 5, 4],
        "end": [7, 7, 7, 7, 6, 6, 7],
        "lm_weight": [0.25, 0.25, 4, 4, 4, 0, 0],
        "value_weight": [0, 0, 0, 4, 1, 2, 3],
        "label": [0, 0, 0, 0.25, 1, 1, 0],
    }
    row = tree.flatten()
    assert {name: values.tolist() for name, values in row.items()} == expected
    assert {name: values.dtype for name, values in row.items()} == FIELDS


def test_two_branches_with_a_language_loss_are_refused() -> None:
    with pytest.raises(ValueError, match="can't predict two tokens"):
        Tree([1], [Branch([2], lm_weight=1.0), Branch([3], lm_weight=1.0)])


def test_a_branch_without_verifier_loss_ends_before_its_last_token() -> None:
    """The last token predicts nothing and is judged by nobody: it isn't computed."""
    tree = Tree([10, 11], [Branch([20, 21, 22], lm_weight=1.0)], lm_weight=1.0)
    row = tree.flatten()
    assert row["tokens"].tolist() == [10, 11, 20, 21]
    assert row["targets"].tolist() == [11, 20, 21, 22]
    assert row["lm_weight"].tolist() == [1, 1, 1, 1]
    document = Tree([10, 11, 20, 21, 22], lm_weight=1.0).flatten()
    for name in ("tokens", "targets", "position", "lm_weight", "value_weight"):
        assert row[name].tolist() == document[name].tolist(), name


WEIGHTS = st.sampled_from([0.0, 1.0, 2.5])


def sequences(least: int) -> st.SearchStrategy[list[int]]:
    """Of few tokens, so that some begin alike and some are the same."""
    return st.lists(st.sampled_from([1, 2, 300]), min_size=least, max_size=6)


@st.composite
def tree_strategy(draw: st.DrawFn) -> Tree:
    branches = []
    for _ in range(draw(st.integers(0, 8))):
        tokens = draw(sequences(1))
        weights = np.array(draw(st.lists(WEIGHTS, min_size=len(tokens), max_size=len(tokens))))
        branches.append(Branch(tokens, 0.0, weights, draw(st.sampled_from([0.0, 1.0]))))
    if draw(st.booleans()):
        tokens, weight = draw(sequences(1)), draw(WEIGHTS)
        judged = draw(st.sampled_from([None, np.ones(len(tokens))]))
        gold = Branch(tokens, weight, judged, 1.0)
        branches.insert(draw(st.integers(0, len(branches))), gold)
    return Tree(draw(sequences(1)), branches, draw(WEIGHTS))


@given(tree_strategy())
def test_every_beginning_is_computed_once_with_the_weights_of_all_that_begin_so(tree: Tree) -> None:
    row = tree.flatten()
    assert all(len(values) == tree.length for values in row.values())
    q = len(tree.question)
    value, right, language = Counter(), Counter(), Counter()
    beginnings = {tuple(tree.question[: i + 1]) for i in range(q - 1)}
    for i in range(q - 1):
        language[tuple(tree.question[: i + 1]), tree.question[i + 1]] += tree.lm_weight
    for branch in tree.branches:
        whole = (*tree.question, *branch.tokens)
        judged = branch.value_weights is not None
        beginnings |= {whole[: q + i] for i in range(len(branch.tokens) + judged)}
        for i in range(len(branch.tokens)):
            language[whole[: q + i], whole[q + i]] += branch.lm_weight
            if judged:
                value[whole[: q + i + 1]] += branch.value_weights[i]
                right[whole[: q + i + 1]] += branch.value_weights[i] * branch.label
    seen = []
    for t in range(tree.length):
        line = [s for s in range(t + 1) if t < row["end"][s]]
        assert row["position"][line].tolist() == list(range(len(line)))
        seen.append(tuple(row["tokens"][line].tolist()))
        assert row["value_weight"][t] == value[seen[-1]]
        assert row["label"][t] * row["value_weight"][t] == pytest.approx(right[seen[-1]])
        if row["lm_weight"][t]:
            assert language.pop((seen[-1], row["targets"][t])) == row["lm_weight"][t]
    assert sorted(seen) == sorted(beginnings)
    assert not any(language.values())


@given(tree_strategy())
def test_places_say_where_each_branch_is(tree: Tree) -> None:
    row, places = tree.flatten(), dict(tree.places())
    assert sorted(places) == list(range(len(tree.branches)))
    q = len(tree.question) - 1
    for number, branch in enumerate(tree.branches):
        whole = [*tree.question, *branch.tokens]
        assert row["tokens"][places[number]].tolist() == whole[q : q + branch.length]
        assert row["position"][places[number]].tolist() == list(range(q, q + branch.length))


# Splitting


@given(tree_strategy(), st.integers(1, 20))
def test_split_keeps_every_branch_once_as_laid_out_within_the_capacity(
    tree: Tree, capacity: int
) -> None:
    space = capacity - (len(tree.question) - 1)
    if any(branch.length > space for branch in tree.branches):
        with pytest.raises(ValueError, match="raise row_tokens"):
            split(tree, capacity)
        return
    parts = split(tree, capacity)
    laid_out = [tree.branches[number] for number, _ in tree.layout]
    assert [b for part in parts for b in part.branches] == laid_out
    for part in parts:
        assert part.layout == Tree(part.question, part.branches).layout
        assert [number for number, _ in part.layout] == list(range(len(part.branches)))
    assert all(part.question == tree.question for part in parts)
    assert [part.lm_weight for part in parts] == [tree.lm_weight] + [0.0] * (len(parts) - 1)
    if tree.branches:
        assert all(part.length <= capacity for part in parts)
        assert all(part.branches for part in parts)
    # Greedy: a part was closed only because the next branch didn't fit.
    for part, following in itertools.pairwise(parts):
        more = Tree(part.question, [*part.branches, following.branches[0]])
        assert more.length > capacity


def test_split_names_the_sizes_that_do_not_fit() -> None:
    tree = Tree([1, 2, 3], [Branch([5, 4]), Branch([4, 5, 6, 7])])
    assert len(split(tree, 7)) == 1
    message = "question of 3 tokens with a solution of 4 doesn't fit a row of 5"
    with pytest.raises(ValueError, match=message):
        split(tree, 5)


# Packing


@given(st.lists(st.integers(1, 20), max_size=300), st.integers(20, 40), st.randoms())
def test_pack_places_every_index_once_and_never_exceeds_the_capacity(
    lengths: list[int], capacity: int, random: object
) -> None:
    order = list(range(len(lengths)))
    random.shuffle(order)
    rows = pack(lengths, capacity, order)
    assert sorted(i for row in rows for i in row) == sorted(order)
    assert all(row and sum(lengths[i] for i in row) <= capacity for row in rows)
    if len(rows) <= OPEN_ROWS:  # first fit: no two rows could have been one
        sums = sorted(sum(lengths[i] for i in row) for row in rows)
        assert len(sums) < 2 or sums[0] + sums[1] > capacity


def test_pack_is_first_fit_in_the_given_order() -> None:
    assert pack([6, 5, 4, 3, 2], 10, [0, 1, 2, 3, 4]) == [[0, 2], [1, 3, 4]]
    assert pack([6, 5, 4, 3, 2], 10, [4, 3, 2, 1, 0]) == [[4, 3, 2], [1], [0]]
    assert pack([], 10, []) == []


def test_pack_forgets_the_fullest_row_when_too_many_are_open() -> None:
    """One row has room for 3, all others for 1; after they were opened, 3 still fits."""
    lengths = [9] * 10 + [7] + [9] * OPEN_ROWS + [3]
    rows = pack(lengths, 10, range(len(lengths)))
    assert [10, len(lengths) - 1] in rows


def test_an_item_longer_than_a_row_is_named() -> None:
    with pytest.raises(ValueError, match="item 1 of 11 tokens doesn't fit a row of 10"):
        pack([3, 11], 10, [0, 1])
    with pytest.raises(ValueError, match="item 0 of 11 tokens doesn't fit a row of 10"):
        PackedRows(trees_of([11]), 10, 1, 0)


# Rows of all epochs


def counted(rows: PackedRows) -> Counter[int]:
    return Counter(tree for i in range(len(rows)) for tree, _ in rows.layout(i))


@pytest.mark.parametrize(
    ("epochs", "expected"), [(0, 0), (0.5, 15), (1, 30), (2, 60), (2.0, 60), (2.1, 63)]
)
def test_epochs_may_be_fractions(epochs: float, expected: int) -> None:
    times = counted(PackedRows(documents(), 24, epochs, 0))
    assert sum(times.values()) == expected
    whole = int(epochs)
    assert all(whole <= times[tree] <= whole + 1 for tree in range(30))


def test_rows_are_a_function_of_their_arguments_and_every_epoch_has_its_order() -> None:
    def layout(seed: int) -> list[list[tuple[int, int]]]:
        rows = PackedRows(documents(), 24, 2, seed)
        return [rows.layout(i) for i in range(len(rows))]

    assert layout(0) == layout(0)
    assert layout(0) != layout(1)
    one = PackedRows(documents(), 24, 1, 0)
    first = layout(0)[: len(one)]
    assert first == [one.layout(i) for i in range(len(one))]  # more epochs change no earlier row
    assert layout(0)[len(one) :] != first


def test_layout_says_where_every_tree_stands() -> None:
    trees = documents()
    rows = PackedRows(trees, 24, 1, 3)
    for i in range(len(rows)):
        row, used = rows[i], 0
        assert all(x.shape == (24,) and x.dtype == FIELDS[name] for name, x in row.items())
        for tree, start in rows.layout(i):
            assert start == used
            here = slice(start, start + trees[tree].length)
            used = here.stop
            for name, values in trees[tree].flatten().items():
                expected = values + start if name == "end" else values
                np.testing.assert_array_equal(row[name][here], expected)
        assert all((x[used:] == 0).all() for x in row.values())
    assert rows.layout(len(rows)) == []
    assert all((x == 0).all() for x in rows[len(rows)].values())


def test_a_forest_makes_the_rows_of_its_trees_and_keeps_few(monkeypatch) -> None:
    monkeypatch.setattr(packing, "KEPT_GROVES", 2)
    trees, made = documents(40), []

    def grove(number: int) -> list[Tree]:  # of unequal sizes, one of them empty
        made.append(number)
        return trees[number**2 - number : number**2 + number]

    forest = Forest(7, grove)
    assert made == list(range(7))
    grown = [grove(number) for number in range(7)]
    eager = [tree for found in grown for tree in found]
    assert forest.lengths.tolist() == [tree.length for tree in eager]
    lazy, whole = (PackedRows(found, 24, 1.5, 0) for found in (forest, eager))
    assert len(lazy) == len(whole) > 5
    made.clear()
    for index in range(len(whole)):
        assert lazy.layout(index) == whole.layout(index)
        assert made == []  # lengths are enough
    for got, expected in zip(lazy.batches(3), whole.batches(3), strict=True):
        for name in FIELDS:
            np.testing.assert_array_equal(got[name], expected[name])
    assert len(made) > 7  # again, since not all were kept
    assert len(PackedRows(Forest(0, grove), 24, 1, 0)) == 0

    sent: list[np.ndarray] = []  # by a process that measures the odd ones
    Forest(7, grove, range(7)[1::2], lambda mine: sent.append(mine) or [mine])
    made.clear()
    shared = Forest(7, grove, range(7)[::2], lambda mine: [mine, *sent])
    assert made == [0, 2, 4, 6]
    np.testing.assert_array_equal(shared.lengths, forest.lengths)
    assert [shared[i].question for i in range(len(eager))] == [tree.question for tree in eager]


def test_batches_from_k_on_are_the_tail_of_all_batches() -> None:
    rows = PackedRows(documents(100), 24, 1.5, 0)
    batches = list(rows.batches(4))
    assert len(batches) == -(-len(rows) // 4)
    assert len(rows) % 4  # so the last one is padded
    for start in range(len(batches)):
        tail = list(rows.batches(4, start))
        assert len(tail) == len(batches) - start
        for got, expected in zip(tail, batches[start:], strict=True):
            for name in FIELDS:
                np.testing.assert_array_equal(got[name], expected[name])
    for i, batch in enumerate(batches):
        for r in range(4):
            row = rows[i * 4 + r]
            assert all((batch[name][r] == row[name]).all() for name in FIELDS)


def test_rows_beyond_a_batch_are_empty() -> None:
    """What more devices than rows are filled with: the batch is the same on any number of them."""
    rows = PackedRows(documents(100), 24, 1, 0)
    for batch, padded in zip(rows.batches(3), rows.batches(3, mine=range(5)), strict=True):
        for name in FIELDS:
            np.testing.assert_array_equal(padded[name][:3], batch[name])
            assert not padded[name][3:].any()


def test_no_trees_make_no_batches() -> None:
    rows = PackedRows([], 24, 3, 0)
    assert len(rows) == 0
    assert list(rows.batches(4)) == []
    some = PackedRows(documents(4), 24, 1, 0)
    assert list(some.batches(4, start=99)) == []
