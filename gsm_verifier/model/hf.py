"""Hugging Face directories, both ways: config.json, tokenizer.json and safetensors.

    folder = resolve("owner/name@<40 hex digits of a revision>")   # or a local folder
    config, params = load(folder, mesh)
    save(folder, config, params, tokenizer)                        # transformers reads it

A family is a table in `model.formats`: the names of its settings, and of its tensors with their
layout. What a directory holds and what its table says must be the same, both ways: a setting,
tensor or shape that isn't understood is an error, never a model that is quietly another one.

A verifier is its generator's directory with one more row in the tables, the reserved token's, and
a `verifier.json`, which says how to compute its value from the logits.
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors import safe_open
from safetensors.numpy import save_file

from gsm_verifier import records, sharding
from gsm_verifier.checkpoint import by_name
from gsm_verifier.config import WORDS
from gsm_verifier.model import transformer
from gsm_verifier.model.config import FAMILIES, ModelConfig
from gsm_verifier.model.formats import BUFFERS, FORMATS, INERT, REQUIRED, Format
from gsm_verifier.model.transformer import Params
from gsm_verifier.text.tokenizer import CONFIG as TOKENIZER_CONFIG
from gsm_verifier.text.tokenizer import Tokenizer

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZER = "tokenizer.json"
GENERATION = "generation_config.json"
VERIFIER = "verifier.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
ROPE = {"rope_theta": "rope_theta", "partial_rotary_factor": "rope_fraction"}  # newer spellings
LENGTH = "original_max_position_embeddings"
SCALINGS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", LENGTH),
}
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
SAMPLING = {  # keys of config.sample, and theirs in generation_config.json
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "max_tokens": "max_new_tokens",
}
HEAD = ("value_gain", "value_bias")  # of our parameters, the verifier's
SQUASHES = ("none", "sigmoid")
READING = (
    "In the logits of the position after a token, value = gain * logits[token_id] + bias; with "
    'squash "sigmoid" its logistic function. A solution, whose last token is the end-of-text '
    'token, is scored by the values after its tokens: by the one that aggregate names, "last" or '
    '"min", or by their "mean" or "product". token_id is never text: don\'t sample it.'
)


def resolve(name: str | Path) -> Path:
    """The local folder of a checkpoint: a folder, or `owner/name@revision` of the Hugging Face hub.

    Raises:
      ValueError: no such folder; a hub id without a whole revision, or one that isn't there.
    """
    if Path(name).is_dir():
        return Path(name)
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@(.*))?", str(name))
    if not match:
        raise ValueError(f"{name}: no such folder, and not owner/name@revision of the hub")
    repository, revision = match.groups()
    if not re.fullmatch(r"[0-9a-f]{40}", revision or ""):
        raise ValueError(
            f"{name}: no such folder; for the hub give the 40 hex digits of a revision, as in "
            f"{repository}@<revision>: without one the model could change from run to run"
        )
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ValueError(
            f"{name}: downloading needs huggingface_hub: pip install -e '.[hf]'"
        ) from error
    fetch = functools.partial(
        snapshot_download,
        repository,
        revision=revision,
        allow_patterns=["*.json", "*.safetensors"],
    )
    with contextlib.suppress(Exception):
        # A revision never changes: what is here and whole needs no network.
        folder = Path(fetch(local_files_only=True))
        needed = (TOKENIZER, TOKENIZER_CONFIG)  # the second names the end-of-text token
        if _Tensors(folder).shapes and all((folder / name).exists() for name in needed):
            return folder
    try:
        return Path(fetch())
    except Exception as error:  # of many kinds, from many lines deep
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{name} can't be downloaded ({reason}): check the id, the revision and the network, "
            "or give a local folder"
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ValueError(
            f"{path} isn't there: give a Hugging Face folder, which has {CONFIG}, {TOKENIZER}, "
            f"{TOKENIZER_CONFIG} and .safetensors files"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} isn't JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} isn't a JSON object")
    return found


def read_config(folder: str | Path) -> ModelConfig:
    """The model of a folder's config.json.

    Raises:
      ValueError: a family or setting that isn't supported, by its name.
    """
    path = Path(folder) / CONFIG
    try:
        model = _parse(_read_json(path))
    except ValueError as error:
        raise ValueError(str(error) if str(path) in str(error) else f"{path}: {error}") from error
    except (TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"{path}: a setting has a value of a wrong type: {error}") from error
    return model.with_(text_size=model.text_size - 1) if read_head(folder) else model


def read_head(folder: str | Path) -> dict[str, Any]:
    """A verifier's head: token_id, gain, bias, squash and aggregate; {} for a generator.

    Raises:
      ValueError: a damaged file, or one that isn't of this model.
    """
    path = Path(folder) / VERIFIER
    if not path.exists():
        return {}
    head, settings = _read_json(path), _read_json(path.parent / CONFIG)
    if head.get("token_id") != settings[_format(settings).keys["text_size"]] - 1:
        raise ValueError(f"{path}: token_id isn't the last of the vocabulary")
    if head.get("aggregate") not in WORDS["score.aggregate"]:
        raise ValueError(f"{path} must have an aggregate: {', '.join(WORDS['score.aggregate'])}")
    if head.get("squash") not in SQUASHES or not all(
        type(head.get(word)) is float and math.isfinite(head[word]) for word in ("gain", "bias")
    ):
        raise ValueError(f"{path} must have numbers gain and bias, and squash {SQUASHES}")
    return head


def _format(settings: Mapping[str, Any]) -> Format:
    kind = settings.get("model_type")
    if kind == "gemma3":
        raise ValueError(
            "model_type 'gemma3' reads images too: save its language model, a gemma3_text, alone"
        )
    if kind not in FORMATS:
        raise ValueError(f"model_type {kind!r} isn't supported: use one of {', '.join(FORMATS)}")
    return FORMATS[kind]


def _parse(given: Mapping[str, Any]) -> ModelConfig:
    """The model that settings mean; ValueError for what the transformer can't do."""
    form = _format(given)
    for key, value in given.items():
        # What is unknown may change the logits, unless it is switched off.
        if key not in form.defaults and key not in INERT and value not in (None, False, [], {}):
            raise ValueError(
                f"setting {key}={value!r} isn't supported; if it doesn't change the logits, "
                "remove it from the file of a copy of the folder"
            )
    settings = {**form.defaults, **given}
    for key, value in settings.items():
        if value is REQUIRED:
            raise ValueError(f"setting {key} is missing: the file isn't whole")
    for key, value in form.fixed.items():
        if (settings[key] or None) != (value or None):
            raise ValueError(f"setting {key}={settings[key]!r} isn't supported, only {value!r} is")
    fields = {ours: settings[theirs] for ours, theirs in form.keys.items()}
    for key, (ours, words) in form.words.items():
        if settings[key] not in words:
            raise ValueError(
                f"setting {key}={settings[key]!r} isn't supported: {' or '.join(map(repr, words))}"
            )
        fields[ours] = words[settings[key]]
    rope = _rope(given, settings, form)
    for ours, value in rope.items():
        theirs = form.keys.get(ours)
        if theirs in given and given[theirs] != value:
            raise ValueError(f"setting {theirs}={given[theirs]!r}, but RoPE's own says {value!r}")
    fields |= rope
    _check_values(fields, form)
    fields["kv_heads"] = fields.get("kv_heads") or fields["heads"]
    fields["head_size"] = fields.get("head_size") or fields["width"] // fields["heads"]
    fields["mlp_width"] = fields["mlp_width"] or 4 * fields["width"]
    scalar = settings.get("query_pre_attn_scalar", fields["head_size"])
    if not _positive(scalar):
        raise ValueError(f"setting query_pre_attn_scalar={scalar!r} makes no sense")
    if scalar != fields["head_size"]:  # the usual scale is no word
        fields["query_scale"] = float(scalar) ** -0.5
    for cap in ("attention_cap", "logit_cap"):
        fields[cap] = fields.get(cap) or 0.0
    fields["windows"] = _windows(settings, fields["layers"])
    if fields["heads"] % fields["kv_heads"] or not fields["head_size"]:
        raise ValueError(
            f"{fields['kv_heads']} key/value heads, {fields['heads']} heads and width "
            f"{fields['width']} don't divide one another"
        )
    return ModelConfig(**{**FAMILIES[form.family], **fields})


