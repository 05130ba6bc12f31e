"""Hugging Face directories, both ways: config.json, tokenizer.json and safetensors.

    folder = resolve("owner/name@<40 hex digits of a revision>")   # or a local folder
    config, params = load(folder, mesh)
    save(folder, config, params, tokenizer)                        # transformers reads it

A family is a table: the names of its settings, and of its tensors with their layout. What a
directory holds and what its family's table says must be the same, both ways: a setting, tensor or
shape that isn't understood is an error, never a model that is quietly another one.

A verifier is its generator's directory with one more row in the tables, the reserved token's, and
a `verifier.json`, which says how to compute its value from the logits.
"""

import dataclasses
import functools
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors import safe_open
from safetensors.numpy import save_file
from tokenizers import Tokenizer as Backend

from gsm_verifier import records, sharding
from gsm_verifier.checkpoint import by_name
from gsm_verifier.model import transformer
from gsm_verifier.model.config import FAMILIES, ModelConfig
from gsm_verifier.model.transformer import Params
from gsm_verifier.text.tokenizer import Tokenizer

CONFIG, WEIGHTS, TOKENIZER, VERIFIER = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "verifier.json",
)
INDEX = WEIGHTS + ".index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
READING = (
    "In the logits of the position after a token, value = gain * logits[token_id] + bias; with "
    'squash "sigmoid" its logistic function. A solution is scored by the value after its last '
    "token, the end-of-text token. token_id is never text: don't sample it."
)


@dataclass(frozen=True)
class Format:
    """How a family is written.

    Attributes:
      family: its words, in `gsm_verifier.model.config.FAMILIES`.
      architecture: the class of transformers that reads it.
      defaults: every setting that is understood, with what its absence means.
      keys: setting of each field of ModelConfig.
      words: settings that choose a word: our field, and our word for each of their values.
      fixed: settings for which the transformer has one value.
      base: prefix of the tensors' names, which some checkpoints leave out.
      tensors: name and layout of each of our parameters; `*` is the number of the layer. Layouts
        are in our letters, merged dimensions in one word; a digit is an index into three.
    """

    family: str
    architecture: str
    defaults: Mapping[str, Any]
    keys: Mapping[str, str]
    words: Mapping[str, tuple[str, Mapping[Any, str]]]
    fixed: Mapping[str, Any]
    base: str
    tensors: Mapping[str, tuple[str, str]]


REQUIRED = object()  # a setting without a default

PLAIN = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu": "gelu_exact"}
GATED = {"silu": "swiglu", "gelu_pytorch_tanh": "geglu"}

_SIZES = {
    "text_size": "vocab_size",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "mlp_width": "intermediate_size",
    "max_length": "max_position_embeddings",
    "tied": "tie_word_embeddings",
    "rope_theta": "rope_theta",
}
_LLAMA_KEYS = {
    **_SIZES,
    "kv_heads": "num_key_value_heads",
    "head_size": "head_dim",
    "norm_eps": "rms_norm_eps",
}
_ROPE = {"rope_theta": 10_000.0, "rope_parameters": None, "rope_scaling": None}
_LLAMA_DEFAULTS = {
    **dict.fromkeys(_LLAMA_KEYS.values(), REQUIRED),
    **_ROPE,
    "num_key_value_heads": None,
    "head_dim": None,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "attention_bias": False,
}
_QWEN_DEFAULTS = {
    **_LLAMA_DEFAULTS,
    "use_sliding_window": False,
    "sliding_window": None,
    "max_window_layers": 0,
    "layer_types": None,
}
_GEMMA_DEFAULTS = {
    **_LLAMA_DEFAULTS,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "tie_word_embeddings": True,
    "hidden_activation": "gelu_pytorch_tanh",
    "final_logit_softcapping": None,
    "attn_logit_softcapping": None,
    "use_bidirectional_attention": False,
    "sliding_window": 4096,
    "layer_types": None,
}
del _GEMMA_DEFAULTS["hidden_act"]
_GEMMA_KEYS = {**_LLAMA_KEYS, "logit_cap": "final_logit_softcapping"}

