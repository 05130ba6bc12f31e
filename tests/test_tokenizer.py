"""Text to ids and back, data text against special tokens, and the calculator's token grammar."""

import json
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from gsm_verifier.text import calculator
from gsm_verifier.text import tokenizer as tk
from gsm_verifier.text.tokenizer import CONFIG, END_NAMES, END_OF_TEXT, Tokenizer

settings.register_profile("untimed", deadline=None)  # machines are shared
settings.load_profile("untimed")

TEXTS = [
    "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n#### 72",
    "Weng earns $12/60 = $<<12/60=0.2>>0.2 per minute; 16.00 for <<4*4=16>>16 — “naïve” cafés.",
    "Betty has 3-8 = <<3-8=-5>>-5 dollars, i.e. (3-8)*1=<<(3-8)*1=-5>>-5.\n#### -5",
] * 4
SPECIALS = [*END_NAMES, "<|im_start|>", "<s>", "<unk>", "<pad>"]

surrogates = st.characters(categories=["Cs"])
texts = st.text(st.characters(exclude_categories=["Cs"]))
fragments = st.lists(st.sampled_from([*SPECIALS, "<|", "a", " ", "7", "é", "<<4=", "\n"]))
# What annotations are made of, and what may stand around them.
ALPHABET = "<>=-+*/().0123456789 a"
MERGES = [
    "<<",
    ">>",
    "=-",
    ")=",
    "<<4",
    "<<<",
    "<<<<",
    ">>>",
    "4=",
    "=4>>",
    "=<<",
    "=<",
    "=>",
    ">=",
]
MERGES += ["=<<4=", "=4>><<", "<<4=", "=>>=", "><", "<>", "=="]
VOCABULARY = [END_OF_TEXT, *ALPHABET, *MERGES]


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return Tokenizer.train(TEXTS, 400)


@pytest.fixture(scope="module")
def foreign(trained: Tokenizer, tmp_path_factory) -> tuple[Tokenizer, set[int]]:
    """A tokenizer.json of elsewhere with many special tokens, and their ids."""
    path = tmp_path_factory.mktemp("foreign") / "tokenizer.json"
    trained.save(path)
    backend = Backend.from_file(str(path))
    backend.add_special_tokens([AddedToken(name, special=True) for name in SPECIALS])
    return Tokenizer(backend), {backend.token_to_id(name) for name in SPECIALS}


@pytest.fixture(scope="module")
def merging() -> Tokenizer:
    """A tokenizer of exactly the tokens of VOCABULARY."""
    ids = {token: index for index, token in enumerate(VOCABULARY)}
    backend = Backend(models.WordLevel(ids, unk_token=END_OF_TEXT))
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([END_OF_TEXT])
    return Tokenizer(backend)


# Text to ids and back


@given(text=texts)
@example(text="\u2028\u200b\xa0\t  \n\n\x00 − ×")
@example(text="<|endoftext|>")
def test_decode_undoes_encode(trained: Tokenizer, text: str) -> None:
    ids = trained.encode(text)
    assert trained.decode(ids) == text
    assert all(0 <= i < trained.size for i in ids)


@given(batch=st.lists(texts, max_size=4))
def test_a_batch_is_its_texts_one_by_one(trained: Tokenizer, batch: list[str]) -> None:
    assert trained.encode_batch(batch) == [trained.encode(text) for text in batch]


@given(parts=fragments)
def test_text_of_data_never_becomes_a_special_token(
    foreign: tuple[Tokenizer, set[int]], parts: list[str]
) -> None:
    tokenizer, special = foreign
    assert tokenizer.end in special
    text = "".join(parts)
    ids = tokenizer.encode(text)
    assert not special & set(ids)
    assert tokenizer.decode(ids) == text


def test_a_file_that_asks_for_truncation_padding_and_specials_is_overruled(
    trained: Tokenizer, tmp_path
) -> None:
    trained.save(tmp_path / "tokenizer.json")
    backend = Backend.from_file(str(tmp_path / "tokenizer.json"))
    backend.encode_special_tokens = False
    backend.enable_truncation(3)
    backend.enable_padding(length=50)
    backend.save(str(tmp_path / "tokenizer.json"))
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    text = TEXTS[0] + END_OF_TEXT
    assert loaded.decode(loaded.encode(text)) == text
    assert loaded.end not in loaded.encode(text)