def _positive(value: Any) -> bool:
    """Is it a finite number above 0?"""
    return type(value) in (int, float) and 0 < value < math.inf


def _check_values(fields: Mapping[str, Any], form: Format) -> None:
    """The file may come from anywhere: sizes are whole, switches are bool, numbers are finite."""
    kinds = {field.name: field.type for field in dataclasses.fields(ModelConfig)}
    for ours, value in fields.items():
        theirs = form.keys.get(ours, ours)
        if value is None and (form.defaults.get(theirs, ()) is None or ours.endswith("_cap")):
            continue
        good = {
            int: type(value) is int and 0 < value < 2**24,
            bool: type(value) is bool,
            float: _positive(value) and (value <= 1 or ours != "rope_fraction"),
            str: type(value) is str,
        }
        if not good.get(kinds[ours], True):
            raise ValueError(f"setting {theirs}={value!r} makes no sense")


def _rope(given: Mapping[str, Any], settings: Mapping[str, Any], form: Format) -> dict[str, Any]:
    """The fields of ModelConfig that `rope_parameters` and the older `rope_scaling` decide."""
    parameters, scaling = settings.get("rope_parameters") or {}, settings.get("rope_scaling") or {}
    by_kind = {"full_attention", "sliding_attention"} & parameters.keys()
    if parameters and bool(by_kind) != ("window_theta" in form.keys):
        raise ValueError(
            "setting rope_parameters must have full_attention and sliding_attention in Gemma 3, "
            "and neither in other families"
        )
    if parameters and scaling and "rope_theta" not in {**given, **scaling}:
        raise ValueError("settings rope_parameters and rope_scaling: give one, or rope_theta too")
    local = _one_type(parameters.get("sliding_attention") or {})
    rope: dict[str, Any] = {}
    for key, ours in ROPE.items():
        value, theirs = settings.get(key), form.keys.get(ours)
        if theirs not in (None, key) and value not in (None, settings[theirs]):
            raise ValueError(f"setting {key}={value!r}, but {theirs} is {settings[theirs]!r}")
        if value is not None:
            rope[key] = value
    if parameters and "rope_theta" not in given:
        rope.pop("rope_theta", None)  # a default, not what the file says
    rope |= _one_type(parameters.get("full_attention") or {} if by_kind else parameters)
    rope |= _one_type(scaling)
    kind = rope.pop("rope_type", "default")
    fields: dict[str, Any] = {}
    for key, ours in ROPE.items():
        if key in rope and ours in form.keys:
            fields[ours] = rope.pop(key)
    if rope.pop("partial_rotary_factor", 1) != 1:
        raise ValueError("a partial_rotary_factor isn't supported in this family, only 1 is")
    if "rope_theta" in local:
        fields["window_theta"] = local.pop("rope_theta")
    if kind not in SCALINGS or local.pop("rope_type", "default") != "default" or local:
        raise ValueError(
            f"rope_type {kind!r} isn't supported: {', '.join(SCALINGS)} (in layers with a "
            "window only default)"
        )
    names = SCALINGS[kind]
    odd = [*(n for n in names if n not in rope), *(n for n in rope if n not in names)]
    if odd or not all(map(_positive, rope.values())):
        wanted = f"positive numbers for {', '.join(names)}" if names else "no more settings"
        raise ValueError(f"RoPE of type {kind!r} must have {wanted}, not {rope}")
    numbers = tuple(float(rope[n]) for n in names)
    if numbers:
        fields |= {"rope_linear": numbers[0]} if len(numbers) == 1 else {"rope_llama3": numbers}
    return fields