_LLAMA_TENSORS = {
    "embed_VD": ("model.embed_tokens.weight", "V D"),
    "layers.attention_norm.scale_D": ("model.layers.*.input_layernorm.weight", "D"),
    "layers.attention.wq_DNH": ("model.layers.*.self_attn.q_proj.weight", "NH D"),
    "layers.attention.wk_DKH": ("model.layers.*.self_attn.k_proj.weight", "KH D"),
    "layers.attention.wv_DKH": ("model.layers.*.self_attn.v_proj.weight", "KH D"),
    "layers.attention.bq_NH": ("model.layers.*.self_attn.q_proj.bias", "NH"),
    "layers.attention.bk_KH": ("model.layers.*.self_attn.k_proj.bias", "KH"),
    "layers.attention.bv_KH": ("model.layers.*.self_attn.v_proj.bias", "KH"),
    "layers.attention.q_norm.scale_H": ("model.layers.*.self_attn.q_norm.weight", "H"),
    "layers.attention.k_norm.scale_H": ("model.layers.*.self_attn.k_norm.weight", "H"),
    "layers.attention.wo_NHD": ("model.layers.*.self_attn.o_proj.weight", "D NH"),
    "layers.mlp_norm.scale_D": ("model.layers.*.post_attention_layernorm.weight", "D"),
    "layers.mlp.w_gate_DF": ("model.layers.*.mlp.gate_proj.weight", "F D"),
    "layers.mlp.w_in_DF": ("model.layers.*.mlp.up_proj.weight", "F D"),
    "layers.mlp.w_out_FD": ("model.layers.*.mlp.down_proj.weight", "D F"),
    "final_norm.scale_D": ("model.norm.weight", "D"),
    "unembed_VD": ("lm_head.weight", "V D"),
}
_GEMMA_TENSORS = {
    **_LLAMA_TENSORS,
    "layers.attention_post_norm.scale_D": ("model.layers.*.post_attention_layernorm.weight", "D"),
    "layers.mlp_norm.scale_D": ("model.layers.*.pre_feedforward_layernorm.weight", "D"),
    "layers.mlp_post_norm.scale_D": ("model.layers.*.post_feedforward_layernorm.weight", "D"),
}
_GPT2_TENSORS = {
    "embed_VD": ("transformer.wte.weight", "V D"),
    "position_TD": ("transformer.wpe.weight", "T D"),
    "layers.attention_norm.scale_D": ("transformer.h.*.ln_1.weight", "D"),
    "layers.attention_norm.bias_D": ("transformer.h.*.ln_1.bias", "D"),
    "layers.attention.wq_DNH": ("transformer.h.*.attn.c_attn.weight", "D 0NH"),
    "layers.attention.wk_DKH": ("transformer.h.*.attn.c_attn.weight", "D 1KH"),
    "layers.attention.wv_DKH": ("transformer.h.*.attn.c_attn.weight", "D 2KH"),
    "layers.attention.bq_NH": ("transformer.h.*.attn.c_attn.bias", "0NH"),
    "layers.attention.bk_KH": ("transformer.h.*.attn.c_attn.bias", "1KH"),
    "layers.attention.bv_KH": ("transformer.h.*.attn.c_attn.bias", "2KH"),
    "layers.attention.wo_NHD": ("transformer.h.*.attn.c_proj.weight", "NH D"),
    "layers.attention.bo_D": ("transformer.h.*.attn.c_proj.bias", "D"),
    "layers.mlp_norm.scale_D": ("transformer.h.*.ln_2.weight", "D"),
    "layers.mlp_norm.bias_D": ("transformer.h.*.ln_2.bias", "D"),
    "layers.mlp.w_in_DF": ("transformer.h.*.mlp.c_fc.weight", "D F"),
    "layers.mlp.b_in_F": ("transformer.h.*.mlp.c_fc.bias", "F"),
    "layers.mlp.w_out_FD": ("transformer.h.*.mlp.c_proj.weight", "F D"),
    "layers.mlp.b_out_D": ("transformer.h.*.mlp.c_proj.bias", "D"),
    "final_norm.scale_D": ("transformer.ln_f.weight", "D"),
    "final_norm.bias_D": ("transformer.ln_f.bias", "D"),
    "unembed_VD": ("lm_head.weight", "V D"),
}
_NEOX_TENSORS = {
    "embed_VD": ("gpt_neox.embed_in.weight", "V D"),
    "layers.attention_norm.scale_D": ("gpt_neox.layers.*.input_layernorm.weight", "D"),
    "layers.attention_norm.bias_D": ("gpt_neox.layers.*.input_layernorm.bias", "D"),
    "layers.attention.wq_DNH": ("gpt_neox.layers.*.attention.query_key_value.weight", "N0H D"),
    "layers.attention.wk_DKH": ("gpt_neox.layers.*.attention.query_key_value.weight", "K1H D"),
    "layers.attention.wv_DKH": ("gpt_neox.layers.*.attention.query_key_value.weight", "K2H D"),
    "layers.attention.bq_NH": ("gpt_neox.layers.*.attention.query_key_value.bias", "N0H"),
    "layers.attention.bk_KH": ("gpt_neox.layers.*.attention.query_key_value.bias", "K1H"),
    "layers.attention.bv_KH": ("gpt_neox.layers.*.attention.query_key_value.bias", "K2H"),
    "layers.attention.wo_NHD": ("gpt_neox.layers.*.attention.dense.weight", "D NH"),
    "layers.attention.bo_D": ("gpt_neox.layers.*.attention.dense.bias", "D"),
    "layers.mlp_norm.scale_D": ("gpt_neox.layers.*.post_attention_layernorm.weight", "D"),
    "layers.mlp_norm.bias_D": ("gpt_neox.layers.*.post_attention_layernorm.bias", "D"),
    "layers.mlp.w_in_DF": ("gpt_neox.layers.*.mlp.dense_h_to_4h.weight", "F D"),
    "layers.mlp.b_in_F": ("gpt_neox.layers.*.mlp.dense_h_to_4h.bias", "F"),
    "layers.mlp.w_out_FD": ("gpt_neox.layers.*.mlp.dense_4h_to_h.weight", "D F"),
    "layers.mlp.b_out_D": ("gpt_neox.layers.*.mlp.dense_4h_to_h.bias", "D"),
    "final_norm.scale_D": ("gpt_neox.final_layer_norm.weight", "D"),
    "final_norm.bias_D": ("gpt_neox.final_layer_norm.bias", "D"),
    "unembed_VD": ("embed_out.weight", "V D"),
}