def test_every_digit_is_a_token_of_its_own(trained: Tokenizer) -> None:
    text = "in 1234567.89 and 2024, 24>>24"
    pieces = trained.pieces(trained.encode(text))
    assert [p for p in pieces if any(c.isdigit() for c in p)] == list("12345678920242424")
    assert len(Tokenizer.train(["7777 7777 777"] * 50, 400).encode("777")) == 3


def test_small_numbers_can_be_one_token_each() -> None:
    tokenizer = Tokenizer.train(TEXTS, 1400, numbers=1000)
    text = "$1400 and 20*50/100 = <<20*50/100=10>>10, 1.05, =-43 of 999"
    ids = tokenizer.encode(text)
    numbers = [p for p in tokenizer.pieces(ids) if any(c.isdigit() for c in p)]
    assert numbers == [
        "140",
        "0",
        "20",
        "50",
        "100",
        "20",
        "50",
        "100",
        "10",
        "10",
        "1",
        "0",
        "5",
        "43",
        "999",
    ]
    assert tokenizer.decode(ids) == text
    assert tokenizer.size <= 1400
    assert {len(tokenizer.encode(str(n))) for n in range(1000)} == {1}
    assert len(tokenizer.encode("1000")) == 2


@given(text=st.text(st.one_of(surrogates, st.sampled_from("a<=é"))))
def test_lone_surrogates_are_replaced(trained: Tokenizer, text: str) -> None:
    expected = "".join("?" if 0xD800 <= ord(c) < 0xE000 else c for c in text)
    assert trained.decode(trained.encode(text)) == expected


@given(text=texts, data=st.data())
@example(text="a🙂é漢字🙂", data=None)
def test_pieces_joined_are_the_decoded_text(trained: Tokenizer, text: str, data) -> None:
    ids = trained.encode(text)
    if data is not None:  # any ids at all, also such as are no text
        ids += data.draw(st.lists(st.integers(0, trained.size - 1), max_size=8))
    pieces = trained.pieces(ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == trained.decode(ids)


def test_special_and_unknown_ids_have_no_text(trained: Tokenizer) -> None:
    assert trained.decode([trained.end, *trained.encode("hi"), trained.end]) == "hi"
    assert trained.decode([trained.size + 5]) == ""
    assert trained.pieces([trained.encode("a")[0], trained.end]) == ["a", ""]


# Training and loading


def test_training_is_deterministic_and_bounded(tmp_path) -> None:
    first = Tokenizer.train(iter(TEXTS), 300)
    first.save(tmp_path / "1.json")
    assert first.size == 300 < Tokenizer.train(TEXTS, 310).size
    # Also in another process, whose hashes have other seeds.
    program = (
        "import json, sys; from gsm_verifier.text.tokenizer import Tokenizer; "
        "Tokenizer.train(json.loads(sys.argv[1]), 300).save(sys.argv[2])"
    )
    command = [sys.executable, "-c", program, json.dumps(TEXTS), str(tmp_path / "2.json")]
    subprocess.run(command, check=True, timeout=60)
    assert (tmp_path / "1.json").read_bytes() == (tmp_path / "2.json").read_bytes()
    loaded = Tokenizer.load(tmp_path / "1.json")
    assert (loaded.size, loaded.end) == (first.size, first.end)
    assert loaded.encode_batch(TEXTS) == first.encode_batch(TEXTS)


def test_what_begins_every_text_begins_questions_and_documents(tmp_path, merging) -> None:
    """As Llama 3's and Gemma's tokenizers say it."""
    assert merging.begin == []
    (ids,) = merging.documents(["a"])
    assert ids.tolist() == [merging.end, *merging.encode("a"), merging.end]
    merging.save(tmp_path / "plain.json")
    backend = Backend.from_file(str(tmp_path / "plain.json"))
    begin = merging.end  # one token as good as another
    backend.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, begin)]
    )
    backend.save(str(tmp_path / "begins.json"))
    begins = Tokenizer.load(tmp_path / "begins.json")
    assert begins.begin == [begin]
    assert begins.question("a") == [begin, *merging.question("a")]
    assert begins.solution("a") == merging.solution("a")
    (ids,) = begins.documents(["a"])
    assert ids.tolist() == [begin, *merging.encode("a"), merging.end]