def _one_type(rope: Mapping[str, Any]) -> dict[str, Any]:
    """RoPE's settings with its type under one name."""
    if rope.get("type", rope.get("rope_type")) != rope.get("rope_type", rope.get("type")):
        raise ValueError(f"RoPE's type {rope['type']!r} isn't its rope_type {rope['rope_type']!r}")
    return {{"type": "rope_type"}.get(key, key): value for key, value in rope.items()}


def _windows(settings: Mapping[str, Any], layers: int) -> tuple[int, ...]:
    """How far back each layer sees: by `layer_types`, or as older files say it."""
    size = settings.get("sliding_window") if settings.get("use_sliding_window", True) else None
    kinds, twin = settings.get("layer_types"), settings.get("sliding_window_size")
    if twin not in (None, size):
        raise ValueError(f"setting sliding_window_size={twin!r}, but sliding_window is {size!r}")
    if kinds is None:
        local = []
        if "sliding_window_pattern" in settings:  # Gemma: every so many layers, one sees all
            every = _layer_number(settings, "sliding_window_pattern", 1)
            local = [(i + 1) % every != 0 for i in range(layers)]
        elif size:  # Qwen: the layers from one on
            first = _layer_number(settings, "max_window_layers", 0)
            local = [i >= first for i in range(layers)]
        kinds = ["sliding_attention" if x else "full_attention" for x in local]
    windows = {"sliding_attention": size, "full_attention": 0}
    if kinds and (len(kinds) != layers or any(windows.get(k) is None for k in kinds)):
        raise ValueError(
            f"layer_types must be {layers} of full_attention or, with a sliding_window, "
            "sliding_attention"
        )
    found = tuple(windows[k] for k in kinds)
    if any(type(w) is not int or not 0 <= w < 2**31 for w in found):
        raise ValueError(f"setting sliding_window={size!r} makes no sense")
    return found if any(found) else ()