_LLAMA = Format(
    family="llama",
    architecture="LlamaForCausalLM",
    defaults={**_LLAMA_DEFAULTS, "mlp_bias": False},
    keys=_LLAMA_KEYS,
    words={"hidden_act": ("mlp", GATED)},
    fixed={"attention_bias": False, "mlp_bias": False},
    base="model.",
    tensors=_LLAMA_TENSORS,
)
_GEMMA = Format(
    family="gemma2",
    architecture="Gemma2ForCausalLM",
    defaults={
        **_GEMMA_DEFAULTS,
        "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0,
        "sliding_window_pattern": 2,
    },
    keys={**_GEMMA_KEYS, "attention_cap": "attn_logit_softcapping"},
    words={"hidden_activation": ("mlp", GATED)},
    fixed={"attention_bias": False, "use_bidirectional_attention": False},
    base="model.",
    tensors=_GEMMA_TENSORS,
)
_like = dataclasses.replace

# By the "model_type" of a config.json.
FORMATS: dict[str, Format] = {
    "gpt2": Format(
        family="gpt3",
        architecture="GPT2LMHeadModel",
        defaults={
            **dict.fromkeys(("vocab_size", "n_embd", "n_layer", "n_head"), REQUIRED),
            "n_positions": 1024,
            "n_inner": None,
            "layer_norm_epsilon": 1e-5,
            "activation_function": "gelu_new",
            "tie_word_embeddings": True,
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
        },
        keys={
            "text_size": "vocab_size",
            "width": "n_embd",
            "layers": "n_layer",
            "heads": "n_head",
            "mlp_width": "n_inner",
            "max_length": "n_positions",
            "norm_eps": "layer_norm_epsilon",
            "tied": "tie_word_embeddings",
        },
        words={"activation_function": ("mlp", PLAIN)},
        fixed={
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
        },
        base="transformer.",
        tensors=_GPT2_TENSORS,
    ),
    "gpt_neox": Format(
        family="gpt_neox",
        architecture="GPTNeoXForCausalLM",
        defaults={
            **dict.fromkeys(_SIZES.values(), REQUIRED),
            "rotary_emb_base": 10_000.0,
            "rotary_pct": 0.25,
            "rope_parameters": None,
            "rope_scaling": None,
            "layer_norm_eps": 1e-5,
            "hidden_act": "gelu",
            "tie_word_embeddings": False,
            "use_parallel_residual": True,
            "attention_bias": True,
        },
        keys={
            **_SIZES,
            "norm_eps": "layer_norm_eps",
            "rope_theta": "rotary_emb_base",
            "rope_fraction": "rotary_pct",
        },
        words={
            "hidden_act": ("mlp", PLAIN),
            "use_parallel_residual": ("residual", {True: "parallel", False: "serial"}),
        },
        fixed={"attention_bias": True},
        base="gpt_neox.",
        tensors=_NEOX_TENSORS,
    ),
    "llama": _LLAMA,
    "qwen2": _like(
        _LLAMA,
        family="qwen2",
        architecture="Qwen2ForCausalLM",
        defaults={k: v for k, v in _QWEN_DEFAULTS.items() if k != "attention_bias"},
        fixed={},
    ),
    "qwen3": _like(
        _LLAMA,
        family="qwen3",
        architecture="Qwen3ForCausalLM",
        defaults={**_QWEN_DEFAULTS, "head_dim": 128},
        fixed={"attention_bias": False},
    ),
    "gemma2": _GEMMA,
    "gemma3_text": _like(
        _GEMMA,
        family="gemma3",
        architecture="Gemma3ForCausalLM",
        defaults={
            **_GEMMA_DEFAULTS,
            "rope_theta": 1e6,
            "rope_local_base_freq": 10_000.0,
            "sliding_window_pattern": 6,
        },
        keys={**_GEMMA_KEYS, "window_theta": "rope_local_base_freq"},
        fixed={**_GEMMA.fixed, "attn_logit_softcapping": None},
    ),
}