def test_documents_are_encoded_in_their_order(trained: Tokenizer) -> None:
    texts = [str(i) for i in range(2500)]  # of more than one batch
    ids = trained.documents(texts)
    assert [trained.decode(document[1:-1]) for document in ids] == texts


def test_the_end_token_is_kept_on_disk(tmp_path, merging: Tokenizer) -> None:
    """Which of several a model ends with stands in no tokenizer.json."""
    merging.save(tmp_path / "plain.json")
    backend = Backend.from_file(str(tmp_path / "plain.json"))
    backend.add_special_tokens(["<|im_end|>"])
    chat = Tokenizer(backend, "<|im_end|>")
    assert chat.end != merging.end
    (tmp_path / "chat").mkdir()
    chat.save(tmp_path / "chat/tokenizer.json")
    assert Tokenizer.load(tmp_path / "chat/tokenizer.json").end == chat.end
    named = tmp_path / "chat" / CONFIG
    named.write_text(json.dumps({"eos_token": {"content": END_OF_TEXT}}))
    assert Tokenizer.load(tmp_path / "chat/tokenizer.json").end == merging.end
    named.write_text(json.dumps({"eos_token": None}))
    assert Tokenizer.load(tmp_path / "chat/tokenizer.json").end == merging.end
    for content in ("[]", "{", '{"eos_token": 3}', '{"eos_token": "<none>"}'):
        named.write_text(content)
        with pytest.raises(ValueError, match=r"chat.tokenizer\.json: .*"):
            Tokenizer.load(tmp_path / "chat/tokenizer.json")


@pytest.mark.parametrize("metaspace", [True, False], ids=["metaspace", "prepend"])
def test_text_in_the_middle_of_a_line_has_no_space_before_it(metaspace: bool) -> None:
    """SentencePiece's tokenizers put one before any text: of Llama 2, TinyLlama, Gemma 1."""
    tokens = [END_OF_TEXT, "\u2581", *"0123456789+=<>"]
    backend = Backend(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    if metaspace:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    else:
        steps = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        backend.normalizer = normalizers.Sequence(steps)
    spacing = Tokenizer(backend)
    whole = [tokens.index(c) for c in "2+3=5>>"]
    assert spacing.encode("2+3=5>>") == [1, *whole]
    assert spacing.continuation("2+3=5>>") == whole
    assert spacing.continuation("") == []


def test_a_byte_level_text_is_the_same_in_the_middle_of_a_line(trained: Tokenizer) -> None:
    for text in ["=5>>", " a", "", *TEXTS]:
        assert trained.continuation(text) == trained.encode(text)


def test_special_tokens_beyond_the_model_are_left_out(merging: Tokenizer) -> None:
    """As Gemma 3's token for images."""
    backend = Backend.from_str(merging._backend.to_str())
    backend.add_special_tokens(["<image>"])
    assert Tokenizer(backend).size == merging.size + 1
    fitting = Tokenizer(backend).within(merging.size)
    assert (fitting.size, fitting.end) == (merging.size, merging.end)
    assert fitting.encode_batch(TEXTS) == merging.encode_batch(TEXTS)
    assert Tokenizer(backend).within(merging.size + 1).size == merging.size + 1


def test_load_names_what_is_wrong(tmp_path, merging: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"no tokenizer at .*gone\.json"):
        Tokenizer.load(tmp_path / "gone.json")
    with pytest.raises(ValueError, match="no tokenizer at"):
        Tokenizer.load(tmp_path)
    for content in ("", "{", "[]", json.dumps({"version": "1.0"}), "\x00\xff"):
        path = tmp_path / "broken.json"
        path.write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match=r"broken\.json is not a tokenizer"):
            Tokenizer.load(path)
    merging.save(tmp_path / "good.json")
    with pytest.raises(ValueError, match="none of the end-of-text tokens <stop>"):
        Tokenizer.load(tmp_path / "good.json", end_token="<stop>")
    assert Tokenizer.load(tmp_path / "good.json", end_token="a").end == 1 + ALPHABET.index("a")