def _layer_number(settings: Mapping[str, Any], key: str, least: int) -> int:
    if type(settings[key]) is not int or settings[key] < least:
        raise ValueError(f"setting {key}={settings[key]!r} makes no sense")
    return settings[key]


def _settings(kind: str, model: ModelConfig) -> dict[str, Any]:
    """The config.json that means the model, if family `kind` has one."""
    form = FORMATS[kind]
    settings: dict[str, Any] = {
        "model_type": kind,
        "architectures": [form.architecture],
        **form.fixed,
    }
    settings |= {theirs: getattr(model, ours) for ours, theirs in form.keys.items()}
    for key, (ours, words) in form.words.items():
        settings[key] = next((k for k, word in words.items() if word == getattr(model, ours)), None)
    for ours, cap in form.keys.items():
        if ours in ("attention_cap", "logit_cap"):
            settings[cap] = settings[cap] or None
    if "query_pre_attn_scalar" in form.defaults:
        scale = model.query_scale or model.head_size**-0.5
        settings["query_pre_attn_scalar"] = round(scale**-2)
    if "rope_parameters" in form.defaults:
        scaling, numbers = "default", ()
        if model.rope_linear != 1:
            scaling, numbers = "linear", (model.rope_linear,)
        if model.rope_llama3:
            scaling, numbers = "llama3", model.rope_llama3
        rope = {"rope_type": scaling, **dict(zip(SCALINGS[scaling], numbers, strict=True))}
        if LENGTH in rope:
            rope[LENGTH] = int(rope[LENGTH])
        # Both spellings: the older is all that other readers know.
        settings["rope_scaling"] = dict(rope) if numbers else None
        rope["rope_theta"] = model.rope_theta
        if "rope_fraction" in form.keys:
            rope["partial_rotary_factor"] = model.rope_fraction
        settings["rope_parameters"] = rope
        if "window_theta" in form.keys:
            local = {"rope_type": "default", "rope_theta": model.window_theta}
            settings["rope_parameters"] = {"full_attention": rope, "sliding_attention": local}
    if "layer_types" in form.defaults:
        windows = model.windows or (0,) * model.layers
        settings["layer_types"] = ["sliding_attention" if w else "full_attention" for w in windows]
        settings["sliding_window"] = max(windows) or form.defaults["sliding_window"]
        if "use_sliding_window" in form.defaults:
            settings["use_sliding_window"] = any(windows)
    return settings