# Settings that don't change the logits.
INERT = frozenset(
    re.findall(
        r"\S+",
        """architectures model_type transformers_version torch_dtype dtype use_cache
        _name_or_path bos_token_id eos_token_id pad_token_id unk_token_id
        initializer_range attention_dropout hidden_dropout classifier_dropout
        attn_pdrop embd_pdrop resid_pdrop summary_type summary_use_proj
        summary_activation summary_proj_to_labels summary_first_dropout
        task_specific_params n_ctx reorder_and_upcast_attn pretraining_tp
        is_llama_config transformers.js_config gradient_checkpointing
        attn_implementation _attn_implementation cache_implementation is_decoder
        return_dict output_hidden_states output_attentions id2label label2id
        num_labels chunk_size_feed_forward unsloth_fixed unsloth_version
        _sliding_window_pattern""",
    )
)
# Tensors that are no parameters: masks and frequencies that old versions stored.
BUFFERS = re.compile(r".*\.(attn|attention)\.(bias|masked_bias)|.*rotary_emb\.inv_freq")


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
            f"{name}: downloading needs huggingface_hub: pip install gsm_verifier[hf]"
        ) from error
    wanted = [CONFIG, TOKENIZER, VERIFIER, "*.safetensors", "*.safetensors.index.json"]
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=wanted))
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
        raise ValueError(f"no {path.name} in {path.parent}: give a Hugging Face folder") from error
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
    if not (path.parent / VERIFIER).exists():
        return model
    model = model.with_(text_size=model.text_size - 1)
    if _read_json(path.parent / VERIFIER).get("token_id") != model.reserved_token:
        raise ValueError(f"{path.parent / VERIFIER}: token_id isn't the last of the vocabulary")
    return model


