"""Text to token ids and back, over the `tokenizers` library, and the calculator's token grammar."""

import functools
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from gsm_verifier import storage

END_OF_TEXT = "<|endoftext|>"
CONFIG = "tokenizer_config.json"  # beside a tokenizer.json; names its end-of-text token
END_NAMES = (END_OF_TEXT, "</s>", "<eos>", "<|im_end|>", "<|end_of_text|>")
DOCUMENTS = 1000  # that are encoded at a time

# States of an annotation as the characters of a completion go by. ASK is the only one anybody
# reads: an annotation is open and its first `=` has just been written. The states after it live
# within a token only, one that goes on behind its `=`.
TEXT, LESS, OPEN, OPEN_LESS, OPEN_GREATER, ASK, ASK_LESS, ASK_GREATER = range(8)
_STEP = {
    (TEXT, "<"): LESS,
    (LESS, "<"): OPEN,
    (OPEN, "<"): OPEN_LESS,
    (OPEN, ">"): OPEN_GREATER,
    (OPEN, "="): ASK,
    (OPEN_LESS, "<"): OPEN,
    (OPEN_LESS, ">"): OPEN_GREATER,
    (OPEN_LESS, "="): ASK,
    (OPEN_GREATER, "<"): OPEN_LESS,
    (OPEN_GREATER, "="): ASK,
    (OPEN_GREATER, ">"): TEXT,
    (ASK, "<"): ASK_LESS,
    (ASK, ">"): ASK_GREATER,
    (ASK_LESS, "<"): OPEN,
    (ASK_LESS, ">"): ASK_GREATER,
    (ASK_GREATER, "<"): ASK_LESS,
    (ASK_GREATER, ">"): TEXT,
}
_ELSE = {TEXT: TEXT, LESS: TEXT, OPEN: OPEN, OPEN_LESS: OPEN, OPEN_GREATER: OPEN}


def by_digits(model: models.BPE) -> Backend:
    """A byte-level BPE in which every digit is a token of its own."""
    backend = Backend(model)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