def _kind(model: ModelConfig) -> str:
    """The model_type a model is exported as.

    Raises:
      ValueError: no family has all of its words; names those in the way of the nearest.
    """
    own = dataclasses.asdict(model)
    differences = {}
    for kind in FORMATS:
        try:
            said = dataclasses.asdict(_parse(_settings(kind, model)))
        except ValueError:
            continue
        said |= {word: own[word] for word in ("dtype", "attention", "scan_layers", "remat")}
        differences[kind] = [f"{k}={own[k]!r}" for k in own if own[k] != said[k]]
    best = min(differences, key=lambda kind: len(differences[kind]), default="gpt2")
    if differences.get(best, True):
        raise ValueError(
            "no Hugging Face family has this model: "
            f"{best} has no {', '.join(differences.get(best, ['such words']))}"
        )
    return best


class _Tensors:
    """The tensors of a folder's safetensors files, one open at a time.

    Attributes:
      shapes: of all tensors, by name.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._file: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for file in self._files():
            with self._open(file) as tensors:
                for name in tensors.keys():  # noqa: SIM118 - not a dictionary
                    if BUFFERS.fullmatch(name):  # of any dtype: Pythia's masks are bytes
                        continue
                    piece = tensors.get_slice(name)
                    if piece.get_dtype() not in DTYPES:
                        raise ValueError(
                            f"{folder / file}: {name} is {piece.get_dtype()}, not one of "
                            f"{', '.join(DTYPES)}: use a checkpoint that isn't quantised"
                        )
                    self._file[name] = file
                    self.shapes[name] = tuple(piece.get_shape())

    def _files(self) -> list[str]:
        folder = self._folder
        if (folder / WEIGHTS).exists():
            return [WEIGHTS]
        if (folder / INDEX).exists():
            places = _read_json(folder / INDEX).get("weight_map")
            if not isinstance(places, dict):
                raise ValueError(f"{folder / INDEX} has no weight_map")
            files = {str(file) for file in places.values()}
            for file in files:
                if Path(file).name != file or not (folder / file).exists():
                    raise ValueError(f"{folder / INDEX} names {file}, which isn't there")
            return sorted(files)
        pickles = [p.name for pattern in PICKLES for p in sorted(folder.glob(pattern))]
        raise ValueError(
            f"no {WEIGHTS} or {INDEX} in {folder}"
            + (f", only {pickles[0]}, a pickle, which could run code" if pickles else "")
            + ": convert the checkpoint with save_pretrained(folder) of transformers"
        )

    def _open(self, file: str) -> Any:
        try:
            return safe_open(self._folder / file, "numpy")
        except Exception as error:  # the library's own class, of no use to anybody
            raise ValueError(f"{self._folder / file} is damaged: {error}") from error

    def read(self, name: str, index: Sequence[slice]) -> np.ndarray:
        """A part of a tensor. Opened anew each time: pages of an open file would add up."""
        with self._open(self._file[name]) as tensors:
            return tensors.get_slice(name)[tuple(index)]


@dataclass(frozen=True)
class _Place:
    """Where one of our parameters, or a layer of one, stands in their tensor.

    Attributes:
      letters: dimensions of ours. layout: of theirs. sizes: of each letter, in their tensor.
    """

    letters: str
    layout: tuple[str, ...]
    sizes: Mapping[str, int]

    def _size(self, letter: str) -> int:
        return 3 if letter.isdigit() else self.sizes[letter]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of their tensor."""
        return tuple(math.prod(map(self._size, word)) for word in self.layout)

    @property
    def _kept(self) -> str:
        """Our letters in their order."""
        return "".join(c for word in self.layout for c in word if not c.isdigit())

    def read(self, read: Callable[[list[slice]], np.ndarray], index: Mapping[str, slice]) -> Any:
        """A part of ours; only what is needed along their outermost letters is read."""
        ranges, view, rest = [], [], []
        for word in self.layout:
            first = word[0]
            part = slice(int(first), int(first) + 1) if first.isdigit() else index[first]
            inner = math.prod(map(self._size, word[1:]))
            ranges.append(slice(part.start * inner, part.stop * inner))
            view += [part.stop - part.start, *map(self._size, word[1:])]
            rest += [0 if first.isdigit() else slice(None)]
            rest += [int(c) if c.isdigit() else index[c] for c in word[1:]]
        found = read(ranges).reshape(view)[tuple(rest)]
        return found.transpose([self._kept.index(c) for c in self.letters])

    def write(self, theirs: np.ndarray, ours: np.ndarray) -> None:
        """Put ours into their tensor."""
        letters = "".join(self.layout)
        view = theirs.reshape([self._size(c) for c in letters])
        where = tuple(int(c) if c.isdigit() else slice(None) for c in letters)
        view[where] = ours.transpose([self.letters.index(c) for c in self._kept])