def _format(settings: Mapping[str, Any]) -> Format:
    kind = settings.get("model_type")
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
                "remove it from the file"
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
    _check_values(fields, form)
    fields["kv_heads"] = fields.get("kv_heads") or fields["heads"]
    fields["head_size"] = fields.get("head_size") or fields["width"] // fields["heads"]
    fields["mlp_width"] = fields["mlp_width"] or 4 * fields["width"]
    if scalar := settings.get("query_pre_attn_scalar"):
        fields["query_scale"] = float(scalar) ** -0.5
    for cap in ("attention_cap", "logit_cap"):
        fields[cap] = fields.get(cap) or 0.0
    fields |= _rope(settings, form)
    fields["windows"] = _windows(settings, fields["layers"])
    if fields["heads"] % fields["kv_heads"]:
        raise ValueError(f"{fields['kv_heads']} key/value heads don't divide {fields['heads']}")
    return ModelConfig(**{**FAMILIES[form.family], **fields})


def _check_values(fields: Mapping[str, Any], form: Format) -> None:
    """The file may come from anywhere: sizes are whole, switches are bool, numbers are finite."""
    kinds = {field.name: field.type for field in dataclasses.fields(ModelConfig)}
    for ours, value in fields.items():
        theirs = form.keys.get(ours, ours)
        if value is None and form.defaults.get(theirs, REQUIRED) is not REQUIRED:
            continue
        good = {
            int: type(value) is int and 0 < value < 2**31,
            bool: type(value) is bool,
            float: type(value) in (int, float) and 0 < value < math.inf,
            str: type(value) is str,
        }
        if not good[kinds[ours]]:
            raise ValueError(f"setting {theirs}={value!r} makes no sense")


def _rope(settings: Mapping[str, Any], form: Format) -> dict[str, Any]:
    """The fields of ModelConfig that `rope_parameters` and the older `rope_scaling` decide."""
    parameters = settings.get("rope_parameters") or {}
    local = parameters.get("sliding_attention") or {}
    rope = {
        **(parameters.get("full_attention") or {} if local else parameters),
        **(settings.get("rope_scaling") or {}),
    }
    kind = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
    rope.pop("type", None)
    fields: dict[str, Any] = {}
    if "rope_theta" in rope:
        fields["rope_theta"] = rope.pop("rope_theta")
    if "partial_rotary_factor" in rope:
        fields["rope_fraction"] = rope.pop("partial_rotary_factor")
    if "window_theta" in form.keys and "rope_theta" in local:
        fields["window_theta"] = local["rope_theta"]
    if kind == "linear":
        fields["rope_linear"] = float(rope.pop("factor"))
    elif kind == "llama3":
        names = ("factor", "low_freq_factor", "high_freq_factor")
        names += ("original_max_position_embeddings",)
        if missing := [n for n in names if n not in rope]:
            raise ValueError(f"the RoPE scaling lacks {missing[0]}")
        fields["rope_llama3"] = tuple(float(rope.pop(n)) for n in names)
    elif kind != "default":
        raise ValueError(f"rope_type {kind!r} isn't supported: default, linear or llama3")
    if rope or local.get("rope_type", "default") != "default":
        raise ValueError(f"RoPE setting {rope or local} isn't supported")
    return fields


def _windows(settings: Mapping[str, Any], layers: int) -> tuple[int, ...]:
    size = settings.get("sliding_window") if settings.get("use_sliding_window", True) else None
    kinds = settings.get("layer_types")
    if kinds is None and size:
        if "sliding_window_pattern" in settings:  # every so many layers, one sees all
            pattern = settings["sliding_window_pattern"]
            local = [(i + 1) % pattern != 0 for i in range(layers)]
        else:
            local = [i >= settings["max_window_layers"] for i in range(layers)]
        kinds = ["sliding_attention" if x else "full_attention" for x in local]
    kinds = kinds or []
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


def _settings(kind: str, model: ModelConfig) -> dict[str, Any]:
    """The config.json that means the model, if family `kind` has one."""
    form = FORMATS[kind]
    settings = {"model_type": kind, "architectures": [form.architecture], **form.fixed}
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
        rope: dict[str, Any] = {"rope_type": "default"}
        if model.rope_linear != 1:
            rope = {"rope_type": "linear", "factor": model.rope_linear}
        if model.rope_llama3:
            factor, low, high, length = model.rope_llama3
            rope = {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": int(length),
            }
        # Both spellings: the older is all that other readers know.
        settings["rope_scaling"] = None if rope["rope_type"] == "default" else dict(rope)
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
        settings["sliding_window"] = max(windows) or None
        if "use_sliding_window" in form.defaults:
            settings["use_sliding_window"] = any(windows)
    return settings


