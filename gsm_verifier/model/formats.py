"""How each family is written in a Hugging Face directory: tables only, read by `model.hf`."""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


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

# Export takes the first name of a word.
PLAIN = {
    "gelu_new": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "gelu_fast": "gelu",
    "gelu": "gelu_exact",
}
GATED = {"silu": "swiglu", "swish": "swiglu", "gelu_pytorch_tanh": "geglu"}

_SIZES = {
    "text_size": "vocab_size",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "mlp_width": "intermediate_size",
    "max_length": "max_position_embeddings",
    "tied": "tie_word_embeddings",
}
_LLAMA_KEYS = {
    **_SIZES,
    "rope_theta": "rope_theta",
    "kv_heads": "num_key_value_heads",
    "head_size": "head_dim",
    "norm_eps": "rms_norm_eps",
}
_ROPE = {"rope_parameters": None, "rope_scaling": None, "partial_rotary_factor": None}
_LLAMA_DEFAULTS = {
    **dict.fromkeys(_LLAMA_KEYS.values(), REQUIRED),
    **_ROPE,
    "rope_theta": 10_000.0,
    "num_key_value_heads": None,
    "head_dim": None,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "attention_bias": False,
}
_QWEN_DEFAULTS = {
    **_LLAMA_DEFAULTS,
    "num_key_value_heads": REQUIRED,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}
_GEMMA_DEFAULTS = {
    **_LLAMA_DEFAULTS,
    "num_key_value_heads": REQUIRED,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "tie_word_embeddings": True,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_act": None,  # stands in some files, and is read by nobody
    "final_logit_softcapping": None,
    "attn_logit_softcapping": None,
    "use_bidirectional_attention": False,
    "sliding_window": 4096,
    "layer_types": None,
}
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
        "sliding_window_size": None,  # in some files once more, and read by nobody
    },
    keys={**_GEMMA_KEYS, "attention_cap": "attn_logit_softcapping"},
    words={"hidden_activation": ("mlp", GATED)},
    # The pattern of its layers is written in their class, whatever the file says.
    fixed={
        "attention_bias": False,
        "use_bidirectional_attention": False,
        "sliding_window_pattern": 2,
    },
    base="model.",
    tensors=_GEMMA_TENSORS,
)
_like = dataclasses.replace

# By the "model_type" of a config.json.
_FORMATS = {
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
            **_ROPE,
            "rope_theta": None,
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
        fixed={
            "attention_bias": False,
            "use_bidirectional_attention": False,
            "attn_logit_softcapping": None,
        },
    ),
}

_CAUSAL = {"is_causal": True}  # embedding models are made of language models by its change
FORMATS: dict[str, Format] = {
    kind: _like(form, defaults={**form.defaults, **_CAUSAL}, fixed={**form.fixed, **_CAUSAL})
    for kind, form in _FORMATS.items()
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
        _sliding_window_pattern output_past n_special predict_special_tokens
        tokenizer_class _attn_implementation_autoset _num_labels max_sequence_length
        attention_probs_dropout_prob hidden_dropout_prob loss_type""",
    )
)
# Tensors that are no parameters: masks and frequencies that old versions stored.
BUFFERS = re.compile(r".*\.(attn|attention)\.(bias|masked_bias)|.*rotary_emb\.inv_freq")