def _places(form: Format, model: ModelConfig, rows: int) -> dict[str, tuple[str, _Place]]:
    """Their tensor's name, and the place in it, of each of our parameters but the verifier's head.

    Args:
      rows: of the vocabulary's tables.
    """
    sizes = {
        "V": rows,
        "T": model.max_length,
        "D": model.width,
        "F": model.mlp_width,
        "N": model.heads,
        "K": model.kv_heads,
        "H": model.head_size,
    }
    places = {}
    for path in by_name(transformer.shapes(model)):
        name = path.removeprefix("params.")
        if name in HEAD:
            continue
        theirs, layout = form.tensors[name]
        places[path] = (theirs, _Place(name.rsplit("_", 1)[1], tuple(layout.split()), sizes))
    return places


def _layers(name: str, model: ModelConfig) -> Iterator[str]:
    """The names of a tensor's layers; itself, outside of them."""
    return (name.replace("*", str(i)) for i in range(model.layers if "*" in name else 1))


def _check_tensors(
    folder: Path, form: Format, model: ModelConfig, source: _Tensors, rows: int, base: str
) -> None:
    """Every tensor is used, and every one that is needed is there in its shape."""
    wanted = set()
    for theirs, place in _places(form, model, rows).values():
        for name in _layers(theirs.removeprefix(base), model):
            wanted.add(name)
            if name not in source.shapes:
                raise ValueError(f"{folder}: tensor {name} is missing: the checkpoint isn't whole")
            if source.shapes[name] != place.shape:
                raise ValueError(
                    f"{folder}: tensor {name} has shape {list(source.shapes[name])}, but its "
                    f"{CONFIG} makes it {list(place.shape)}: take both from the same checkpoint"
                )
    for name in source.shapes:
        if name in wanted:
            continue
        table = form.tensors["embed_VD"][0].removeprefix(base)
        if model.tied and name == form.tensors["unembed_VD"][0] and _same(source, name, table):
            continue
        raise ValueError(
            f"{folder}: tensor {name} would be left unused: its {CONFIG} and its weights aren't of "
            "the same model"
        )


def _same(source: _Tensors, one: str, other: str) -> bool:
    """Two tables are equal; compared in pieces."""
    if source.shapes[one] != source.shapes[other]:
        return False
    size = source.shapes[one][0]
    pieces = [slice(i, min(i + 4096, size)) for i in range(0, size, 4096)]
    return all(np.array_equal(source.read(one, [p]), source.read(other, [p])) for p in pieces)