def _differences(kind: str, model: ModelConfig) -> list[str]:
    """Fields of the model that family `kind` can't say."""
    try:
        said = _parse(_settings(kind, model))
    except ValueError as error:
        return [str(error)]
    here = dict.fromkeys(("dtype", "scan_layers", "remat"))
    query = {"query_scale": model.query_scale or model.head_size**-0.5}
    said = dataclasses.asdict(said.with_(query_scale=said.query_scale or said.head_size**-0.5))
    own = dataclasses.asdict(model) | query
    return [f"{k}={own[k]!r}" for k in own if k not in here and own[k] != said[k]]


def _kind(model: ModelConfig) -> str:
    """The model_type a model is exported as.

    Raises:
      ValueError: no family has all of its words; names those in the way of the nearest.
    """
    found = {kind: _differences(kind, model) for kind in FORMATS}
    best = min(found, key=lambda kind: len(found[kind]))
    if found[best]:
        raise ValueError(
            f"no Hugging Face family has this model: {best} has no {', '.join(found[best])}"
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
            files = {str(f) for f in _read_json(folder / INDEX).get("weight_map", {}).values()}
            for file in files:
                if Path(file).name != file or not (folder / file).exists():
                    raise ValueError(f"{folder / INDEX} names {file}, which isn't there")
            return sorted(files)
        pickles = [p.name for pattern in PICKLES for p in sorted(folder.glob(pattern))]
        if pickles:
            raise ValueError(
                f"{folder} holds its weights only as {pickles[0]}, a pickle, which could run code: "
                "convert it with transformers: save_pretrained(folder, safe_serialization=True)"
            )
        raise ValueError(f"no {WEIGHTS} or {INDEX} in {folder}")

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


def _layers(name: str, model: ModelConfig) -> list[str]:
    """The names of a tensor's layers; itself, outside of them."""
    return [name.replace("*", str(i)) for i in range(model.layers if "*" in name else 1)]


def _check_tensors(
    folder: Path, form: Format, model: ModelConfig, source: _Tensors, rows: int, base: str
) -> None:
    """Every tensor is used, and every one that is needed is there in its shape."""
    wanted = {
        name: place.shape
        for theirs, place in _places(form, model, rows).values()
        for name in _layers(theirs.removeprefix(base), model)
    }
    for name, shape in wanted.items():
        if name not in source.shapes:
            raise ValueError(f"{folder}: tensor {name} is missing: the checkpoint isn't whole")
        if source.shapes[name] != shape:
            raise ValueError(
                f"{folder}: tensor {name} has shape {list(source.shapes[name])}, but its "
                f"{CONFIG} makes it {list(shape)}: take both from the same checkpoint"
            )
    for name in source.shapes:
        if name in wanted or BUFFERS.fullmatch(name):
            continue
        table = form.tensors["embed_VD"][0].removeprefix(base)
        if model.tied and name == form.tensors["unembed_VD"][0] and _same(source, name, table):
            continue
        raise ValueError(
            f"{folder}: tensor {name} would be left unused: its {CONFIG} and its weights aren't of "
            "the same model" + (", which isn't tied" if "unembed" in name else "")
        )


def _same(source: _Tensors, one: str, other: str) -> bool:
    """Two tables are equal; compared in pieces."""
    if source.shapes[one] != source.shapes[other]:
        return False
    pieces = [slice(i, i + 4096) for i in range(0, source.shapes[one][0], 4096)]
    return all(np.array_equal(source.read(one, [p]), source.read(other, [p])) for p in pieces)


HEAD = ("value_gain", "value_bias")


def load(folder: str | Path, mesh: Mesh, dtype: str = "float32") -> tuple[ModelConfig, Params]:
    """A folder's model, its parameters on the mesh in `dtype`.

    Tensors are read one by one, and of each only what this process's devices hold.

    Raises:
      ValueError: what isn't supported, missing, left over or of another shape, by its name.
    """
    folder = Path(folder)
    model = read_config(folder)
    form = _format(_read_json(folder / CONFIG))
    head = _read_json(folder / VERIFIER) if (folder / VERIFIER).exists() else {}
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
        parts = [functools.partial(_part, source, name, place, dtype) for name in names]
        if "*" in theirs:
            found[path] = _stacked(parts, like.shape, where[path], dtype)
        else:
            found[path] = jax.make_array_from_callback(like.shape, where[path], parts[0])
    structure = jax.tree.structure(transformer.shapes(model))
    return model, jax.tree.unflatten(structure, list(found.values()))


def _part(
    source: _Tensors, name: str, place: _Place, dtype: str, index: tuple[slice, ...]
) -> np.ndarray:
    """A part of one of our parameters; rows beyond their vocabulary are zeros."""
    sizes = {c: place.sizes[c] for c in place.letters}
    # Our vocabulary is longer than theirs: the slices are cut to what there is.
    wanted = {c: slice(s.start or 0, s.stop) for c, s in zip(place.letters, index, strict=True)}
    inside = {c: slice(*s.indices(sizes[c])[:2]) for c, s in wanted.items()}
    inside = {c: slice(min(s.start, s.stop), s.stop) for c, s in inside.items()}
    if any(s.start == s.stop for s in inside.values()):
        found = np.zeros([inside[c].stop - inside[c].start for c in place.letters], dtype)
    else:
        found = place.read(lambda ranges: source.read(name, ranges), inside).astype(dtype)
    extra = [
        (0, 0 if s.stop is None else s.stop - s.start - n)
        for s, n in zip(wanted.values(), found.shape, strict=True)
    ]
    return np.pad(found, extra) if any(after for _, after in extra) else found


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


def save(
    folder: str | Path,
    model: ModelConfig,
    params: Params,
    tokenizer: Tokenizer,
    *,
    squash: str | None = None,
    dtype: str = "float32",
) -> None:
    """Write a folder that transformers reads, with equal logits.

    Args:
      params: with stacked layers.
      squash: of a verifier, which is written with its head: "none" | "sigmoid". None: a generator.
      dtype: of the weights on disk, "float32" | "float16" | "bfloat16".

    Raises:
      ValueError: no Hugging Face family has such a model, or ids of the tokenizer have no row.
    """
    folder = Path(folder)
    kind = _kind(model)
    if tokenizer.size > model.text_size:
        raise ValueError(f"the tokenizer has {tokenizer.size} ids, the model {model.text_size}")
    if dtype not in DTYPES.values():
        raise ValueError(f"dtype={dtype!r}: use one of {', '.join(DTYPES.values())}")
    rows = model.text_size + (squash is not None)
    tensors: dict[str, np.ndarray] = {}
    leaves = by_name(params)
    for path, (theirs, place) in _places(FORMATS[kind], model, rows).items():
        ours = sharding.to_host(leaves[path]).astype(dtype)
        if "V" in place.letters:
            ours = ours[:rows]
        names = _layers(theirs, model)
        for name, layer in zip(names, ours if "*" in theirs else [ours], strict=True):
            whole = tensors.setdefault(name, np.zeros(place.shape, dtype))
            place.write(whole, layer)
    gain, bias = (float(sharding.to_host(leaves[f"params.{name}"])) for name in HEAD)
    if jax.process_index():
        return
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{WEIGHTS}.part"
    save_file(tensors, part, {"format": "pt"})
    os.replace(part, folder / WEIGHTS)
    tokenizer.save(folder / TOKENIZER)
    ids = {"bos_token_id": tokenizer.end, "eos_token_id": tokenizer.end}
    settings = _settings(kind, model) | ids | {"dtype": dtype, "torch_dtype": dtype}
    settings |= {FORMATS[kind].keys["text_size"]: rows}
    files = {
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": Backend.from_file(str(folder / TOKENIZER)).id_to_token(tokenizer.end),
            "model_max_length": model.max_length,
            "clean_up_tokenization_spaces": False,
        },
        "generation_config.json": ids,
        CONFIG: settings,
    }
    (folder / VERIFIER).unlink(missing_ok=True)
    if squash is not None:
        head = {"token_id": model.reserved_token, "gain": gain, "bias": bias, "squash": squash}
        files[VERIFIER] = head | {"reading": READING}
    for name, content in files.items():
        records.write_atomically(folder / name, (json.dumps(content, indent=1) + "\n").encode())