class Tokenizer:
    """A tokenizer in which text from data never becomes a special token.

    Attributes:
      size: number of ids, special ones included.
      end_token, end: the token that ends a completion or a document, and its id.
      begin: ids before any text.
    """

    def __init__(self, backend: Backend, end_token: str | None = None):
        # Or "<|endoftext|>" inside a question would become the special id.
        backend.encode_special_tokens = True
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.size = max(vocabulary.values()) + 1
        names = [end_token] if end_token else END_NAMES
        self.end_token = next((name for name in names if name in vocabulary), "")
        if not self.end_token:
            raise ValueError(f"the tokenizer has none of the end-of-text tokens {', '.join(names)}")
        self.end: int = vocabulary[self.end_token]
        # What it puts before any text: Llama 3 and Gemma were trained to see their `<bos>` there.
        self.begin: list[int] = backend.encode("", add_special_tokens=True).ids

    @classmethod
    def load(cls, path: str | Path, end_token: str | None = None) -> "Tokenizer":
        """Any `tokenizer.json`.

        Args:
          end_token: None: the one that the tokenizer_config.json beside it names, if any does.

        Raises:
          ValueError: no such file, not a tokenizer, or one without its end token; names the path.
        """
        path = storage.path(path)
        if not path.is_file():
            raise ValueError(f"no tokenizer at {path}: give the path of a tokenizer.json")
        try:
            backend = Backend.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # tokenizers raises bare Exception
            raise ValueError(f"{path} is not a tokenizer.json: {error}") from error
        try:
            return cls(backend, end_token or _named_end(path.with_name(CONFIG)))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def within(self, rows: int) -> "Tokenizer":
        """This one without special tokens that a model of so many rows can't read.

        Gemma 3's tokenizer has a token for images, which its text models have no row for.
        """
        content = json.loads(self._backend.to_str())
        content["added_tokens"] = [
            token for token in content["added_tokens"] if token["id"] < rows or not token["special"]
        ]
        return Tokenizer(Backend.from_str(json.dumps(content)), self.end_token)

    @classmethod
    def train(cls, texts: Iterable[str], size: int, numbers: int = 10) -> "Tokenizer":
        """A byte-level BPE of at most `size` ids in which numbers below `numbers` are one token.

        Longer digit strings are several. Whole numbers are easier to copy and to compare, digits
        to calculate with.
        """
        backend = by_digits(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=size - max(numbers - 10, 0),
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        backend.add_tokens([AddedToken(str(n), normalized=False) for n in range(10, numbers)])
        return cls(backend)

    def save(self, path: str | Path) -> None:
        """Write a `tokenizer.json`, and beside it which token ends a text."""
        path = storage.path(path)
        path.write_text(self._backend.to_str(pretty=True), encoding="utf-8")
        named = json.dumps({"eos_token": self.end_token}, indent=1)
        path.with_name(CONFIG).write_text(named, encoding="utf-8")

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def continuation(self, text: str) -> list[int]:
        """Ids of text in the middle of a line: SentencePiece puts a space before any other."""
        return self._within_line.encode(text, add_special_tokens=False).ids

    @functools.cached_property
    def _within_line(self) -> Backend:
        content = json.loads(self._backend.to_str())
        backend = Backend.from_str(json.dumps(_without_first_space(content)))
        backend.encode_special_tokens = True
        return backend

    def question(self, text: str) -> list[int]:
        """Ids of a question as every model here reads it: a line of its own."""
        return [*self.begin, *self.encode(text + "\n")]

    def solution(self, text: str) -> list[int]:
        """Ids of a whole solution: the end-of-text token is its last."""
        return [*self.encode(text), self.end]

    def documents(self, texts: Iterable[str]) -> Iterator[np.ndarray]:
        """Ids of texts of their own, from one end-of-text token, or what begins a text, to one.

        int32 [T] each: there may be many, and a list takes ten times the memory.
        """
        begin = self.begin or [self.end]
        texts = iter(texts)
        while batch := list(itertools.islice(texts, DOCUMENTS)):
            for ids in self.encode_batch(batch):
                yield np.array([*begin, *ids, self.end], np.int32)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        # Lone surrogates can't be encoded as UTF-8; they come from hostile JSON only.
        clean = [t.encode("utf-8", "replace").decode("utf-8") for t in texts]
        return [e.ids for e in self._backend.encode_batch(clean, add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; special tokens and unknown ids are left out."""
        return self._backend.decode(list(map(int, ids)), skip_special_tokens=True)

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """The text each id adds to the text before it; joined they are decode(ids)."""
        ids, out, done = [int(i) for i in ids], [], ""
        for end in range(1, len(ids) + 1):
            text = self.decode(ids[:end])
            # An unfinished multi-byte character shows with the token that finishes it.
            text = text if end == len(ids) else text.rstrip("\ufffd")
            out.append(text[len(done) :] if text.startswith(done) else "")
            done = text if text.startswith(done) else done
        return out

    def grammar(self) -> np.ndarray:
        """Transition table of the annotation states, int8 [V, states]: state after a token.

        It answers "is an annotation open, and has its first `=` just come?" for any way a BPE may
        have merged the characters (`=-`, `)=`, `<<4`), so that no token id stands in the source.
        It may ask once too often; the calculator, reading the text, has the last word.
        """
        table = np.zeros((self.size, ASK + 1), np.int8)
        for token in range(self.size):
            text = self.decode([token])
            for start in range(ASK + 1):
                state = TEXT if start == ASK else start  # asked and answered: over
                for character in text:
                    state = _STEP.get((state, character), _ELSE.get(state, ASK))
                table[token, start] = min(state, ASK)
        return table


def _named_end(path: Path) -> str | None:
    """The end-of-text token a tokenizer_config.json names, as a string or a token's description."""
    try:
        named = json.loads(path.read_bytes()).get("eos_token")
        named = named.get("content") if isinstance(named, dict) else named
    except FileNotFoundError:
        return None
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path.name} beside it isn't a JSON object: {error}") from error
    if not isinstance(named, str | None):
        raise ValueError(f"{path.name} beside it has eos_token={named!r}: name a token")
    return named


def _without_first_space(part: Any) -> Any:
    """A part of a tokenizer.json, without the steps that put a space before a text."""
    if isinstance(part, list):
        steps = [x for x in part if not isinstance(x, dict) or x.get("type") != "Prepend"]
        return [_without_first_space(step) for step in steps]
    if not isinstance(part, dict):
        return part
    if part.get("type") == "Prepend":
        return None
    never = {"prepend_scheme": "never", "add_prefix_space": False}
    return {
        key: never[key]
        if key in never
        else value
        if key == "vocab"
        else _without_first_space(value)
        for key, value in part.items()
    }