def load(folder: str | Path, mesh: Mesh, dtype: str = "float32") -> tuple[ModelConfig, Params]:
    """A folder's model, its parameters on the mesh in `dtype`.

    Tensors are read one by one, and of each only what this process's devices hold.

    Raises:
      ValueError: what isn't supported, missing, left over or of another shape, by its name.
    """
    folder = Path(folder)
    model = read_config(folder)
    form = _format(_read_json(folder / CONFIG))
    head = read_head(folder)
    rows = model.text_size + bool(head)
    source = _Tensors(folder)
    base = "" if any(name.startswith(form.base) for name in source.shapes) else form.base
    _check_tensors(folder, form, model, source, rows, base)
    places = _places(form, model, rows)
    where = by_name(transformer.shardings(model, mesh))
    found = {}
    for path, like in by_name(transformer.shapes(model)).items():
        if path not in places:
            value = {"value_gain": head.get("gain", 1.0), "value_bias": head.get("bias", 0.0)}
            value = np.float32(value[path.removeprefix("params.")])
            found[path] = sharding.to_global(mesh, "", value)
            continue
        theirs, place = places[path]
        names = _layers(theirs.removeprefix(base), model)
        shape = like.shape[len(like.shape) - len(place.letters) :]  # without L
        parts = [functools.partial(_part, source, name, place, shape, dtype) for name in names]
        if "*" in theirs:
            found[path] = _stacked(parts, like.shape, where[path], dtype)
        else:
            found[path] = jax.make_array_from_callback(like.shape, where[path], parts[0])
    structure = jax.tree.structure(transformer.shapes(model))
    return model, jax.tree.unflatten(structure, list(found.values()))


def _part(
    source: _Tensors,
    name: str,
    place: _Place,
    shape: tuple[int, ...],
    dtype: str,
    index: tuple[slice, ...],
) -> np.ndarray:
    """A part of one of our parameters of a shape; rows beyond their vocabulary are zeros."""
    wanted = [slice(*s.indices(size)[:2]) for s, size in zip(index, shape, strict=True)]
    found = np.zeros([s.stop - s.start for s in wanted], dtype)
    inside = {
        c: slice(s.start, min(s.stop, place.sizes[c]))
        for c, s in zip(place.letters, wanted, strict=True)
    }
    if all(s.start < s.stop for s in inside.values()):
        part = place.read(functools.partial(source.read, name), inside)
        found[tuple(map(slice, part.shape))] = part
    return found


def _stacked(
    parts: Sequence[Callable[[tuple[slice, ...]], np.ndarray]],
    shape: tuple[int, ...],
    where: NamedSharding,
    dtype: str,
) -> jax.Array:
    """Layers put into their stack one after the other, so that it exists once."""
    one = NamedSharding(where.mesh, PartitionSpec(*where.spec[1:]))
    put = jax.jit(
        lambda stack, layer, i: jax.lax.dynamic_update_index_in_dim(stack, layer, i, 0),
        donate_argnums=0,
        out_shardings=where,
    )
    stack = jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=where)()
    for i, part in enumerate(parts):
        stack = put(stack, jax.make_array_from_callback(shape[1:], one, part), i)
        stack.block_until_ready()  # or layers would queue up
    return stack


def storage(dtype: str) -> np.dtype:
    """numpy's dtype of a word of `DTYPES`, bfloat16 included."""
    if dtype not in DTYPES.values():
        raise ValueError(f"dtype={dtype!r}: use one of {', '.join(DTYPES.values())}")
    return jnp.dtype(dtype)


def save(
    folder: str | Path,
    model: ModelConfig,
    params: Params,
    tokenizer: Tokenizer,
    *,
    squash: str | None = None,
    aggregate: str = "last",
    sampling: Mapping[str, Any] | None = None,
    dtype: str = "float32",
) -> None:
    """Write a folder that transformers reads, with equal logits.

    Args:
      params: with stacked layers.
      squash: of a verifier, which is written with its head: "none" | "sigmoid". None: a generator.
      aggregate: of a verifier, how the values of a solution become its score.
      sampling: how its generation_config.json says to sample, by the keys of `SAMPLING`;
        temperature 0: greedily. None: it doesn't.
      dtype: of the weights on disk, "float32" | "float16" | "bfloat16".

    Raises:
      ValueError: no Hugging Face family has such a model, or ids of the tokenizer have no row.
    """
    if squash not in (None, *SQUASHES):
        raise ValueError(f"squash={squash!r}: use one of {SQUASHES}, or None for a generator")
    form = FORMATS[_kind(model)]
    rows = model.text_size + (squash is not None)
    tensors: dict[str, np.ndarray] = {}
    leaves = by_name(params)
    for path, (theirs, place) in _places(form, model, rows).items():
        ours = sharding.to_host(leaves[path]).astype(storage(dtype))
        if "V" in place.letters:
            ours = ours[:rows]
        names = _layers(theirs, model)
        for name, layer in zip(names, ours if "*" in theirs else [ours], strict=True):
            whole = tensors.setdefault(name, np.zeros(place.shape, storage(dtype)))
            place.write(whole, layer)
    head = None
    if squash is not None:
        gain, bias = (float(sharding.to_host(leaves[f"params.{name}"])) for name in HEAD)
        head = {"token_id": model.reserved_token, "gain": gain, "bias": bias, "squash": squash}
        head["aggregate"] = aggregate
    write(folder, model, tensors, tokenizer, dtype=dtype, head=head, sampling=sampling)