@pytest.mark.parametrize("name", END_NAMES)
def test_the_usual_names_of_the_end_are_found(name: str) -> None:
    backend = Backend(models.WordLevel({"a": 0, name: 1}, unk_token="a"))
    assert Tokenizer(backend).end == 1
    with pytest.raises(ValueError, match="none of the end-of-text tokens"):
        Tokenizer(Backend(models.WordLevel({"a": 0}, unk_token="a")))


# The token grammar


@st.composite
def cut_text(draw: st.DrawFn) -> list[str]:
    """Text over ALPHABET, cut into tokens in some way."""
    tokens = st.sampled_from([*ALPHABET, *MERGES, *("<<", "=", ">>", "<", ">") * 6])
    return draw(st.lists(tokens, max_size=30))


def asks(merging: Tokenizer, tokens: list[str]) -> list[bool]:
    """After which tokens the table is in state ASK; as on the device, an ask starts anew."""
    table, state, out = merging.grammar(), tk.TEXT, []
    for token in tokens:
        state = int(table[VOCABULARY.index(token), state])
        out.append(state == tk.ASK)
    return out


def oracle(tokens: list[str], opened: Callable[[str], object]) -> list[bool]:
    """An annotation is open and its first `=` has just come, in the text since the last ask."""
    text, out = "", []
    for token in tokens:
        before = text
        text += token
        out.append(opened(before) is None and opened(text) is not None)
        text = "" if out[-1] else text
    return out


@settings(max_examples=1000)
@given(tokens=cut_text())
@example(tokens=["<<", "3", "-", "8", "=-", "5", ">>"])
@example(tokens=["<<", "(", "4", ")=", "4", "="])
@example(tokens=["<<4", "/", "2", "="])
@example(tokens=["<<<", "4", "="])
@example(tokens=["<", "<", "4", "=", "=", "<<", "="])
@example(tokens=["<<", "4", ">", "=", ">>"])
@example(tokens=["<<", "4", ">>", "="])
@example(tokens=["<<", "4", "=4>>", "=", "<<4="])
@example(tokens=["<<", "4", "=<<", "4", "="])
def test_the_table_asks_when_an_annotations_first_equals_sign_has_just_come(
    merging: Tokenizer, tokens: list[str]
) -> None:
    assert asks(merging, tokens) == oracle(tokens, calculator.open_expression)


@settings(max_examples=300)
@given(tokens=cut_text(), other=st.randoms(use_true_random=False))
def test_the_cut_into_tokens_does_not_matter(merging: Tokenizer, tokens, other) -> None:
    """Any cut asks at the `=` at which the text, read character by character, asks first."""
    text = "".join(tokens)
    by_character = asks(merging, list(text))
    first = by_character.index(True) if any(by_character) else None
    again, rest = [], text
    while rest:
        again.append(other.choice([t for t in VOCABULARY if rest.startswith(t)]))
        rest = rest[len(again[-1]) :]
    asked = asks(merging, again)
    ends = np.cumsum([len(t) for t in again])
    if first is None:
        assert not any(asked)
        return
    index = int(np.searchsorted(ends, first, side="right"))  # the token holding that `=`
    assert not any(asked[:index])
    if ends[index] == first + 1:
        assert asked[index]


def test_the_table_of_a_trained_tokenizer_asks_in_gold_solutions(trained: Tokenizer) -> None:
    """Once an annotation, at its `=`, however BPE has merged the characters."""
    table = trained.grammar()
    assert table.shape == (trained.size, tk.ASK + 1)
    assert (table[trained.end] == [*range(tk.ASK), tk.TEXT]).all()  # it has no text
    for text in TEXTS:
        ids, state, expressions = trained.encode(text), tk.TEXT, []
        for end, token in enumerate(ids, 1):
            state = table[token, state]
            if state == tk.ASK:
                expressions.append(calculator.open_expression(trained.decode(ids[:end])))
        assert expressions == [e for e, _ in calculator.annotations(text)]


def test_bpe_can_merge_the_equals_sign_with_a_minus() -> None:
    """The case the paper's released sampler never answers."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    merged = Tokenizer.train(["x =-5 y)=-7 <<3-8=-5>>"] * 50, 300)
    assert "=-" in merged.pieces(merged.encode("<<3-8=-5>>"))
    table, state = merged.grammar(), tk.TEXT
    asked = []
    for token in merged.encode("<<3-8=-5>>"):
        state = table[token, state]
        asked.append(state == tk.ASK)
    assert asked.count(True) == 1