def write(
    folder: str | Path,
    model: ModelConfig,
    tensors: dict[str, np.ndarray],
    tokenizer: Tokenizer,
    *,
    dtype: str,
    head: dict[str, Any] | None = None,
    sampling: Mapping[str, Any] | None = None,
) -> None:
    """Write a folder of tensors that have Hugging Face's names; process 0 does, whole files only.

    Args:
      head: of a verifier, whose tables have a row more. sampling: as in `save`.
    """
    folder = Path(folder)
    kind = _kind(model)
    if tokenizer.size > model.text_size:
        raise ValueError(f"the tokenizer has {tokenizer.size} ids, the model {model.text_size}")
    if jax.process_index():
        return
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f".{WEIGHTS}.part"
    save_file(tensors, part, {"format": "pt"})
    tokenizer.save(folder / TOKENIZER)
    shutil.copymode(folder / TOKENIZER, part)  # it was written for its owner's eyes only
    os.replace(part, folder / WEIGHTS)
    begin = (tokenizer.begin or [tokenizer.end])[0]
    ids = {"bos_token_id": begin, "eos_token_id": tokenizer.end}
    rows = {FORMATS[kind].keys["text_size"]: model.text_size + (head is not None)}
    files = {
        TOKENIZER_CONFIG: {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": tokenizer.end_token,
            "model_max_length": model.max_length,
            "clean_up_tokenization_spaces": False,
        },
        GENERATION: ids | _generation(sampling),
        CONFIG: _settings(kind, model) | ids | rows | {"dtype": dtype, "torch_dtype": dtype},
    }
    (folder / VERIFIER).unlink(missing_ok=True)
    if head is not None:
        files[VERIFIER] = head | {"reading": READING}
    for name, content in files.items():
        records.write_atomically(folder / name, (json.dumps(content, indent=1) + "\n").encode())


def _generation(sampling: Mapping[str, Any] | None) -> dict[str, Any]:
    """How to sample, in transformers' words; all of them, for its own top_k is 50."""
    if sampling is None:
        return {}
    if not sampling["temperature"]:
        return {"do_sample": False, SAMPLING["max_tokens"]: sampling["max_tokens"]}
    return {"do_sample": True, **{SAMPLING[key]: value for key, value in sampling.items()}}


def read_sampling(folder: str | Path) -> dict[str, Any]:
    """What a folder's generation_config.json says of the keys of `SAMPLING`; {} without one.

    Of one that is greedy only max_tokens counts.

    Raises:
      ValueError: a damaged file.
    """
    path = Path(folder) / GENERATION
    if not path.exists():
        return {}
    given = _read_json(path)
    keys = SAMPLING if given.get("do_sample") else ["max_tokens"]
    found = {key: given.get(SAMPLING[key]) for key in keys}
    return {key: value for key, value in found.items() if value is not None}


def read_tokenizer(folder: str | Path) -> Tokenizer:
    """A folder's tokenizer, with the end-of-text token the folder names, as far as it has rows.

    Raises:
      ValueError: no tokenizer.json, or one with more ids than the model's tables have rows.
    """
    folder = Path(folder)
    rows = read_config(folder).text_size
    tokenizer = Tokenizer.load(folder / TOKENIZER)
    if tokenizer.size > rows:
        tokenizer = tokenizer.within(rows)
    if tokenizer.size > rows:
        raise ValueError(f"{folder / TOKENIZER} has {tokenizer.size} ids, the model only {rows}")
    return tokenizer
